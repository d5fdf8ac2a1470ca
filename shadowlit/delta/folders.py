"""The graft of three folders or hub ids: checked from their headers, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import LayoutReader
from shadowlit.checkpoint.names import count_layers, layer_of
from shadowlit.checkpoint.reader import TensorReader
from shadowlit.errors import GraftError, as_usage
from shadowlit.grafting.disk import DiskGraft, Scale
from shadowlit.grafting.export import DEFAULT_SHARD_BYTES, export_folder
from shadowlit.grafting.manifest import add_to_manifest, build_manifest
from shadowlit.grafting.tuned import is_run, open_update, require_no_graft
from shadowlit.grafting.update import Update
from shadowlit.pair.buffers import open_model
from shadowlit.pair.folders import model_folder
from shadowlit.pair.pair import ModelPair
from shadowlit.pair.side import Side, stated_sides
from shadowlit.pair.weights import require_one_architecture

if TYPE_CHECKING:
    from shadowlit.delta.delta import Delta

MakeManifest = Callable[[], Mapping[str, Any]]  # fingerprints take time, and are needed only if something is written


def graft(
    base: str | Path,
    tuned: str | Path,
    instruct: str | Path,
    out: str | Path,
    *,
    scale: float | str = 1.0,
    select: str | list[str] = "linear",
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    files_from: str | Path | None = None,
    allow_pickle: bool = False,
    transforms: Sequence[Mapping[str, Any]] = (),
    allow_zero: bool = False,
) -> DiskGraft:
    r"""Write the Instruct with the update that a tuned Base has learned: ``instruct + scale * (tuned - base)``.

    Shadow-FT, arXiv 2505.12716. Only a few rows of each tensor are in memory at a time. Values are computed in float32
    and rounded once. The same as ``shadowlit graft``, without output.

    Args:
        base: Folder or hub id of the Base that the tuning started from.
        tuned: Folder or hub id of the tuned Base: a whole model, or a LoRA or rsLoRA adapter in peft's form; or a run
            of ``fit``, its folder (the newest checkpoint counts) or a ``*.ckpt``.
        instruct: Folder or hub id of the Instruct that gets the update.
        out: Folder to create. It is written atomically; an existing one is never overwritten.
        scale: Scale of the update, and other scales by pattern: a number, or ``1;layers\.(0|1)\.=0.5``.
        select: Tensors that get the update: ``linear`` (every linear layer except the output head), ``all``, or regular
            expressions.
        dtype: Dtype of the result, e.g. ``bfloat16``; None for the Instruct's own.
        max_shard_bytes: Size of the largest file, in bytes.
        files_from: Folder or hub id whose config, tokenizer, template and generation settings are taken instead of the
            Instruct's.
        allow_pickle: Also read ``pytorch_model.bin`` and ``adapter_model.bin`` in local folders, as tensors alone:
            nothing in them is run.
        transforms: Transforms of the update, applied in this order before it is scaled, e.g.
            ``[{"name": "dare", "density": 0.2}]``; a few copies of one whole tensor are then in memory.
        allow_zero: Whether an update that is zero, so that the result is the Instruct unchanged, is no error.

    Returns:
        The finished graft, whose ``coverage`` says which tensors got the update, and whose ``survival`` is the
        fraction of the update that survives rounding to the result's dtype.

    Raises:
        GraftError: The models don't fit together, the selection or a scale matches no tensor, a transform is wrong, or
            the update is zero.
        CheckpointError: A checkpoint is missing or broken.
        ExportError: ``out`` exists or can't be written.

    Example::

        done = shadowlit.graft("Qwen/Qwen3-0.6B-Base", "runs/my-tuned-base", "Qwen/Qwen3-0.6B", "grafted")
        print(f"{done.survival:.1%} of the update survives")
    """
    with plan_graft(
        base, tuned, instruct, scale=scale, select=select, dtype=dtype, allow_pickle=allow_pickle,
        transforms=transforms, allow_zero=allow_zero,
    ) as plan:  # fmt: skip
        write_graft(*plan, out, max_shard_bytes=max_shard_bytes, files_from=files_from)
    return plan[0]


@contextmanager
def plan_graft(
    base: str | Path,
    tuned: str | Path,
    instruct: str | Path,
    *,
    scale: float | str = 1.0,
    select: str | list[str] = "linear",
    dtype: str | None = None,
    allow_pickle: bool = False,
    transforms: Sequence[Mapping[str, Any]] = (),
    key: str = "transforms",
    allow_zero: bool = False,
) -> Iterator[tuple[DiskGraft, MakeManifest]]:
    """Open three models and check from their headers that they can be grafted; see :func:`graft`.

    ``key`` is the name of ``transforms`` in messages.
    """
    chosen = None
    if transforms:
        from shadowlit.delta.delta import Delta  # late: torch, with which they compute, takes seconds
        from shadowlit.delta.transforms import Transforms

        with as_usage():
            chosen = Transforms(transforms, key)
    with (
        open_model(model_folder("base", str(base)), allow_pickle) as base_reader,
        open_model(model_folder("instruct", str(instruct)), allow_pickle) as instruct_reader,
    ):
        require_one_architecture(*stated_sides(("base", base_reader.folder), ("instruct", instruct_reader.folder)))
        in_place = base_of(instruct_reader.learned(), base_reader.learned())
        update: Update
        if is_run(Path(tuned)):
            from shadowlit.delta.checkpoints import latest, update_of  # late, as above

            stage = latest(tuned)
            tuned = stage.folder
            if stage.fingerprints.get("base", base_reader.fingerprint()) != base_reader.fingerprint():
                raise GraftError(
                    f"{tuned} was not trained from {base_reader.folder}: the fingerprints differ. Give the Base that "
                    "the config.yaml of its run names."
                )
            update = update_of(stage, ModelPair(str(base_reader.folder), str(instruct_reader.folder)))
        else:
            folder = model_folder("tuned", str(tuned))
            require_one_architecture(*stated_sides(("base", base_reader.folder), ("tuned model", folder)))
            require_no_graft(folder, base_reader, instruct_reader)
            update = open_update(in_place, folder, allow_pickle, strict=False)
        scales = Scale.parse(str(scale))
        if chosen:
            update = Delta.from_update(update).map(chosen)
        plan = DiskGraft(update, instruct_reader, scales, select, dtype, allow_zero)
        yield plan, lambda: build_manifest(
            ModelPair(str(base), str(instruct)), scale=scales.default, select=select, dtype=dtype,
            coverage=plan.coverage,
            config={"tuned": str(tuned), "scale": str(scale), **({"scales": scales.by_name} if scales.by_name else {})},
            transforms=chosen.specs if chosen else (),
            fingerprints={"base": base_reader.fingerprint(), "instruct": instruct_reader.fingerprint()},
        )  # fmt: skip


def write_graft(
    graft: DiskGraft,
    manifest: MakeManifest,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    files_from: str | Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a planned graft to the folder ``out``; ``advance`` is called with the bytes of every part."""
    export_folder(
        Path(out),
        graft.instruct.folder,
        graft.tensors(advance),
        dtype=graft.dtype,
        max_shard_bytes=max_shard_bytes,
        manifest=manifest(),
        files_from=None if files_from is None else model_folder("files_from", str(files_from)),
        stored=graft.instruct.tensors,
    )
    left_out = {"left_out": graft.shares} if graft.shares else {}
    by_component = {"survival_by_component": parts} if (parts := graft.survival_by_component) else {}
    add_to_manifest(Path(out), {"survival": {"survival": graft.survival, **by_component, **left_out}})


