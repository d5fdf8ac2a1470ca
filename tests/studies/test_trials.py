"""Trainings in processes of their own: what they leave, and what the next one waits for when they were killed."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import psutil
import pytest
import torch
from filelock import FileLock

from shadowlit import lightning_cli
from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ShadowlitError
from shadowlit.studies import progress
from shadowlit.studies.sweep.scheduler import Scheduler
from shadowlit.studies.trials import folder as module
from shadowlit.studies.trials import process as process_module
from shadowlit.studies.trials import trial
from shadowlit.studies.trials.process import Job, Running, TrialProcess, start, stop_all
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


STUBBORN = """
import os, re, subprocess
from pathlib import Path
worker = subprocess.Popen(["sleep", "600"])
Path({told!r}).write_text(str(worker.pid))
re.match("(a+)+$", "a" * 60 + "b")  # never ends, and holds Python's lock, so that no thread runs
"""


@pytest.mark.parametrize("kind", ["busy", "stopped"])
def test_a_training_ends_with_its_command_whatever_it_does(tmp_path, monkeypatch, kind):
    """And so does what it has started: ranks and data workers are of its process group."""
    (tmp_path / "stubborn.py").write_text(STUBBORN.format(told=str(tmp_path / "worker")))
    monkeypatch.syspath_prepend(tmp_path)
    home = tmp_path / "home"
    job = Job("home", ("fit", "--model.class_path=stubborn.Mine"))
    command = Forked(start_and_wait, job, home, tmp_path / "pid", out=tmp_path / "told.txt")
    wait_for(lambda: all((tmp_path / name).is_file() and (tmp_path / name).read_text() for name in ("pid", "worker")))
    family = [psutil.Process(int((tmp_path / name).read_text())) for name in ("pid", "worker")]
    if kind == "stopped":
        family[0].suspend()
    assert not any(has_ended(each) for each in family)
    command.send_signal(signal.SIGKILL)
    command.wait(10)
    wait_for(lambda: all(has_ended(each) for each in family), seconds=5)
    with FileLock(home / ".lock", timeout=1):
        pass


def test_a_training_that_is_stopped_takes_along_what_it_has_started(tmp_path, monkeypatch):
    """It ignores SIGTERM, so that it is killed when it has had its time; several have theirs at the same time."""
    monkeypatch.setattr(process_module, "_PATIENCE_S", 0.2)
    code = "import signal, subprocess; signal.signal(15, signal.SIG_IGN); "
    code += "worker = subprocess.Popen(['sleep', '600']); print(worker.pid, flush=True); worker.wait()"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0, text=True)
        for _ in range(3)
    ]
    workers = [psutil.Process(int(job.stdout.readline())) for job in jobs]
    begun = time.monotonic()
    stop_all([TrialProcess(job, job.poll, job.wait) for job in jobs])
    assert 0.2 < time.monotonic() - begun < 0.5
    wait_for(lambda: all(has_ended(each) for each in workers), seconds=5)
    assert [job.wait(5) for job in jobs] == [-signal.SIGKILL] * 3


BAD = Job("home", ("fit", "--no_such_key=1"))


def test_a_training_waits_until_its_folder_is_free(tmp_path):
    """The folder is left after half a second: until then nothing of it may be touched."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "half").write_text("written")
    held, seen = FileLock(home / ".lock", thread_local=False).acquire(), []

    def leave():
        time.sleep(0.5)
        seen.append((home / "half").is_file())
        held.lock.release()

    threading.Thread(target=leave).start()
    second = start(BAD, home, threads=1)
    assert seen == [True] and not (home / "half").exists()
    second.wait(60)
    assert second.poll() == 2 and "no_such_key" in (home / "log.txt").read_text()


def test_a_training_that_does_not_leave_its_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    (tmp_path / "half").write_text("written")
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ShadowlitError, match=r"still running in .* after .*fuser .*/\.lock shows its process"),
    ):
        start(BAD, tmp_path)
    assert (tmp_path / "half").is_file()


