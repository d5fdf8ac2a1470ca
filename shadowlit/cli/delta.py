"""``shadowlit delta``: the update as an artefact; the docstrings are the help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from shadowlit.checkpoint.names import kind_of
from shadowlit.cli.graft import parse_bytes, write
from shadowlit.delta.delta import Delta, overlap, ties_sum, weighted_sum
from shadowlit.delta.folders import is_run, require_same_model
from shadowlit.delta.lora import export_svd_adapter
from shadowlit.delta.transforms import Transforms
from shadowlit.errors import GraftError, as_usage, counted
from shadowlit.grafting.disk import DiskGraft, Scale, describe_shares, shares_of
from shadowlit.grafting.manifest import describe_source, versions
from shadowlit.grafting.update import zero_update
from shadowlit.pair.buffers import open_model
from shadowlit.pair.folders import model_folder
from shadowlit.progress import make_console, make_table, progress_bar

DType = Literal["bfloat16", "float32", "float16"]


def make(
    base: str,
    tuned: str,
    out: str,
    select: str | list[str] = "all",
    dtype: DType = "bfloat16",
    shard_size: str = "5GB",
    allow_zero: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Store the update tuned - base as a delta.

    Base and tuned may be any two models of one architecture: with --tuned INSTRUCT it is the offset of a pair, which
    Chat Vector (arXiv 2310.04799), RE-Adapt (arXiv 2405.15007) and ParamΔ (arXiv 2504.21023) move.

    Args:
        base: Folder or hub id of the model that the tuning started from.
        tuned: Folder or hub id of the tuned one: a whole model, or a LoRA or rsLoRA adapter in peft's format.
        out: Folder to create. It is written atomically.
        select: all, linear (every linear layer except the output head), or regular expressions for tensor names.
        dtype: Dtype that the delta is stored in; bfloat16 loses about 0.2 % of its norm.
        shard_size: Size of the largest file, e.g. 5GB or 500MB.
        allow_zero: Whether an update of zero is allowed.
        allow_pickle: Also read pytorch_model.bin and adapter_model.bin in local folders, as tensors alone: nothing in
            them is run.
    """
    if is_run(Path(tuned)):
        raise GraftError(
            f"{tuned} is a run of fit or one of its checkpoints; expected a model's folder or an adapter. 'python -m "
            "shadowlit graft BASE RUN INSTRUCT OUT' takes it as it is; for a delta, call open_stage(latest(RUN), "
            "select='all').save(Path(OUT)), both of shadowlit.delta.checkpoints, in Python."
        )
    found = Delta.make(base, tuned, select, allow_pickle)
    if not allow_zero and not any(map(found.changes, found.shapes)):
        raise zero_update(counted(len(found.shapes), "tensor"))
    _save(found, out, dtype, shard_size, found.manifest)
    for name, why in found.without.items():
        make_console().print(f"delta: left out for want of an update: {name} ({why})")
    if found.left_out is not None and (shares := shares_of(found.left_out.squares(), found.norm() ** 2)):
        make_console().print(f"delta: left out of the update's norm: {describe_shares(shares)}")


def show(deltas: list[str], effective_rank: bool = False) -> None:
    """Show norm, size and sparsity of deltas by kind of tensor, and where several of them conflict.

    Args:
        deltas: Folders of deltas.
        effective_rank: Also compute the mean effective rank of the matrices. Takes time, and memory for one matrix.
    """
    console = make_console()
    opened = [Delta.open(folder) for folder in deltas]
    for folder, found in zip(deltas, opened, strict=True):
        console.print(_table(folder, found, effective_rank))
    if len(opened) > 1:
        console.print(_conflicts(deltas, opened))


def sum_(
    deltas: list[str],
    out: str,
    weights: list[float] | None = None,
    method: Literal["add", "ties"] = "add",
    density: float = 0.2,
    dtype: DType = "bfloat16",
    shard_size: str = "5GB",
) -> None:
    """Combine deltas of one Base, with a table of their conflicts: Σ weight * delta, or TIES.

    A difference is a sum with --weights '[1,-1]' (task arithmetic, arXiv 2212.04089). TIES (arXiv 2306.01708) trims
    each, elects a sign per element and takes the mean of those that agree; it holds one tensor of each in memory.

    Args:
        deltas: Folders of deltas.
        out: Folder to create. It is written atomically.
        weights: Weight of each delta; 1 by default.
        method: add, or ties.
        density: Fraction of each delta's elements that is kept (ties).
        dtype: Dtype that the result is stored in.
        shard_size: Size of the largest file, e.g. 5GB or 500MB.
    """
    opened = [Delta.open(folder) for folder in deltas]
    given = [1.0] * len(opened) if weights is None else weights
    found = weighted_sum(opened, given) if method == "add" else ties_sum(opened, density, given)
    if len(opened) > 1:
        make_console().print(_conflicts(deltas, opened))
    step: dict[str, Any] = {"method": method, "weights": given, "of": [one.manifest for one in opened]}
    if method == "ties":
        step["density"] = density
    manifest = {"base": opened[0].manifest.get("base"), **found.manifest, "history": [step], "versions": versions()}
    _save(found, out, dtype, shard_size, manifest)


