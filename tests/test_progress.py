"""The progress of a real training in a recorded terminal, and of one without a terminal."""

import re

import pytest

from shadowlit.cli.main import main

from .terminal import record

EVALUATORS = [f"--evaluation.evaluators.{name}.init_args.limit=2" for name in ("new", "old", "format", "refusal")]
ARGUMENTS = [
    "-m", "shadowlit", "fit", "--config", "configs/demo_lora.yaml", "--trainer.max_steps=4",
    "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1",
    "--data.limit_train_samples=128", "--evaluation.evaluators.forgetting.init_args.limit=2", *EVALUATORS,
]  # fmt: skip
LINE = re.compile(
    r"step (\d)/4(  [a-z]+ of [a-z]+( \d+/\d+)?|  \w+)?(  \d:\d\d left)?(  [\d,.k]+ tokens/s)?(  loss \d\.\d+)?"
    r"(  gain [+-]\d\.\d+)?(  grafted \d\.\d+)?"
)
# Of other libraries. The notes are filtered in the handlers, and so only on the screen.
NOTES = ("GPU available", "Tip", "Seed set", "stopped:")
FOREIGN = ("Warning", "deprecated", "num_workers", "Traceback")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_fit_in_a_terminal_that_is_resized(columns, tmp_path):
    session = record([*ARGUMENTS, f"--run.root={tmp_path}"], columns, [("step 2/4", 100), ("step 3/4", 80)])
    assert session.status == 0
    text = "\n".join(session.lines)
    assert not [word for word in (*FOREIGN, *NOTES) if word in text] and "step 1/4" not in text
    shown = {lines[-1] for lines in session.snapshots if lines and lines[-1].startswith("step ")}
    assert all(LINE.match(line) and len(line) <= 79 for line in shown)
    assert any("grafted" in line and "gain" in line and "tokens/s" in line and "left" in line for line in shown)
    validation = [line for line in shown if re.match("step [234]/4  validation of ", line)]
    assert validation and all(" left  " in line and " tokens/s" in line for line in validation)
    assert all(sum("step " in line and "/4" in line for line in lines) <= 1 for lines in session.snapshots)
    whole = "".join(line.ljust(80) for line in session.lines)
    exported = tmp_path / "demo_lora/version_0/export/model"
    assert exported.is_dir() and f"from_pretrained('{exported}')" in whole
    assert max(map(len, session.lines)) <= 80 and "Scores at step 4" in text


def test_without_a_terminal_the_log_has_a_line_every_few_seconds(tmp_path, caplog):
    own = '{"class_path": "shadowlit.training.bar.ProgressLine", "init_args": {"every_s": 0}}'
    with caplog.at_level("INFO"):
        assert (
            main([*ARGUMENTS[2:], f"--run.root={tmp_path}", "--export.enabled=false", f"--trainer.callbacks+={own}"])
            == 0
        )
    messages = [record.message for record in caplog.records]
    assert not [word for word in FOREIGN if word in "\n".join(messages)]
    number = r"([+-]?[\d.]+)"
    shape = rf"\d:\d\d left, [\d,.k]+ tokens/s, loss {number}, grafted loss {number}, gain {number}"
    (line,) = filter(None, (re.fullmatch(rf"step 3/4, {shape}", message) for message in messages))
    validation = [message for message in messages if message.startswith("step 4/4, validation of ")]
    assert validation and all(re.fullmatch(rf"[^,]+, [^,]+, {shape}", message) for message in validation)
    scored = rf"graft: step 2: gain {number}, grafted loss {number}, "
    (scores,) = filter(None, (re.match(scored, message) for message in messages))
    gain, loss = map(float, scores.groups())
    assert [float(x) for x in line.groups()[1:]] == [pytest.approx(loss, abs=1e-3), pytest.approx(gain, abs=1e-3)]
