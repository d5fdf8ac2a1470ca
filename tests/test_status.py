"""The status line in recorded terminals of several widths, resized in the middle, and without one."""

import io

import pytest

from shadowlit.status import StatusLine, count, duration, number

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
     (number(0.0, True), "+0.000"), (number(float("nan")), "nan"), (number(1.2345, digits=3), "1.23"),
     (number(123.4, digits=3), "123"), (count(987.4), "987"), (count(4120), "4,120"),
     (count(12345), "12.3k"), (count(999_960), "1.00M"), (count(123456), "123k"), (duration(7), "0:07"),
     (duration(725), "12:05"), (duration(3723), "1:02:03")],
)  # fmt: skip
def test_numbers_have_three_or_four_digits(text, expected):
    assert text == expected