def compress(
    delta: str,
    out: str,
    method: str,
    density: float | None = None,
    rank: int | None = None,
    explained_variance: float | None = None,
    seed: int | None = None,
    parameters: dict[str, Any] = {},  # noqa: B006 - read only, and shown by --help
    dtype: DType = "bfloat16",
    shard_size: str = "5GB",
) -> None:
    """Transform a delta, e.g. make it sparser or of lower rank, and report what it lost.

    magnitude keeps the largest elements of each tensor (arXiv 1506.02626), and so does ties for a single delta (arXiv
    2306.01708); dare drops elements at random and rescales the rest (arXiv 2311.03099); svd cuts every matrix by rank
    or by explained variance (LoRE-Adapt, arXiv 2405.15007) and leaves other tensors as they are. Any function of a
    tensor can be given by its import path, mypackage.transforms.sign_only. One tensor is in memory at a time. The
    result is stored dense.

    Args:
        delta: Folder of a delta.
        out: Folder to create. It is written atomically.
        method: Transform: magnitude, dare, svd, ties, an entry point in the group shadowlit.transforms, or the import
            path of a function.
        density: Fraction of the elements to keep, in (0, 1] (magnitude, dare, ties).
        rank: Number of singular values to keep (svd).
        explained_variance: Instead of rank: the fewest that hold this fraction of the squared norm, in (0, 1] (svd).
        seed: Seed of the mask, 0 by default (dare).
        parameters: Parameters of other transforms, e.g. '{"size": 1e-4}'.
        dtype: Dtype that the result is stored in.
        shard_size: Size of the largest file, e.g. 5GB or 500MB.
    """
    options = {"density": density, "rank": rank, "explained_variance": explained_variance, "seed": seed}
    given = {"name": method, **{name: value for name, value in options.items() if value is not None}}
    keys = {"name": "--method"} | {name: f"--{name}" for name in options.keys() - parameters.keys()}
    with as_usage():
        if twice := [name for name in parameters if name in given]:
            raise GraftError(f"--parameters has {twice[0]!r}, which is given as an option as well. Give it once.")
        chosen = Transforms([{**parameters, **given}], option=lambda name: keys.get(name, f"--parameters.{name}"))
    opened = Delta.open(delta)
    squares: dict[str, tuple[float, float]] = {}

    def one(name: str, tensor: Tensor) -> Tensor:
        small = chosen(name, tensor)
        squares[name] = (float((small - tensor).double().square().sum()), float(tensor.double().square().sum()))
        return small

    step = {"method": method, **options, "seed": seed or 0, **parameters}
    manifest = {**opened.manifest, "history": [*opened.manifest.get("history", []), step], "versions": versions()}
    _save(opened.map(one), out, dtype, shard_size, manifest)
    lost, size = (sum(values) for values in zip(*squares.values(), strict=True))
    make_console().print(f"delta: {method} changes it by {math.sqrt(lost / size) if size else 0:.1%} of its norm")


def lora(
    delta: str,
    instruct: str,
    out: str,
    rank: int | None = None,
    explained_variance: float | None = None,
    dtype: DType = "bfloat16",
) -> None:
    """Cut a delta into a LoRA adapter that peft and vLLM load on the Instruct, and report what it lost.

    The linear layers' matrices are cut by singular values; what an adapter can't hold (norms, biases, embeddings, head)
    is left out and counted as lost.

    Args:
        delta: Folder of a delta.
        instruct: Folder or hub id of the Instruct that the adapter is for.
        out: Folder to create. It is written atomically.
        rank: Rank of every layer.
        explained_variance: Instead of rank: the smallest rank, layer by layer, that holds this fraction of the squared
            norm.
        dtype: Dtype of the factors.
    """
    opened = Delta.open(delta)
    with progress_bar("decomposing", len(opened.shapes)) as advance:
        report = export_svd_adapter(
            opened, instruct, Path(out), rank, explained_variance, getattr(torch, dtype), lambda: advance(1)
        )
    console = make_console()
    console.print(
        f"delta: {out} has {counted(report.num_layers, 'layer')}, rank {report.smallest_rank} to {report.largest_rank}"
    )
    console.print(
        f"delta: the adapter differs from the delta by {report.error:.1%} of its norm "
        f"({report.error_of_adapted:.1%} in the layers that it adapts; left out: {report.left_out or 'nothing'})"
    )


