"""Checkpoints of a training: complete or not there, verified before they are used, and never a program."""

import errno
import importlib
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from shadowlit.checkpoint import saved, sharded
from shadowlit.checkpoint.saved import DamagedError, checksums, find_whole, step_of, write_file, write_manifest, writing
from shadowlit.delta.checkpoints import TrainedReader
from shadowlit.errors import CheckpointError
from shadowlit.files import install, partial_path, remove

WEIGHTS = {"model.a": torch.arange(600.0).view(20, 30), "model.b": torch.ones(7)}


class Evil:
    """Leaves a file if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def content(step, **more):
    rest = {"epoch": 0, "loops": {"fit_loop": {}}, "pytorch-lightning_version": "2.6.0", "lr_schedulers": [{}],
            "global_step": step}  # fmt: skip
    return {**rest, "state_dict": WEIGHTS, "optimizer_states": [{"state": {}, "param_groups": []}], **more}


def write_folder(path, step, manifest=True, weights=WEIGHTS, **more):
    """As FSDP2 leaves it; one rank writes both shards."""
    rest = content(step, **more)
    optimizer = {"state": {"model.b": {"step": torch.ones(())}}, "param_groups": [{"lr": 0.5, "params": ["model.b"]}]}
    state = {"state_dict": weights, "optimizer_0": optimizer}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, thread_count=2), no_dist=True)
    torch.save({k: v for k, v in rest.items() if k not in ("state_dict", "optimizer_states")}, path / saved.REST)
    if manifest:
        write_manifest(path, step, 2, checksums(path, sorted(os.listdir(path))))
    return path


def write(path, step):
    (write_folder if path.parent.name == "shards" else lambda path, step: write_file(path, content(step)))(path, step)
    return path


@pytest.fixture(params=["file", "shards"])
def last(request, tmp_path):
    """A checkpoint of step 4, one file or a folder, alone in its folder."""
    return write(tmp_path / request.param / "last.ckpt", 4)


def test_a_new_checkpoint_replaces_the_old_one(last):
    assert find_whole(last, resumes=True) == last and step_of(last) == 4
    new = partial_path(last)
    if last.is_dir():
        write_folder(new, 5)
        install(new, last)
    else:
        write_file(last, content(5))
    assert find_whole(last, resumes=True) == last and step_of(last) == 5
    assert os.listdir(last.parent) == ["last.ckpt"]
    remove(last)
    remove(last)  # again is harmless
    assert os.listdir(last.parent) == []


def test_kinds_replace_each_other(tmp_path):
    path = write_folder(tmp_path / "a.ckpt", 1)
    write_file(path, content(2))
    assert path.is_file() and step_of(path) == 2
    install(write_folder(partial_path(path), 3), path)
    assert path.is_dir() and step_of(path) == 3 and os.listdir(tmp_path) == ["a.ckpt"]


def test_killed_at_any_point_leaves_a_whole_one(last):
    """Beside a torn new one; between the two renames of a folder; and after them."""
    new, old = partial_path(last), partial_path(last)
    torn = write(last.parent / "torn", 9)
    (torn / "manifest.json").unlink() if torn.is_dir() else torn.write_bytes(torn.read_bytes()[:-100])
    torn.rename(new)
    assert find_whole(last, resumes=True) == last
    last.rename(old)
    with pytest.warns(UserWarning, match=r"last.ckpt doesn't exist: the run was stopped .* resumes from .*, the"):
        assert find_whole(last, resumes=True) == (old if new.is_file() else find_whole(new, resumes=True))
    remove(new)
    write(last.parent / "new", 5).rename(new)
    with pytest.warns(UserWarning, match="the newest complete one \\(step 5\\)"):
        assert find_whole(last, resumes=True) == new
    new.rename(last)
    assert find_whole(last, resumes=True) == last and step_of(last) == 5


def damage(path, how):
    """Damage a checkpoint; of a folder the larger shard."""
    file = path if path.is_file() else max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[data.index(torch.tensor([100.0, 101.0]).numpy().tobytes()) + 1] ^= 1
    file.write_bytes(bytes(data) if how == "flipped" else data[: {"empty": 0, "cut": len(data) // 2}[how]])


@pytest.mark.parametrize("how", ["empty", "cut", "flipped"])
def test_a_damaged_one_is_refused_or_replaced_by_the_newest_whole_one(last, how):
    damage(last, how)
    words = {"flipped": "has changed since it was written"}.get(how, "was cut short|or a part of it")
    with pytest.raises(
        DamagedError, match=rf"last.ckpt is damaged: it .*({words}).* Give another checkpoint as ckpt_path"
    ):
        find_whole(last, resumes=True)
    for step in (1, 3, 2):
        write(last.with_name(f"step={step}.ckpt"), step)
    damage(last.with_name("step=3.ckpt"), how)
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged: .* resumes from .*step=2.ckpt, the newest"):
        assert find_whole(last, resumes=True) == last.with_name("step=2.ckpt")
    with pytest.raises(DamagedError):  # another model would be scored
        find_whole(last, resumes=False)


def test_what_every_rank_reads_is_always_verified(last):
    """The pickle of a file, and what a folder holds besides shards; also where only names and sizes are."""
    file = last / "meta.pt" if last.is_dir() else last
    data = bytearray(file.read_bytes())
    data[data.index(b"global_step")] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        find_whole(last, resumes=True, contents=False)


def test_half_removed_and_older_folders(tmp_path):
    """Without a manifest (of an earlier version) sizes are compared; what lacks its index is damaged."""
    path = write_folder(tmp_path / "a.ckpt", 1, manifest=False)
    assert find_whole(path, resumes=True) == path
    damage(path, "cut")
    with pytest.raises(DamagedError, match=r"lacks __0_\d.distcp, or a part of it"):
        find_whole(path, resumes=True)
    (path / ".metadata").unlink()
    with pytest.raises(DamagedError, match=r"lacks .metadata: it was cut short"):
        find_whole(path, resumes=True)


OTHERS = {
    "missing.ckpt": (None, "doesn't exist. .* holds good.ckpt; give one of these"),
    "http://there/a.ckpt": (None, "is http://there/a.ckpt, an address; expected a path of this machine. Download"),
    "registry:a": (None, "an address"),
    "list.ckpt": ([1], "it holds a list. Expected a"),
    "state.ckpt": (WEIGHTS, "is not a checkpoint of a training: it lacks state_dict, global_step"),
    "weights.ckpt": ({k: v for k, v in content(1).items() if k != "optimizer_states"},
                     r"holds weights and no optimizer_states \(save_weights_only"),
    "nan.ckpt": (content(1, state_dict={**WEIGHTS, "model.b": torch.full((7,), torch.nan)}),
                 r"weights that are not finite numbers: model.b\. The training had diverged: resume from"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_checkpoint_is_refused_in_a_line(tmp_path, name):
    value, message = OTHERS[name]
    write_file(tmp_path / "good.ckpt", content(1))
    path = name if ":" in name else tmp_path / name
    if value is not None:
        torch.save(value, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_whole(path, resumes=True)
    assert (
        str(path) in str(caught.value)
        and "\n" not in str(caught.value)
        and len(str(caught.value)) < 400 + len(str(path))
    )


def test_other_files_and_folders_are_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"a": Evil(tmp_path / "run")}))
    (tmp_path / "b.ckpt").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "c").mkdir()
    write_file(tmp_path / "c/d.ckpt", content(1))
    for name, message in {
        "a.ckpt": "it is not an archive of torch.save",
        "b.ckpt": "is a safetensors file",
        "c": r"is a folder, but no sharded checkpoint: it has no .metadata. Give one of its checkpoints, d.ckpt\.",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            find_whole(tmp_path / name, resumes=True)
    assert not (tmp_path / "run").exists()


def spoil(path, trace, where):
    """A checkpoint that would run code when it is read as torch and Lightning read it."""
    if where == "file":
        torch.save(content(1, extra=Evil(trace)), path)
    else:
        rest = {"extra": Evil(trace)} if where == "rest" else {}
        weights = {**WEIGHTS, "extra": Evil(trace)} if where == "value" else WEIGHTS
        write_folder(path, 1, False, weights, **rest)
    if where == "index":
        index = pickle.loads((path / sharded.INDEX).read_bytes())
        index.storage_meta = Evil(trace)
        (path / sharded.INDEX).write_bytes(pickle.dumps(index))
    if where == "outside":
        index = pickle.loads((path / sharded.INDEX).read_bytes())
        for place in index.storage_data.values():
            place.relative_path = f"../{path.name}/{place.relative_path}"
        (path / sharded.INDEX).write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("where", ["file", "rest", "index", "value", "outside"])
def test_no_code_from_a_checkpoint_runs(tmp_path, where):
    """Neither for resuming nor in the analysis; torch alone does run it."""
    trace, path = tmp_path / "trace", tmp_path / "a.ckpt"
    spoil(path, trace, where)

    def resume():
        find_whole(path, resumes=True)
        sharded.read_nested(path, ("state_dict.",), lambda key, shape, dtype: torch.empty(shape), alone=True)

    for read in (resume, lambda: TrainedReader(path).read("a")):
        if where == "value" and read is not resume:
            continue  # it reads weights alone
        with pytest.raises(CheckpointError, match=r"nothing in it was run|UnpicklingError|tensors outside the folder"):
            read()
    assert not trace.exists()
    if where in ("index", "value"):
        dcp.load({"state_dict": {"model.b": torch.ones(7), **({"extra": 0} if where == "value" else {})}},
                 checkpoint_id=path, no_dist=True)  # fmt: skip
        assert trace.exists()


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize("known", ["pathlib PurePosixPath", "pathlib PosixPath", "torch Size", "torch float32",
                                   "torch.serialization _get_layout", "torch.distributed.checkpoint.filesystem "
                                   "_StorageInfo", *(f"torch.distributed.checkpoint.metadata {name}" for name in (
                                       "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                                       "_MEM_FORMAT_ENCODING"))])  # fmt: skip
@pytest.mark.parametrize("value", [b"(N}" + text("name") + text("x") + b"st", b"}" + text("name") + text("x") + b"s"])
def test_an_index_changes_no_class(tmp_path, known, value):
    """BUILD on a class that the index may name; it once set PurePosixPath.name, by which places are checked."""
    path, (module, name) = write_folder(tmp_path / "a.ckpt", 1, False), known.split()
    owner = getattr(importlib.import_module(module), name)
    before, index = dir(owner), (path / sharded.INDEX).read_bytes()
    code = b"\x80\x04" + b"c" + module.encode() + b"\n" + name.encode() + b"\n" + value + b"b0"
    (path / sharded.INDEX).write_bytes(code + index[2:])
    stand_ins = [dir(each) for each in (sharded._Part, *sharded._Part.__subclasses__())]
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        sharded.read_index(path)
    assert dir(owner) == before and Path("/a/b").name == "b"
    assert [dir(each) for each in (sharded._Part, *sharded._Part.__subclasses__())] == stand_ins


def test_an_index_is_read_as_torch_reads_it(tmp_path):
    path = write_folder(tmp_path / "a.ckpt", 1, False, {**WEIGHTS, "half": torch.ones(2, dtype=torch.bfloat16)})
    expected = pickle.loads((path / sharded.INDEX).read_bytes())
    found = sharded.read_index(path)
    for part in ("state_dict_metadata", "planner_data", "storage_data"):
        assert getattr(found, part) == getattr(expected, part) and getattr(found, part)
    assert [place.index for place in found.storage_data] == [place.index for place in expected.storage_data]


@pytest.mark.parametrize(("key", "value"), [
    ("relative_path", "../a.distcp"), ("relative_path", "/etc/passwd"), ("relative_path", ".."), ("relative_path", 3),
    ("offset", -1), ("length", 1.5), ("length", True),
])  # fmt: skip
def test_an_index_with_wrong_places_is_refused(tmp_path, key, value):
    path = write_folder(tmp_path / "a.ckpt", 1, False)
    index = pickle.loads((path / sharded.INDEX).read_bytes())
    for place in index.storage_data.values():
        setattr(place, key, value)
    (path / sharded.INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        find_whole(path, resumes=True)


def test_a_full_disk_names_the_path_and_keeps_the_old_one(last, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = step_of(last)
    monkeypatch.setattr(torch, "save", full)
    message = f"the checkpoint {re.escape(str(last))} can't be written \\(No space left on device\\). Earlier .* resume"
    with pytest.raises(CheckpointError, match=message):
        write_file(last, content(5))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=message), writing(last) as partial:
        partial.mkdir()
        (partial / "shard").touch()
        full()
    assert os.listdir(last.parent) == ["last.ckpt"] and find_whole(last, resumes=True) == last
    assert step_of(last) == before


def test_a_manifest_is_not_written_for_files_that_are_not_there(tmp_path):
    """What another node has written, without a disk that both share."""
    files = {"__9_0.distcp": {"bytes": 3, "crc32": "0"}}
    with pytest.raises(
        OSError, match=r"__9_0.distcp of other ranks can't be seen by rank 0, so the ranks share no disk"
    ):
        write_manifest(tmp_path, 1, 16, files)
    shutil.rmtree(tmp_path)
