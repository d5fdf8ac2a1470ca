"""Runs shadowlit's commands in processes of their own that are stopped half-way: the driver of test_interrupted.py.

``python -m tests.grafting.stopped`` reads cases from its standard input, a JSON list, and forks once for each:
importing everything once is what makes hundreds of interruptions cheap. A case is stopped at one of its own calls to
the system, counted, so that no test depends on time. For every case a line of JSON comes back.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any

import jsonargparse  # noqa: F401  before the forks: see above

import shadowlit.cli.graft  # noqa: F401
from shadowlit.checkpoint import workers
from shadowlit.cli.main import main

# Calls through which our own code changes what is on the disk, directly or through the library that follows.
_CALLS = frozenset({"mkdir", "open", "write", "seek", "close", "chmod", "fsync", "rename", "replace", "unlink", "rmdir",
                    "sendfile", "truncate"})  # fmt: skip
_CALLERS = (f"{os.sep}shadowlit{os.sep}", "pathlib.py", "shutil.py", "contextlib.py")


def _stop_at(moment: int, number: int) -> list[int]:
    """Send this process a signal before its call ``moment``, counted from the first folder it makes.

    Returns:
        The number of calls so far, in a list.
    """
    calls, process = [0], os.getpid()

    def count(frame: FrameType, event: str, function: Any) -> None:
        if os.getpid() != process:  # one that was forked to compute
            return
        if event != "c_call" or function.__name__ not in _CALLS:
            return
        file = frame.f_code.co_filename
        if any(name in file for name in _CALLERS) and (calls[0] or function.__name__ == "mkdir"):
            calls[0] += 1
            if calls[0] == moment:
                os.kill(os.getpid(), number)

    sys.setprofile(count)
    return calls


def _child(case: dict[str, Any], report: int) -> None:
    """Run one case; tell exit status, number of calls and what was said."""
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "file_bytes" in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_bytes"], case["file_bytes"]))
    if case.get("processes"):
        workers.WORTH_FORKING_BYTES, workers.num_cores = 0, lambda: 2
    calls = _stop_at(case.get("moment", -1), case.get("signal", 0))
    try:
        status = main(case["args"])
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.setprofile(None)
    told = {"status": status, "calls": calls[0], "err": sys.stderr.getvalue()}
    os.write(report, json.dumps(told).encode())


def _run(case: dict[str, Any]) -> dict[str, Any]:
    """Fork for a case; one that is killed reports its signal alone."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _child(case, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read()
    _, code = os.waitpid(child, 0)
    return json.loads(told) if told else {"killed_by": os.WTERMSIG(code) if os.WIFSIGNALED(code) else None}


if __name__ == "__main__":
    for line in json.load(sys.stdin):
        print(json.dumps(_run(line)), flush=True)
