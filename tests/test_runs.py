"""A run's folder: the same command continues it, with one metrics file, its best score and its configuration."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from shadowlit import runs
from shadowlit.callbacks.metrics_file import MetricsFile
from shadowlit.checkpoint.saved import newest_whole, step_of
from shadowlit.errors import CheckpointError, Interrupted, ShadowlitError
from shadowlit.lightning_cli import main
from shadowlit.masking import MASK
from shadowlit.runs import Run, RunOptions
from tests.checkpoint.test_saved import write_folder
from tests.distributed import Forked, shadowlit
from tests.test_stopping import Strike, logged
from tests.tiny import save_pair

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own
BEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "val/grafted/loss", "save_top_k": 2, "every_n_epochs": 1, "mode": "max"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, and a configuration of 8 steps with 4 validations, of which the two worst are kept."""
    root = tmp_path_factory.mktemp("runs")
    base, instruct = save_pair(root)
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab" * (1 + i % 3)}]
             for i in range(4)]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    config = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-2, "adapter": {"r": 4}},
        "graft": {"select": "all", "dtype": "float32"},
        "export": {"parts": ["adapter"]},
        "data": {"train": str(root / "rows.jsonl"), "validation": str(root / "rows.jsonl"), "batch_size": 2,
                 "max_length": 64, "cache": False},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 4, "enable_progress_bar": False, "log_every_n_steps": 1,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "callbacks": [BEST],
        },
    }  # fmt: skip
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test has its own folder of runs."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def fit(root, *args, callbacks=(), subcommand="fit"):
    """Run a command; return it, or its exit status."""
    try:
        return main([subcommand, "--config", str(root / "tiny.yaml"), *args], callbacks)
    except (Interrupted, SystemExit) as stop:
        return stop.code


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- the metrics file -------------------------------------------------------------------------------------------------


def write(step, *rows):
    """Log rows to the file of a run that resumes from a step; return what is in it."""
    logger = MetricsFile("r", "a", is_new=False)
    logger.step = step
    for at, values in rows:
        logger.log_metrics(values, at)
        logger.save()
    with open("r/a/metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_after_the_checkpoint_are_dropped_and_none_is_written_twice():
    """Row n - 1 is of step n. A resumed validation repeats its own row; a killed process has left half a line."""
    before = [(0, {"x": 1.0}), (1, {"x": 2.0}), (1, {"y": 0.5}), (2, {"x": 3.0, "z": 9.0})]
    assert len(write(0, *before)) == 4
    with open("r/a/metrics.csv", "a") as file:
        file.write("4,7")
    found = write(2, (1, {"y": 0.5}), (2, {"x": 3.5}), (2, {"y": 0.25}), (3, {"new": 1.0}))
    assert found == [
        {"step": "0", "x": "1.0"}, {"step": "1", "x": "2.0"}, {"step": "1", "y": "0.5"}, {"step": "2", "x": "3.5"},
        {"step": "2", "y": "0.25"}, {"step": "3", "new": "1.0"},
    ]  # fmt: skip
    assert write(0, (0, {"x": 5.0})) == [{"step": "0", "x": "5.0"}]


# -- loggers ----------------------------------------------------------------------------------------------------------


class Service(DummyLogger):
    """Logs to a server, and would keep its files in the working folder, which its runs share."""

    name, version, save_dir = "project", "x7", "."

    def __init__(self, api_key: str = "") -> None:
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_loggers_are_added_to_the_run_s_own(root, tmp_path):
    loggers = [{"class_path": "tests.test_runs.Service"},
               {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "other"}}]  # fmt: skip
    options = [f"--trainer.logger={json.dumps(loggers)}", "--trainer.max_epochs=1"]
    cli = fit(root, *options)
    first, service, other = cli.trainer.loggers
    assert sorted(os.listdir()) == ["other", "runs"] and type(other) is CSVLogger
    home = tmp_path / "runs/tiny/version_0"
    assert {path.split("/")[0] for path in files(home)} == {
        "checkpoints", "complete.json", "config.yaml", "export", "metrics.csv"}  # fmt: skip
    assert (tmp_path / "other/lightning_logs/version_0/metrics.csv").read_bytes() == (home / "metrics.csv").read_bytes()
    assert [str(step) for step, _ in service.rows] == [row["step"] for row in logged(home)[1]]
    assert first.experiment is cli.trainer.logger.experiment


