"""Checkpoints whose parts have another form than fit writes: an error of a line, by every reader, before any is used.

Without the check each of these ends in a traceback of torch or Lightning, in memory that nothing was read into, or
never.
"""

import math
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from shadowlit.checkpoint import sharded
from shadowlit.checkpoint.saved import DamagedError, find_whole, newest_whole, step_of, write_file
from shadowlit.checkpoint.structure import _covers
from shadowlit.delta.checkpoints import TrainedReader
from shadowlit.errors import CheckpointError
from tests.checkpoint.test_saved import content, write_folder

PARTS = [
    ("state_dict", [1]), ("state_dict", None), ("state_dict", {3: torch.ones(1)}), ("callbacks", [1]),
    ("callbacks", {"a": 5}), ("loops", {}), ("loops", 3), ("loops", {"fit_loop": 3}),
    ("pytorch-lightning_version", "abc"), ("pytorch-lightning_version", None), ("optimizer_states", None),
    ("optimizer_states", [3]), ("optimizer_states", [{"state": [], "param_groups": []}]),
    ("optimizer_states", [{"state": {}, "param_groups": [1]}]), ("lr_schedulers", {}), ("lr_schedulers", [None]),
    ("global_step", "abc"), ("global_step", None), ("global_step", math.nan), ("global_step", -1),
    ("global_step", True), ("epoch", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), PARTS)
def test_a_part_of_another_form_is_an_error_of_every_reader(tmp_path, key, value):
    path = tmp_path / "a.ckpt"
    write_file(path, content(3, **{key: value}))
    for read in (lambda: find_whole(path, resumes=True), lambda: find_whole(path, resumes=False), lambda: step_of(path),
                 lambda: newest_whole(tmp_path, resumes=True), lambda: TrainedReader(path)):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"a.ckpt is damaged: it holds .* as {key}, expected ") as caught:
            read()
        assert "\n" not in str(caught.value)
    write_file(tmp_path / "b.ckpt", content(2))
    with pytest.warns(UserWarning, match="a.ckpt is damaged: .* It is passed over"):
        assert newest_whole(tmp_path, resumes=True) == tmp_path / "b.ckpt"


A = "state_dict.model.a"


def place_of(index, name=A):
    return next(place for key, place in index.storage_data.items() if key.fqn == name)


def resize(index, size, chunks=None):
    entry = index.state_dict_metadata[A]
    entry.size = torch.Size(size)
    for each in [] if chunks is None else entry.chunks:
        object.__setattr__(each, "sizes", torch.Size(chunks))


def swap(index):
    object.__setattr__(place_of(index), "length", 1)


def shift(index):
    object.__setattr__(index.state_dict_metadata[A].chunks[0], "offsets", torch.Size((5, 0)))


INDICES = {
    "no chunks": lambda index: index.state_dict_metadata[A].chunks.clear(),
    "huge": lambda index: resize(index, (10**9, 10**6)),
    "huge, and its chunk": lambda index: resize(index, (10**7, 10**6), (10**7, 10**6)),
    "small": lambda index: resize(index, (2, 2)),
    "negative": lambda index: resize(index, (-1, 30)),
    "shifted": shift,
    "too little in its place": swap,
    "twice": lambda index: index.state_dict_metadata[A].chunks.append(index.state_dict_metadata[A].chunks[0]),
    "before the file": lambda index: object.__setattr__(place_of(index), "offset", -5),
    "after the file": lambda index: object.__setattr__(place_of(index), "offset", 10**18),
    "no places": lambda index: setattr(index, "storage_data", None),
    "a list": lambda index: setattr(index, "state_dict_metadata", [1]),
    "a name": lambda index: index.state_dict_metadata.update({3: index.state_dict_metadata[A]}),
    "no keys": lambda index: setattr(index, "planner_data", None),
    "some keys": lambda index: index.planner_data.pop(A),
    "other keys": lambda index: index.planner_data.update({A: ("state_dict", 10**9, "x")}),
    "a long list": lambda index: index.planner_data.update({A: ("state_dict", "model", "a", 10**9)}),
    "a long list of that name": lambda index: [
        part.update({"state_dict.1000000000": part.pop(A)}) for part in (index.state_dict_metadata,)
    ] and index.planner_data.update({"state_dict.1000000000": ("state_dict", 10**9)}),
}  # fmt: skip


