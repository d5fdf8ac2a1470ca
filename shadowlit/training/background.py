"""Checkpoints that are written in a thread while the training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves_with_path

from shadowlit.checkpoint.saved import explained, write_error
from shadowlit.distributed import local, of_all_ranks
from shadowlit.errors import ShadowlitError


class Background:
    """Writes and removes checkpoints one after the other in a thread; every rank has one, and calls it alike.

    An error ends the queue: nothing that follows is written, and nothing removed. All ranks raise it when they next
    call :meth:`look`. Checkpoints of one step at a time are in memory.

    Attributes:
        group: The ranks' connections for the thread alone; None without several ranks.
    """

    def __init__(self) -> None:
        # In one group, a collective of the thread could meet one of the training on another rank.
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._tasks: list[Future[None]] = []
        self._problem: ShadowlitError | None = None
        self._step: int | None = None  # of what is being written, the same on all ranks
        self._copies: dict[Any, Tensor] = {}
        self._exists: dict[str, bool] = {}

    def begin(self, step: int) -> None:
        """Wait until checkpoints of other steps are written, before one of ``step`` is; a collective."""
        if step != self._step:
            self.wait()
        self._step = step

    def copied(self, content: Any) -> Any:
        """A copy of a checkpoint on the CPU; tensors that an earlier one of the same step has too are kept once."""
        copies: dict[Any, Tensor] = {}
        shared: dict[Any, Tensor] = {}  # tied weights
        memo: dict[int, Any] = {}
        for place, leaf in tree_leaves_with_path(content):
            if not isinstance(leaf, Tensor):
                continue
            part = local(leaf)
            key = (part.data_ptr(), part.shape, part.stride(), part.dtype)
            if key not in shared:
                earlier, shared[key] = self._copies.get(place), part.to("cpu", copy=True)
                if earlier is not None and earlier.dtype == part.dtype and torch.equal(earlier, shared[key]):
                    shared[key] = earlier
            part = copies[place] = shared[key]
            # from_local would move it to the mesh's device
            memo[id(leaf)] = DTensor(part, leaf._spec, requires_grad=False) if isinstance(leaf, DTensor) else part
        self._copies = copies
        return copy.deepcopy(content, memo)

    def submit(self, path: Path, task: Callable[[], None], *, exists: bool) -> None:
        """Let the thread write or remove a checkpoint, after which it exists or not."""
        self._exists[str(path)] = exists
        self._tasks.append(self._pool.submit(self._run, path, task))

    def exists(self, path: Any) -> bool | None:
        """Whether a checkpoint will exist when the queue is empty; None if it isn't in it."""
        return self._exists.get(str(path))

    @property
    def writes(self) -> bool:
        """Whether something may still be in the queue; the same on all ranks."""
        return self._step is not None

    def look(self) -> None:
        """Raise the error of a rank on all of them; forget what is written. A collective while something is."""
        if not self.writes:
            return
        found = of_all_ranks([(self._problem, all(task.done() for task in self._tasks))])
        problems = [problem for problem, _ in found if problem is not None]
        if problems or all(done for _, done in found):
            self._tasks, self._copies, self._exists, self._step = [], {}, {}, None
        if problems:
            raise self._problem or problems[0]

    def wait(self) -> None:
        """Wait until all is written, and :meth:`look`."""
        wait(self._tasks)
        self.look()

    def close(self) -> None:
        """Wait for this rank's thread, and warn of an error that nothing has raised."""
        self._pool.shutdown()
        if self._problem is not None and self.writes:
            rank_zero_warn(str(self._problem))

    def _run(self, path: Path, task: Callable[[], None]) -> None:
        if self._problem is not None:
            return
        try:
            explained(path)(task)()
        except ShadowlitError as error:
            self._problem = error
        except Exception as error:
            self._problem = write_error(path, error)
