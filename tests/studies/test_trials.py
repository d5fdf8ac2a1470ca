"""Trainings whose command was killed: the next one waits until their folder is theirs alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from filelock import FileLock

from shadowlit.errors import ShadowlitError
from shadowlit.studies.trials import folder as module
from shadowlit.studies.trials.process import Job, start
from tests.distributed import Forked


def start_and_wait(job, home, told):
    """A command that starts a training, and then only waits to be killed."""
    process = start(job, home, threads=1).process
    told.write_text(str(process.pid))
    process.join()


def has_ended(process):
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def orphan(tmp_path):
    """A training in the folder ``home`` that hasn't noticed yet that its command was killed: it was stopped before."""
    home = tmp_path / "home"
    os.mkfifo(tmp_path / "fit.yaml")  # nobody writes it: the training reads its configuration for ever
    job = Job("home", ("fit", f"--config={tmp_path / 'fit.yaml'}"))
    command = Forked(start_and_wait, job, home, tmp_path / "pid", out=tmp_path / "told.txt")
    wait_for(lambda: (home / "log.txt").is_file() and (tmp_path / "pid").is_file())
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    process.suspend()
    command.send_signal(signal.SIGKILL)
    command.wait(10)
    (home / "half").write_text("written")
    yield process
    with suppress(psutil.NoSuchProcess):
        process.kill()


BAD = Job("home", ("fit", "--no_such_key=1"))


def test_a_training_waits_for_the_orphan_in_its_folder(orphan, tmp_path):
    """The orphan is let go after a second: until then nothing of its folder may be touched."""
    seen = []

    def resume():
        time.sleep(1)
        seen.append((tmp_path / "home/half").is_file())
        orphan.resume()

    threading.Thread(target=resume).start()
    second = start(BAD, tmp_path / "home", threads=1)
    assert seen == [True] and has_ended(orphan)
    assert not (tmp_path / "home/half").exists()
    second.wait(60)
    assert second.poll() == 2 and "no_such_key" in (tmp_path / "home/log.txt").read_text()


def test_an_orphan_that_does_not_end_is_named(orphan, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with pytest.raises(ShadowlitError, match=r"still running in .*home after .*fuser .*home/\.lock shows its process"):
        start(BAD, tmp_path / "home")
    assert (tmp_path / "home/half").is_file()


def test_every_rank_of_an_orphan_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with FileLock(tmp_path / ".lock1"), pytest.raises(ShadowlitError, match=r"fuser .*\.lock1"):
        start(BAD, tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with module.occupied(tmp_path), pytest.raises(ShadowlitError, match=r"fuser .*\.lock1"), module.vacated(tmp_path):
        pass


def test_a_training_ends_whose_command_was_killed_during_its_start_up(tmp_path):
    """In an interpreter of its own, which is a child of this process and not of the command."""
    command = [sys.executable, "-m", "shadowlit.studies.trials.trial", str(tmp_path), "fit", "--no_such_key=1"]
    environment = {**os.environ, "SHADOWLIT_PARENT": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 1 and not ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
