"""Sweeps for real, on the embedded pair: each trial once, whatever is killed; and what can't run is told before."""

import json
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from shadowlit.cli.sweep import report, run
from shadowlit.errors import ShadowlitError
from shadowlit.studies.sweep.definition import Definition
from shadowlit.studies.sweep.scheduler import Scheduler, gpus_of_slots, visible_gpus
from shadowlit.studies.sweep.storage import open_storage
from shadowlit.studies.sweep.study import SweepStudy, state_of, stored_definition
from shadowlit.studies.sweep.table import read_table
from shadowlit.studies.trials import process as module
from tests.distributed import Forked, shadowlit
from tests.studies.sweep.test_definition import define

ROOT = Path(__file__).parents[3]
# The embedded pair and its configuration, with a few conversations: two steps, and some rows to validate.
SHORT = {
    "data.limit_train_samples": 64,
    "data.validation": {"new": "shadowlit/demo/data/new.jsonl"},
    "evaluation.evaluators": {},
    "trainer.max_epochs": 1,
    "trainer.limit_val_batches": 1,
    "trainer.val_check_interval": 1.0,
    "trainer.num_sanity_val_steps": 0,
    "trainer.callbacks": [],
    "trainer.enable_checkpointing": False,
}
TWELVE = {
    "name": "twelve", "fit": "configs/demo_lora.yaml", "overrides": SHORT, "seeds": [0, 1, 2],
    "grid": {"model.lr": [1e-3, 2e-3], "model.adapter.r": [2, 4]},
}  # fmt: skip