def apply(
    delta: str,
    instruct: str,
    out: str,
    scale: str = "1",
    select: str | list[str] = "linear",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    shard_size: str = "5GB",
    dry_run: bool = False,
    files_from: str | None = None,
    allow_zero: bool = False,
) -> None:
    r"""Add a delta to an Instruct, or to its next version: instruct + scale * delta, rounded once.

    Args:
        delta: Folder of a delta.
        instruct: Folder or hub id of the model that gets the delta; it must have the delta's architecture.
        out: Folder to create. It is written atomically.
        scale: Scale of the delta, and other scales by pattern: a number, or '1;layers\.(0|1)\.=0.5'; or a scales.json
            whose scales were fitted to it.
        select: Tensors of the delta that are added: linear (every linear layer except the output head), all, or regular
            expressions. Tensors that the delta doesn't hold stay as they are.
        dtype: Dtype of the result; auto for the Instruct's own.
        shard_size: Size of the largest file, e.g. 5GB or 500MB.
        dry_run: Only report what would be changed and how large the result is.
        files_from: Folder or hub id whose config, tokenizer, template and generation settings are taken instead of the
            Instruct's.
        allow_zero: Whether an update of zero is allowed, which leaves the Instruct unchanged.
    """
    opened, scales = Delta.open(delta), Scale.parse(scale)
    folder = model_folder("instruct", instruct, None, False)
    wanted = None if dtype == "auto" else dtype
    with open_model(folder) as reader:
        require_same_model(opened, reader)
        plan = DiskGraft(opened, reader, scales, select, wanted, allow_zero=allow_zero)
        manifest = {
            "base": opened.manifest.get("base"),
            "instruct": describe_source(instruct, folder, reader.fingerprint()),
            "delta": opened.manifest,
            "scale": scales.default,
            "select": select,
            "dtype": wanted,
            "coverage": plan.coverage,
            "config": {"scale": scale, "delta": delta, **({"scales": scales.by_name} if scales.by_name else {})},
            "versions": versions(),
        }
        write(plan, lambda: manifest, out, parse_bytes(shard_size), files_from, dry_run)


COMMANDS = {"make": make, "show": show, "sum": sum_, "compress": compress, "lora": lora, "apply": apply}


def _save(found: Delta, out: str, dtype: DType, shard_size: str, manifest: Mapping[str, Any]) -> None:
    max_bytes = parse_bytes(shard_size)
    with progress_bar("writing", found.num_elements) as advance:
        lost = found.save(Path(out), getattr(torch, dtype), manifest, max_bytes, advance)
    console = make_console()
    factored = sum(found.is_stored_as_factors(name, getattr(torch, dtype)) for name in found.shapes)
    told = f", {factored} of them as factors in float32" if factored else ""
    console.print(
        f"delta: {out} has {counted(len(found.shapes), 'tensor')}, {found.num_elements:,} elements in {dtype}{told}"
    )
    console.print(f"delta: storing it changes it by {lost:.2%} of its norm")


def _table(title: str, found: Delta, effective_rank: bool) -> Table:
    """Norm, root mean square, peak and zeros by kind of tensor."""
    statistics = found.statistics()
    norm = math.sqrt(sum(t.square for t in statistics))
    zeros = sum(t.num_zeros for t in statistics) / max(1, found.num_elements)
    more = ["effective rank"] if effective_rank else []
    title = f"{title}: norm {norm:.4g}, {zeros:.1%} zeros"
    table = make_table("kind", "tensors", "norm", "rms", "max", "zeros", *more, title=title)
    groups: dict[str, list[Any]] = {}
    for tensor in statistics:
        groups.setdefault(kind_of(tensor.name), []).append(tensor)
    for kind, tensors in groups.items():
        square = sum(t.square for t in tensors)
        size = max(1, sum(math.prod(t.shape) for t in tensors))
        row = [
            kind, str(len(tensors)), f"{math.sqrt(square):.4g}", f"{math.sqrt(square / size):.2e}",
            f"{max(t.peak for t in tensors):.2e}", f"{sum(t.num_zeros for t in tensors) / size:.1%}",
        ]  # fmt: skip
        if effective_rank:
            ranks = [found.effective_rank(t.name) for t in tensors if len(t.shape) == 2]
            row.append(f"{sum(ranks) / len(ranks):.1f}" if ranks else "–")
        table.add_row(*row)
    return table


def _conflicts(names: Sequence[str], deltas: Sequence[Delta]) -> Table:
    """Every pair of deltas: do they point the same way, and do their elements have the same signs."""
    table = make_table("delta", "and", "cosine", "equal signs", "elements in both", left=2, title="conflicts")
    for (name_a, a), (name_b, b) in combinations(zip(names, deltas, strict=True), 2):
        met = overlap(a, b)
        table.add_row(name_a, name_b, f"{met.cosine:+.3f}", f"{met.sign_agreement:.1%}", f"{met.shared:.1%}")
    return table