def test_a_folder_that_is_no_training_s_is_not_cleared(tmp_path):
    (tmp_path / "thesis.tex").write_text("written")
    with pytest.raises(ShadowlitError, match=r"home would be trained, but it holds .*\(thesis\.tex\), which would"):
        start(BAD, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "written"


def test_every_rank_of_an_orphan_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    with FileLock(tmp_path / ".lock1"), pytest.raises(ShadowlitError, match=r"fuser .*\.lock1"):
        start(BAD, tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with module.occupied(tmp_path), pytest.raises(ShadowlitError, match=r"fuser .*\.lock1"), module.vacated(tmp_path):
        pass


def test_a_training_ends_whose_command_was_killed_during_its_start_up(tmp_path):
    """In an interpreter of its own; the other end of its standard input is closed already."""
    command = [sys.executable, "-m", "shadowlit.studies.trials.trial", str(tmp_path), "fit", "--no_such_key=1"]
    with FileLock(tmp_path / ".lock"):
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, process_group=0)
    assert ended.returncode == -signal.SIGKILL and not ended.stderr


class Fitted:
    """What a command line of ``fit`` leaves, of which the callback has been told these validations."""

    def __init__(self, callback, validations, last):
        self.evaluation = EvaluationCallback()
        graft, self.ran = GraftCallback(), 0
        self.trainer = self
        self.model = self.datamodule = self
        self.callbacks, self.sanity_checking, self.is_global_zero = [graft, self.evaluation], False, True
        self.fit_loop, self.num_training_batches = SimpleNamespace(total_batch_idx=last - 1), 10
        self.callback_metrics = {"val/grafted/loss": torch.tensor(1.0), "val/grafted/rare/score": torch.tensor(0.5)}
        for self.global_step, due, evaluators in validations:
            self.evaluation.due, self.evaluation.evaluators = list(due), dict.fromkeys(evaluators)
            graft.record.metrics = {name: 1.0 for name in self.callback_metrics if "rare" in due or "loss" in name}
            callback.on_validation_end(self, None)
        self.global_step = last

    def validate(self, *_, **__):
        self.ran += 1

    def parameters(self):
        return iter(())

    def trained_tokens(self, epochs):
        return 7.0


@pytest.mark.parametrize(
    ("validations", "again"),
    [
        ([(2, "", ""), (4, "", "")], 0),  # no evaluators
        ([(2, "", "")], 1),
        ([], 1),
        ([(2, ["rare"], ["rare"]), (4, ["rare"], ["rare"])], 0),
        ([(2, ["often", "rare"], ["often", "rare"]), (4, ["often"], ["often", "rare"])], 1),  # stopped early
    ],
)
def test_a_trial_is_measured_once_at_its_end(tmp_path, monkeypatch, validations, again):
    made = []
    monkeypatch.setattr(
        lightning_cli, "main", lambda _, callbacks: made.append(Fitted(*callbacks, validations, 4)) or made[0]
    )
    trial.main(tmp_path, ["fit"])
    assert made[0].ran == again
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 4
    if validations:  # and a score that this validation did not measure is not told as its own
        live = json.loads((tmp_path / "live.json").read_text())
        assert live["step"] == validations[-1][0] and ("val/grafted/rare/score" in live["metrics"]) == (
            "rare" in validations[-1][1]
        )


@pytest.mark.parametrize(("stop", "code"), [(3, 3), (None, 0), ("the licence has expired", 1),
                                            (RuntimeError("password=S3CRET"), 1)])  # fmt: skip
def test_what_ends_a_trial_is_told(tmp_path, monkeypatch, capsys, stop, code):
    def end(*_):
        if isinstance(stop, Exception):
            raise stop
        sys.exit(stop)

    monkeypatch.setattr(trial, "main", end)
    monkeypatch.setattr(trial, "occupied", lambda *_: nullcontext())
    monkeypatch.setattr(trial, "_end_with_command", lambda _: None)
    monkeypatch.setattr(trial.multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=None))
    monkeypatch.setattr(trial.os, "setpgid", lambda *_: None)
    monkeypatch.setattr(trial.os, "dup2", lambda *_: None)
    ended = []
    monkeypatch.setattr(trial.os, "_exit", ended.append)
    trial.run_logged(tmp_path, ["fit"])
    error = capsys.readouterr().err
    if isinstance(stop, Exception):
        assert error.startswith("Traceback") and error.endswith("RuntimeError: password=**********\n\n")
        assert "S3CRET" not in error
    else:
        assert error == (f"{stop}\n" if isinstance(stop, str) else "")
    assert ended == [code]


def test_an_interruption_that_can_not_be_recorded_is_logged(caplog):
    scheduler = Scheduler.__new__(Scheduler)
    running = Running("lr=1", SimpleNamespace(stop=lambda: None), 0, claim="claim")
    scheduler._pool = SimpleNamespace(stop=lambda: [running])
    scheduler.study = SimpleNamespace(fail=lambda *_: [][0])
    scheduler._stop()
    assert "lr=1 could not be marked as interrupted: IndexError: list index out of range" in caplog.text


def test_progress_without_a_terminal_counts_what_has_ended_and_failed_and_estimates_the_rest(monkeypatch, capsys):
    now = iter([0.0, 0.0, 90.0, 90.0, 90.0, 90.0, 90.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.StudyProgress("trainings", 6, "report/loss")
    monkeypatch.setattr(shown._line, "is_due", lambda: True)
    shown.end("a", progress.SKIPPED)
    shown.end("b", "complete")
    shown.end("c", "failed", "no memory")
    shown.poll([Running("d", None, 0, begun=0.0)], lambda each: vars(each).update(step=40, value=1.25))
    told = " ".join(capsys.readouterr().out.split())
    # two have run in 90 s, so that three more take 135 s
    assert told.endswith("3/6 trainings, 1 failed, 1:30, 2:15 left, d: step 40 report/loss 1.250")
    assert "c failed: no memory" in told
