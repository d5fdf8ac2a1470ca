"""How Lightning writes and reads the checkpoints of a ShadowModule, on one process, under DDP and under FSDP2.

Every kind of checkpoint can be read under every strategy: tensors are found by the names of their parameters, and each
rank takes its part of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.saved import (
    REST,
    checksums,
    explained,
    find_whole,
    is_checkpoint,
    read_rest,
    require_finite,
    write_file,
    write_manifest,
)
from shadowlit.checkpoint.sharded import INDEX, read_nested
from shadowlit.distributed import local, of_all_ranks, on_all_ranks, place, reshard_all, whole
from shadowlit.errors import CheckpointError
from shadowlit.files import partial_path, put_in_place, remove, sync
from shadowlit.training.background import Background
from shadowlit.training.optimizer import by_name, keep_names


def take_over(trainer: Trainer) -> None:
    """Let the trainer's strategy write checkpoints atomically, verify them, and read those of other strategies.

    Called before anything is restored. A plugin or a subclass of a strategy that the user has chosen is kept.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) in (TorchCheckpointIO, Checkpoints):
        strategy.checkpoint_io = Checkpoints(trainer)
    own: dict[type[Strategy], type[Strategy]] = {
        ModelParallelStrategy: ShardedStrategy,
        DDPStrategy: ReplicatedStrategy,
    }
    if type(strategy) in own:  # the same object with other methods: Lightning offers no hook for them
        strategy.__class__ = own[type(strategy)]


