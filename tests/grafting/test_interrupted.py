"""Whatever stops a command, what stands at its target is whole or nothing, and what is left over is told."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint import folder as folders
from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader, CheckpointWriter, atomic_folder
from shadowlit.cli.main import main
from shadowlit.errors import CheckpointError, ExportError
from tests.tiny import save_model, save_pair

# How many of the about 120 moments are tried with every signal; SHADOWLIT_MOMENTS=1000 tries all (a minute).
MOMENTS = int(os.environ.get("SHADOWLIT_MOMENTS", "12"))

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Base, Instruct and tuned of 1.3 MB each, in one file, and what the graft makes of them."""
    root = tmp_path_factory.mktemp("models")
    base, _ = save_pair(root, "qwen3", hidden=128)
    save_model(root / "tuned", "qwen3", hidden=128, near=base, seed=5, distance=0.02)
    assert main(graft(root, root / "whole")) == 0
    return root


def graft(models: Path, target: Path, *options: str) -> list[str]:
    given = [f"--{name}={models / name}" for name in ("base", "tuned", "instruct")]
    return ["graft", *given, f"--out={target}", "--shard_size=400KB", *options]


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases' reports, from ``tests/grafting/stopped.py``."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.grafting.stopped"], input=json.dumps(cases), cwd=ROOT, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def num_calls(models) -> int:
    """The calls to the system that an uninterrupted graft makes from its first folder on."""
    [report] = run([{"args": graft(models, models / "counted")}])
    assert report["status"] == 0 and report["calls"] > 80
    return report["calls"]


