"""The checkpoints of a training on disk: written atomically, and verified before they are used.

A checkpoint is one file, as ``torch.save`` writes it, whose archive lists the size and the CRC-32 of its parts; or a
folder of shards (FSDP2), whose ``manifest.json`` lists those of its files and is written last. Both are written next to
their target, flushed and renamed, so that under the name of a checkpoint there is a complete one or none.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from shadowlit.checkpoint import sharded
from shadowlit.checkpoint.headers import some_of
from shadowlit.checkpoint.structure import DamagedError, damaged, require_parts
from shadowlit.distributed import local, of_all_ranks
from shadowlit.errors import CheckpointError, first_line
from shadowlit.files import partial_path, put_in_place, remove, sync

MANIFEST = "manifest.json"
REST = "meta.pt"  # what a sharded checkpoint holds besides weights and optimizer states
_KEYS = ("state_dict", "global_step", "epoch", "loops", "pytorch-lightning_version")  # of Lightning's, always
_FULL = ("optimizer_states", "lr_schedulers")  # of a checkpoint that a training can resume from
WITHIN_STEP = "within_step"  # key of a checkpoint that holds no gradients of micro-batches that were computed
_READ = 2**22  # bytes that are read at a time
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, OSError)
_EXPECTED = "Expected a *.ckpt, file or folder, that 'fit' has written"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path to write a checkpoint to, file or folder, which replaces ``path`` when it is complete.

    Raises:
        CheckpointError: It can't be written: the disk is full, for example. An earlier checkpoint is still there.
    """
    partial = partial_path(path)
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            put_in_place(partial, path)
    finally:
        remove(partial)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise what keeps a checkpoint from being written as a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        raise write_error(path, next(iter(error.failures.values()))[0]) from error
    except (OSError, RuntimeError) as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: BaseException) -> CheckpointError:
    """Return the error about a checkpoint that can't be written."""
    root: BaseException | None = error
    while root is not None and not isinstance(root, OSError):  # torch's archive complains after the disk
        root = root.__cause__ or root.__context__
    cause = getattr(root, "strerror", None) or first_line(root or error)
    return CheckpointError(
        f"the checkpoint {path} can't be written ({cause}). Earlier checkpoints are intact: free disk space, or save "
        "elsewhere (dirpath of ModelCheckpoint), and resume from the last one (ckpt_path)."
    )


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint as one file.

    Raises:
        CheckpointError: It can't be written.
    """
    with writing(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def checksums(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the size and CRC-32 of files, as the manifest of a folder lists them."""
    return {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)} for name in names}


