"""The hazards of a graft inside training, each with its test (see docs/explanation/hazards.md)."""

import contextlib
import copy
import gc
import json
import logging
import math
import operator
import os
import shutil
import signal
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from peft import LoraConfig
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

import shadowlit.callbacks.graft as graft_module
from shadowlit.callbacks import record as record_module
from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.record import RunTotals, ValidationRecord
from shadowlit.data.module import ShadowData
from shadowlit.errors import DataError, GraftError, PairError
from shadowlit.evaluation.evaluator import EvalResult, Evaluator
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.subject import TUNED, Subject
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import TokenScores
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import SFT
from tests.data.templates import talk
from tests.distributed import run_ranks
from tests.reloading import reload_logits
from tests.synthetic import RandomData, random_samples
from tests.tiny import save_model, save_pair

KINDS = ["full", "lora"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


def make_module(folders, kind="full", cls=ShadowModule, **options):
    adapter = LoraConfig(r=4, lora_dropout=0.1) if kind == "lora" else None
    options = {"lr": 1e-2 if kind == "lora" else 1e-3, **options}
    return cls(ModelPair(str(folders[0]), str(folders[1])), adapter, **options)


def make_trainer(tmp_path, *callbacks, **options):
    seed_everything(0)
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "use_distributed_sampler": False, "inference_mode": False, "accumulate_grad_batches": 2,
        "val_check_interval": 4, "gradient_clip_val": 1.0, "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(tmp_path, folders, kind="full", callbacks=None, **options):
    module = make_module(folders, kind)
    trainer = make_trainer(tmp_path, *([GraftCallback()] if callbacks is None else callbacks), **options)
    trainer.fit(module, RandomData())
    return module, trainer


def metrics(trainer):
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def score_by_hand(model, set_seeds):
    """Loss over all tokens of the sets, with nothing of the package but the metric's definition."""
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for count, seed in set_seeds:
            for sample in random_samples(count, seed):
                logits = model(
                    input_ids=sample["input_ids"][None], attention_mask=sample["attention_mask"][None]
                ).logits.double()
                chosen = sample["labels"][1:] != -100
                log_probs = logits[0, :-1].log_softmax(-1)[chosen]
                loss -= log_probs.gather(1, sample["labels"][1:][chosen][:, None]).sum().item()
                tokens += int(chosen.sum())
    return loss / tokens


@pytest.mark.parametrize("kind", KINDS)
def test_grafted_metrics_are_those_of_the_exported_model(tmp_path, folders, kind):
    """Hazards 1, 10, 13: the swap covers the whole validation, sums are token-weighted, export = validated."""
    callbacks = [GraftCallback(), ExportCallback(folder=str(tmp_path / "export"))]
    _, trainer = fit(tmp_path, folders, kind, callbacks)
    logged = metrics(trainer)
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "export/model").eval()
    assert logged["val/grafted/loss"] == pytest.approx(score_by_hand(grafted, [(8, 1), (4, 2)]), rel=1e-6)
    assert logged["val/grafted/left/loss"] == pytest.approx(score_by_hand(grafted, [(8, 1)]), rel=1e-6)
    for who, folder in zip(("base", "instruct"), folders, strict=True):
        untouched = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert logged[f"val/{who}/right/loss"] == pytest.approx(score_by_hand(untouched, [(4, 2)]), rel=1e-6)
    gain, rounding = logged["val/instruct/loss"] - logged["val/grafted/loss"], 2**-23 * logged["val/instruct/loss"]
    assert logged["graft/gain"] == pytest.approx(gain, abs=rounding)  # Lightning logs in float32
    assert logged["val/grafted/loss"] != logged["val/tuned/loss"]
    manifest = read_manifest(tmp_path / "export/model")
    assert manifest["logits_against_validated"] == {"max_abs": 0, "rms": 0, "top1_agreement": 1}
    assert manifest["metrics"]["val/grafted/loss"] == logged["val/grafted/loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, folders, kind):
    """Hazard 4: with dropout, accumulation, clipping and shuffled validation in between."""
    runs = []
    for callbacks in ([GraftCallback(scales=[1.0, 0.5])], []):
        module, trainer = fit(tmp_path, folders, kind, callbacks, max_epochs=2)
        moments = [s["exp_avg_sq"] for s in trainer.optimizers[0].state.values()]
        runs.append((weights(module), moments, metrics(trainer)["val/tuned/loss"], torch.rand(1).item()))
    assert_same(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][2:] == runs[1][2:]  # the same loss, and the global generator in the same state


class Saboteur(ShadowModule):
    """Does something in the middle of a grafted pass."""

    action = None
    armed_at = 4  # optimizer steps

    def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=TUNED):
        super().validation_step(batch, batch_idx, dataloader_idx, subject)
        if self.action and subject.name == "grafted" and self.global_step == self.armed_at and batch_idx == 1:
            action, self.action = self.action, None
            action(self)


def sabotage(tmp_path, folders, kind, action, *callbacks, **options):
    module = make_module(folders, kind, cls=Saboteur)
    module.action = action
    trainer = make_trainer(tmp_path, *callbacks, **options)
    return module, trainer


