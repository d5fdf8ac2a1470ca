"""The status line in recorded terminals of several widths, resized in the middle, and without one."""

import functools
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shadowlit.status import StatusLine
from shadowlit.text import count, duration, fitted, number, size

from .terminal import record

LONG = "/a/folder/" + "of-many-names/" * 12 + "model"
SCRIPT = f"""
import logging, sys, time, warnings
from shadowlit.status import StatusLine
log = logging.getLogger("lightning.pytorch")
log.addHandler(logging.StreamHandler())
log.setLevel(logging.INFO)
line = StatusLine(log.info)
line.start()
for step in range(1, 7):
    parts = [f"step {{step}}/6", "loss 0.412", "grafted 0.398", "gain +1.23", "12:05 left", "4,120 tokens/s"]
    line.show(lambda: parts, now=True)
    time.sleep(0.05)
    if step == 2: log.info("export: in {LONG}")
    if step == 3: print("half", end=""); time.sleep(0.01); print(" a line")
    if step == 4: warnings.warn("careful")
    if step == 5: print("resized", file=sys.stderr); time.sleep(0.3)
line.stop()
print("table")
"""


@pytest.mark.parametrize(("columns", "later"), [(80, 80), (100, 80), (200, 100), (80, 200)])
def test_others_lines_are_whole_and_the_status_line_stands_once_below_them(columns, later):
    session = record(["-c", SCRIPT], columns, [("resized", later)])
    assert session.status == 0
    text = "\n".join(session.lines)
    assert "step" not in text  # erased
    rows = ["".join(line.ljust(columns) for line in lines) for lines in session.snapshots]
    assert any(f"export: in {LONG} " in whole for whole in rows)  # over several rows, before the resize
    assert [line for line in session.lines if line in ("half a line", "resized", "table")] == [
        "half a line", "resized", "table",
    ]  # fmt: skip
    assert "UserWarning: careful" in text
    for lines in session.snapshots:
        shown = [line for line in lines if "step" in line]
        assert len(shown) <= 1 and (not shown or lines[-1] == shown[0])
        assert not shown or shown[0].endswith("  loss 0.412  grafted 0.398  gain +1.23  12:05 left  4,120 tokens/s")
    assert any("step 6/6" in lines[-1] for lines in session.snapshots if lines)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_in_tmux_too_the_line_is_shown_once_and_others_stay(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT + "time.sleep(60)\n")
    tmux = ["tmux", "-L", f"shadowlit-{os.getpid()}", "-f", "/dev/null"]
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    path = f"PYTHONPATH={Path(__file__).parents[1]}"
    run([*tmux, "new-session", "-d", "-x", "100", "-y", "40", "env", path, sys.executable, str(tmp_path / "script.py")])
    try:
        screens = []
        for _ in range(600):
            screens.append(run([*tmux, "capture-pane", "-p", "-S", "-", "-J"]).stdout)
            if "resized" in screens[-1] and len(screens[-1]) and not any("resize" in s for s in screens[:-1]):
                run([*tmux, "resize-window", "-x", "80", "-y", "40"])
            if "table" in screens[-1]:
                break
            time.sleep(0.02)
    finally:
        run([*tmux, "kill-server"])
    assert f"export: in {LONG}\n" in screens[-1] and "/6" not in screens[-1]
    assert [x for x in screens[-1].split("\n") if x in ("half a line", "resized", "table")] == [
        "half a line", "resized", "table",
    ]  # fmt: skip
    assert any("12:05 left  4,120 tokens/s" in screen for screen in screens)
    assert all(screen.count("/6") <= 1 for screen in screens)


BREAKS = f"""
import logging, sys, warnings
from shadowlit.progress import make_console
from shadowlit.quiet import quieten
import lightning.pytorch
quieten()
sentence = "the logits differ from those of the validated graft by at most 0.0000123 in one of the layers, and by none"
logging.getLogger("lightning.pytorch").info("export: %s", sentence)
logging.getLogger("lightning.pytorch").info("wrote it to {LONG} and ended")
logging.getLogger("shadowlit.any").warning(sentence)
warnings.warn(sentence)
make_console().print("  1. " + sentence)
make_console().print('    model = AutoModelForCausalLM.from_pretrained("{LONG}")')
"""


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_lines_break_between_words_and_what_is_to_be_copied_stays_whole(columns):
    session = record(["-c", BREAKS], columns)
    sentence = BREAKS.partition('sentence = "')[2].partition('"')[0]
    words = {*sentence.split(), "export:", "warning:", "1.", "wrote", "it", "to", "and", "ended"}
    rows = ["".join(line.ljust(columns) for line in session.lines)]
    assert f'    model = AutoModelForCausalLM.from_pretrained("{LONG}")' in rows[0] and f"{LONG} " in rows[0]
    end = next(i for i, line in enumerate(session.lines) if "model = " in line)
    text = [line for line in session.lines[:end] if "many-names" not in line]
    assert {word for line in text for word in line.split()} <= words | {"model"}  # the end of the path
    assert " ".join(" ".join(text).split()).count(sentence) == 4


def test_text_that_goes_to_a_file_is_not_broken():
    assert fitted("word " * 100, io.StringIO()) == "word " * 100


def test_without_a_terminal_there_is_a_line_from_time_to_time(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    lines: list[str] = []
    line = StatusLine(lines.append, every_s=9)
    line.start()  # at 0
    for step in range(20):  # each takes a second to ask, and one to note the time
        line.show(lambda step=step: [f"step {step}", "loss 1"])
    line.show(lambda: ["validated"], now=True)
    line.stop()
    assert lines == ["step 8, loss 1", "step 17, loss 1", "validated"]


def test_a_terminal_that_is_too_narrow_loses_the_least_important_parts():
    session = record(["-c", SCRIPT], 30)
    shown = {line for lines in session.snapshots for line in lines if "step" in line}
    assert shown == {f"step {n}/6  loss 0.412" for n in range(1, 7)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(number(0.412), "0.4120"), (number(12.3456), "12.35"), (number(1234.5), "1,234"),
     (number(-0.01234, True), "-0.01234"),
     (number(0.0, True), "+0.000"), (number(-0.0), "0.000"), (size(35e9), "35.0 GB"), (size(273_456_789), "273 MB"),
     (size(1.9994e9), "2.00 GB"), (size(117), "117 bytes"), (size(0), "0 bytes"), (size(float("nan")), "not known"),
     (size(999_960), "1.00 MB"), (number(float("nan")), "nan"), (number(1.2345, digits=3), "1.23"),
     (number(123.4, digits=3), "123"), (count(987.4), "987"), (count(4120), "4,120"),
     (count(12345), "12.3k"), (count(999_960), "1.00M"), (count(123456), "123k"), (duration(7), "0:07"),
     (duration(725), "12:05"), (duration(3723), "1:02:03")],
)  # fmt: skip
def test_numbers_have_three_or_four_digits(text, expected):
    assert text == expected