def write_manifest(folder: Path, step: int, world_size: int, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what makes a folder of shards a complete checkpoint; all that it lists is flushed already.

    Raises:
        OSError: It can't be written, or a file that another rank has written is not visible to this one.
    """
    absent = [name for name, entry in files.items() if not _has_size(folder / name, entry["bytes"])]
    if absent:
        raise OSError(
            f"{some_of(absent)} of other ranks can't be seen by rank 0, so the ranks share no disk; expected a folder "
            "on one, or a strategy with save_distributed_checkpoint=False"
        )
    content = {"step": step, "world_size": world_size, "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)


def find_whole(path: str | Path, *, resumes: bool, contents: bool = True) -> Path:
    """Return the checkpoint at ``path`` if it is complete; a collective of all ranks, which share the reading.

    Where a training is to resume and the checkpoint is damaged, it is replaced by the newest complete one in the same
    folder, with a warning.

    Args:
        path: Path of the checkpoint.
        resumes: Whether a training is to resume from it; otherwise its weights are enough.
        contents: Whether to verify all bytes, and not only names and sizes.

    Raises:
        CheckpointError: It is none, it is damaged and there is no other, or its weights are not finite.
    """
    if "://" in str(path) or str(path).startswith("registry:"):
        raise CheckpointError(
            f"ckpt_path is {path}, an address; expected a path of this machine. Download the checkpoint from a source "
            "that you trust, and give its path."
        )
    path = Path(path)
    problem = _agreed_problem(path, resumes, contents)
    if problem is None:
        return path
    if resumes and isinstance(problem, DamagedError):
        for other in of_all_ranks([_others(path)])[0]:  # as rank 0 sees them
            if _agreed_problem(other, resumes, contents) is None:
                newest = f"the newest complete one (step {step_of(other)})"
                rank_zero_warn(f"{problem} The run resumes from {other}, {newest}.")
                return other
    if isinstance(problem, DamagedError):
        cure = (
            "Give another checkpoint as ckpt_path, or start again without one" if resumes else "Use another checkpoint"
        )
        raise DamagedError(f"{problem} {cure}.")
    raise problem


def newest_whole(folder: Path, *, resumes: bool, contents: bool = True) -> Path | None:
    """Return the newest complete checkpoint in ``folder``, or None if there is none at all; a collective.

    Newer ones that are damaged are passed over, with a warning. For the arguments see :func:`find_whole`.

    Raises:
        CheckpointError: There are checkpoints, but none is complete, or none can be resumed from.
    """
    problems: list[CheckpointError] = []
    for path in of_all_ranks([_checkpoints_in(folder)])[0]:  # as rank 0 sees them
        problem = _agreed_problem(path, resumes, contents)
        if problem is None:
            for each in problems:
                rank_zero_warn(f"{each} It is passed over.")
            return path
        if path.suffix == ".ckpt":
            problems.append(problem)
    if problems:
        raise CheckpointError(f"{problems[0]} {folder} holds no other. Remove it to begin again.")
    return None


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a path has the name of a checkpoint, and is not a folder of anything else."""
    path = Path(path)
    if path.suffix != ".ckpt":
        return False
    return not path.is_dir() or any((path / name).exists() for name in (sharded.INDEX, REST))


def step_of(path: Path) -> int:
    """Return the number of optimizer steps of a checkpoint.

    Raises:
        CheckpointError: It can't be read.
    """
    step: int = read_rest(path)["global_step"]
    return step


def read_rest(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds without running code from it: all of a file, mapped; a folder without its shards.

    Raises:
        CheckpointError: It holds anything but tensors and plain values.
    """
    file = path / REST if path.is_dir() else path
    content = sharded.load_plain(file)
    needed = [key for key in _KEYS if not (path.is_dir() and key == "state_dict")]
    if not isinstance(content, dict) or (missing := [key for key in needed if key not in content]):
        found = f"lacks {', '.join(missing)}" if isinstance(content, dict) else f"holds a {type(content).__name__}"
        raise CheckpointError(f"{file} is not a checkpoint of a training: it {found}. {_EXPECTED}.")
    require_parts(path, content)
    return content


def require_finite(path: Path, state: Mapping[str, Any]) -> None:
    """Raise if weights are not finite numbers; of sharded tensors, this rank checks its own part."""
    tensors = {name: local(t) for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(
            f"{path} holds weights that are not finite numbers: {some_of(wrong)}. The training had diverged: resume "
            "from an earlier checkpoint, with a lower model.lr."
        )


def _agreed_problem(path: Path, resumes: bool, contents: bool) -> CheckpointError | None:
    """What is wrong with a checkpoint, as the first rank that finds something sees it."""
    several = dist.is_available() and dist.is_initialized()
    share = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    own: list[tuple[bool, str]] = []
    try:
        _require_exists(path)
        _verify(path, _stamp(path), share if contents else None, resumes)
    except CheckpointError as error:
        own = [(isinstance(error, DamagedError), str(error))]
    except OSError as error:
        own = [(False, f"{path} can't be read ({first_line(error)}). Give a checkpoint that this user may read.")]
    found = of_all_ranks(own)
    return (DamagedError if found[0][0] else CheckpointError)(found[0][1]) if found else None


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = ((file.name, file.stat()) for file in files)
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def _require_exists(path: Path) -> None:
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{path} is a pipe, socket or device. {_EXPECTED}.")
    if any(path.parent.glob(f"{path.name}.*.partial")):
        raise DamagedError(f"{path} doesn't exist: the run was stopped while it was being written or replaced.")
    there = sorted(file.name for file in path.parent.glob("*.ckpt"))
    advice = f"{path.parent} holds {some_of(there)}; give one of these" if there else _EXPECTED
    raise CheckpointError(f"{path} doesn't exist. {advice}.")


@lru_cache(maxsize=8)  # the command line verifies before anything is loaded, the strategy again
def _verify(path: Path, stamp: Any, share: tuple[int, int] | None, resumes: bool) -> None:
    """Verify a share of a checkpoint, a number and the number of shares; None for names and sizes alone."""
    (_verify_folder if path.is_dir() else _verify_file)(path, share)
    content = read_rest(path)
    absent = [key for key in _FULL if key not in content and not (path.is_dir() and key == "optimizer_states")]
    if resumes and absent:
        raise CheckpointError(
            f"{path} holds weights and no {', '.join(absent)} (save_weights_only of ModelCheckpoint), so a training "
            "can't resume from it. Give a checkpoint that holds all, or use it with validate, test or predict."
        )
    if resumes and content.get(WITHIN_STEP):
        raise CheckpointError(
            f"{path} was written within a step, by an exception or a callback, and holds no gradients of the "
            "micro-batches that were computed, so a training can't resume from it exactly. Give a checkpoint that was "
            "written after a step, use it with validate, test or predict, or start a new run from its weights "
            "(model.start_from)."
        )
    if share is not None and not path.is_dir():  # of shards, when they are loaded
        state = content["state_dict"].items()
        require_finite(path, {name: t for number, (name, t) in enumerate(state) if _is_mine(number, share)})


def _verify_file(path: Path, share: tuple[int, int] | None) -> None:
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        raise CheckpointError(f"{path} is a safetensors file, which holds weights of a model alone. {_EXPECTED}.")
    if not zipfile.is_zipfile(path):
        if not head.strip(b"\0") or head[:2] == b"PK":
            raise damaged(path, f"was cut short at {path.stat().st_size} bytes")
        raise CheckpointError(f"{path} is not a checkpoint: it is not an archive of torch.save. {_EXPECTED}.")
    try:
        with zipfile.ZipFile(path) as archive:
            for number, part in enumerate(archive.infolist()):
                if _is_mine(number, share) or part.filename.endswith("/data.pkl"):  # which every rank reads
                    with archive.open(part) as stream:  # compares the CRC-32
                        while stream.read(_READ):
                            pass
    except _BROKEN as error:
        raise damaged(path, f"has changed since it was written ({first_line(error)})") from error


def _verify_folder(path: Path, share: tuple[int, int] | None) -> None:
    names = {file.name for file in path.iterdir()}
    if not names & {MANIFEST, sharded.INDEX, REST} and not any(name.endswith(".distcp") for name in names):
        inside = sorted(name for name in names if name.endswith(".ckpt"))
        advice = f"Give one of its checkpoints, {some_of(inside)}" if inside else _EXPECTED
        raise CheckpointError(f"{path} is a folder, but no sharded checkpoint: it has no {sharded.INDEX}. {advice}.")
    if missing := [name for name in (sharded.INDEX, REST) if name not in names]:
        raise damaged(path, f"lacks {', '.join(missing)}: it was cut short")
    if special := [name for name in names if (path / name).exists() and not (path / name).is_file()]:
        raise damaged(path, f"holds {some_of(sorted(special))}, expected files alone")
    if MANIFEST in names:
        try:
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
            entries = [(name, int(entry["bytes"]), str(entry["crc32"])) for name, entry in files.items()]
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(path, f"has a {MANIFEST} that can't be read ({first_line(error)})") from error
        entries = [entry for entry in entries if Path(entry[0]).name == entry[0]]
    else:  # of an earlier version, or of Lightning alone
        entries = []
    if wrong := [name for name, size, _ in entries if not _has_size(path / name, size)]:
        raise damaged(path, f"lacks {some_of(wrong)}, or a part of it")
    for number, (name, _, crc32) in enumerate(entries):
        mine = _is_mine(number, share) or name in (sharded.INDEX, REST)  # which every rank reads
        if mine and crc32 and _crc32(path / name) != crc32:
            raise damaged(path, f"has changed since it was written: the CRC-32 of {name} is not that of {MANIFEST}")
    sharded.read_index(path)


def _is_mine(number: int, share: tuple[int, int] | None) -> bool:
    return share is not None and number % share[1] == share[0]


def _others(path: Path) -> list[Path]:
    return [other for other in _checkpoints_in(path.parent) if other != path]


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first: unreadable ones, then by step. Parts of others come last.

    Complete ones that were not renamed yet are included.
    """
    found: list[tuple[float, float, Path]] = []
    for path in folder.rglob("*.ckpt*") if folder.is_dir() else []:
        if path.suffix == ".ckpt" or path.suffix == ".partial":
            try:
                found.append((step_of(path), path.stat().st_mtime, path))
            except (CheckpointError, OSError):
                found.append((math.inf if path.suffix == ".ckpt" else -1.0, 0.0, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def _crc32(file: Path) -> str:
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(_READ):
            value = zlib.crc32(part, value)
    return f"{value:08x}"