SIX = {**TWELVE, "name": "six", "seeds": [0, 1], "grid": {"model.lr": [1e-3, 2e-3, 4e-3], "model.adapter.r": [2]}}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """The configurations' paths are relative to it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def started(tmp_path, definition, out, **options):
    file = tmp_path / f"{definition['name']}.yaml"
    file.write_text(yaml.safe_dump(definition, sort_keys=False))  # the order of axes is that of names
    command = ["sweep", f"--config={file}", f"--out={out}", "--threads=1"]
    command += [f"--{name}={value}" for name, value in options.items()]
    return Forked(shadowlit, *command, out=tmp_path / "told.txt")


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def results(out):
    return {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*seed=*/result.json")}


def trainings(process):
    """The processes of trials: they were forked from the server, which is a child of the command."""
    with suppress(psutil.NoSuchProcess):
        return [each for each in psutil.Process(process.pid).children(recursive=True)
                if psutil.Process(each.ppid()).ppid() == process.pid]  # fmt: skip
    return []


def test_six_trials_with_two_workers_and_two_deaths(tmp_path):
    """A training is killed, then the command itself, both by SIGKILL; the same command again finishes the rest."""
    out = tmp_path / "out"
    first = started(tmp_path, SIX, out, workers=2)
    wait_for(lambda: results(out) and (out / "untouched/result.json").is_file(), first)
    while "failed" not in (tmp_path / "told.txt").read_text():  # one that was ending anyway is no loss
        assert first.poll() is None
        for training in trainings(first)[:1]:
            with suppress(psutil.NoSuchProcess):
                training.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    wait_for(lambda: trainings(first), first)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    kept = results(out)
    assert 1 <= len(kept) < 6

    assert started(tmp_path, SIX, out, workers=2).wait(600) == 0, (tmp_path / "told.txt").read_text()
    found = results(out)
    assert len(found) == 6 and kept.items() <= found.items()
    definition = define(**SIX)
    planned = Counter(definition.name_of(key) for key in definition.planned())
    study = SweepStudy(definition, open_storage(None, out))
    assert Counter(trial.user_attrs["name"] for trial in study._all() if state_of(trial) == "complete") == planned
    table = read_table(out)
    rows = table.of("B2I")
    assert Counter(row.trial for row in rows) == planned and all(row.state == "complete" for row in rows)
    for row in rows:
        logged = json.loads((out / row.trial / "result.json").read_text())["metrics"]
        assert row.metrics["loss"] == logged["val/grafted/loss"]
        assert row.setting == {
            "model.lr": f"{float(row.setting['model.lr']):g}",
            "model.adapter.r": row.setting["model.adapter.r"],
        }
    assert len({row.metrics["loss"] for row in rows}) == 6
    untouched = json.loads((out / "untouched/result.json").read_text())["metrics"]
    assert table.untouched("Instruct", "loss") == untouched["val/instruct/loss"]
    assert "6 trials: 6 complete" in (out / "REPORT.md").read_text()
    assert (out / "main_effects.png").stat().st_size > 5000 and (out / "main_effects.pdf").is_file()


@pytest.mark.slow
def test_two_machines_share_a_database_and_one_dies(tmp_path, database):
    """Each has a folder of its own; what the dead one had begun is taken up by the other while it runs."""
    outs = [tmp_path / "one", tmp_path / "two"]
    one = started(tmp_path, TWELVE, outs[0], storage=database)
    two = started(tmp_path, TWELVE, outs[1], storage=database)
    wait_for(lambda: all(results(out) for out in outs) and trainings(one), one)
    one.send_signal(signal.SIGKILL)
    one.wait(60)
    assert two.wait(600) == 0, (tmp_path / "told.txt").read_text()
    by_one, by_two = (set(results(out)) for out in outs)
    definition = define(**TWELVE)
    planned = {definition.name_of(key) for key in definition.planned()}
    assert by_one | by_two == planned and len(planned) == 12
    study = SweepStudy(definition, open_storage(database, tmp_path))
    # A training that ends in the moment of its worker's death leaves a result that nobody hears of.
    assert by_one & by_two <= {trial.user_attrs["name"] for trial in study._all() if "orphaned" in trial.user_attrs}
    complete = Counter(trial.user_attrs["name"] for trial in study._all() if state_of(trial) == "complete")
    assert complete == Counter(planned)
    report(str(tmp_path / "three"), storage=database, name="twelve-demo_lora")
    assert sorted(row.trial for row in read_table(tmp_path / "three").of("B2I")) == sorted(planned)
    assert stored_definition(open_storage(database, tmp_path), "twelve-demo_lora").planned() == definition.planned()


def run_trials_alone(out, **definition):
    """Run a sweep whose untouched models count as measured, as if another worker had done it."""
    SweepStudy(Definition(**definition), open_storage(None, out)).keep_untouched({})
    run(**definition, threads=1, workers=2, out=str(out))


def test_a_failing_trial_costs_itself_alone_and_is_tried_again(tmp_path, capsys):
    """A batch size of 0 passes the parser, which sees an integer."""
    given = {
        "name": "failing", "fit": "configs/demo_lora.yaml", "overrides": SHORT, "grid": {"data.batch_size": [32, 0]},
    }  # fmt: skip
    with pytest.raises(ShadowlitError, match=r"1 trial failed; .*REPORT\.md has the reasons"):
        run_trials_alone(tmp_path, **given)
    table = read_table(tmp_path)
    assert Counter(row.state for row in table.rows if row.seed is not None) == {"complete": 1, "failed": 1}
    text = (tmp_path / "REPORT.md").read_text()
    assert "batch_size=0_seed=0`: " in text and "data.batch_size" in text.split("## Failed")[1]
    before = results(tmp_path)
    with pytest.raises(ShadowlitError, match="1 trial failed"):
        run_trials_alone(tmp_path, **given)
    assert results(tmp_path) == before
    assert "batch_size=32" not in capsys.readouterr().out.split("report")[1]


def test_a_hopeless_trial_is_ended_by_its_live_metric(tmp_path):
    """Twenty epochs of ten steps, of which the first validation is the last: everything is above a loss of 0."""
    run_trials_alone(
        tmp_path, name="pruned", fit="configs/demo_lora.yaml", grid={"model.lr": [1e-3]},
        overrides={**SHORT, "data.limit_train_samples": 320, "trainer.max_epochs": 20},
        pruner="threshold", pruner_options={"upper": 0.0},
    )  # fmt: skip
    (row,) = (row for row in read_table(tmp_path).rows if row.seed is not None)
    assert row.state == "pruned" and row.metrics["loss"] > 0
    assert not list(tmp_path.glob("*seed=0/result.json"))
    reached = json.loads((tmp_path / "lr=0.001_seed=0/live.json").read_text())["step"]
    assert 0 < reached < 20 * 10
    curve = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(curve) == 2 and curve[1].startswith("lr=0.001_seed=0,10,")


def test_a_result_that_was_not_told_is_taken_as_it_is(tmp_path):
    """The worker died between the training's end and the storage."""
    definition = define(grid={"model.lr": [1e-3]}, overrides=SHORT)
    home = tmp_path / "lr=0.001_seed=0"
    home.mkdir()
    (home / "result.json").write_text(json.dumps({"metrics": {"val/grafted/loss": 0.25}, "step": 2}))
    study = SweepStudy(definition, open_storage(None, tmp_path))
    study.keep_untouched({})
    Scheduler(study, tmp_path).run()
    assert [trial.value for trial in study.trials] == [0.25]


