"""Transforms of the update inside a module that trains: on whole parameters, on shards, and on fused experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.headers import TensorInfo
from shadowlit.checkpoint.layout import LayoutReader, Range
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described, keeping, rows_of
from shadowlit.distributed import local_slices
from shadowlit.errors import GraftError


class GradientRows(NamedTuple):
    """Rows on which the gradient at the untouched Instruct is computed: the first ones of a source."""

    data: str
    rows: int


Signs = Callable[[GradientRows], Tensor]
"""Gives the gradient's signs of a part of a tensor by the rows: -1, 0 or 1, in the part's shape."""


class Transforms(Protocol):
    """What the live graft needs of its transforms, :class:`shadowlit.delta.transforms.Transforms`."""

    key: str  # of the list in messages

    @property
    def whole(self) -> list[str]:
        """Names of the functions that need whole tensors; the others may be applied to any part of one."""

    def __call__(self, name: str, update: Tensor, signs: Signs | None = None) -> Tensor:
        """The transformed update of the whole tensor ``name``."""

    def on_part(self, name: str, update: Tensor, noise: Callable[[int], Tensor], signs: Signs | None = None) -> Tensor:
        """Return the transformed part of a tensor's update; ``noise`` gives that part's random numbers by
        their seed, ``signs`` that part of the gradient's signs.
        """

    def noise(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return the random numbers of the whole tensor ``name``, on the CPU."""


class ParameterTransforms:
    """Applies transforms to the updates of a module's parameters, such that the graft on disk gives the same bits.

    On disk a transform sees the tensors of the Instruct's files. Where the module holds several of them in one
    parameter (experts), or under another name, each is transformed by itself under its name in the files. Sharded
    parameters stay sharded: elementwise transforms get the shard, and the random numbers that belong to it.

    ``parameters`` are the module's by the names in checkpoints; ``parts`` are the parts of parameters that make up each
    tensor of the Instruct's files that is not a parameter by itself. ``signs`` are the signs of gradients, of this
    rank's parts of parameters, by rows and name; they may be filled in later.

    Raises:
        GraftError: A transform needs whole tensors and the parameters are sharded.
    """

    def __init__(
        self,
        transforms: Transforms,
        parameters: Mapping[str, Tensor],
        instruct: TensorReader,
        parts: Mapping[str, list[Range]],
        signs: Mapping[GradientRows, Mapping[str, Tensor]],
    ) -> None:
        sharded = (p.device_mesh.size() for p in parameters.values() if isinstance(p, DTensor))
        require_elementwise(transforms, max(sharded, default=1))
        self._transforms, self._parameters, self._signs = transforms, parameters, signs
        shapes = {part.name: tuple(parameters[part.name].shape) for p in parts.values() for part in p}
        self._module = ComputedReader(instruct.folder, described(shapes))
        self._files = ComputedReader(instruct.folder, described({name: instruct.tensors[name].shape for name in parts}))

    def __call__(self, name: str, update_of: Callable[[str], Tensor]) -> Tensor:
        """This rank's part of the transformed update of a parameter; ``update_of`` gives that of a learned update."""
        parameter = self._parameters[name]
        if not self._transforms.whole:
            slices = local_slices(parameter)
            noise = lambda seed: self._noise(name, seed)[slices]  # noqa: E731
            return self._transforms.on_part(name, update_of(name), noise, lambda rows: self._signs[rows][name])
        if name not in self._module.tensors:
            return self._transforms(name, update_of(name), lambda rows: self._signs[rows][name])
        learned = laid_out(self._module.tensors, self._files, update_of)

        def transformed(stored: str) -> Tensor:
            def signs(rows: GradientRows) -> Tensor:
                return laid_out(self._module.tensors, self._files, lambda n: self._signs[rows][n].float()).read(stored)

            return self._transforms(stored, learned.read(stored), signs)

        return laid_out(self._files.tensors, self._module, transformed).read(name).to(parameter.device)

    def _noise(self, name: str, seed: int) -> Tensor:
        """The random numbers of a whole parameter: those of the files' tensors that it holds."""
        if name not in self._module.tensors:
            return self._transforms.noise(name, tuple(self._parameters[name].shape), seed)
        stored = self._files.tensors
        noise = laid_out(stored, self._module, lambda one: self._transforms.noise(one, stored[one].shape, seed))
        return noise.read(name)


def laid_out(tensors: Mapping[str, TensorInfo], like: TensorReader, tensor_of: Callable[[str], Tensor]) -> TensorReader:
    """Present tensors, computed when they are needed, under the names and in the layout of ``like``."""
    return LayoutReader(ComputedReader(like.folder, tensors, rows_of(keeping(tensor_of))), like, ties=False)


def require_elementwise(transforms: Transforms, num_ranks: int) -> None:
    """Raise a GraftError if ``num_ranks`` ranks hold shards of the parameters and a transform needs whole tensors."""
    if num_ranks > 1 and transforms.whole:
        raise GraftError(
            f"{transforms.key} has transforms of whole tensors ({', '.join(transforms.whole)}), but FSDP2 shards the "
            f"tensors over {num_ranks} ranks. Use elementwise transforms (dare), one device or DDP; or train without "
            "transforms and apply them afterwards (shadowlit graft ... --transforms)."
        )