def base_of(instruct: TensorReader, base: TensorReader) -> TensorReader:
    """Return the Base under the names and in the layout of its Instruct.

    Either may have tensors that the other lacks, such as a vision tower. If both have some in their layers, those are
    probably the same tensors under names that are unknown here, and no update would reach them.

    Raises:
        CheckpointError: One of them holds more than plain weights, or one tensor twice.
        GraftError: They have different architectures, or numbers of layers.
    """
    presented = LayoutReader(base, instruct)
    require_equal_layers(count_layers(base.tensors), instruct, f"the Base {base.folder}")
    ours, theirs = _only_in(presented, instruct), _only_in(instruct, presented)
    if ours and theirs:
        raise GraftError(
            f"{base.folder} has {some_of(ours)}, {instruct.folder} has {some_of(theirs)} instead. Expected one "
            "architecture, and names or layouts that are known here; load the one with the transformers version that "
            "saved the other, and save it again."
        )
    return presented


def require_equal_layers(counts: Mapping[str, int], instruct: TensorReader, of: str) -> None:
    """Raise a GraftError unless what has these counts of layers, ``of``, has as many as the Instruct of every kind."""
    theirs = count_layers(instruct.tensors)
    if unequal := [f"{kind}: {n} and {theirs[kind]}" for kind, n in counts.items() if theirs.get(kind, n) != n]:
        raise GraftError(
            f"{of} and the Instruct {instruct.folder} have different numbers of layers ({some_of(unequal)}), so that "
            "a part of the update would have no place. Give models of one size and family."
        )


def require_same_model(delta: Delta, instruct: TensorReader) -> None:
    """Raise unless a delta can be one of the Instruct's architecture, as far as its manifest tells.

    Raises:
        PairError: It was made of models of another type.
        GraftError: It has layers that the Instruct lacks, or was made of models with another number of them.
    """
    stored = (delta.manifest.get("model_type") or "").removesuffix("_text")
    types = stored, stated_sides(("instruct", instruct.folder))[0].get("model_type")
    if all(types):
        sides = Side("delta"), Side("instruct", instruct.folder)
        for side, model_type in zip(sides, types, strict=True):
            side.config = {"model_type": model_type}
        require_one_architecture(*sides)
    theirs = count_layers(instruct.tensors)
    more = {kind: n for kind, n in count_layers(delta.shapes).items() if n > theirs.get(kind, n)}
    require_equal_layers(delta.manifest.get("layers") or more, instruct, "the delta")


def _only_in(reader: TensorReader, other: TensorReader) -> list[str]:
    """Names of the tensors of ``reader``'s layers that ``other`` lacks."""
    return [name for name in reader.tensors if name not in other.tensors and layer_of(name) is not None]