@pytest.mark.parametrize("what", INDICES)
@pytest.mark.parametrize("manifest", [False, True])
def test_an_index_that_does_not_place_each_element_once_is_damaged(tmp_path, what, manifest):
    path = write_folder(tmp_path / "a.ckpt", 1, False)
    index = pickle.loads((path / sharded.INDEX).read_bytes())
    INDICES[what](index)
    (path / sharded.INDEX).write_bytes(pickle.dumps(index))
    if manifest:
        (path / "manifest.json").write_text('{"files": {}}')
    for read in (lambda: find_whole(path, resumes=True), lambda: TrainedReader(path)):
        with pytest.raises(
            CheckpointError, match=r"it (has an index|lacks __0_\d.distcp, or)|can't be read as the index"
        ):
            read()


@pytest.mark.parametrize(("size", "boxes", "covers"), [
    ((4, 6), [((0, 0), (4, 3)), ((0, 3), (4, 3))], True),
    ((4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))], True),
    ((4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6)), ((4, 0), (0, 6))], True),  # a rank without rows
    ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], True),
    ((0, 6), [((0, 0), (0, 6))], True),
    ((), [((), ())], True),
    ((), [], False),
    ((), [((), ()), ((), ())], False),
    ((0, 6), [], False),
    ((4, 6), [((0, 0), (2, 6))], False),
    ((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))], False),  # as many elements, some twice
    ((4, 4), [((0, 0), (4, 2)), ((0, 1), (4, 2))], False),
    ((4,), [((0, 0), (4, 1))], False),
])  # fmt: skip
def test_chunks_cover_a_tensor_exactly_once(size, boxes, covers):
    entry = metadata.TensorStorageMetadata(
        metadata.TensorProperties(torch.float32), torch.Size(size),
        [metadata.ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)) for start, sizes in boxes],
    )  # fmt: skip
    places = {metadata.MetadataIndex("a", torch.Size(start)): _StorageInfo("f", 0, 10**6) for start, _ in boxes}
    assert _covers("a", entry, places) == covers


@pytest.mark.parametrize("text", ['{"files":{"a":{"bytes":1e999,"crc32":"0"}}}', "[" * 100_000, '{"files":3}'])
def test_a_manifest_of_another_form_is_damaged(tmp_path, text):
    path = write_folder(tmp_path / "a.ckpt", 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(DamagedError, match=r"a.ckpt is damaged: it has a manifest.json that can't be read"):
        find_whole(path, resumes=True)


def test_what_is_neither_file_nor_folder_is_not_opened(tmp_path):
    """Opening a pipe waits for whoever writes to it; a device may never end."""
    path = write_folder(tmp_path / "folder.ckpt", 1)
    os.mkfifo(tmp_path / "pipe.ckpt")
    pipe = tmp_path / "pipe.ckpt"
    for read in (lambda: find_whole(pipe, resumes=True), lambda: find_whole("/dev/zero", resumes=True),
                 lambda: TrainedReader(pipe), lambda: step_of(pipe)):  # fmt: skip
        with pytest.raises(CheckpointError, match="is a pipe, socket or device"):
            read()
    with pytest.warns(UserWarning, match="pipe.ckpt is a pipe, socket or device.* It is passed over"):
        assert newest_whole(tmp_path, resumes=True) == path
    for name in (".metadata", "meta.pt", "manifest.json"):
        (path / name).rename(path / "kept")
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match=r"expected files alone|is a pipe"):
            find_whole(path, resumes=False)
        (path / "kept").replace(path / name)
