"""Transforms of the update inside a module that trains: on whole parameters, on shards, and on fused experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.layout import Described, Layout, Range, assemble
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
        instruct: CheckpointReader,
        parts: Mapping[str, list[Range]],
    ) -> None:
        sharded = (p.device_mesh.size() for p in parameters.values() if isinstance(p, DTensor))
        require_elementwise(transforms, max(sharded, default=1))
        self._transforms, self._parameters, self._parts = transforms, parameters, parts
        self._shapes = {name: instruct.tensors[name].shape for name in parts}
        in_files = Described.of(instruct.folder, self._shapes)
        in_module = Described.of(
            instruct.folder, {part.name: tuple(parameters[part.name].shape) for p in parts.values() for part in p}
        )
        self._in_files = Layout(in_files, in_module).ranges

    def __call__(self, name: str, update_of: Callable[[str], Tensor]) -> Tensor:
        """This rank's part of the transformed update of a parameter.

        Args:
            name: Name of the parameter.
            update_of: Gives this rank's part of the update of a parameter as it was learned.
        """
        parameter = self._parameters[name]
        if not self._transforms.whole:
            slices = local_slices(parameter)
            return self._transforms.on_part(update_of(name), lambda seed: self._noise(name, seed)[slices])
        if name not in self._in_files:
            return self._transforms(name, update_of(name))
        learned = lru_cache(maxsize=2)(update_of)
        return assemble(
            self._in_files[name],
            tuple(parameter.shape),
            lambda stored: self._transforms(stored, assemble(self._parts[stored], self._shapes[stored], learned)),
        )

    def _noise(self, name: str, seed: int) -> Tensor:
        """The random numbers of a whole parameter: those of the files' tensors that it holds."""
        shape = tuple(self._parameters[name].shape)
        if name not in self._in_files:
            return self._transforms.noise(name, shape, seed)
        return assemble(
            self._in_files[name], shape, lambda stored: self._transforms.noise(stored, self._shapes[stored], seed)
        )


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