def name_states(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Let the states of a module's optimizers name their parameters."""
    reshard_all(module)
    for optimizer in optimizers:
        keep_names(optimizer, module.named_parameters())


class Checkpoints(TorchCheckpointIO):
    """Checkpoints as one file, written atomically; reads sharded ones too, as whole tensors.

    Addresses (``s3://``) are written to and removed as Lightning does it.

    Attributes:
        background: What writes checkpoints while training continues; None if it waits for them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.background: Background | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, which holds the complete earlier one until then.

        Raises:
            CheckpointError: It can't be written.
        """
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        if "global_step" not in checkpoint:  # bare weights, which a launcher passes between processes
            return write_file(Path(path), checkpoint)
        content = {**checkpoint, "world_size": self._trainer.world_size}
        if self.background is None:
            return write_file(Path(path), content)
        self.background.begin(checkpoint["global_step"])  # no wait where the strategy has called it
        copied = self.background.copied(content)
        return self.background.submit(Path(path), lambda: write_file(Path(path), copied), exists=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Verify a checkpoint and read it, without running code from it.

        Raises:
            CheckpointError: It is damaged or none.
        """
        path = find_for(self._trainer, path, weights_only)
        if not path.is_dir():
            return dict(torch.load(path, map_location=map_location, weights_only=True))
        return _read_folder(self._trainer, path, {}, alone=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; a folder loses its name before its files.

        What is not a checkpoint below a folder of the trainer's callbacks stays, with a warning: its path may come from
        a checkpoint that was loaded.
        """
        folders = [getattr(each, "dirpath", None) for each in self._trainer.checkpoint_callbacks]
        if not any(is_below(path, folder) for folder in folders) or not is_checkpoint(path):
            rank_zero_warn(f"{path} is not removed: it is not a checkpoint in a folder of this run's callbacks.")
            return None
        if "://" in str(path):
            return super().remove_checkpoint(path)
        if self.background is not None and self.background.step is not None:
            return self.background.submit(Path(path), lambda: remove(Path(path)), exists=False)
        return remove(Path(path))

    def teardown(self) -> None:
        """Wait for what is being written, and warn of an error that another one hides."""
        if self.background is not None:
            self.background.close()
            if self._trainer.interrupted and self.background.step is not None and self.background.problem is not None:
                rank_zero_warn(str(self.background.problem))
            self.background = None


def is_below(path: Any, folder: Any) -> bool:
    """Return whether a path, or an address, is below a folder when ``..`` and links are resolved."""
    path, folder = str(path), str(folder or "")
    if not folder or "://" in path or "://" in folder:
        return bool(folder) and path.startswith(f"{folder.rstrip('/')}/") and ".." not in path.split("/")
    return Path(folder).resolve() in Path(path).resolve().parents


def wait_for(trainer: Trainer) -> None:
    """Wait until the checkpoints of a trainer are written; a collective.

    Raises:
        CheckpointError: One can't be written.
    """
    if background := _background(trainer.strategy):
        background.wait()


def _background(strategy: Strategy, step: int | None = None) -> Background | None:
    """What writes checkpoints while training continues, ready for one of ``step``; with a step, a collective."""
    background: Background | None = getattr(strategy.checkpoint_io, "background", None)
    if background is not None and step is not None:
        background.begin(step)
    return background


class ReplicatedStrategy(DDPStrategy):
    """DDP whose ranks end with the same error if rank 0 can't write a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write on rank 0.

        Raises:
            CheckpointError: It can't be written; on every rank.
        """
        _background(self, checkpoint.get("global_step"))
        save = partial(Strategy.save_checkpoint, self, checkpoint, filepath, storage_options)
        on_all_ranks(explained(Path(filepath))(save))


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are written atomically, and restored before the optimizer and the loaders are made.

    Lightning restores this strategy's checkpoints after its setup, when the training loader exists already and the
    position in the data has no reader. The module of a ``ShadowModule`` is sharded by ``configure_model``, so that
    nothing has to be waited for.
    """

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False, as for other strategies."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True, as for other strategies."""
        return True

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Make the optimizers, whose states name their parameters."""
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        name_states(self.optimizers, self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder of shards with a manifest, or one file where the strategy doesn't save distributed.

        Raises:
            CheckpointError: A rank can't write its part; on every rank.
        """
        if storage_options is not None:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        path = Path(self.broadcast(filepath))
        background = _background(self, checkpoint.get("global_step"))
        if not self._save_distributed_checkpoint:
            on_all_ranks(explained(path)(lambda: Strategy.save_checkpoint(self, checkpoint, path)))
            return None
        beside = Path(self.broadcast(str(partial_path(path))))
        if background is None:
            return self._save_shards(checkpoint, path, beside)
        write = partial(self._save_shards, background.copied(checkpoint), path, beside, background.group)
        return background.submit(path, write, exists=True)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state: by the names of parameters, sharded; or whole, on rank 0, as other strategies
        have it.

        A collective.
        """
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()  # Lightning wraps it
        if self._save_distributed_checkpoint:
            return by_name(state)
        gathered = {
            key: {name: _gathered(value, self.root_device) for name, value in values.items()}
            for key, values in state["state"].items()
        }
        return {**state, "state": gathered} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Verify a checkpoint and read this rank's part of it, without running code from it; a collective.

        The weights of a folder are read into the parameters; a file is mapped.

        Raises:
            CheckpointError: It is damaged or none.
        """
        assert self.lightning_module is not None
        trainer, module = self.lightning_module.trainer, self.lightning_module
        path = find_for(trainer, self.broadcast(checkpoint_path), weights_only)
        if not path.is_dir():
            return read_rest(path)
        reshard_all(module)
        return _read_folder(trainer, path, module.state_dict(), alone=False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of the weights into the module."""
        assert self.lightning_module is not None
        reshard_all(self.lightning_module)
        likes = self.lightning_module.state_dict()
        state = {
            name: place(tensor, likes[name]) if name in likes else tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimizer's state."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def _save_shards(
        self, checkpoint: dict[str, Any], path: Path, beside: Path, group: dist.ProcessGroup | None = None
    ) -> None:
        """Write shards and all else next to the target, on all ranks; then rank 0 writes the manifest and renames."""
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": one for i, one in enumerate(checkpoint.pop("optimizer_states", []))}
        files: dict[str, Any] = {}

        def write() -> None:
            save(state, storage_writer=FileSystemWriter(beside), process_group=group)
            own = [file.name for file in beside.glob(f"__{self.global_rank}_*")]
            if self.is_global_zero:
                torch.save(checkpoint, beside / REST)
                sync(beside / REST)
                own += [INDEX, REST]
            files.update(checksums(beside, own))

        def finish() -> None:
            if self.is_global_zero:
                write_manifest(beside, checkpoint["global_step"], self.world_size, dict(every))
                put_in_place(beside, path)

        try:
            on_all_ranks(explained(path)(write), group)
            every = of_all_ranks(list(files.items()), group)
            on_all_ranks(explained(path)(finish), group)
        finally:
            if self.is_global_zero:
                remove(beside)


def find_for(trainer: Trainer, path: Any, weights_only: bool | None) -> Path:
    """Return the checkpoint that the trainer is to read, verified; a damaged one is replaced only for resuming."""
    if weights_only is False:
        raise CheckpointError(
            f"weights_only is false, which would run code from {path}; expected true or null. Store what your classes "
            "need as tensors and plain values (on_save_checkpoint), and leave weights_only unset."
        )
    wait_for(trainer)
    resumes = trainer.state.fn == TrainerFn.FITTING and str(path) == str(trainer.ckpt_path)
    return find_whole(path, resumes=resumes)


def require_same_parameters(path: Any, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise if a checkpoint holds other tensors than a module, by name and shape.

    Raises:
        CheckpointError: With some of the names.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if isinstance(tensor, Tensor)}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} belongs to no parameter" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
    ]
    if problems:
        raise CheckpointError(
            f"{path} holds other trained parameters than this run: {some_of(problems, 3)}. Resume with the "
            "model.adapter and the pair of its run, or start a new run (no ckpt_path, another run.name)."
        )


def _read_folder(trainer: Trainer, path: Path, likes: Mapping[str, Tensor], *, alone: bool) -> dict[str, Any]:
    """Read a sharded checkpoint as the content of a file; sharded where ``likes``, tensors by name, are."""

    def make(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        _, _, name = key.partition(".state." if key.startswith("optimizer_") else ".")
        like = likes.get(name)
        if like is not None and like.shape == shape:
            return like.detach()  # read in place
        while name and name not in likes:  # a state of the optimizer: what it is of comes before
            name = name.rpartition(".")[0]
        like = likes.get(name)
        if isinstance(like, DTensor) and like.shape == shape and key.startswith("optimizer_"):
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    prefixes = ("state_dict.", "optimizer_") if trainer.state.fn == TrainerFn.FITTING else ("state_dict.",)
    content = read_nested(path, prefixes, make, alone=alone)
    on_all_ranks(lambda: require_finite(path, content["state_dict"]))
    states = [content.pop(key) for key in sorted(content, key=_number) if key != "state_dict"]
    return {**read_rest(path), **content, "optimizer_states": states}


def _number(key: str) -> int:
    return int(key.rpartition("_")[2]) if key.startswith("optimizer_") else -1


def _gathered(value: Any, device: torch.device) -> Any:
    """The whole of a sharded tensor, on the CPU; a collective."""
    return whole(local(value).to(device), value).cpu() if isinstance(value, DTensor) else value
