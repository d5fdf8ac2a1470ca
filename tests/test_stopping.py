"""Signals end a command with 128 + signal: a training at a boundary, with a checkpoint that resumes exactly."""

import csv
import json
import os
import signal
import subprocess
import time

import psutil
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from shadowlit.distributed import local
from shadowlit.errors import Interrupted
from shadowlit.lightning_cli import main
from tests.distributed import run_ranks
from tests.tiny import save_pair

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pair, and a configuration of 10 steps: 4 and a half batches an epoch are 3 steps, with validations."""
    root = tmp_path_factory.mktemp("stopping")
    base, instruct = save_pair(root)
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab" * (1 + i % 5)}]
            for i in range(9)]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = {
        "pair": {"base": str(base), "instruct": str(instruct)},
        "model": {"lr": 1e-2, "adapter": {"r": 4, "lora_dropout": 0.2}},
        "graft": {"select": "all", "dtype": "float32"},
        "evaluation": {"evaluators": {"answers": {
            "class_path": "shadowlit.evaluation.generated.Generation",
            "init_args": {"data": str(root / "rows.jsonl"), "match": "contains", "max_new_tokens": 2, "batch_size": 2},
        }}},
        "export": {"parts": ["adapter"]},
        "data": {"train": str(root / "rows.jsonl"), "validation": str(root / "rows.jsonl"), "batch_size": 2,
                 "eval_batch_size": 4, "max_length": 64, "cache": False},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 1,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2,
            "check_val_every_n_epoch": None, "val_check_interval": 4,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def fit(root, name, *args, callbacks=(), command="fit"):
    """Run a command on the run of a name; return it, or the status with which a signal has ended it."""
    args = [f"--run.root={root}", f"--run.name={name}", *args]
    torch.set_num_threads(1)
    try:
        return main([command, "--config", str(root / "run.yaml"), *args], callbacks)
    except Interrupted as stop:
        return stop.code


class Strike(Callback):
    """Sends a signal to this process, at the n-th call of something in a training, after a pause."""

    def __init__(self, where, at, number=signal.SIGTERM, delay_s=0.0):
        self.where, self.left, self.number, self.delay_s = where, at, number, delay_s

    def on_train_batch_end(self, *_):
        self.count("batch")

    def on_validation_batch_end(self, *_):
        self.count("validation")

    def on_subject(self, trainer, module, subject, record):
        self.count("subject")

    def on_train_epoch_end(self, *_):
        self.count("epoch")

    def on_train_end(self, *_):
        self.count("end")

    def on_fit_end(self, *_):
        self.count("after")

    def count(self, where):
        self.left -= where == self.where
        if not self.left:
            self.left = -1
            time.sleep(self.delay_s)
            os.kill(os.getpid(), self.number)


_MACHINES = ("seconds", "time", "per_s", "memory", "tokens")


def logged(folder):
    """The names in metrics.csv, and the rows without times."""
    with (folder / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [{n: row[n] for n in row if not any(m in n for m in _MACHINES)} for row in reader]
    return reader.fieldnames, rows


def last(folder):
    (found,) = folder.rglob("last.ckpt")
    return found


def require_same(one, other, folders):
    """Two trainings end with the same weights, and have logged the same."""
    for (name, weight), found in zip(one.model.model.named_parameters(), other.model.model.parameters(), strict=True):
        assert torch.equal(local(weight), local(found)), name
    whole, parts = map(logged, folders)
    assert len(whole[1]) > 4 and parts == whole


STOPS = [("batch", 1), ("batch", 1), ("validation", 2), ("subject", 2), ("epoch", 1), ("batch", 2), ("end", 1)]


@pytest.mark.parametrize(("stops", "at", "options"), [
    ([("subject", 2), ("epoch", 1), ("batch", 2)], [2, 3, 4], ["--checkpoint.asynchronous=true"]),
    pytest.param(STOPS, [1, 2, 2, 2, 3, 4, 9], [], marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_that_is_stopped_everywhere_is_the_uninterrupted_one(root, tmp_path, stops, at, options):
    """Each time it ends with 143 and exports nothing; the same command resumes it, in one folder and one file."""
    whole, folder, steps = fit(root, str(tmp_path / "whole")), tmp_path / "parts", []
    for strike in stops:
        assert fit(root, str(folder), *options, callbacks=[Strike(*strike)]) == 143
        assert not (folder / "export").exists()
        steps.append(torch.load(last(folder), weights_only=True)["global_step"])
    assert steps == at
    end = fit(root, str(folder), *options)
    assert (folder / "export/adapter").is_dir() and sorted(os.listdir(tmp_path)) == ["parts", "whole"]
    require_same(whole, end, [tmp_path / "whole", folder])


class StrikeAtTheEnd(Strike):
    """In the validation after the last of five steps."""

    def on_subject(self, trainer, module, subject, record):
        if trainer.global_step == 5:
            self.count("subject")


def test_a_validation_after_the_last_step_is_repeated(root, tmp_path):
    """One that was stopped: its scores are logged, and the best checkpoint is chosen by them."""
    whole, folder = fit(root, str(tmp_path / "whole"), "--trainer.max_steps=5"), tmp_path / "parts"
    assert fit(root, str(folder), "--trainer.max_steps=5", callbacks=[StrikeAtTheEnd("subject", 1)]) == 143
    end = fit(root, str(folder), "--trainer.max_steps=5")
    assert end.trainer.global_step == 5
    require_same(whole, end, [tmp_path / "whole", folder])


def test_other_parts_end_at_once(root):
    """A validation, and what follows a training; SIGINT is not swallowed."""
    strike = Strike("validation", 1, signal.SIGINT)
    assert fit(root, "validated", callbacks=[strike], command="validate") == 130
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    assert fit(root, "exported", *options, callbacks=[Strike("after", 1, signal.SIGINT)]) == 130
    assert not list(root.glob("*ed/**/*.ckpt"))


def test_workers_of_loaders_survive_a_signal_to_all_processes(root):
    """As SLURM sends it: in the middle of a step, for which another batch is needed."""
    before, workers = psutil.Process().children(), []

    class All(Strike):
        def count(self, where):
            if where == self.where and self.left == 1:
                workers.extend(each for each in psutil.Process().children() if each not in before)
                subprocess.run(["kill", *(str(each.pid) for each in workers)], check=True)
                time.sleep(0.05)
            super().count(where)

    options = ["--data.num_workers=1", "--data.prefetch=1"]
    assert fit(root, "workers", *options, callbacks=[All("batch", 3)]) == 143
    assert torch.load(last(root / "workers"), weights_only=True)["global_step"] == 2
    for each in workers:
        each.terminate()  # by their parent
    assert workers and not psutil.wait_procs(workers, timeout=5)[1]


_SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}
STRATEGIES = {"ddp": "ddp", "fsdp2": json.dumps(_SHARDED)}


def stop_ranks(root, out, strategy):
    """In a SLURM job of two tasks, in whose working folder another job's checkpoint lies; the run has no name."""
    os.chdir(out)
    os.environ["PATH"] = f"{out}:{os.environ['PATH']}"
    rank = int(os.environ["SLURM_PROCID"])
    options = ["--trainer.devices=2", f"--trainer.strategy={STRATEGIES[strategy]}", "--trainer.max_epochs=2"]

    def run(strike=None, name="null"):
        return fit(root, name, *options, f"--run.root={out}", callbacks=[strike] if strike else [])

    whole = run(name="whole")
    statuses = [run(Strike("batch", 3, signal.SIGUSR1, delay_s=0.25 * rank))]  # and is requeued
    statuses.append(run(Strike("subject", 1) if rank == 1 else None))
    require_same(whole, run(), [out / "whole", out / "run/job_4711"])
    return statuses


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_ranks_stop_at_the_same_boundary(root, tmp_path, strategy):
    """Both are told a quarter of a second apart, then one alone while the graft is loaded; SLURM requeues the first."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> calls.txt\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("of another job")
    assert run_ranks(stop_ranks, 2, root, tmp_path, strategy, slurm=True) == [[138, 143]] * 2
    assert (tmp_path / "calls.txt").read_text() == "requeue 4711\n"
    assert os.listdir(tmp_path / "run") == ["job_4711"]
    assert os.listdir(tmp_path / "run/job_4711/export") == ["adapter"]
