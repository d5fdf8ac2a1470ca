"""A delta cut into a LoRA adapter for the Instruct, by the singular values of its matrices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.names import factor_key, is_weight, kind_of, leaf_of, module_of
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import truncated_svd
from shadowlit.errors import GraftError
from shadowlit.grafting.disk import linear_on_disk
from shadowlit.grafting.export import export_adapter
from shadowlit.grafting.factors import Factors, joined
from shadowlit.grafting.manifest import versions
from shadowlit.pair.pair import ModelPair


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds of the delta that it was cut from.

    Attributes:
        error: ``‖adapter − delta‖ / ‖delta‖`` over the whole delta; what is left out counts as lost.
        error_of_adapted: The same over the adapted matrices alone.
        left_out: Kinds of tensors that the delta changes and an adapter can't hold, and their number.
    """

    num_layers: int
    smallest_rank: int
    largest_rank: int
    error: float
    error_of_adapted: float
    left_out: str


@torch.no_grad()
def export_svd_adapter(
    delta: Delta,
    instruct: str,
    out: Path,
    rank: int | None,
    explained_variance: float | None,
    dtype: torch.dtype = torch.bfloat16,
    advance: Callable[[], None] = lambda: None,
) -> AdapterReport:
    """Write an adapter whose update is the delta, cut matrix by matrix.

    One matrix is in memory at a time. Errors are measured on the factors as they are stored. Every layer has
    ``lora_alpha`` equal to its rank, so that the scaling is 1. Either ``rank`` is given (a smaller matrix keeps its
    own), or ``explained_variance``, the fraction of each matrix's squared norm to keep. ``instruct`` is a folder or hub
    id; ``advance`` is called after each tensor.

    Raises:
        GraftError: The delta has no matrix of a linear layer of the Instruct, or one of another shape.
        ExportError: The folder exists and is not empty, or can't be written.
    """
    from peft import LoraConfig

    pair = ModelPair(instruct, instruct)
    with CheckpointReader(pair.instruct_folder()) as reader:
        tensors = dict(reader.tensors)
    linear = linear_on_disk(tensors)
    chosen = sorted(n for n, shape in delta.shapes.items() if n in linear and is_weight(n) and len(shape) == 2)
    unequal = [f"{n} {delta.shapes[n]} and {tensors[n].shape}" for n in chosen if delta.shapes[n] != tensors[n].shape]
    if not chosen or unequal:
        found = f"differs in the shapes of {some_of(unequal)}" if unequal else f"changes {some_of(delta.shapes)} only"
        raise GraftError(f"the delta {found}; expected matrices of linear layers of {instruct}. Give its Instruct.")
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    lost, sizes = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}  # squared norms of what is adapted, and of the rest
    left_out: Counter[str] = Counter()
    for name in delta.shapes:
        adapted = name in chosen
        factors = delta.factored[name]() if adapted and name in delta.factored else None
        update = factors or delta.tensor(name)
        size = update.square if isinstance(update, Factors) else float(update.double().square().sum())
        sizes[adapted] += size
        if adapted and size:
            cut = truncated_svd(update, rank, explained_variance)
            up, down = cut.up.to(dtype), cut.down.to(dtype)
            module = module_of(name)
            ranks[module] = cut.rank
            state[factor_key(module, "A")] = down
            state[factor_key(module, "B")] = up
            stored = Factors(up.float(), down.float())
            if isinstance(update, Factors):
                lost[adapted] += joined([stored, update], [1.0, -1.0]).square
            else:
                lost[adapted] += float((stored.matrix - update).double().square().sum())
        elif size:
            left_out[kind_of(name)] += 1
            lost[adapted] += size
        advance()
    if not ranks:
        raise GraftError("the delta is zero in every linear layer; there is nothing to put into an adapter.")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: r for module, r in ranks.items() if r != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=_targets(ranks, linear), rank_pattern=dict(other), alpha_pattern=dict(other),
    )  # fmt: skip
    report = AdapterReport(
        num_layers=len(ranks),
        smallest_rank=min(ranks.values()),
        largest_rank=max(ranks.values()),
        error=math.sqrt(sum(lost.values()) / sum(sizes.values())),
        error_of_adapted=math.sqrt(lost[True] / sizes[True]),
        left_out=", ".join(f"{kind} ({count})" for kind, count in left_out.items()),
    )
    manifest = {"delta": delta.manifest, "scale": 1.0, "svd": asdict(report), "versions": versions()}
    export_adapter(out, pair, config, state, manifest)
    return report


def _targets(ranks: dict[str, int], linear: frozenset[str]) -> list[str]:
    """Names of the adapted modules: their last parts where that means the same layers, which is what servers expect."""
    leaves = set(map(leaf_of, ranks))
    same = {module for module in map(module_of, filter(is_weight, linear)) if leaf_of(module) in leaves}
    return sorted(leaves if same == set(ranks) else ranks)