def test_a_csv_logger_of_the_same_folder_is_left_out():
    run = Run(RunOptions("a", root="r"), "fit", "tiny")
    assert run.loggers([CSVLogger("r", "a", "")]) == run.loggers(CSVLogger("r", "a", "")) == [run.metrics]
    assert run.loggers(True) == run.loggers(None) == run.loggers(False) == [run.metrics]


# -- the same command again -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """A run that is stopped in its third epoch, at step 5 of 8; the best two, the worst ones, are of steps 2 and 4."""
    home = tmp_path_factory.mktemp("stopped")
    assert fit(root, f"--run.root={home}", "--run.name=a", callbacks=[Strike("batch", 5)]) == 143
    return home / "a"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "runs/a")
    return tmp_path / "runs/a"


def test_the_best_ones_are_carried_over_though_the_folder_moves(root, run, tmp_path):
    """What was kept before the stop may go later; stopped again at an epoch's end, it logs the right steps."""
    whole = fit(root, "--run.name=whole")
    os.rename(run, "moved")
    assert fit(root, "--run.name=moved", f"--run.root={tmp_path}", callbacks=[Strike("epoch", 1)]) == 143
    end = fit(root, "--run.name=../moved")
    one, other = (cli.trainer.checkpoint_callback for cli in (whole, end))
    scores = [{os.path.basename(path): score.item() for path, score in c.best_k_models.items()} for c in (one, other)]
    assert scores[0] == scores[1] and one.best_model_score == other.best_model_score and len(scores[0]) == 2
    assert {path.name for path in (tmp_path / "moved/checkpoints").iterdir()} == {*scores[0], "last.ckpt"}
    assert logged(tmp_path / "moved") == logged(tmp_path / "runs/whole")


def test_the_checkpoint_it_resumes_from_is_removed_like_any_other(root, tmp_path):
    """Lightning keeps it for ever."""
    options = ["--run.name=a", "--trainer.callbacks=null"]
    assert fit(root, *options, callbacks=[Strike("epoch", 2)]) == 143
    os.remove("runs/a/checkpoints/last.ckpt")  # as if it had been killed before this was written
    fit(root, *options)
    assert files(tmp_path / "runs/a/checkpoints") == ["epoch=3-step=8.ckpt"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_checkpoint_names_nothing_to_remove_outside_the_run_s_own_folder(root, run, tmp_path, name):
    """As the newest of the run itself, and as what another run begins from; Lightning removes the whole folder."""
    source = run / "checkpoints/last.ckpt"
    saved = torch.load(source, weights_only=True)
    (state,) = (each for key, each in saved["callbacks"].items() if key.startswith("ModelCheckpoint"))
    victim = write_folder(tmp_path / "victim/weights.ckpt", 1).parent
    state["dirpath"] = f"runs/{name}/checkpoints"
    path = f"{state['dirpath']}/../../../victim/weights.ckpt"
    assert Path(path).resolve() == victim / "weights.ckpt"
    state |= {"best_model_path": path, "kth_best_model_path": path, "last_model_path": path,
              "best_k_models": {path: torch.tensor(-2.0), f"{path}/.": torch.tensor(-1.0)}}  # fmt: skip
    torch.save(saved, source)
    last = json.dumps([{**BEST, "init_args": {**BEST["init_args"], "save_last": True}}])
    options = [] if name == "a" else [f"--ckpt_path={source}"]
    cli = fit(root, f"--run.name={name}", "--run.allow_changes=true", f"--trainer.callbacks={last}", *options)
    assert cli.trainer.global_step == 8 and (victim / "weights.ckpt/.metadata").exists()
    assert cli.trainer.checkpoint_callback.best_model_path.startswith(f"runs/{name}/checkpoints/")


def test_a_complete_run_is_left_alone(root, run, tmp_path, caplog):
    fit(root, "--run.name=a")
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)}
    with caplog.at_level("INFO"):
        assert fit(root, "--run.name=a") == 0
    assert "runs/a is complete (step 8), and nothing is done. Its export: runs/a/export." in caplog.text
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in files(tmp_path)} == before
    os.remove("runs/a/complete.json")  # killed in the export, which nobody has verified
    os.remove("runs/a/export/adapter/adapter_model.safetensors")
    fit(root, "--run.name=a")
    assert "runs/a/export/adapter/adapter_model.safetensors" in files(tmp_path)
    assert {path for path in files(tmp_path) if "export-v1" not in path} == {*before}