class Snapshots(Callback):
    """Copies the weights after every optimizer step of a run."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.after[trainer.global_step] = weights(module)


def expected_weights(tmp_path, folders, kind):
    """The trained weights after four optimizer steps of the same run, without any graft."""
    snapshots = Snapshots()
    fit(tmp_path / "reference", folders, kind, [snapshots])
    return snapshots.after[4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_grafted_pass_restores_the_weights(tmp_path, folders, kind, error):
    """Hazards 2 and 3: also before a checkpoint callback that comes first saves them."""

    def raise_it(_):
        raise error

    module, trainer = sabotage(tmp_path, folders, kind, raise_it, OnExceptionCheckpoint(tmp_path), GraftCallback())
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, RandomData())
    expected = expected_weights(tmp_path, folders, kind)
    assert_same(weights(module), expected)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    trained = {f"model.{name}" for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained <= saved.keys() <= trained | {"model.lm_head.weight"}
    assert all(torch.equal(saved[name], expected[name.removeprefix("model.")]) for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_asked_for_in_the_grafted_pass_holds_the_trained_weights(tmp_path, folders, kind):
    """Hazard 3: as SLURM's requeue handler does. The pass is run again, so its metrics are right too."""

    def save(module):
        module.trainer.save_checkpoint(tmp_path / "signal.ckpt")

    module, trainer = sabotage(tmp_path, folders, kind, save, GraftCallback(), max_epochs=1)
    trainer.fit(module, RandomData())
    undisturbed, quiet = fit(tmp_path, folders, kind, max_epochs=1)
    assert metrics(trainer)["val/grafted/loss"] == metrics(quiet)["val/grafted/loss"]
    saved = torch.load(tmp_path / "signal.ckpt", weights_only=True)["state_dict"]
    assert any(p.requires_grad for p in undisturbed.model.parameters())
    for name, parameter in undisturbed.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(saved[f"model.{name}"], parameter)


def test_a_checkpoint_asked_for_in_the_middle_of_a_swap_is_refused(tmp_path, folders):
    module, trainer = fit(tmp_path, folders)
    graft = next(c for c in trainer.callbacks if isinstance(c, GraftCallback)).build(module)
    before = weights(module)

    write = graft._write_state

    def write_and_save(host, subject, squares):
        write(host, subject, squares)
        trainer.save_checkpoint(tmp_path / "swap.ckpt")

    graft._write_state = write_and_save
    with pytest.raises(GraftError, match="none was written"), graft.applied(Subject("grafted", 1.0)):
        pass
    assert not (tmp_path / "swap.ckpt").exists()
    assert_same(weights(module), before)


def terminated(folders, root):
    module, trainer = sabotage(
        root, folders, "full", lambda _: os.kill(os.getpid(), signal.SIGTERM), GraftCallback(),
        ModelCheckpoint(dirpath=root, every_n_train_steps=1, save_top_k=-1),
    )  # fmt: skip
    with pytest.raises(BaseException) as caught:
        trainer.fit(module, RandomData())
    return type(caught.value).__name__, weights(module), trainer.global_step


def test_sigterm_in_the_grafted_pass_leaves_the_trained_weights(tmp_path, folders):
    """Hazard 2: Lightning ends the run at the next batch; nothing grafted is left or saved."""
    ((name, left, steps),) = run_ranks(terminated, 1, folders, tmp_path)
    assert name == "SIGTERMException"
    assert steps == 4
    assert_same(left, expected_weights(tmp_path, folders, "full"))
    saved = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], p) for name, p in left.items())


@pytest.mark.parametrize("monitor", ["val/grafted/loss", "val/instruct/left/accuracy", "graft/gain", "val/base/loss"])
def test_checkpoints_and_early_stopping_can_monitor_any_of_them(tmp_path, folders, monitor):
    """Hazard 3: and the checkpoint holds the weights that train."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor=monitor, save_last=True)
    snapshots = Snapshots()
    fit(tmp_path, folders, callbacks=[EarlyStopping(monitor), checkpoint, GraftCallback(), snapshots], max_epochs=2)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    (remembered,) = [s for key, s in saved["callbacks"].items() if "GraftCallback" in key]
    assert checkpoint.best_model_score.item() == remembered["metrics"][monitor]
    expected = snapshots.after[saved["global_step"]]
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], p) for name, p in expected.items())


def test_one_callback_serves_two_pairs(tmp_path, folders):
    """Nothing that was measured of the first one is taken for the second."""
    other = folders[0], save_model(tmp_path / "other", near=folders[1], seed=5)
    graft, logged = GraftCallback(), []
    for callback, pair in ((graft, folders), (graft, other), (GraftCallback(), other)):
        _, trainer = fit(tmp_path, pair, callbacks=[callback], max_steps=2)
        logged.append(metrics(trainer)["val/instruct/loss"])
    assert logged[0] != logged[1] == logged[2]


def test_two_pairs_are_not_mixed_up_on_resume(tmp_path, folders):
    """Hazard 14."""
    other = save_model(tmp_path / "other", near=folders[1], seed=5)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path, folders, callbacks=[GraftCallback(), checkpoint], max_epochs=1)
    module = make_module((folders[0], other))
    with pytest.raises(GraftError, match=r"written with another instruct than pair.instruct is now"):
        trainer = make_trainer(tmp_path, GraftCallback(), max_epochs=2)
        trainer.fit(module, RandomData(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_graft_is_the_instruct(tmp_path, folders, kind):
    """Hazard 15: Δ = 0 gives the Instruct's own score, to the last bit; and the tuned model is the Base."""
    module = make_module(folders, kind)
    trainer = make_trainer(tmp_path, GraftCallback(scales=[1.0, 2.0]))
    trainer.validate(module, RandomData(), verbose=False)
    logged = metrics(trainer)
    for what in ("loss", "accuracy", "left/loss", "right/sequence_accuracy"):
        assert logged[f"val/grafted/{what}"] == logged[f"val/instruct/{what}"] == logged[f"val/grafted@2/{what}"]
        assert logged[f"val/tuned/{what}"] == logged[f"val/base/{what}"]
    assert logged["graft/gain"] == 0
    assert logged["val/instruct/loss"] != logged["val/base/loss"]