class _Stub:
    """A process that has ended at once and left a result."""

    def __init__(self, job, folder):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"metrics": {"val/grafted/loss": 1.0}, "step": 1}))

    def poll(self):
        return 0

    def stop(self):
        pass

    def kill(self):
        pass


def test_each_trial_gets_gpus_of_its_own(tmp_path, monkeypatch):
    seen = []

    def start(job, folder, *, environment, in_process, threads):
        arguments = [each for each in job.arguments if each.startswith("--trainer.devices")]
        seen.append((environment, in_process, arguments[-1]))
        return _Stub(job, folder)

    monkeypatch.setattr(module, "start", start)
    study = SweepStudy(define(), open_storage(None, tmp_path))
    study.keep_untouched({})
    Scheduler(study, tmp_path, workers=2, gpus=[["0", "1"], ["2", "3"]]).run()
    assert len(seen) == 4
    assert {tuple(environment.items()) for environment, _, _ in seen} == {
        (("CUDA_VISIBLE_DEVICES", "0,1"),), (("CUDA_VISIBLE_DEVICES", "2,3"),)
    }  # fmt: skip
    assert {(in_process, devices) for _, in_process, devices in seen} == {(False, "--trainer.devices=2")}


def test_gpus_are_shared_out(monkeypatch):
    four = ["0", "1", "2", "3"]
    assert gpus_of_slots(four, 1, None) == [["0"], ["1"], ["2"], ["3"]]
    assert gpus_of_slots(four, 2, None) == [["0", "1"], ["2", "3"]]
    assert gpus_of_slots(four, 1, 2) == [["0"], ["1"]]
    for per_trial, workers in ((3, 2), (5, None), (1, 5)):
        with pytest.raises(ShadowlitError, match=r"GPUs, and 4 are visible\. Lower workers or gpus_per_trial"):
            gpus_of_slots(four, per_trial, workers)
    with pytest.raises(ShadowlitError, match="gpus_per_trial is 0"):
        gpus_of_slots(four, 0, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert visible_gpus() == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


def test_a_worker_of_an_array_runs_as_many_as_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "start", lambda job, folder, **_: _Stub(job, folder))
    study = SweepStudy(define(overrides={"trainer.devices": 1}), open_storage(None, tmp_path))
    study.keep_untouched({})
    Scheduler(study, tmp_path, limit=1).run()
    assert Counter(map(state_of, study.trials)) == {"complete": 1, "waiting": 3}


@pytest.mark.parametrize(("options", "message"), [
    ({"grid": {"model.lrr": [1e-3]}}, "lrr"),
    ({"grid": {"model.lr": ["fast"]}}, 'model.lr is fast; expected float.'),
    ({"grid": {"model.adapter.r": [4, "x"]}}, 'model.adapter.r is x; expected int.'),
    ({"variants": {"v": {"a": {"model.lr": 1e-3}, "b": {"graft.selct": "all"}}}, "grid": {}}, "graft.selct"),
    ({"fit": "configs/none.yaml"}, "fit is 'configs/none.yaml', which is not a file"),
    ({"workers": 0}, "workers is 0; expected at least 1"),
    ({"limit": 0}, "limit is 0; expected at least 1"),
    ({"grid": {"model.lr": []}}, "grid.model.lr is"),
    ({"storage": "postgresql://127.0.0.1:1/x"}, "can't be reached"),
])  # fmt: skip
def test_what_cannot_run_is_told_before_the_first_trial(tmp_path, options, message):
    given = {"name": "bad", "fit": "configs/demo_lora.yaml", "grid": {"model.lr": [1e-3]}, "out": str(tmp_path / "out")}
    with pytest.raises(ShadowlitError, match=message):
        run(**{**given, **options})
    assert not list(tmp_path.glob("out/*seed*"))