def test_a_removed_export_is_made_again(tmp_path):
    os.makedirs("runs/a/export")
    (tmp_path / "runs/a/config.yaml").write_text("x: 1\n")
    (tmp_path / "runs/a/complete.json").write_text(json.dumps({"step": 1, "export": "export"}))
    run = Run(RunOptions("a"), "fit", "tiny")
    with pytest.raises(SystemExit):
        run.require_continuable("x: 1")
    with pytest.raises(ShadowlitError, match=r"complete, .* export has changed: export\.parts null → \['delta'\]\. Wr"):
        run.require_continuable("x: 1\nexport: {parts: [delta]}")
    os.rmdir("runs/a/export")
    run.require_continuable("x: 1")
    Run(RunOptions("a"), "validate", "tiny").require_continuable("x: 2")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "x: [1", r"config\.yaml is not readable YAML \(.*\)\. Restore it"),
        ("config.yaml", "no keys", r"config\.yaml holds str, not the keys of a configuration\. Restore it"),
        ("complete.json", '{"step"', r"complete\.json is damaged \(JSONDecodeError: .*\)\. Remove it; the same"),
        ("complete.json", '{"export": "export"}', r"complete\.json is damaged \(KeyError: 'step'\)\. Remove it"),
        ("complete.json", "[]", r"complete\.json is damaged \(TypeError: "),
    ],
)
def test_damaged_files_of_a_run_are_named(file, text, message):
    os.makedirs("runs/a")
    for name, content in {"config.yaml": "x: 1\n", "complete.json": '{"step": 1, "export": null}', file: text}.items():
        Path("runs/a", name).write_text(content)
    with pytest.raises(ShadowlitError, match=message):
        Run(RunOptions("a"), "fit", "tiny").require_continuable("x: 1")


def test_the_number_of_a_job_is_a_name(monkeypatch):
    """A job that is requeued must resume, and may say so without a name of its own."""
    monkeypatch.setattr(runs.SLURMEnvironment, "detect", staticmethod(lambda: True))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = Run(RunOptions(resume="must"), "fit", "tiny")
    assert run.folder == Path("runs/tiny/job_7")
    with pytest.raises(ShadowlitError, match=r"runs/tiny/job_7 has no checkpoint to resume from"):
        run.find_checkpoint(None, contents=True)


@pytest.mark.parametrize("name", [".", "..", "../..", "a/.."])
def test_a_run_has_a_folder_below_the_others(name):
    with pytest.raises(ShadowlitError, match=r"run\.name is '.*', whose folder \S+ holds run\.root"):
        Run(RunOptions(name), "fit", "tiny")


class TimeIsUp(Timer):
    """Stops after the first step."""

    def on_fit_start(self, *_):
        """Don't stop yet."""

    def time_elapsed(self, stage=None):
        return 1.0