def test_the_sanity_check_runs_the_graft_and_logs_nothing(tmp_path, folders):
    seen = []

    class Recorder(ShadowModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=TUNED):
            seen.append((self.trainer.sanity_checking, subject.name))
            super().validation_step(batch, batch_idx, dataloader_idx, subject)

    module = make_module(folders, cls=Recorder)
    trainer = make_trainer(tmp_path, GraftCallback(), max_steps=1, val_check_interval=None, limit_val_batches=0.5)
    trainer.num_sanity_val_steps = 1
    trainer.fit(module, RandomData())
    assert seen.count((True, "tuned")) == seen.count((True, "grafted")) == 2  # one batch of each set
    assert not any(name.startswith("val/") for name in trainer.callback_metrics)


def test_the_untouched_models_are_measured_once_and_kept_over_a_resume(tmp_path, folders):
    subjects = []

    class Recorder(ShadowModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=TUNED):
            if not self.trainer.sanity_checking:
                subjects.append(subject.name)
            super().validation_step(batch, batch_idx, dataloader_idx, subject)

    module = make_module(folders, cls=Recorder)
    callbacks = [GraftCallback(), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    first = make_trainer(tmp_path, *callbacks, max_epochs=2)
    first.fit(module, RandomData())
    batches = 4 + 2
    assert subjects.count("base") == subjects.count("instruct") == batches
    assert subjects.count("tuned") == subjects.count("grafted") == 4 * batches
    subjects.clear()
    again = make_trainer(tmp_path, GraftCallback(), max_epochs=3)
    again.fit(make_module(folders, cls=Recorder), RandomData(), ckpt_path=tmp_path / "last.ckpt")
    assert "base" not in subjects and "grafted" in subjects
    assert metrics(again)["val/instruct/loss"] == metrics(first)["val/instruct/loss"]


def test_the_untouched_models_are_measured_anew_on_other_data(tmp_path, folders):
    callbacks = [GraftCallback(), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    first = make_trainer(tmp_path, *callbacks)
    first.fit(make_module(folders), RandomData())

    class OtherData(RandomData):
        validation_names = ("left",)

        def val_dataloader(self):
            return [self._loader(6, seed=9)]

    again = make_trainer(tmp_path, GraftCallback())
    again.validate(make_module(folders), OtherData(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    instruct = AutoModelForCausalLM.from_pretrained(folders[1]).eval()
    assert metrics(again)["val/instruct/loss"] == pytest.approx(score_by_hand(instruct, [(6, 9)]), rel=1e-6)
    assert metrics(again)["val/instruct/loss"] != metrics(first)["val/instruct/loss"]


def test_limits_and_several_scales(tmp_path, folders):
    _, trainer = fit(tmp_path, folders, callbacks=[GraftCallback(scales=[1.0, 0.0, 0.5])], limit_val_batches=1)
    logged = metrics(trainer)
    assert logged["val/grafted@0/loss"] == logged["val/instruct/loss"]
    assert len({logged[f"val/{who}/loss"] for who in ("grafted", "grafted@0", "grafted@0.5", "tuned")}) == 4


def test_subclasses_log_their_own_metrics_for_every_subject(tmp_path, folders):
    class Counting(TokenScores):
        def compute(self):
            return {**super().compute(), "tokens": float(self.num_tokens)}

    class Custom(ShadowModule):
        def configure_scores(self):
            return Counting()

    trainer = make_trainer(tmp_path, GraftCallback())
    trainer.validate(make_module(folders, cls=Custom), RandomData(), verbose=False)
    counts = {metrics(trainer)[f"val/{who}/tokens"] for who in ("tuned", "grafted", "base", "instruct")}
    assert len(counts) == 1 and counts.pop() > 0


class Precise(SFT):
    """An objective with an option."""

    def __init__(self, option=1.0):
        self.option = option


class Tokens(Metric):
    """Counts the supervised tokens."""

    def __init__(self, option=1):
        super().__init__()
        self.option = option
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits, labels):
        self.count += len(labels)

    def compute(self):
        return self.count


class OtherTokens(Tokens):
    pass


@pytest.mark.parametrize(
    ("options", "trainer_options", "again"),
    [
        ({}, {}, False),
        ({"objective": Precise(2.0)}, {}, True),
        ({"objective": SFT()}, {}, True),
        ({"metrics": {"other": Tokens()}}, {}, True),
        ({"metrics": {"tokens": OtherTokens()}}, {}, True),
        ({"metrics": {"tokens": Tokens(2)}}, {}, True),
        ({}, {"precision": "bf16-mixed"}, True),
    ],
)
def test_the_untouched_models_are_measured_again_with_other_settings(
    tmp_path, folders, options, trainer_options, again
):
    graft, seen = GraftCallback(), []

    class Recorder(ShadowModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=TUNED):
            seen.append(subject.name)
            super().validation_step(batch, batch_idx, dataloader_idx, subject)

    def validate(options, trainer_options):
        seen.clear()
        module = make_module(
            folders, cls=Recorder, **{"objective": Precise(), "metrics": {"tokens": Tokens()}, **options}
        )
        make_trainer(tmp_path, graft, **trainer_options).validate(module, RandomData(), verbose=False)
        return "instruct" in seen, "base" in seen

    assert validate({}, {}) == (True, True)
    assert validate(options, trainer_options) == (again, again)


def test_the_validation_data_are_told_from_others(tmp_path, folders, monkeypatch):
    """Four validations of the same data; other limits are other data."""
    asked, original = [], graft_module.data_signature
    monkeypatch.setattr(graft_module, "data_signature", lambda *given: asked.append(original(*given)) or asked[-1])
    _, trainer = fit(tmp_path, folders, max_epochs=2)
    assert (len(asked), len(set(asked))) == (4, 1)
    assert original(trainer.val_dataloaders, [1, 1]) != asked[0]


def test_nothing_selected_is_an_error_and_the_coverage_is_said(tmp_path, folders, caplog):
    """Hazard 7."""
    with pytest.raises(GraftError, match="0 of 24 tensors matched selection 'wqkv' for model type 'qwen3'"):
        fit(tmp_path, folders, callbacks=[GraftCallback(select="wqkv")])
    with caplog.at_level(logging.INFO):
        fit(tmp_path, folders, max_epochs=1)
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert line.startswith(
        "graft: 14 of 24 tensors, 18.43 k of 27.33 k parameters; trained but left out: embed_tokens,"
    )
    assert "8.0 bytes per parameter" in line


def test_an_unfit_pair_is_found_before_any_weight_is_loaded(tmp_path, folders):
    """Hazards 6 and 9."""
    other = save_model(tmp_path / "llama", "llama")
    module = make_module((folders[0], other))
    with pytest.raises(PairError):
        make_trainer(tmp_path, GraftCallback()).fit(module, RandomData())
    assert module.model is None


def test_a_module_that_does_not_start_at_the_base_is_refused(tmp_path, folders):
    class Moved(ShadowModule):
        def configure_model(self):
            super().configure_model()
            with torch.no_grad():
                self.model.model.norm.weight[0] += 1

    with pytest.raises(GraftError, match="does not start at the Base"):
        make_trainer(tmp_path, GraftCallback()).fit(make_module(folders, cls=Moved), RandomData())


class OwnAveraging(WeightAveraging):
    """A subclass, as the docstring of Lightning's class recommends."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return True


@pytest.mark.parametrize("make", [EMAWeightAveraging, OwnAveraging, lambda: StochasticWeightAveraging(1e-2)])
def test_callbacks_that_swap_weights_themselves_are_refused(tmp_path, folders, make):
    other = make()
    with pytest.raises(GraftError, match=f"can't share a run with {type(other).__name__}: both swap"):
        fit(tmp_path, folders, callbacks=[GraftCallback(), other])


def test_a_step_that_cannot_be_told_the_subject_is_refused(tmp_path, folders):
    class Deaf(ShadowModule):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            super().test_step(batch, batch_idx, dataloader_idx)

    class Late(ShadowModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=None):
            super().validation_step(batch, batch_idx, dataloader_idx, subject)

    class Silent(ShadowModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0, subject=TUNED):
            super().validation_step(batch, batch_idx, dataloader_idx)

    for cls, message in (
        (Deaf, r"Deaf\.test_step\(batch, batch_idx, dataloader_idx=0\) does not take the subject"),
        (Late, r"Late\.validation_step has the argument subject=None; expected subject=TUNED"),
        (Silent, r"Silent\.validation_step was called with the subject grafted .* super\(\)\.validation_step\(batch, "),
    ):
        module = make_module(folders, cls=cls)
        with pytest.raises(GraftError, match=message):
            make_trainer(tmp_path, GraftCallback(), max_epochs=1).fit(module, RandomData())
    module = make_module(folders, cls=Deaf)
    make_trainer(tmp_path, max_steps=1).fit(module, RandomData())  # without the callback there is nothing to tell


def test_a_callback_that_does_not_take_the_subject_is_refused(tmp_path, folders):
    class Wrong(Callback):
        def on_subject(self, trainer, module, subject):
            pass

    module = make_module(folders)
    message = (
        r"Wrong\.on_subject\(trainer, module, subject\) can't be called .* expected \(trainer, module, subject, rec"
    )
    with pytest.raises(GraftError, match=message):
        make_trainer(tmp_path, GraftCallback(), Wrong()).fit(module, RandomData())
    assert module.model is None


def test_a_step_that_passes_everything_on_scores_every_subject(tmp_path, folders):
    class Passing(ShadowModule):
        def validation_step(self, *args):
            super().validation_step(*args)

    logged = []
    for cls in (ShadowModule, Passing):
        trainer = make_trainer(tmp_path, GraftCallback(scales=[1.0, 0.5]), max_epochs=1)
        trainer.fit(make_module(folders, cls=cls), RandomData())
        logged.append({name: value for name, value in metrics(trainer).items() if name.startswith("val/")})
    assert logged[0] == logged[1] and "val/grafted@0.5/loss" in logged[0]


def open_files(*folders):
    """Names of the files in the folders that this process has open."""
    names = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{number}")]  # fmt: skip
    return [name for name in names if any(name.startswith(str(folder)) for folder in folders)]


class Holding(Callback):
    """Remembers what the graft holds while a run lasts, without keeping it."""

    def __init__(self, graft):
        self.graft = graft

    def on_train_end(self, trainer, module):
        live = self.graft.graft
        self.held = [weakref.ref(live), *(weakref.ref(host.instruct) for host in live._hosts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_nothing_of_the_pair_is_kept_after_a_run(tmp_path, folders, kind, error):
    class Failing(Callback):
        def on_train_end(self, *_):
            if error:
                raise error

    graft = GraftCallback()
    watch = Holding(graft)
    evaluation = EvaluationCallback({"probe": Fixed()}, folder=str(tmp_path / "e"))
    export = ExportCallback(folder=str(tmp_path / "x"))
    module = make_module(folders, kind)
    trainer = make_trainer(tmp_path, graft, evaluation, export, watch, Failing())
    if error:
        with contextlib.suppress(error):
            trainer.fit(module, RandomData())
    else:
        trainer.fit(module, RandomData())
        assert (tmp_path / "x/model").is_dir()
    gc.collect()
    assert graft.graft is None and len(watch.held) > 20
    assert [ref for ref in watch.held if ref() is not None] == []
    assert open_files(*folders) == [] and not module._state_dict_pre_hooks


class Fixed(Evaluator):
    """Whose reference is swapped in, and which keeps nothing."""

    def read(self, pair, template_kwargs):
        pass

    def run(self, context):
        with context.reference():
            return EvalResult({"score": 1.0}, [])

    def signature(self):
        return "fixed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_validation_after_the_run_builds_the_graft_again(tmp_path, folders, kind):
    graft = GraftCallback(scales=[1.0, 0.5])
    module, trainer = fit(tmp_path, folders, kind, [graft])
    before, trained = metrics(trainer), weights(module)
    trainer.validate(module, RandomData(), verbose=False)
    after = metrics(trainer)
    for who in ("tuned", "grafted", "grafted@0.5", "base", "instruct"):
        assert after[f"val/{who}/loss"] == before[f"val/{who}/loss"]
    assert after["graft/delta_norm"] == before["graft/delta_norm"]
    assert_same(weights(module), trained)
    with graft.grafted(module):  # and once more, by hand
        assert any(not torch.equal(p, trained[name]) for name, p in module.model.named_parameters())
    assert_same(weights(module), trained)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_validation_after_the_run_has_no_share_of_its_time(tmp_path, folders, error):
    class Failing(Callback):
        def on_train_end(self, *_):
            if error:
                raise error

    graft, evaluation = GraftCallback(), EvaluationCallback({"probe": Fixed()}, folder=str(tmp_path / "e"))
    module, trainer = make_module(folders), make_trainer(tmp_path, graft, evaluation, Failing(), max_steps=2)
    with contextlib.suppress(RuntimeError):
        trainer.fit(module, RandomData())
    assert {"graft/time_share", "evaluation/time_share"} <= metrics(trainer).keys()
    make_trainer(tmp_path, graft, evaluation).validate(module, RandomData(), verbose=False)
    logged = graft.finished.metrics
    assert "graft/seconds" in logged and not {"graft/time_share", "evaluation/time_share"} & logged.keys()


@pytest.mark.parametrize("scales", [[], [1.0, 1.0], [0.1234567, 0.12345671], [math.nan], [1.0, math.inf]])
def test_scales_are_finite_and_named_apart(scales):
    with pytest.raises(GraftError, match=r"graft\.scales is \[.*expected at least one finite number, and none of them"):
        GraftCallback(scales=scales)
    assert [s.name for s in GraftCallback(scales=[1.0, 0.5, 0.123456, 0.123457]).subjects][1:] == [
        "grafted@0.5", "grafted@0.123456", "grafted@0.123457",
    ]  # fmt: skip


def test_a_resume_with_another_graft_is_told(tmp_path, folders):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path, folders, callbacks=[GraftCallback(), checkpoint], max_steps=2)
    (state,) = [s for k, s in load(tmp_path / "last.ckpt")["callbacks"].items() if "GraftCallback" in k]
    with warnings.catch_warnings(action="error"):
        same = GraftCallback()
        same.load_state_dict(state)
    assert same.finished.metrics == state["metrics"] and state["metrics"]
    told = r"written with another graft: scales \[1\.0\] \(now \[0\.5\]\), dtype None \(now torch\.bfloat16\)\. Its"
    with pytest.warns(UserWarning, match=told):
        other = GraftCallback(scales=[0.5], dtype="bfloat16")
        other.load_state_dict(state)
    assert other.finished.metrics == {}
    trainer = make_trainer(tmp_path, GraftCallback(scales=[0.5]), max_steps=4)
    with pytest.warns(UserWarning, match=r"written with another graft: scales \[1\.0\]"):
        trainer.fit(make_module(folders), RandomData(), ckpt_path=tmp_path / "last.ckpt")


def test_an_export_of_a_checkpoint_with_another_graft_is_told(tmp_path, folders):
    """The best checkpoint of a resumed run may be one from before the graft was changed."""

    def run(epochs, ckpt_path=None, **options):
        best = ModelCheckpoint(dirpath=tmp_path, monitor="graft/delta_norm", mode="min", save_last=True)
        export = ExportCallback(folder=str(tmp_path / f"x{bool(ckpt_path)}"), parts=["delta"])
        trainer = make_trainer(tmp_path, GraftCallback(**options), best, export, max_epochs=epochs)
        trainer.fit(make_module(folders), RandomData(), ckpt_path=ckpt_path)

    run(1)
    with pytest.warns(UserWarning) as told:
        run(2, tmp_path / "last.ckpt", scales=[0.5])
    assert sum("was written with another graft: scales" in str(one.message) for one in told) == 2
    assert read_manifest(tmp_path / "xTrue/delta")["metrics"] == {}


def load(path):
    return torch.load(path, weights_only=True)


def test_relative_delta_by_hand(tmp_path, folders):
    """The update's norm over the Instruct's, both over the selected tensors."""
    module, trainer = fit(tmp_path, folders, max_epochs=1)
    base, instruct = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in folders)
    selected = [name for name, p in base.items() if "layers" in name and p.dim() == 2]
    assert len(selected) == 14
    tuned = dict(module.model.named_parameters())
    square = lambda tensors: sum(t.double().square().sum().item() for t in tensors)  # noqa: E731
    update, goal = square(tuned[n] - base[n] for n in selected), square(instruct[n] for n in selected)
    assert metrics(trainer)["graft/relative_delta"] == pytest.approx((update / goal) ** 0.5, rel=1e-5)
    assert metrics(trainer)["graft/delta_norm"] == pytest.approx(update**0.5, rel=1e-5)


def test_a_checkpoint_from_before_the_record_still_resumes(tmp_path, folders):
    """Its scores of the untouched models lie under other keys, and are not measured again."""
    callbacks = [GraftCallback(), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    first = make_trainer(tmp_path, *callbacks, max_epochs=1)
    first.fit(make_module(folders), RandomData())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (key,) = [key for key in saved["callbacks"] if "GraftCallback" in key]
    state = saved["callbacks"][key]
    entry = state.pop("untouched")["val"]
    assert set(entry) == {"signature", "base", "instruct"}
    # The marks show where the logged numbers come from.
    old = {who: {**entry[who], "mark": mark} for who, mark in (("base", 1.0), ("instruct", 2.0))}
    saved["callbacks"][key] = {**state, "constants": old, "measured_on": entry["signature"]}
    torch.save(saved, tmp_path / "old.ckpt")
    again = make_trainer(tmp_path, GraftCallback(), max_epochs=2)
    again.fit(make_module(folders), RandomData(), ckpt_path=tmp_path / "old.ckpt")
    logged = metrics(again)
    assert logged["val/base/mark"] == 1 and logged["val/instruct/mark"] == 2
    assert logged["val/instruct/loss"] == metrics(first)["val/instruct/loss"]


def test_a_checkpoint_saved_in_a_pass_states_the_last_complete_validation(tmp_path, folders):
    def save(module):
        module.trainer.save_checkpoint(tmp_path / "within.ckpt")

    every = ModelCheckpoint(tmp_path, filename="{step}", monitor="graft/gain", save_top_k=-1)
    _, trainer = (module, trainer) = sabotage(tmp_path, folders, "full", save, GraftCallback(), every)
    trainer.fit(module, RandomData())
    states = []
    for name in ("within.ckpt", "step=2.ckpt"):  # the action strikes at step 4
        saved = torch.load(tmp_path / name, weights_only=True)
        states.append(next(state for key, state in saved["callbacks"].items() if "GraftCallback" in key))
    assert states[0]["metrics"] == states[1]["metrics"] and "val/grafted/loss" in states[0]["metrics"]


class Norms(Callback):
    """A user's own measurement of every subject."""

    def __init__(self):
        self.calls = []

    def on_subject(self, trainer, module, subject, record):
        self.calls.append((trainer.global_step, subject.name, [s.name for s in record.subjects]))
        with record.timed("norm"):
            time.sleep(0.05)
            square = sum(p.double().square().sum().item() for p in module.model.parameters())
        record.metrics[f"{record.stage}/{subject.name}/norm"] = square**0.5


def test_a_callback_of_ones_own_measures_every_subject(tmp_path, folders):
    own, graft = Norms(), GraftCallback(scales=[1.0, 0.5])
    module, trainer = fit(tmp_path, folders, callbacks=[own, graft], max_epochs=1)
    logged = metrics(trainer)
    square = lambda model: sum(p.double().square().sum().item() for p in model.parameters())  # noqa: E731
    for who, folder in (("base", folders[0]), ("instruct", folders[1])):
        expected = square(AutoModelForCausalLM.from_pretrained(folder)) ** 0.5
        assert logged[f"val/{who}/norm"] == pytest.approx(expected, rel=1e-6)
    assert logged["val/tuned/norm"] == pytest.approx(square(module.model) ** 0.5, rel=1e-6)
    with graft.grafted(module, 0.5):
        assert logged["val/grafted@0.5/norm"] == pytest.approx(square(module.model) ** 0.5, rel=1e-6)
    # Two validations; the untouched models in the first one only, and never in the sanity check.
    order = ["grafted", "grafted@0.5", "tuned", "base", "instruct"]
    assert [name for step, name, _ in own.calls if step == 2] == order
    assert [name for step, name, _ in own.calls if step == 4] == order[:3] and len(own.calls) == 8
    assert all(before == order[: len(before)] and name == order[len(before)] for _, name, before in own.calls)
    record = graft.record
    assert [subject.name for subject in record.subjects] == order[:3] and record is graft.finished
    assert record.seconds["norm"] > 0.15 and logged["graft/seconds"] == pytest.approx(record.seconds["graft"])
    # Lightning still shows what only the first validation measured; the record of the second does not state it.
    assert logged.keys() - record.metrics.keys() == {"val/base/norm", "val/instruct/norm"}
    assert record.metrics.items() <= logged.items()


@pytest.mark.parametrize("first", [True, False])
def test_a_metric_of_any_callback_is_logged_wherever_it_is_listed(tmp_path, folders, first):
    graft, own = GraftCallback(), Callback()
    own.on_validation_epoch_end = lambda *_: graft.record.metrics.update({"val/own": 0.25})
    _, trainer = fit(tmp_path, folders, callbacks=[own, graft] if first else [graft, own], max_steps=2)
    assert metrics(trainer)["val/own"] == graft.finished.metrics["val/own"] == 0.25
    assert copy.deepcopy(graft.finished).metrics == graft.finished.metrics


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.update({"val/own": 1.0}),
        lambda m: operator.setitem(m, "val/own", 1.0),
        lambda m: operator.ior(m, {"val/own": 1.0}),
    ],
)
def test_a_metric_that_comes_after_the_others_were_logged_is_an_error(tmp_path, folders, first, add):
    graft, own = GraftCallback(), Callback()
    own.on_validation_end = lambda *_: add(graft.record.metrics)
    with pytest.raises(GraftError, match=r"val/own was added .* had been logged\. Add metrics in on_subject or on_val"):
        fit(tmp_path, folders, callbacks=[own, graft] if first else [graft, own], max_steps=2)


def test_a_metric_that_the_module_scores_too_is_an_error(tmp_path, folders):
    class Twice(Callback):
        def on_subject(self, trainer, module, subject, record):
            record.metrics[f"val/{subject.name}/left/loss"] = 1.0

    with pytest.raises(
        DataError, match="val/tuned/left/loss would be logged twice: for a validation set, and for an eval"
    ):
        fit(tmp_path, folders, callbacks=[GraftCallback(baselines=False), Twice()])


def test_time_in_a_part_does_not_count_for_the_part_around_it(monkeypatch):
    clock = iter([0, 2, 12, 12, 13, 18, 20, 21, 40])  # each beginning and end, the outermost last
    monkeypatch.setattr(record_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    record = ValidationRecord(run=RunTotals(started=0))
    with record.timed("graft"):
        with record.timed("evaluation/a"):
            pass
        with record.timed("evaluation/b"), record.timed("inner"):
            pass
    assert record.seconds == {"evaluation/a": 10, "inner": 5, "evaluation/b": 3, "graft": 3}
    assert record.spent("evaluation") == record.run.seconds["evaluation"] == 13 and record.spent("evaluation/a") == 10
    record.add_cost("inner")
    assert record.metrics == {"inner/seconds": 5, "inner/time_share": 5 / 40}


def test_offloading_changes_no_number(tmp_path, folders):
    """Hazard 12 (on a device the frozen shards then lie on the CPU)."""
    logged = [metrics(fit(tmp_path, folders, callbacks=[GraftCallback(offload=o)])[1]) for o in (False, True)]
    timeless = [{k: v for k, v in run.items() if "seconds" not in k and "time" not in k} for run in logged]
    assert timeless[0] == timeless[1]


def test_its_cost_is_logged(tmp_path, folders):
    logged = metrics(fit(tmp_path, folders)[1])
    assert 0 < logged["graft/swap_seconds"] < logged["graft/seconds"]
    assert 0 < logged["graft/time_share"] < 1


def test_export_takes_the_best_checkpoint(tmp_path, folders):
    """Monitoring the loss of the wrong sign makes the first checkpoint the best: that one is exported."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="graft/delta_norm", mode="min")
    callbacks = [GraftCallback(), ExportCallback(folder=str(tmp_path / "x")), checkpoint]
    module, _ = fit(tmp_path, folders, callbacks=callbacks)
    first, _ = fit(tmp_path, folders, callbacks=[GraftCallback()], max_steps=checkpoint_step(checkpoint))
    assert checkpoint_step(checkpoint) == 2
    assert_same(weights(module), weights(first))
    assert read_manifest(tmp_path / "x/model")["metrics"]["graft/delta_norm"] == checkpoint.best_model_score.item()


def checkpoint_step(checkpoint):
    return torch.load(checkpoint.best_model_path, weights_only=True)["global_step"]


def test_exported_adapter_on_the_instruct_is_the_graft(tmp_path, folders):
    from peft import PeftModel

    fit(tmp_path, folders, "lora", [GraftCallback(), ExportCallback(folder=str(tmp_path / "x"))])
    sample = random_samples(1, 1)[0]
    ids, mask = sample["input_ids"][None], sample["attention_mask"][None]
    instruct = AutoModelForCausalLM.from_pretrained(folders[1])
    with torch.no_grad():
        untouched = instruct(input_ids=ids, attention_mask=mask).logits
        adapted = PeftModel.from_pretrained(instruct, tmp_path / "x/adapter").eval()
        logits = adapted(input_ids=ids, attention_mask=mask).logits
    merged = reload_logits(tmp_path / "x/model", ids, mask)
    torch.testing.assert_close(logits, merged, rtol=0, atol=1e-6)
    assert (untouched - logits).abs().max() > 1e-3
    assert read_manifest(tmp_path / "x/adapter")["scale"] == 1.0


def test_an_adapter_that_means_another_update_on_the_instruct_is_not_exported(tmp_path, folders):
    module = make_module(folders, "full")
    module.adapter = LoraConfig(r=2, bias="all", target_modules="all-linear")
    module.strict_loading = False
    trainer = make_trainer(tmp_path, GraftCallback(), ExportCallback(folder=str(tmp_path / "x")))
    trainer.fit(module, RandomData())
    assert (tmp_path / "x/model").is_dir() and not (tmp_path / "x/adapter").exists()
    assert read_manifest(tmp_path / "x/model")["logits_against_validated"]["max_abs"] == 0


def test_an_export_that_is_not_the_graft_is_told(tmp_path, folders):
    callbacks = [GraftCallback(), ExportCallback(folder=str(tmp_path / "x"))]
    module = make_module(folders)
    trainer = make_trainer(tmp_path, *callbacks)
    genuine = callbacks[0].build

    def build(pl_module):
        graft = genuine(pl_module)
        graft.grafted_tensors = lambda scale, variant: (
            (n, torch.randn(i.shape)) for n, i in graft._instruct_reader.tensors.items()
        )
        return graft

    callbacks[0].build = build
    with pytest.warns(UserWarning, match="is not what was validated"):
        trainer.fit(module, RandomData())


def test_an_export_is_never_overwritten(tmp_path, folders):
    (tmp_path / "x/model").mkdir(parents=True)
    from shadowlit.errors import ExportError

    with pytest.raises(ExportError, match="holds an export already"):
        fit(tmp_path, folders, callbacks=[GraftCallback(), ExportCallback(folder=str(tmp_path / "x"))])
    with pytest.raises(ExportError, match="has 0 GraftCallbacks"):
        fit(tmp_path, folders, callbacks=[ExportCallback(folder=str(tmp_path / "y"))])


class Unread(RandomData):
    """Data that must not be read."""

    def prepare_data(self):
        raise AssertionError("the data were read")

    def setup(self, stage):
        self.prepare_data()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_pair_is_checked_before_the_data_are_read(tmp_path, folders, command):
    quantised = shutil.copytree(folders[0], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    module, trainer = make_module((quantised, folders[1])), make_trainer(tmp_path, GraftCallback())
    with pytest.raises(PairError, match=r"base quantised: config\.json has quantization_config \(gptq\)"):
        getattr(trainer, command)(module, Unread())


def test_each_command_checks_the_pair_once(tmp_path, folders, monkeypatch):
    checked = []
    monkeypatch.setattr(graft_module, "require_fit", lambda pair, *_: checked.append(pair))
    limits = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": 1}
    trainer = make_trainer(tmp_path, GraftCallback(baselines=False), **limits)
    module = make_module(folders)
    for command in ("fit", "validate", "test"):
        getattr(trainer, command)(module, RandomData())
    assert checked == [module.pair] * 3


def test_an_instruct_without_a_template_is_trained_with_that_of_the_data(tmp_path):
    folders = save_pair(tmp_path / "pair", "qwen3")
    rows = [{"messages": talk(f"question {i}", f"answer {i}")} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = {name: str(tmp_path / "rows.jsonl") for name in ("train", "validation")}
    own = ShadowData(make_module(folders).pair, **sources, cache=False)
    own.setup("fit")
    template = tmp_path / "template.jinja"
    (folders[1] / "chat_template.jinja").rename(template)
    module, trainer = make_module(folders), make_trainer(tmp_path, GraftCallback(), val_check_interval=1)
    with pytest.raises(PairError, match=r"the Instruct's tokenizer has none.*set data\.chat_template to the file"):
        trainer.fit(module, ShadowData(module.pair, **sources, cache=False))
    data = ShadowData(module.pair, **sources, cache=False, chat_template=str(template))
    trainer.fit(module, data)
    assert trainer.global_step == 1 and metrics(trainer)["val/grafted/loss"] > 0
    assert [data.dataset("train")[i] for i in range(8)] == [own.dataset("train")[i] for i in range(8)]


class Stops(Callback):
    """A user's own check."""

    def before_data(self, trainer, module):
        raise GraftError(f"{module.pair.base} is not for today")


def test_any_callback_can_check_before_the_data_are_read(tmp_path, folders):
    with pytest.raises(GraftError, match="is not for today"):
        make_trainer(tmp_path, Stops()).fit(make_module(folders), Unread())
