"""Threads that share a reader read its file, also when they open it at the same moment."""

import os
import threading

import numpy as np
import torch
from safetensors.torch import save_file

from shadowlit.checkpoint import folder as folders
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import CheckpointError


def save_constant(folder, value):
    folder.mkdir()
    save_file({"weight": torch.full((4, 4), value)}, folder / "model.safetensors")
    return CheckpointReader(folder)


def test_a_file_opened_by_two_threads_at_once_is_not_closed_under_either(tmp_path, monkeypatch):
    """The worst order: while the first thread is about to read, the second puts its own stream in the place of the
    first's, whose descriptor, if that closes it, goes to the next file that is opened: another model's."""
    instruct, tuned = save_constant(tmp_path / "instruct", 1.0), save_constant(tmp_path / "tuned", 2.0)
    both_open, first_reads, go_on = threading.Barrier(2), threading.Event(), threading.Event()
    found = {}

    class Stream(folders.FileIO):
        def __init__(self, path):
            super().__init__(path)
            if path.parent == instruct.folder:
                both_open.wait(10)
                if threading.current_thread().name == "second":
                    first_reads.wait(10)

    def preadv(*arguments, read=os.preadv):
        if threading.current_thread().name == "first":
            first_reads.set()
            go_on.wait(10)
        return read(*arguments)

    def read():
        try:
            found[threading.current_thread().name] = instruct.rows("weight", 0, 4)
        except CheckpointError as error:
            found[threading.current_thread().name] = error

    monkeypatch.setattr(folders, "FileIO", Stream)
    monkeypatch.setattr(folders.os, "preadv", preadv)
    first, second = (threading.Thread(target=read, name=name) for name in ("first", "second"))
    first.start()
    second.start()
    second.join(10)
    assert np.array_equal(tuned.rows("weight", 0, 4), np.full((4, 4), 2.0))
    go_on.set()
    first.join(10)
    assert all(np.array_equal(found[name], np.ones((4, 4))) for name in ("first", "second")), found