def test_a_run_whose_time_is_up_is_not_complete(root, tmp_path):
    """It goes on with more time or as another training, and its export of fewer steps is set aside."""
    fit(root, "--run.name=a", "--trainer.max_time=00:01:00:00", callbacks=[TimeIsUp("00:00:00:00")])
    assert not (tmp_path / "runs/a/complete.json").exists() and (tmp_path / "runs/a/export").is_dir()
    allowed = ["--run.allow_changes=true", "--trainer.max_steps=3"]
    fit(root, "--run.name=a", *allowed)
    assert json.loads((tmp_path / "runs/a/complete.json").read_text())["step"] == 3
    fit(root, "--run.name=a", "--run.allow_changes=true", "--trainer.max_steps=4")
    assert {"export", "export-v1", "export-v2"} <= {*os.listdir(tmp_path / "runs/a")}


def test_a_changed_configuration_is_listed_and_refused_unless_it_is_allowed(root, run):
    """The earlier one is kept."""
    with pytest.raises(ShadowlitError) as error:
        fit(root, "--run.name=a", "--model.lr=0.02", "--data.batch_size=4", "--trainer.logger=false")
    assert str(error.value) == (
        "the configuration of runs/a has changed: model.lr 0.01 → 0.02; data.batch_size 2 → 4. Undo the changes, "
        "give another run.name, or set run.allow_changes=true."
    )
    with pytest.warns(UserWarning, match=r"runs/a continues with another configuration: model\.lr 0\.01 → 0\.02\."):
        cli = fit(root, "--run.name=a", "--model.lr=0.02", "--run.allow_changes=true")
    assert cli.trainer.global_step == 8 and [row["step"] for row in logged(run)[1]][-1] == "7"
    assert [yaml.safe_load((run / f"config{v}.yaml").read_text())["model"]["lr"] for v in ("", "-v1")] == [0.02, 0.01]


def test_what_counts_as_a_change():
    """Masked secrets don't, and neither does what leaves the training as it is."""
    saved = {"trainer": {"x": {"api_key": MASK, "url": f"m://u:{MASK}@h/"}, "max_time": None}, "old": 1, "run": {}}
    given = {
        **saved,
        "trainer": {"x": {"api_key": "k", "url": "m://u:p@h/"}, "max_time": "1"},
        "run": {"resume": "must"},
    }
    assert runs._changes(given, saved) == ""
    changed = {**saved, "old": {"now": [1, 2]}, "runs": 1, "trainer": {**saved["trainer"], "callbacks": [{"n": 1}]}}
    found = "old 1 → null; trainer.callbacks.0.n null → 1; old.now null → [1, 2]; runs null → 1"
    assert sorted(runs._changes(saved, changed).split("; ")) == sorted(found.split("; "))


def test_never_and_must(root, run):
    for options, message in (
        (["--run.name=b", "--resume=must"], r"runs/b has no checkpoint to resume from. Check run\.root and run\.name"),
        (
            ["--run.name=a", "--run.resume=never"],
            r"run\.resume is never, but runs/a holds a run. Give another run\.name",
        ),
        (
            ["--run.resume=must"],
            r"run\.name is None, and run\.resume must; expected the name of the run, e\.g\. run\.n",
        ),
    ):
        with pytest.raises(ShadowlitError, match=message):
            fit(root, *options)


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_run_whose_configuration_is_gone_is_not_resumed_unless_it_is_allowed(run, resume):
    (run / "config.yaml").unlink()
    with pytest.raises(ShadowlitError, match=r"runs/a holds checkpoints, but no config\.yaml, so .* Restore that file"):
        Run(RunOptions("a", resume=resume), "fit", "tiny").find_checkpoint(None, contents=True)
    allowed = Run(RunOptions("a", resume=resume, allow_changes=True), "fit", "tiny")
    assert allowed.find_checkpoint(None, contents=True)


