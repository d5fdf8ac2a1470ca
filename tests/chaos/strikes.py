"""What ends a command from the inside, at a change of its files that is counted, so that no test depends on time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import environment, shadowlit

# Audit events of the interpreter that change what is on a disk, and which of their arguments are paths.
_CHANGES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,),
    "os.link": (0, 1), "os.symlink": (0, 1), "os.chmod": (0,), "shutil.copyfile": (1,),
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE_S = 5  # of torchrun's kind of launcher, which has 30


@dataclass(frozen=True)
class Aim:
    """A strike just before the n-th change of files whose path contains a text, or in a write soon after it.

    Changes are made by Python's own calls: files are opened to be written, synced, renamed and removed. What a library
    writes by itself is reached by ``room``.

    Args:
        where: Text that the paths contain.
        number: Which of the changes, counted from 1; 0 for none: they are only recorded.
        signal: The signal.
        group: Whether all processes of the command are sent it, and not only this one.
        room: Number of bytes of a file, in the write beyond which the process is killed, instead of by the signal.
        full: Whether such a write fails instead, as on a full disk (EFBIG).
        fill: Folder on whose disk all but ``room`` bytes are taken, so that writes fail (ENOSPC).
        rank: The rank that counts.
    """

    where: str
    number: int = 0
    signal: int = signal.SIGKILL
    group: bool = False
    room: int | None = None
    full: bool = False
    fill: str | None = None
    rank: int = 0


def install(aim: Aim, record: Path) -> None:
    """Count the changes that this process makes; ``record`` lists them, the one that was struck last."""
    if aim.room is not None and not aim.full:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process, which Python prevents
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    process, count, lines = os.getpid(), 0, os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def change(event: str, args: Iterable[Any]) -> None:
        nonlocal count
        paths = [os.fsdecode(arg) for arg in args if isinstance(arg, str | bytes | os.PathLike)]
        if os.getpid() != process or not any(aim.where in path for path in paths) or (count and count == aim.number):
            return
        count += 1
        os.write(lines, f"{event} {' '.join(paths)}\n".encode())
        if count == aim.number:
            _strike(aim)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            change(event, args[:1])
        elif event in _CHANGES:
            change(event, (args[i] for i in _CHANGES[event]))

    def fsync(descriptor: Any, sync: Callable[[Any], None] = os.fsync) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        change("fsync", [os.readlink(f"/proc/self/fd/{number}")])
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)


def _strike(aim: Aim) -> None:
    if aim.fill is not None:
        fill(Path(aim.fill), aim.room or 0)
    elif aim.room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (aim.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif aim.group:
        os.killpg(0, aim.signal)
    else:
        os.kill(os.getpid(), aim.signal)


FILLER = ".filler"


def fill(folder: Path, room: int) -> None:
    """Take all of a folder's disk but ``room`` bytes; FILLER is what has to be removed."""
    with (folder / FILLER).open("ab", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - room)))


def command(aim: Aim | None, record: Path, ranks: int, prepare: Callable[[], None] | None, *args: str) -> int:
    """Run a command of shadowlit in a session of its own, as one process or as ranks; return the exit status.

    Args:
        aim: A strike from the inside.
        record: File that lists the changes which ``aim`` counts.
        ranks: Number of processes; several are started as torchrun starts them.
        prepare: Called before, in the process that the command is of.
        args: The command's arguments.
    """
    if ranks > 1:
        return _launch([lambda rank=rank: _run(aim, record, rank, prepare, args) for rank in range(ranks)])
    return _run(aim, record, 0, prepare, args)


def _run(aim: Aim | None, record: Path, rank: int, prepare: Callable[[], None] | None, args: tuple[str, ...]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command handles it
    if prepare is not None:
        prepare()
    if aim is not None and aim.rank == rank:
        install(aim, record)
    return shadowlit(*args)


def _launch(ranks: list[Callable[[], int]]) -> int:
    """Fork ranks with torchrun's environment; as there, one that fails takes the others with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank, run in enumerate(ranks):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                os.environ |= environment(rank, len(ranks), port)
                code = run()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = 0
    while pids:
        pid, code = os.wait()
        pids.remove(pid)
        status = status or os.waitstatus_to_exitcode(code)
        if status and not received:
            signal.signal(signal.SIGALRM, lambda *_: pass_on(signal.SIGKILL, None))
            signal.alarm(_PATIENCE_S)
            pass_on(signal.SIGTERM, None)
    return status if status >= 0 else 128 - status
