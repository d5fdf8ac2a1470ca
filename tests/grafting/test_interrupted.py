"""Whatever stops a command, what stands at its target is whole or nothing, and what is left over is told."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shadowlit.checkpoint import folder as folders
from shadowlit.checkpoint import streaming
from shadowlit.checkpoint.folder import CheckpointReader, CheckpointWriter, atomic_folder
from shadowlit.cli.main import main
from shadowlit.errors import CheckpointError, ExportError
from tests.tiny import save_model, save_pair

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


def test_what_a_killed_run_has_left_is_reported_and_stays(models, tmp_path, caplog):
    """Another process could still be writing it."""
    partial = tmp_path / ".out.partial-0123"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(bytes(10**6))
    assert main(graft(models, tmp_path / "out")) == 0
    require_whole(tmp_path / "out", models / "whole")
    assert left(tmp_path) == [partial.name, "out"]
    assert f"{partial} (1.00 MB) was left unfinished by a killed run" in caplog.text


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
