"""Swapping two tensors in place, such that an interruption at any point loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


def windows(tensor: Tensor) -> Iterator[slice]:
    """Cut a flat tensor into ranges that bound the transient memory of an elementwise pass over it.

    On a CPU a range fits the cache, so that a temporary of it costs no traffic to memory; elsewhere it is large
    enough for the launch of a kernel not to count.
    """
    step = 2**17 if tensor.device.type == "cpu" else 2**26
    for start in range(0, tensor.numel(), step):
        yield slice(start, min(start + step, tensor.numel()))


class _Progress(NamedTuple):
    done: int = 0  # ranges that are swapped
    part: int = 0  # the range that is being swapped, where `staged` is set
    after: int = 0  # what `done` becomes when it is finished
    staged: Tensor | None = None  # what the live tensor held there before
    copied: bool = False  # whether the live tensor has its new content there


class Swap:
    """Swaps the contents of two equally shaped tensors range by range, and back again.

    A keyboard interrupt or a signal may arrive between any two statements. All progress is one attribute, set only
    after the step that it records, and every step may be repeated: :meth:`undo` restores both tensors bit for bit from
    wherever a call was interrupted. Copies between a GPU and pinned memory follow the order of the GPU's stream;
    whoever reads ``held`` on the CPU waits for it first. Both tensors are contiguous and have one shape and dtype;
    ``held`` may be on another device.
    """

    def __init__(self, live: Tensor, held: Tensor) -> None:
        assert live.shape == held.shape and live.dtype == held.dtype
        self._live, self._held = live.view(-1), held.view(-1)
        self._ranges = list(windows(self._live))
        self._progress = _Progress()

    @property
    def begun(self) -> bool:
        """Whether any range is swapped, wholly or in part."""
        return self._progress.done > 0 or self._progress.staged is not None

    def follow(self, live: Tensor) -> None:
        """Continue with the storage that the live tensor has been moved to; not while anything is swapped."""
        assert not self.begun and live.shape.numel() == self._live.numel()
        if live.data_ptr() != self._live.data_ptr() or live.device != self._live.device:
            self._live = live.view(-1)
            self._ranges = list(windows(self._live))

    def apply(self) -> None:
        """Swap all ranges that are not swapped yet."""
        self._finish()
        while (done := self._progress.done) < len(self._ranges):
            self._swap_range(done, after=done + 1)

    def undo(self) -> None:
        """Swap back all ranges that are swapped."""
        self._finish()
        while (done := self._progress.done) > 0:
            self._swap_range(done - 1, after=done - 1)

    def _swap_range(self, part: int, after: int) -> None:
        staged = self._live[self._ranges[part]].clone()
        self._progress = _Progress(self._progress.done, part, after, staged)
        self._finish()

    def _finish(self) -> None:
        progress = self._progress
        if progress.staged is None:
            return
        window = self._ranges[progress.part]
        if not progress.copied:
            self._live[window].copy_(self._held[window], non_blocking=True)
            self._progress = progress._replace(copied=True)
        self._held[window].copy_(progress.staged, non_blocking=True)
        self._progress = _Progress(done=progress.after)
