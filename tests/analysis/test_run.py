import json
import math
import os

import pytest
import yaml

from shadowlit.analysis.curves import read_metrics
from shadowlit.analysis.run import answers, changes, overview, read_run, scores
from shadowlit.delta.configured import located, pair_of, read_config
from shadowlit.errors import DataError

HEAD = (
    "step,train/loss,graft/gain,graft/survival,val/tuned/loss,val/grafted/loss,val/base/loss,val/instruct/loss,"
    "val/grafted/old/loss,val/instruct/old/loss,val/grafted/task/score,val/instruct/task/score,val/grafted/kept/kl"
)
ROWS = [
    "0,2.5" + "," * 11,
    "9,,0.5,0.99,1.0,1.5,3.0,2.0,0.4,0.3,0.75,0.5,0.01",
    "19,,0.8,0.98,0.9,1.2,3.0,2.0,0.5,0.3,0.25,0.5,0.02",
]


def a_run(home, rows=ROWS, end="\n", config=None):
    home.mkdir(parents=True, exist_ok=True)
    (home / "metrics.csv").write_text("\n".join([HEAD, *rows]) + end)
    if config is not None:
        (home / "config.yaml").write_text(yaml.safe_dump(config))
    return home


def test_what_was_logged(tmp_path):
    """Lightning counts steps from 0; here they are the steps that were done."""
    run = read_run(a_run(tmp_path / "run"))
    assert run.points("val/grafted/loss") == [(10, 1.5), (20, 1.2)] and run.points("train/loss") == [(1, 2.5)]
    assert (run.step, run.last("val/tuned/loss")) == (20, 0.9)
    assert (run.sets, run.evaluators, run.divergences) == (["old"], ["task"], ["kept"])
    assert math.isnan(run.last("val/tuned/other")) and run.config == {} and run.written_s >= 0


def test_the_gain(tmp_path):
    """A smaller loss is better, a higher score is."""
    run = read_run(a_run(tmp_path / "run"))
    assert run.gain() == [(10, pytest.approx(0.5)), (20, pytest.approx(0.8))]
    assert run.gain("old/loss") == [(10, pytest.approx(-0.1)), (20, pytest.approx(-0.2))]
    assert run.gain("task/score") == [(10, pytest.approx(0.25)), (20, pytest.approx(-0.25))]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    """Its last number would be another one: 0.1 of 0.123."""
    file = a_run(tmp_path / "run", [*ROWS, "29,,0.1"], end="") / "metrics.csv"
    assert read_metrics(file)["graft/gain"] == [(10, 0.5), (20, 0.8)]
    file.write_text("")
    assert read_metrics(file) == {}


def test_the_run_that_was_written_last(tmp_path):
    for age, version in enumerate(("version_1", "version_0")):
        file = a_run(tmp_path / "runs/a" / version) / "metrics.csv"
        os.utime(file, (1e9 - age, 1e9 - age))
    assert read_run(tmp_path / "runs").folder.name == "version_1"
    assert read_run(tmp_path / "runs/a/version_0").folder.name == "version_0"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"holds no metrics.csv, in no folder below it either"):
        read_run(tmp_path / "nothing")


def test_overview_and_scores(tmp_path):
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 8}}
    config = {"pair": {"base": "b", "instruct": "i"}, "model": {"adapter": adapter, "lr": 1e-4}, "seed_everything": 3}
    home = a_run(tmp_path / "run", config=config)
    (home / "export/model").mkdir(parents=True)
    (home / "export/model/shadowlit.json").write_text(
        json.dumps({"logits_against_validated": {"top1_agreement": 0.99}})
    )
    found = dict(overview(read_run(home)).rows)
    assert found["tuning"] == "LoRA, rank 8" and found["learning rate"] == 1e-4 and found["seed"] == 3
    assert found["loss, grafted (nats per token)"] == 1.2 and found["gain in loss (nats per token)"] == 0.8
    assert found["KL from the Instruct, grafted: kept (nats per token)"] == 0.02
    assert found["same most probable token after reloading"] == 0.99
    full = read_run(a_run(tmp_path / "full", config={"model": {"adapter": None, "lr": 1e-5}}))
    assert dict(overview(full).rows)["tuning"] == "full"
    ((name, tuned, grafted, _, instruct, gain, _),) = scores(read_run(home)).rows
    assert (name, grafted, instruct, gain) == ("task", 0.25, 0.5, -0.25) and math.isnan(tuned)


def with_answers(home):
    def write(folder, found):
        (home / "evaluation" / folder).mkdir(parents=True, exist_ok=True)
        rows = [
            {"index": i, "prompt": f"question {i}", "reference": "x", "answer": f"{folder} {i}", "score": score}
            for i, score in enumerate(found)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (home / "evaluation" / folder / "task.jsonl").write_text(text)

    write("instruct", [1, 1, 0, 0, 0])
    write("step-10/grafted", [0, 0, 0, 0, 0])
    write("step-20/grafted", [1, 0, 1, 1, 0])
    write("step-20/tuned", [1, 1, 1, 1, 1])
    (home / "evaluation/step-30/tuned").mkdir(parents=True)  # a validation that is going on
    return home


def test_won_and_lost(tmp_path):
    run = read_run(with_answers(a_run(tmp_path / "run")))
    assert changes(run).rows == [("task", 1, 2, 1, 1)]
    assert changes(run, step=10).rows == [("task", 0, 0, 2, 3)]
    assert changes(run).caption == "step 20; right is a score above 0.5"
    with pytest.raises(DataError, match=r"no answers of step 11; there are those of 10, 20"):
        changes(run, step=11)
    without = read_run(a_run(tmp_path / "other"))
    assert changes(without).rows == [] and "There are no answers. A run leaves them" in changes(without).caption
    assert "There are no answers" in str(answers(without))


def test_answers_side_by_side(tmp_path):
    run = read_run(with_answers(a_run(tmp_path / "run")))
    text = str(answers(run, rows=1))
    assert "## task, row 0" in text and "row 1" not in text
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert lines == [
        "- instruct (1): 'instruct 0'",
        "- grafted (1): 'step-20/grafted 0'",
        "- tuned (1): 'step-20/tuned 0'",
    ]
    assert "step-10/grafted 0" in str(answers(run, ["task"], step=10))


def test_configuration_and_pair(tmp_path):
    (tmp_path / "models/b").mkdir(parents=True)
    home = tmp_path / "runs/x"
    home.mkdir(parents=True)
    assert read_config(home) == {} and located("models/b", home) == str(tmp_path / "models/b")
    pair = pair_of({"pair": {"base": "models/b", "instruct": "org/name", "instruct_revision": "v1"}}, home)
    assert (pair.base, pair.instruct, pair.instruct_revision) == (str(tmp_path / "models/b"), "org/name", "v1")
    with pytest.raises(DataError, match=r"holds no config\.yaml that names a pair"):
        pair_of({}, home)
    (home / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match="is not readable YAML"):
        read_config(home)
