"""Work on parts, shared among processes or threads, with results in order.

numpy's operations on a part that fits the cache are so short that two threads spend their time waiting for the
interpreter's lock; two processes don't. Both compute the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from shadowlit.checkpoint.streaming import AHEAD, THREADS, ordered
from shadowlit.errors import ShadowlitError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROCESSES = 4
"""Largest number of processes, and not more than there are cores: with more, writing their results is the limit."""
WORTH_FORKING_BYTES = 2**27
"""Bytes of stored tensors to read; below that, threads are done before processes have started."""
_ROOMS_PER_WORKER = 3  # one is computed, one waits, one is written
_PAGE_BYTES = 4096
_TASK = struct.Struct("<I")
_CAUGHT = (signal.SIGINT, signal.SIGTERM)

Room = npt.NDArray[np.uint8]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_order(
    function: Callable[[_In, Room], _Out], items: Sequence[_In], room_bytes: int, num_bytes: int
) -> Generator[tuple[_Out, Room], None, None]:
    """``function(item, room)`` of every item, in the order of the items, a few of them computed ahead.

    Processes are forked if that pays and is safe (see :func:`may_fork`), otherwise threads are used. Of what
    ``function`` changes, only what it returns and writes to its room is seen here.

    Args:
        function: Function that computes a part. What it returns or raises must be small, and picklable.
        items: Arguments of its calls.
        room_bytes: Size of the memory for the bytes of one part; 0 if there are none.
        num_bytes: Bytes that all items together read; decides whether forking pays.

    Yields:
        What ``function`` returned, and its room, which the next part may reuse.

    Raises:
        ShadowlitError: A process was killed.
        Exception: ``function`` raised it; of several, that of the first item.
    """
    count = min(PROCESSES, num_cores(), len(items))
    if num_bytes >= WORTH_FORKING_BYTES and count > 1 and may_fork():
        try:
            team = _Team(function, items, room_bytes, count)
        except OSError:  # no memory, or no process more for this user: threads need neither
            pass
        else:
            with contextlib.closing(team):
                yield from team.results()
            return
    yield from _by_threads(function, items, room_bytes)


def by_processes(function: Callable[[_In], _Out], items: Sequence[_In], count: int) -> Generator[_Out, None, None]:
    """``function(item)`` of every item, in the order of the items, by ``count`` forked processes.

    Unlike :func:`in_order`, it forks next to torch and other threads, as torch's DataLoader does for its workers. That
    is safe for a function that computes no tensors and takes no lock that another thread might hold. Without other
    processes (``count`` of 1, systems other than Linux, none to be had), this one computes.

    Args:
        function: Function that computes a part. What it returns or raises must be picklable.
        items: Arguments of its calls.
        count: Largest number of processes.

    Raises:
        ShadowlitError: A process was killed.
        Exception: ``function`` raised it; of several, that of the first item.
    """
    count = min(count, len(items))
    if count > 1 and sys.platform == "linux":
        try:
            team = _Team(lambda item, _: function(item), items, 0, count)
        except OSError:
            pass
        else:
            with contextlib.closing(team):
                for result, _ in team.results():
                    yield result
            return
    yield from map(function, items)


def may_fork() -> bool:
    """Return whether a forked copy of this process could compute: only the calling thread continues in it.

    Locks that another thread holds would stay locked, and torch's own threads would be missing. On systems other than
    Linux, even system libraries don't support it.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and "torch" not in sys.modules


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_threads(
    function: Callable[[_In, Room], _Out], items: Sequence[_In], room_bytes: int
) -> Iterator[tuple[_Out, Room]]:
    from concurrent.futures import ThreadPoolExecutor

    rooms = [np.empty(room_bytes, np.uint8) for _ in range(min(AHEAD + 1, len(items)))]
    with ThreadPoolExecutor(min(THREADS, num_cores())) as pool:
        numbers = range(len(items))
        found = ordered(pool, lambda number: function(items[number], rooms[number % len(rooms)]), numbers)
        for number, result in zip(numbers, found, strict=True):
            yield result, rooms[number % len(rooms)]


