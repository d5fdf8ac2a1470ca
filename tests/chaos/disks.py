"""Disks of their own for tests, which can be filled."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import start_server

_NEWNS, _NEWUSER, _PRIVATE = 0x20000, 0x10000000, 1 << 18 | 1 << 14  # with MS_REC


def on_small_disk(folder: Path, size_bytes: int, function: Callable[..., Any], *args: Any) -> int:
    """Call a function in this process, for which ``folder`` becomes a disk of its own; that ends with the process.

    Returns:
        0, or 77 if the system lets this user mount nothing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWNS):
        if libc.unshare(_NEWUSER | _NEWNS):
            return 77
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    options = f"size={size_bytes}".encode()
    if libc.mount(b"none", b"/", None, _PRIVATE, None) or libc.mount(
        b"none", os.fsencode(folder), b"tmpfs", 0, options
    ):
        return 77
    start_server()  # what it starts sees the disk too
    function(*args)
    return 0
