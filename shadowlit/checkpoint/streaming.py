"""Work on tensors part by part: a few parts are computed ahead by threads, and come out in order."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from shadowlit.checkpoint.headers import TensorInfo

THREADS = 2
PART_ELEMENTS = 2**19
"""Rows are read, computed and written in parts of about this many elements."""
AHEAD = 4
"""Number of results that wait at most, besides the one that was taken."""
_SYNC_FILE_RANGE_WRITE = 2  # of fcntl.h
_FALLOC_FL_KEEP_SIZE = 1  # of linux/falloc.h

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def start_write_back(descriptor: int, offset: int, count: int) -> None:
    """Let the system begin to write a range of a file to the disk, without waiting: the flush then finds little to do.

    Errors are ignored here; the flush reports them. Only Linux has the call; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows: TypeError
        ctypes.CDLL(None).sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE
        )


def reserve(descriptor: int, offset: int, count: int) -> None:
    """Reserve disk space for a range of a file that is about to be written; the file's size stays as it is.

    Saves a fifth of the system time, and raises an OSError at once if the disk is full. Only Linux has the call, and
    not every file system supports it; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, TypeError):
        call = ctypes.CDLL(None, use_errno=True).fallocate
        if call(descriptor, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(count)):
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(code, os.strerror(code))


def row_windows(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Cut a tensor into runs of rows that are small enough to hold in memory: ``(start, stop)`` of each."""
    rows = info.shape[0] if info.shape else 1
    per_row = max(1, info.num_elements // max(1, rows))
    step = max(1, PART_ELEMENTS // per_row)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def ordered(pool: Executor, function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """``map`` by the threads of ``pool``, in order, at most a few results ahead of the one that is taken."""
    pending: deque[Future[_Out]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
