"""A PostgreSQL server of one's own, as Debian packages it, for the length of a test module."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Where ``initdb`` and ``postgres`` are; None without them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def server() -> Iterator[str]:
    """Start a server that listens on a socket alone; yields the address of its database."""
    programs = binaries()
    assert programs is not None
    # The path of a socket has 107 bytes at most: pytest's folders may be too deep.
    root = Path(tempfile.mkdtemp(prefix="pg"))
    as_owner = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(root, "postgres", "postgres")
    data, log = root / "data", root / "log"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": root}
    control = [*as_owner, str(programs / "pg_ctl"), "-D", str(data), "-w"]
    try:
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run([*as_owner, *initdb], **quiet)
        options = f"-k {root} -c listen_addresses='' -c fsync=off"
        subprocess.run([*control, "-l", str(log), "-o", options, "start"], **quiet)
        yield f"postgresql://postgres@/postgres?host={root}"
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(root, ignore_errors=True)
