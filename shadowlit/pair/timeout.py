"""A limit for the time that a template takes, which is code and may never end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

TIME_LIMIT_S = 10.0
"""After this time, a rendering is stopped; templates take well below a millisecond."""


class _OutOfTime(BaseException):
    """Not an Exception, which jinja would catch, to rewrite its traceback."""


def in_time(render: Callable[[], Any], limit_s: float) -> Any:
    """``render()``; a TimeoutError after ``limit_s``."""
    if (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")  # not on Windows
        and not any(signal.getitimer(signal.ITIMER_VIRTUAL))
        and (handler := signal.getsignal(signal.SIGVTALRM)) is not None
    ):
        # Of processor time, which doesn't pass while the machine sleeps; test runners use the other timer.
        signal.signal(signal.SIGVTALRM, _stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
        try:
            return render()
        except _OutOfTime:
            raise TimeoutError(f"it takes more than {limit_s:g} s, as if it never ended") from None
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
    # Only the main thread receives signals. Here, the thread of an endless template runs until the process ends.
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(render())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(limit_s)


def _stop(*_: Any) -> None:
    raise _OutOfTime
