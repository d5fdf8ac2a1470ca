"""Processes for tests: ranks on the CPU and commands that can be killed, forked from a copy of the test process.

A fresh interpreter pays for importing torch, Lightning and transformers before its first line; a fork does not.
:func:`start_server` forks the server of multiprocessing's ``forkserver`` context, once and before the first test runs,
so everything that uses that context (our own trials too) starts in milliseconds.
"""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver, reduction, resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])  # for a server that has to be started anew


def start_server() -> None:
    """Fork the server from this process, which must not have run a backward pass: autograd refuses to run after it."""
    server = forkserver._forkserver
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(connection.arbitrary_address("AF_UNIX"))
        listener.listen()
        ours, theirs = os.pipe()[::-1]  # the server ends when the last process that holds ``ours`` has ended
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _serve(listener.detach(), theirs)
        os.close(theirs)
        server._forkserver_address, server._forkserver_alive_fd = listener.getsockname(), ours
        server._forkserver_pid = pid


def server_pid() -> int | None:
    """The process id of the server, if it runs."""
    return forkserver._forkserver._forkserver_pid


def _serve(listener: int, alive: int) -> None:
    try:
        import tests.preload  # noqa: F401

        gc.freeze()  # a collection in a fork would copy every page
        forkserver.main(listener, alive, [])
    finally:
        os._exit(0)


class _Streams:
    """The output streams of the process that pickles it, for one that it starts: pytest captures what ranks print."""

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(number) for number in (1, 2)]

    def __setstate__(self, streams: list[Any]) -> None:
        for number, stream in zip((1, 2), streams, strict=True):
            os.dup2(stream.detach(), number)
        _reopen()


def _reopen() -> None:
    """Print to what the streams are now: those of Python are still pytest's."""
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 180, slurm: bool = False
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes that look like torchrun's, or like tasks of a SLURM job.

    Returns what each of them returned. ``function`` must be importable by name, its results must be picklable. A
    rank that raises, dies or outlives the time fails the test with its traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = _context.Queue()
    processes = [
        _context.Process(
            target=_rank,
            args=(_Streams(), function, environment(rank, world_size, port, slurm), results, args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, answer, error = results.get(timeout=timeout_s)
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            answers[rank] = torch.load(io.BytesIO(answer), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == world_size else 0.1)
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def environment(rank: int, world_size: int, port: int, slurm: bool = False) -> dict[str, str]:
    """The variables by which a process knows its rank, as torchrun sets them or SLURM."""
    if slurm:
        return {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "test",
            "SLURM_NTASKS": str(world_size),
            "SLURM_NTASKS_PER_NODE": str(world_size),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NODELIST": "127.0.0.1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _rank(_: _Streams, function: Callable, environment: dict[str, str], results: Any, args: tuple) -> None:
    os.environ |= environment
    rank = int(environment.get("RANK", environment.get("SLURM_PROCID", 0)))
    torch.set_num_threads(1)
    try:
        # As bytes: torch would pass tensors through files of a process that is gone by then.
        answer = io.BytesIO()
        torch.save(function(*args), answer)
        results.put((rank, answer.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()


class Forked:
    """A command in a process of its own, as ``subprocess.Popen`` has it, but without the seconds of its imports.

    Like a fresh interpreter's process it has its own server for what it starts itself, a SIGINT that interrupts, and
    the working folder and variables of the test. It leads a session, to which all that it starts belongs.

    Args:
        function: Function to call, importable by name; its result is the exit status.
        args: Arguments of the function.
        out: File that standard output is appended to.
        err: File that standard error is appended to; that of the output by default.
        env: Variables to set in addition to those of this process.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, out: Path, err: Path | None = None, env: Mapping[str, str] = {}
    ) -> None:
        files = (str(out), str(err or out))
        environment = {**os.environ, **env}
        self._process = _context.Process(target=_command, args=(function, args, files, environment, os.getcwd()))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Wait for the end and return the exit status; a process that takes longer is killed and fails the test."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
        assert self._process.exitcode is not None, f"still running after {timeout_s} s"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)


def _command(
    function: Callable[..., Any], args: tuple, files: tuple[str, str], environment: dict[str, str], folder: str
) -> None:
    os.setsid()
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _reopen()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forkserver._forkserver.__init__()  # of this process alone, and it ends with it
    start_server()
    sys.exit(function(*args))


def shadowlit(*args: str) -> int:
    """What ``python -m shadowlit ARGS`` does: the command reads its line itself."""
    from shadowlit.cli.main import main

    sys.argv = ["shadowlit", *args]
    # What Lightning's launcher starts the other ranks by.
    sys.modules["__main__"] = importlib.import_module("shadowlit.__main__")
    return main()


@dataclass(frozen=True)
class Finished:
    """What a command has left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_command(
    folder: Path,
    *args: str,
    timeout_s: float = 300,
    env: Mapping[str, str] = {},
    function: Callable[..., Any] = shadowlit,
) -> Finished:
    """Run ``python -m shadowlit ARGS``, or another function, in a forked process; its output is in ``folder``."""
    files = [folder / name for name in ("out.txt", "err.txt")]
    code = Forked(function, *args, out=files[0], err=files[1], env=env).wait(timeout_s)
    return Finished(code, *(file.read_text() for file in files))
