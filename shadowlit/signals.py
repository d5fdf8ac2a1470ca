"""SIGINT, SIGTERM and SIGUSR1 end a command with the exit status 128 + signal: at once, or at its next boundary."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType

from shadowlit.errors import Interrupted, ShadowlitError

PATIENCE_S = 600.0
"""Seconds without a boundary after which a command that received a signal is ended."""
_REPEATED_S = 1.0  # torchrun passes on a signal that the terminal has sent to all processes
_POLL_S = 1.0
_PARENT = "SHADOWLIT_PARENT"  # whose process id is the value: Lightning starts the other ranks from it


class StopSignals:
    """The signals that a command was sent, and whether it waits for a boundary before it ends.

    The first signal raises :class:`Interrupted`, unless the command is in a part that it can only leave at a boundary.
    A second signal, more than a second after the first, ends the process at once, whatever it is doing: a thread
    watches for it, since Python's handlers wait while the main thread is in a collective. SIGTERM after SIGUSR1 is not
    a second signal, since SIGUSR1 is a scheduler's warning that SIGTERM will come.

    Attributes:
        number: The signal that ends the command: the first one, or the one that the ranks have agreed on.
        waits: Whether a boundary is waited for.
        is_part: Whether the process is a rank that Lightning's launcher has started: rank zero has the exit status.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.waits = self.is_part = False
        self._before: dict[int, object] = {}
        self._alive = 0.0  # when the last boundary was reached

    @contextlib.contextmanager
    def caught(self) -> Iterator[StopSignals]:
        """Handle the signals in the block, which only the main thread receives.

        A signal that the process ignores, as a background job ignores SIGINT, or that another handler takes, is left
        alone. The block ends with Interrupted if a signal has arrived, even if something in it has swallowed that.

        Raises:
            Interrupted: With the exit status 128 + signal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        threading.Thread(target=self._watch, args=(readable,), daemon=True, name="stop-signals").start()
        wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        _running.append(self)
        try:
            self.catch(number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)))
            yield self
        except (Interrupted, ShadowlitError):
            raise
        except BaseException as error:
            self.end(error)  # such as the loss of the connection to a rank that has ended before
            raise
        finally:
            self.waits = True  # nothing may interrupt what follows
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            _running.remove(self)
            signal.set_wakeup_fd(wakeup)
            os.close(writable)  # ends the thread
        self.end()

    def catch(self, numbers: Iterable[int]) -> None:
        """Handle further signals in the block of :meth:`caught`; in its thread alone."""
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._receive)

    def reached_boundary(self) -> None:
        """Tell the watching thread that the command proceeds."""
        self._alive = time.monotonic()

    def end(self, cause: BaseException | None = None) -> None:
        """Raise Interrupted if there was a signal."""
        if self.number is not None:
            raise Interrupted(128 + self.number) from cause

    def _receive(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and not self.waits:
            raise Interrupted(128 + number)

    def _watch(self, readable: int) -> None:
        """End the process at the second signal, and where it doesn't end by itself after the first."""
        first: tuple[int, float] | None = None
        while True:
            ready, _, _ = select.select([readable], [], [], None if first is None else _POLL_S)
            received = os.read(readable, 64) if ready else b""
            if ready and not received:
                os.close(readable)
                return
            now = time.monotonic()
            for number in received:
                if number not in self._before:
                    continue
                if first is None:
                    first = number, now
                    self._alive = now
                elif now - first[1] > _REPEATED_S and not (number == signal.SIGTERM and _is_warning(first[0])):
                    _end(number, "a second signal")
            if first is not None and now - self._alive > PATIENCE_S:
                _end(first[0], f"no boundary within {PATIENCE_S:.0f} s after the signal")


def end_with_parent() -> bool:
    """End this process, whatever it is doing, when the process that has started it as a rank ends.

    That is torchrun, or the process of rank zero if Lightning's launcher has started the others, for which it returns
    true. To be called at the beginning of a command.
    """
    parent = os.getppid()
    is_part = os.environ.get(_PARENT) == str(parent)
    if is_part or "TORCHELASTIC_RUN_ID" in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; works on a stopped process too

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(_POLL_S)
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
    os.environ[_PARENT] = str(os.getpid())
    return is_part


def end_by_parent(*_: object) -> None:
    """Let SIGTERM end this worker process of a loader only if its parent sends it.

    Schedulers send it to all processes of a job, and torch raises an error in the parent of a worker that it ends.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def watch() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="end-by-parent").start()


def running() -> StopSignals | None:
    """Return the signals of the running command; None outside of one."""
    return _running[-1] if _running else None


_running: list[StopSignals] = []


def _forget() -> None:
    """Let a forked process, as a worker of a loader, leave the signals to its parent; SIGTERM ends it."""
    for signals in _running:
        signal.set_wakeup_fd(-1)
        for number in signals._before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _is_warning(number: int) -> bool:
    return number == getattr(signal, "SIGUSR1", None)


def _end(number: int, why: str) -> None:
    os.write(2, f"\nended by {signal.Signals(number).name} at once: {why}\n".encode())
    os._exit(128 + number)