@dataclass
class _Worker:
    """A forked process as its parent knows it, and the end of the pipe by which its replies come."""

    pid: int
    replies: Connection

    def receive(self) -> tuple[int, Any, BaseException | None]:
        """Its next reply: number, result, error."""
        try:
            return self.replies.recv()
        except (EOFError, OSError):
            status = os.waitpid(self.pid, 0)[1]
            self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise ShadowlitError(
            f"a process that computes a part of the work was {how}; expected it to finish. The system "
            "kills one where memory runs out: free some, and run this again."
        )

    def end(self) -> None:
        self.replies.close()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, nobody waits
                os.waitpid(self.pid, 0)


class _Team(Generic[_In, _Out]):
    """Forked processes that take the numbers of items from one pipe, whoever is free, and reply by one of their own.

    They see the pipe's end when this process is gone, however it went, and end too.
    """

    def __init__(
        self, function: Callable[[_In, Room], _Out], items: Sequence[_In], room_bytes: int, count: int
    ) -> None:
        self._function, self._items = function, items
        self._workers: list[_Worker] = []
        self._pipes: list[int] = []
        size = -(-room_bytes // _PAGE_BYTES) * _PAGE_BYTES
        num_rooms = count * _ROOMS_PER_WORKER
        memory = np.frombuffer(mmap.mmap(-1, max(1, num_rooms * size)), np.uint8)  # shared with the forked ones
        self._rooms = [memory[i * size : i * size + room_bytes] for i in range(num_rooms)]
        try:
            self._pipes = list(os.pipe())
            for _ in range(count):
                self._fork()
        except BaseException:
            self.close()
            raise

    def results(self) -> Iterator[tuple[_Out, Room]]:
        """Yield the results of the items in order."""
        from multiprocessing.connection import wait

        workers: dict[Any, _Worker] = {worker.replies: worker for worker in self._workers}
        total, sent = len(self._items), 0
        arrived: dict[int, list[Any]] = {}
        for number in range(total):
            # A room is free when the part that it held was taken.
            for ahead in range(sent, min(total, number + len(self._rooms))):
                os.write(self._pipes[1], _TASK.pack(ahead))
                sent = ahead + 1
            while number not in arrived:
                for replies in wait(list(workers)):
                    done, *reply = workers[replies].receive()
                    arrived[done] = reply
            result, error = arrived.pop(number)
            if error is not None:
                raise error
            yield result, self._rooms[number % len(self._rooms)]

    def _fork(self) -> None:
        from multiprocessing import Pipe  # late: a command that doesn't fork is faster without

        reading, writing = Pipe(duplex=False)
        # Until the copy has handlers of its own, it must not run this process's: they clean up.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which by_processes permits
                pid = os.fork()
            if not pid:
                self._compute(writing, [reading, *(worker.replies for worker in self._workers)], before)
            self._workers.append(_Worker(pid, reading))
        except OSError:
            reading.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            writing.close()

    def _compute(self, replies: Connection, not_ours: list[Connection], mask: set[Any]) -> NoReturn:
        """What a forked process does until there is nothing more to do; never returns into what its parent was at."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            gc.freeze()  # a search for garbage would copy all pages that are shared
            os.close(self._pipes[1])
            for other in not_ours:
                other.close()
            while task := os.read(self._pipes[0], _TASK.size):
                (number,) = _TASK.unpack(task)
                try:
                    room = self._rooms[number % len(self._rooms)]
                    told = pickle.dumps((number, self._function(self._items[number], room), None))
                except Exception as error:
                    told = pickle.dumps((number, None, _portable(error)))
                replies.send_bytes(told)
            status = 0
        except BrokenPipeError:  # the parent is gone
            status = 0
        finally:
            os._exit(status)

    def close(self) -> None:
        for descriptor in self._pipes:
            os.close(descriptor)
        for worker in self._workers:
            worker.end()
        self._pipes, self._workers = [], []


def _portable(error: Exception) -> Exception:
    """An error as it can be sent to another process; one that isn't the user's keeps the place it came from."""
    if not isinstance(error, ShadowlitError):
        error.add_note(f"in a process that computes parts:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
