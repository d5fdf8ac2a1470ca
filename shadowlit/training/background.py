"""Checkpoints that are written in a thread while training continues.

Lightning's ``AsyncCheckpointIO`` removes the old checkpoint before the new one is written, raises on rank 0 alone, and
knows no shards; torch's ``async_save`` ends before the checksums, the manifest and the renaming.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves_with_path

from shadowlit.checkpoint.saved import explained, write_error
from shadowlit.distributed import local, of_all_ranks
from shadowlit.errors import ShadowlitError


class Background:
    """Writes and removes checkpoints one after the other in a thread; every rank has one, and calls it alike.

    After an error nothing is written or removed; all ranks raise it when they next call :meth:`look`. Checkpoints of
    one step at a time are in memory.

    Attributes:
        group: The ranks' connections for the thread: in one group, its collectives could meet those of the training.
        step: The step whose checkpoints may still be in the queue, the same on all ranks; None if it is empty.
        exists: Whether a checkpoint will exist when the queue is empty, by path.
        problem: The error of this rank's thread.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self.step: int | None = None
        self.exists: dict[str, bool] = {}
        self.problem: ShadowlitError | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._tasks: list[Future[None]] = []
        self._copies: dict[Any, Tensor] = {}

    def begin(self, step: int) -> None:
        """Wait until checkpoints of other steps are written, before one of ``step`` is; a collective."""
        if step != self.step:
            self.wait()
        self.step = step

    def copied(self, content: Any) -> Any:
        """Return a copy of a checkpoint on the CPU; tensors that an earlier one of the same step has too
        are kept once.
        """
        copies: dict[Any, Tensor] = {}
        tied: dict[Any, Tensor] = {}
        memo: dict[int, Any] = {}
        for place, leaf in tree_leaves_with_path(content):
            if not isinstance(leaf, Tensor):
                continue
            part = local(leaf)
            key = (part.data_ptr(), part.shape, part.stride(), part.dtype)
            if key not in tied:
                earlier, tied[key] = self._copies.get(place), part.to("cpu", copy=True)
                if earlier is not None and earlier.dtype == part.dtype and torch.equal(earlier, tied[key]):
                    tied[key] = earlier
            part = copies[place] = tied[key]
            # from_local would move it to the mesh's device
            memo[id(leaf)] = DTensor(part, leaf._spec, requires_grad=False) if isinstance(leaf, DTensor) else part
        self._copies = copies
        return copy.deepcopy(content, memo)

    def submit(self, path: Path, task: Callable[[], None], *, exists: bool) -> None:
        """Let the thread write or remove a checkpoint, after which it exists or not."""
        self.exists[str(path)] = exists
        self._tasks.append(self._pool.submit(self._run, path, task))

    def look(self) -> None:
        """Raise an error of one rank on all, and forget what is written; a collective unless the queue is empty."""
        if self.step is None:
            return
        found = of_all_ranks([(self.problem, all(task.done() for task in self._tasks))])
        problems = [problem for problem, _ in found if problem is not None]
        if problems or all(done for _, done in found):
            self._tasks, self._copies, self.exists, self.step = [], {}, {}, None
        if problems:
            raise self.problem or problems[0]

    def wait(self) -> None:
        """Wait until all is written, and :meth:`look`."""
        wait(self._tasks)
        self.look()

    def close(self) -> None:
        """Wait for this rank's thread, and end it."""
        self._pool.shutdown()

    def _run(self, path: Path, task: Callable[[], None]) -> None:
        try:
            if self.problem is None:
                explained(path)(task)()
        except Exception as error:
            self.problem = error if isinstance(error, ShadowlitError) else write_error(path, error)
