"""Transforms of the update inside a module that trains: on whole parameters, on shards, and on fused experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.layout import LayoutReader, Range
from shadowlit.checkpoint.reader import ComputedReader, TensorReader, described, rows_of
from shadowlit.distributed import local_slices
from shadowlit.errors import GraftError
from shadowlit.grafting.update import Transforms


class ParameterTransforms:
    """Applies transforms to the updates of a module's parameters, such that the graft on disk gives the same bits.

    There a transform sees the tensors of the Instruct's files. Where the module holds several of them in one parameter
    (experts), or under another name, each is transformed by itself under its name in the files. Parameters that are
    sharded stay so: elementwise transforms get the shard, and the random numbers that belong to it.

    Args:
        transforms: Functions of an update.
        parameters: Parameters of the module, by the names in checkpoints.
        instruct: Reader of the Instruct's checkpoint.
        parts: For each tensor of the files that is no parameter by itself, the parts of parameters that it consists of.

    Raises:
        GraftError: A transform needs whole tensors and the parameters are sharded.
    """

    def __init__(
        self,
        transforms: Transforms,
        parameters: Mapping[str, nn.Parameter],
        instruct: TensorReader,
        parts: Mapping[str, list[Range]],
    ) -> None:
        sharded = (p.device_mesh.size() for p in parameters.values() if isinstance(p, DTensor))
        require_elementwise(transforms, max(sharded, default=1))
        self._transforms, self._parameters = transforms, parameters
        shapes = {part.name: tuple(parameters[part.name].shape) for p in parts.values() for part in p}
        self._module = ComputedReader(instruct.folder, described(shapes))
        self._files = ComputedReader(instruct.folder, described({name: instruct.tensors[name].shape for name in parts}))

    def __call__(self, name: str, update_of: Callable[[str], Tensor]) -> Tensor:
        """This rank's part of the transformed update of a parameter.

        Args:
            name: Name of the parameter.
            update_of: Gives this rank's part of the update of a parameter as it was learned.
        """
        parameter = self._parameters[name]
        if not self._transforms.whole:
            slices = local_slices(parameter)
            return self._transforms.on_part(name, update_of(name), lambda seed: self._noise(name, seed)[slices])
        if name not in self._module.tensors:
            return self._transforms(name, update_of(name))
        learned = _laid_out(self._module, self._files, update_of)
        transformed = _laid_out(
            self._files, self._module, lambda stored: self._transforms(stored, learned.read(stored))
        )
        return transformed.read(name).to(parameter.device)

    def _noise(self, name: str, seed: int) -> Tensor:
        """The random numbers of a whole parameter: those of the files' tensors that it holds."""
        if name not in self._module.tensors:
            return self._transforms.noise(name, tuple(self._parameters[name].shape), seed)
        shapes = {stored: info.shape for stored, info in self._files.tensors.items()}
        noise = _laid_out(
            self._files, self._module, lambda stored: self._transforms.noise(stored, shapes[stored], seed)
        )
        return noise.read(name)


def _laid_out(given: TensorReader, like: TensorReader, tensor_of: Callable[[str], Tensor]) -> TensorReader:
    """Present float32 tensors with the names and shapes of ``given`` in the layout of ``like``."""
    computed = ComputedReader(given.folder, given.tensors, rows_of(lru_cache(maxsize=2)(tensor_of)))
    return LayoutReader(computed, like, ties=False)


def require_elementwise(transforms: Transforms, num_ranks: int) -> None:
    """Raise if ``num_ranks`` ranks hold shards of the parameters and a transform needs whole tensors.

    Raises:
        GraftError: Naming the transforms.
    """
    if num_ranks > 1 and transforms.whole:
        raise GraftError(
            f"graft.transforms has transforms of whole tensors ({', '.join(transforms.whole)}), but FSDP2 shards the "
            f"tensors over {num_ranks} ranks. Use elementwise transforms (dare), one device or DDP; or train without "
            "transforms and apply them afterwards (python -m shadowlit graft ... --transforms)."
        )
