"""The second signal, a process that doesn't end by itself, and a rank whose parent has ended."""

import os
import signal
import time
from pathlib import Path

import pytest

from shadowlit import signals
from shadowlit.errors import Interrupted
from tests.distributed import Forked


def wait_for(number, patience_s, own):
    """Wait for a boundary that never comes after a signal; then perhaps another one comes."""
    signals.PATIENCE_S, signals._REPEATED_S, signals._POLL_S = patience_s, 0.1, 0.05
    try:
        with signals.StopSignals().caught() as stop:
            stop.waits = True
            for each in own:
                os.kill(os.getpid(), each)
                time.sleep(0.2)
            print(f"still here after {stop.number}", flush=True)
            os.kill(os.getpid(), number)
            time.sleep(30)
    except Interrupted:
        return 1
    return 0


@pytest.mark.parametrize(("own", "number", "patience_s", "why"), [
    ([signal.SIGTERM], signal.SIGTERM, 30, "a second signal"),
    ([signal.SIGUSR1, signal.SIGTERM], signal.SIGINT, 30, "a second signal"),
    ([], signal.SIGTERM, 0.2, "no boundary within 0 s after the signal"),
])  # fmt: skip
def test_a_second_signal_ends_at_once_and_so_does_patience(tmp_path, own, number, patience_s, why):
    """SIGTERM after SIGUSR1 is what was announced, and no second signal."""
    ended = Forked(wait_for, number, patience_s, own, out=tmp_path / "out.txt").wait(10)
    text = (tmp_path / "out.txt").read_text()
    assert ended == 128 + number and why in text and f"still here after {own[0] if own else None}" in text


def test_the_first_signal_interrupts_where_no_boundary_is_waited_for_and_is_never_swallowed():
    with pytest.raises(Interrupted) as stopped, signals.StopSignals().caught():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except Interrupted:
            pass  # as in an object's __del__
    assert stopped.value.code == 130
    with pytest.raises(Interrupted) as stopped, signals.StopSignals().caught() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a rank that has ended before")
    assert stopped.value.code == 143 and type(stopped.value.__cause__) is RuntimeError


def start_rank(out):
    """A command that starts a rank, as Lightning's launcher does, and is killed; the rank hangs."""
    os.environ[signals._PARENT] = str(os.getpid())
    if os.fork() == 0:
        assert signals.end_with_parent()
        Path(out).write_text(str(os.getpid()))
        time.sleep(60)
    time.sleep(60)


def test_a_rank_ends_with_the_process_that_started_it(tmp_path):
    command = Forked(start_rank, tmp_path / "pid.txt", out=tmp_path / "out.txt")
    while not (tmp_path / "pid.txt").exists() or not (pid := (tmp_path / "pid.txt").read_text()):
        time.sleep(0.01)
    os.kill(int(pid), signal.SIGSTOP)  # even one that is stopped
    command.send_signal(signal.SIGKILL)
    command.wait(5)
    deadline = time.monotonic() + 3
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