def stop(models: Path, root: Path, num_calls: int, number: int, processes: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Graft into ``root/<moment>/out``, stopped by a signal at moments spread over the run; folders and reports.

    Among the moments are the last calls, around the folder's appearance and the manifest's last change.
    """
    some = random.Random(number).sample(range(1, num_calls - 10), k=min(MOMENTS, num_calls - 11))
    moments = sorted({*some, *range(num_calls - 10, num_calls - 4, 2)})
    cases = [
        {
            "args": graft(models, root / str(moment) / "out"), "moment": moment, "signal": number,
            "processes": processes,
        }
        for moment in moments
    ]  # fmt: skip
    return [(root / str(moment), report) for moment, report in zip(moments, run(cases), strict=True)]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def require_whole(folder: Path, whole: Path) -> None:
    """All files are there, equal byte for byte but for the manifest, whose last entry may be missing."""
    more = set(left(folder)) - set(left(whole))
    assert set(left(whole)) <= set(left(folder)) and len(more) <= 1
    assert all(name.startswith("shadowlit.json.") and name.endswith(".partial") for name in more)
    for name in set(left(whole)) - {"shadowlit.json"}:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    told = json.loads((folder / "shadowlit.json").read_text())
    assert told.items() <= {**json.loads((whole / "shadowlit.json").read_text()), "survival": told["survival"]}.items()


def require_no_model(folder: Path) -> None:
    """Neither our reader nor transformers takes the folder for a model."""
    with pytest.raises(CheckpointError):
        CheckpointReader(folder)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


THREADS = pytest.param(False, id="threads", marks=pytest.mark.slow)
PROCESSES = pytest.param(True, id="processes")


@pytest.mark.parametrize("processes", [THREADS, PROCESSES])
class TestMoments:
    def test_kill(self, models, num_calls, tmp_path, caplog, processes):
        """Nothing can be cleaned up: only hidden folders are left, and a target only if it is whole."""
        unfinished = []
        for folder, report in stop(models, tmp_path, num_calls, signal.SIGKILL, processes):
            assert report == {"killed_by": signal.SIGKILL}
            if "out" in left(folder):
                assert left(folder) == ["out"]
                require_whole(folder / "out", models / "whole")
            else:
                assert len(left(folder)) <= 1 and all(name.startswith(".out.partial-") for name in left(folder))
                unfinished += [folder / name for name in left(folder)]
        assert len(unfinished) > 5
        for partial in unfinished:
            require_no_model(partial.parent)
            try:
                found = weights(partial)
            except CheckpointError:
                continue
            # All is there, and only the rename is missing.
            assert all(torch.equal(found[name], value) for name, value in weights(models / "whole").items())
        partial = unfinished[-1]
        size = sum(path.stat().st_size for path in partial.rglob("*"))
        assert main(graft(models, partial.parent / "out")) == 0
        require_whole(partial.parent / "out", models / "whole")
        assert left(partial.parent) == [partial.name, "out"]  # another process could still be writing it
        assert f"{partial} ({size / 1e9:.3f} GB) was left unfinished by a killed run" in caplog.text

    @pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_stop_leaves_nothing(self, models, num_calls, tmp_path, number, processes):
        for folder, report in stop(models, tmp_path, num_calls, number, processes):
            assert report["status"] == 128 + number and report["err"] == ""
            if left(folder):
                assert left(folder) == ["out"]
                require_whole(folder / "out", models / "whole")
                assert left(folder / "out") == left(models / "whole")


class TestSignals:
    def test_stop_of_the_real_command(self, models, tmp_path):
        """``python -m shadowlit``, stopped by another process while it writes: it waits at its first shard."""
        (tmp_path / "sitecustomize.py").write_text(
            "import time\nfrom shadowlit.checkpoint.folder import CheckpointWriter\n"
            "CheckpointWriter.add = lambda *_: (print('writing', flush=True), time.sleep(60))\n"
        )
        paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "shadowlit", *graft(models, tmp_path / "to" / "out")]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while process.stdout.readline() != "writing\n":
            assert process.poll() is None, process.stderr.read()
        assert [name[:13] for name in left(tmp_path / "to")] == [".out.partial-"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 143 and "Traceback" not in err
        assert left(tmp_path / "to") == []

    def test_handlers_are_put_back(self, models, tmp_path, monkeypatch):
        """And a background job, which ignores SIGINT, goes on ignoring it."""
        seen = {}

        def look(*_):
            seen.update({number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)})

        monkeypatch.setattr(CheckpointWriter, "close", look)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            main(graft(models, tmp_path / "out"))
            assert seen[signal.SIGINT] is signal.SIG_IGN and callable(seen[signal.SIGTERM])
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        finally:
            signal.signal(signal.SIGINT, before)


class TestFullDisk:
    def test_files_that_may_not_grow(self, models, tmp_path):
        """A limit of the system (EFBIG) at every stage: copies, the first shard's header, its data, its last byte."""
        largest = max(path.stat().st_size for path in (models / "whole").iterdir())
        limits = [100, 1000, 131_000, 131_100, 300_000, largest - 1]
        cases = [
            {"args": graft(models, tmp_path / str(limit) / "out"), "file_bytes": limit} for limit in [*limits, largest]
        ]
        *stopped, enough = run(cases)
        for limit, report in zip(limits, stopped, strict=True):
            assert report["status"] == 1
            assert report["err"].startswith("error: ") and "File too large" in report["err"]
            assert "ree " in report["err"]  # free some space, or choose another target
            assert left(tmp_path / str(limit)) == []
        assert enough["status"] == 0
        require_whole(tmp_path / str(largest) / "out", models / "whole")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
    def test_room_is_reserved_before_a_large_tensor(self, tmp_path, monkeypatch, code):
        """A disk without it is told before a byte is written; a file system that can't reserve any does without."""

        class Library:
            def __init__(self, *_, **__):
                pass

            def fallocate(self, *_):
                ctypes.set_errno(code)
                return -1

        monkeypatch.setattr(streaming.ctypes, "CDLL", Library)
        monkeypatch.setattr(folders, "_RESERVE_BYTES", 8)
        writer = CheckpointWriter(tmp_path)
        parts = iter([torch.ones(2)])
        streamed = folders.Streamed("F32", (2,), parts)
        if code == errno.ENOSPC:
            with pytest.raises(
                CheckpointError, match=r"'w' could not be written .*No space left.*Free some disk space"
            ):
                writer.add("w", streamed)
            assert next(parts) is not None and left(tmp_path) == []
        else:
            writer.add("w", streamed)
            writer.close()
            assert torch.equal(weights(tmp_path)["w"], torch.ones(2))

    def test_reserving_leaves_the_size(self, tmp_path):
        with (tmp_path / "file").open("wb") as stream:
            stream.write(b"x")
            stream.flush()
            streaming.reserve(stream.fileno(), 1, 2**20)
        assert (tmp_path / "file").read_bytes() == b"x"

    def test_an_adapter_that_does_not_fit(self, tmp_path):
        """safetensors' own writer tells a full disk as an error of its own."""
        from safetensors.torch import save_file

        with (
            pytest.raises(ExportError, match=r"out could not be written: .*Nothing is left"),
            atomic_folder(tmp_path / "out") as folder,
        ):
            save_file({"a": torch.ones(4)}, folder / "missing" / "adapter_model.safetensors")
        assert left(tmp_path) == []

    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
    def test_flushing_to_the_disk_fails(self, models, tmp_path, monkeypatch, capsys, code):
        def fail(_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        assert main(graft(models, tmp_path / "out")) == 1
        assert f"out could not be written: [Errno {code}]" in capsys.readouterr().err
        assert left(tmp_path) == []

    def test_target_that_is_taken_meanwhile(self, models, tmp_path, monkeypatch, capsys):
        """Two runs with one target: the second says where its finished folder is, and the first one's stays."""
        close = CheckpointWriter.close

        def other_run(writer: CheckpointWriter) -> None:
            close(writer)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "theirs").write_text("x")

        monkeypatch.setattr(CheckpointWriter, "close", other_run)
        assert main(graft(models, tmp_path / "out")) == 1
        [partial] = [name for name in left(tmp_path) if name != "out"]
        assert f"The finished folder was kept as {tmp_path / partial}" in capsys.readouterr().err
        assert left(tmp_path / "out") == ["theirs"]
        require_whole(tmp_path / partial, models / "whole")

    @pytest.mark.parametrize("num_tensors", [1, 3])
    def test_writer_alone_leaves_nothing(self, tmp_path, monkeypatch, num_tensors):
        """Without an atomic folder around it: the index, or a shard's last bytes, cannot be written."""
        writer = CheckpointWriter(tmp_path, max_shard_bytes=8)
        for i in range(num_tensors):
            writer.add(f"t{i}", torch.ones(2))

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text" if num_tensors > 1 else "rename", full)
        with pytest.raises(CheckpointError, match=r"could not be completed: .*No space left.*Free some disk space"):
            writer.close()
        assert left(tmp_path) == []

    def test_manifest_that_cannot_be_completed(self, models, tmp_path, monkeypatch, capsys):
        """The model is whole when its manifest gets its last entry: it stays, with the manifest it had."""
        replace, count = os.replace, [0]

        def full(*args):
            count[0] += 1
            if count[0] > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(*args)

        monkeypatch.setattr(os, "replace", full)
        assert main(graft(models, tmp_path / "out")) == 1
        assert "shadowlit.json could not be written" in capsys.readouterr().err
        require_whole(tmp_path / "out", models / "whole")
        assert left(tmp_path / "out") == left(models / "whole")