def test_values_may_be_classes(tmp_path, capsys):
    """They reach the trainings as they are written, in variants, grids and overrides of a sweep's file."""
    from shadowlit.cli.main import main

    loha = {"class_path": "peft.LoHaConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}
    objective = {"class_path": "shadowlit.training.objectives.EAFT", "init_args": {"top_k": 7}}
    definition = {
        "name": "classes", "fit": "configs/demo_lora.yaml",
        "variants": {"adapter": {"loha": {"model.adapter": loha}, "lora": {"model.adapter.r": 2}}},
        "grid": {"model.optimizer": [{"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}, "adamw"]},
        "overrides": {**SHORT, "model.objective": objective},
    }  # fmt: skip
    (file := tmp_path / "classes.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    command = ["sweep", f"--config={file}", f"--out={tmp_path / 'out'}", "--threads=1"]
    assert main([*command, "--limit=1"]) == 0, capsys.readouterr().err
    (result,) = (tmp_path / "out").glob("optimizer=*/result.json")
    model = yaml.safe_load((result.parent / "config.yaml").read_text())["model"]
    assert (model["adapter"]["class_path"].endswith("LoHaConfig"), model["adapter"]["init_args"]["r"]) == (True, 2)
    assert model["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": model["optimizer"]["init_args"]}
    assert (model["optimizer"]["init_args"]["momentum"], model["objective"]["init_args"]["top_k"]) == (0.5, 7)


def test_a_folder_has_one_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "start", lambda job, folder, **_: _Stub(job, folder))
    given = {"fit": "configs/demo_lora.yaml", "grid": {"model.lr": [1e-3]}, "threads": 1, "overrides": SHORT}
    run("a", out=str(tmp_path / "out"), **given)
    with pytest.raises(
        ShadowlitError, match=r"another sweep; different: metric .* Give this one another name or folder"
    ):
        run("a", out=str(tmp_path / "out"), storage=str(tmp_path / "y.journal"), metric="accuracy", **given)
    with pytest.raises(ShadowlitError, match=r"holds another sweep named 'a-demo_lora'; different: metric"):
        run("a", out=str(tmp_path / "out"), metric="accuracy", **given)
    with pytest.raises(ShadowlitError, match=r"there is no .*study\.journal"):
        report(str(tmp_path / "none"))
    with pytest.raises(ShadowlitError, match="no folder and no name is given"):
        report()


@pytest.mark.parametrize("file", [
    pytest.param(file, id=file.stem, marks=[] if file.stem == "search" else [pytest.mark.slow])
    for file in sorted((ROOT / "experiments").glob("*.yaml"))
])  # fmt: skip
def test_the_experiments_can_run(file, capsys, monkeypatch):
    from shadowlit.cli.main import main

    assert main(["sweep", f"--config={file}", "--dry-run"]) == 0
    shown = capsys.readouterr().out.replace(",", "").split()
    text = file.read_text()
    told = next(line for line in text.splitlines() if " on the embedded pair." in line)
    assert (
        f"= {shown[shown.index('trials') - 1]} trials" in told
        or f"{yaml.safe_load(text).get('trials')} settings" in told
    )
    assert f"--config experiments/{file.name}" in text


@pytest.mark.parametrize("file", [
    pytest.param(file, id=file.stem, marks=[] if "qwen3" in file.stem else [pytest.mark.slow])
    for file in sorted((ROOT / "experiments/on").glob("*.yaml"))
])  # fmt: skip
def test_by_one_more_file_an_experiment_runs_on_a_real_pair(file, capsys):
    from shadowlit.cli.main import main

    assert main(["sweep", f"--config={ROOT / 'experiments/rank.yaml'}", f"--config={file}", "--dry-run"]) == 0
    assert f"runs/sweeps/rank-{file.stem}" in capsys.readouterr().out.replace("\n", "")
