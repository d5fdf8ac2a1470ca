"""Pairs a module's parameters with the tensors of two checkpoints, by their names, and chooses what is grafted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.layout import LayoutReader, Range
from shadowlit.checkpoint.names import canonical_name, split_selection
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described
from shadowlit.distributed import local
from shadowlit.errors import GraftError
from shadowlit.grafting.adapter import AdaptedLayer
from shadowlit.grafting.parameters import host_parameters
from shadowlit.grafting.quantised import FourBitLinear
from shadowlit.grafting.selection import resolve
from shadowlit.grafting.swap import Swap


@dataclass
class HostParameter:
    """A parameter of the host model and its frozen shards; all of one local shape."""

    name: str
    parameter: Tensor
    instruct: Tensor
    base: Tensor | None  # None where the parameter is frozen at the Base's own value
    selected: bool
    swap: Swap | None  # where `base` is None
    saved: Tensor | None = None  # the tuned values while others are loaded
    adapted: AdaptedLayer | None = None
    quantised: FourBitLinear | None = None  # the layer, where `parameter` stands for its weight in 4 bits
    exchange: Swap | None = None  # of a frozen weight under an adapter with the Instruct's, where no graft is written
    instruct_square: Tensor | None = None  # sum of squares of `instruct`, once it was computed

    @property
    def trained(self) -> bool:
        """Whether it is trained itself, or has a trained adapter."""
        return self.base is not None or self.adapted is not None

    def tuned(self) -> Tensor:
        """Return the trained values, whichever are loaded."""
        return local(self.parameter) if self.saved is None else self.saved


def parts_of(shapes: Mapping[str, tuple[int, ...]], instruct: TensorReader) -> dict[str, list[Range]]:
    """Return the parts of parameters that make up each tensor of the Instruct's files that is not a parameter
    by itself.
    """
    layout = LayoutReader(ComputedReader(instruct.folder, described(shapes)), instruct, ties=False)
    return {name: layout.ranges[name] for name in instruct.tensors if name in layout.ranges and name not in shapes}


def select_parameters(
    select: str | list[str], names: list[str], parts: dict[str, list[Range]], linear: frozenset[str], model_type: str
) -> frozenset[str]:
    """Return the parameters that a selection chooses; a pattern means what it means for the files."""
    if select in ("linear", "all") or not parts:
        return resolve(select, names, linear, model_type)
    towers, patterns = split_selection(select)
    apart = {part.name for ranges in parts.values() for part in ranges}
    in_files = [*(name for name in names if name not in apart), *parts]
    by_file: set[str] = set()
    by_parameter: set[str] = set()
    for pattern in patterns or ["all"]:
        within = [*towers, pattern]
        try:
            if pattern in ("linear", "all"):
                by_parameter |= resolve(within, names, linear, model_type)
            else:
                by_file |= resolve(within, in_files, linear, model_type)
        except GraftError:
            by_parameter |= resolve(within, names, linear, model_type)
    touched = {part.name for name, ranges in parts.items() if name in by_file for part in ranges}
    missed = {part.name for name, ranges in parts.items() if name not in by_file for part in ranges}
    if torn := sorted((touched & missed) - by_parameter):
        raise GraftError(
            f"graft.select={select!r} chooses some of the matrices that the module holds in {some_of(torn)}, and not "
            "others. Expected all of them or none: in memory they are one tensor, which gets the update as a whole. "
            "Choose all ('experts'), or graft on disk, where each is chosen by itself (shadowlit graft)."
        )
    return frozenset(by_file & set(names) | touched | by_parameter)


def require_pairing(parameters: dict[str, Tensor], base: TensorReader, instruct: TensorReader) -> None:
    """Raise a GraftError unless both checkpoints hold every parameter, in its shape."""
    problems = []
    for title, reader in (("Base", base), ("Instruct", instruct)):
        missing = [name for name in parameters if name not in reader.tensors]
        if missing:
            problems.append(f"the {title}'s checkpoint {reader.folder} has no tensor {', '.join(missing[:5])}")
        problems += [
            f"{name} has the shape {reader.tensors[name].shape} in the {title}'s checkpoint and "
            f"{tuple(parameter.shape)} in the module"
            for name, parameter in parameters.items()
            if name in reader.tensors and reader.tensors[name].shape != tuple(parameter.shape)
        ][:5]
    if problems:
        raise GraftError(
            "the trained module and the pair can't be paired by name: " + "; ".join(problems) + ". Every parameter "
            "needs its tensor in both checkpoints. Check pair.base and pair.instruct."
        )


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return the checkpoint names of shared storage, mapped to the name under which the parameter is listed first."""
    parameters = host_parameters(model)
    first = {id(parameter): name for name, parameter in parameters.items()}
    return {name: name for name in parameters} | {
        canonical_name(name): first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in first
    }