def test_a_root_is_no_address():
    with pytest.raises(ShadowlitError, match=r"run\.root is 's3://x'; expected a folder of a mounted file system"):
        Run(RunOptions("a", root="s3://x"), "fit", "tiny")


def test_a_number_of_batches_is_no_share_of_them():
    assert runs._changes({"trainer": {"limit_val_batches": 1}}, {"trainer": {"limit_val_batches": 1.0}})


def test_a_run_that_begins_from_another_s_checkpoint_lists_what_it_changes(root, run, tmp_path):
    with pytest.warns(UserWarning, match=r"last\.ckpt was trained with another configuration: model\.lr 0\.01 → 0\.02"):
        fit(root, f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--model.lr=0.02", f"--run.root={tmp_path / 'other'}")


def test_a_run_that_another_process_works_on_is_left_alone(root, run, monkeypatch):
    monkeypatch.setattr(runs, "_PATIENCE_S", 0.1)
    before = files(run)
    with FileLock(run / ".run.lock"), pytest.raises(ShadowlitError, match=r"another process is training runs/a\. Wait"):
        fit(root, "--run.name=a")
    assert files(run) == before


def test_a_run_that_another_process_has_trained_meanwhile_is_looked_at_again(run):
    """It may have written what this command would resume from, and rows that are to be dropped."""
    found = Run(RunOptions("a"), "fit", "tiny")
    found.find_checkpoint(None, contents=True)
    os.rename(run / "checkpoints/last.ckpt", run / "checkpoints/newer.ckpt")
    with pytest.raises(ShadowlitError, match=r"another process has trained runs/a since .* the same command again"):
        found.held().__enter__()
    found.find_checkpoint(None, contents=True)
    with found.held():
        assert found.start == found.folder / "checkpoints/newer.ckpt"


def test_commands_that_start_at_once_have_folders_of_their_own():
    one, other = (Run(RunOptions(), "fit", "tiny").metrics for _ in range(2))
    assert [one.log_dir, other.log_dir, one.log_dir] == [f"runs/tiny/version_{i}" for i in (0, 1, 0)]
    other.leave()
    assert os.listdir("runs/tiny") == ["version_0"]


@pytest.mark.parametrize("name", ["x" * 300, "file"])
def test_a_name_that_can_be_no_folder_s(name, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").touch()
    with pytest.raises(ShadowlitError, match=rf"run\.name is '{name}', but runs/{name} can't be written \(.*\)\. Give"):
        Run(RunOptions(name), "fit", "tiny").require_continuable("x: 1")


# -- ckpt_path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subcommand", "path"), [("fit", "last"), ("validate", "last"), ("test", "best")])
def test_last_and_best_of_no_run_are_errors(subcommand, path):
    """Lightning would train anew, or score the untrained Base."""
    run = Run(RunOptions(), subcommand, "tiny")
    with pytest.raises(
        ShadowlitError, match=rf"ckpt_path is {path}, but the run has no name, so it is unknown of which "
    ):
        run.find_checkpoint(path, contents=True)


def test_last_and_best_are_those_of_the_run(root, run):
    with pytest.raises(
        ShadowlitError, match=r"runs/b has no checkpoint to load. Check run\.root and run\.name, or give"
    ):
        fit(root, "--run.name=b", "--ckpt_path=last", subcommand="validate")
    (run / "checkpoints/epoch=0-step=2.ckpt").rename(run / "checkpoints/best.ckpt")
    found = Run(RunOptions("a"), "test", "tiny")
    with pytest.raises(CheckpointError, match=r"epoch=0-step=2\.ckpt doesn't exist"):  # the best of two
        found.find_checkpoint("best", contents=True)
    assert found.find_checkpoint("last", contents=True) == found.folder / "checkpoints/last.ckpt"
    cli = fit(root, "--run.name=a", "--ckpt_path=last", subcommand="validate")
    losses = [row["val/tuned/loss"] for row in logged(run)[1] if row["val/tuned/loss"]]
    assert cli.trainer.callback_metrics["val/tuned/loss"].item() < float(losses[-1])  # trained one step more
    assert os.listdir(run / "validate") == ["version_0"]
    assert sorted(os.listdir(run)) == [".run.lock", "checkpoints", "config.yaml", "metrics.csv", "validate"]


def test_a_run_goes_on_from_its_newest_checkpoint_alone(root, run):
    first = run / "checkpoints/epoch=0-step=2.ckpt"
    for path, message in (
        (first, r"step=2\.ckpt, but the newest checkpoint of the run is runs/a/\S*last\.ckpt"),
        ("best", r"ckpt_path is runs/a/\S*step=2\.ckpt, but the newest checkpoint of the run is runs/a/\S*last\.ckpt"),
    ):
        with pytest.raises(ShadowlitError, match=message):
            fit(root, "--run.name=a", f"--ckpt_path={path}")
    for steps in (["2"], ["2", "3"]):  # from where it was stopped
        assert fit(root, "--run.name=b", f"--ckpt_path={first}", callbacks=[Strike("batch", 1)]) == 143
        assert [row["step"] for row in logged(run.parent / "b")[1]] == steps
        first.unlink(missing_ok=True)  # what it began from may be gone when it is started again


def test_the_newest_complete_one_is_taken_whatever_its_name(run):
    """One that wasn't renamed when the process was killed; a damaged one is passed over; with none it is an error."""
    home = run / "checkpoints"
    os.rename(home / "last.ckpt", home / "last.ckpt.0123456789abcdef.partial")
    (home / "torn.ckpt.0123456789abcdef.partial").write_bytes(b"PK")
    assert step_of(newest_whole(home, resumes=True)) == 5
    (home / "last.ckpt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged: .* It is passed over\."):
        assert step_of(newest_whole(home, resumes=True)) == 5
    for path in home.iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"is damaged: .* holds no other\. Remove it to begin again\."):
        newest_whole(home, resumes=True)
    assert newest_whole(home / "none", resumes=True) is None


def test_checkpoints_of_a_run_with_a_name_are_in_its_folder(root):
    elsewhere = json.dumps([{"class_path": BEST["class_path"], "init_args": {"dirpath": "/scratch"}}])
    with pytest.raises(
        ShadowlitError,
        match=r"dirpath of ModelCheckpoint is /scratch, but a run with a name .* own folder, runs/a/checkp",
    ):
        fit(root, "--run.name=a", f"--trainer.callbacks={elsewhere}")


# -- processes --------------------------------------------------------------------------------------------------------


def test_three_sigterms_and_the_same_command_make_one_run(root, tmp_path):
    """Sent from outside, wherever the process is by then."""
    line = [
        "fit",
        "--config",
        str(root / "tiny.yaml"),
        "--trainer.max_epochs=40",
        "--trainer.check_val_every_n_epoch=10",
    ]
    line += ["--trainer.limit_val_batches=1", f"--run.root={tmp_path / 'runs'}"]
    assert Forked(shadowlit, *line, "--run.name=whole", out=tmp_path / "whole.txt").wait(120) == 0
    file, rows = tmp_path / "runs/parts/metrics.csv", 0
    for _ in range(3):
        process, deadline = (
            Forked(shadowlit, *line, "--run.name=parts", out=tmp_path / "parts.txt"),
            time.monotonic() + 60,
        )
        while not file.is_file() or (now := file.read_bytes().count(b"\n")) < rows + 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        rows = now
    assert Forked(shadowlit, *line, "--run.name=parts", out=tmp_path / "parts.txt").wait(120) == 0
    assert sorted(os.listdir("runs")) == ["parts", "whole"]
    assert logged(tmp_path / "runs/parts") == logged(tmp_path / "runs/whole")
