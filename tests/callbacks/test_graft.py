"""The hazards of a graft inside training, each with its test (see docs/footguns.md)."""

import logging
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import shadowlit.callbacks.graft as graft_module
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import GraftError, PairError
from shadowlit.grafting.export import reload_logits
from shadowlit.grafting.manifest import read_manifest
from shadowlit.pair.pair import ModelPair
from shadowlit.training.metrics import TokenScores
from shadowlit.training.module import ShadowModule
from tests.distributed import run_ranks
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
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "use_distributed_sampler": False, "inference_mode": False, "accumulate_grad_batches": 2,
        "val_check_interval": 4, "gradient_clip_val": 1.0, "default_root_dir": tmp_path,
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
    assert logged["graft/gain"] == pytest.approx(logged["val/instruct/loss"] - logged["val/grafted/loss"], abs=1e-6)
    assert logged["val/grafted/loss"] != logged["val/tuned/loss"]
    manifest = read_manifest(tmp_path / "export/model")
    assert manifest["logits_against_validated"]["max_abs"] < (1e-6 if kind == "full" else 1e-5)
    assert manifest["metrics"]["val/grafted/loss"] == logged["val/grafted/loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, folders, kind):
    """Hazard 4: with dropout, accumulation, clipping and shuffled validation in between."""
    runs = []
    for callbacks in ([GraftCallback(scales=[1.0, 0.5])], []):
        module, trainer = fit(tmp_path, folders, kind, callbacks)
        moments = [s["exp_avg_sq"] for s in trainer.optimizers[0].state.values()]
        runs.append((weights(module), moments, metrics(trainer)["val/tuned/loss"], torch.rand(1).item()))
    assert_same(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][2:] == runs[1][2:]  # the same loss, and the global generator in the same state


class Saboteur(ShadowModule):
    """Does something in the middle of a grafted pass."""

    action = None
    armed_at = 4  # optimizer steps

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.action and self.subject == "grafted" and self.global_step == self.armed_at and batch_idx == 1:
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
    assert module.subject == "tuned"
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

    put = graft._put

    def put_and_save(host, state, squares):
        put(host, state, squares)
        trainer.save_checkpoint(tmp_path / "swap.ckpt")

    graft._put = put_and_save
    with pytest.raises(GraftError, match="none was written"), graft.applied(1.0):
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
    fit(tmp_path, folders, callbacks=[EarlyStopping(monitor), checkpoint, GraftCallback(), snapshots])
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    (remembered,) = [s for key, s in saved["callbacks"].items() if "GraftCallback" in key]
    assert checkpoint.best_model_score.item() == remembered["metrics"][monitor]
    expected = snapshots.after[saved["global_step"]]
    assert all(torch.equal(saved["state_dict"][f"model.{name}"], p) for name, p in expected.items())


def test_two_pairs_are_not_mixed_up_on_resume(tmp_path, folders):
    """Hazard 14."""
    other = save_model(tmp_path / "other", near=folders[1], seed=5)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path, folders, callbacks=[GraftCallback(), checkpoint], max_epochs=1)
    module = make_module((folders[0], other))
    with pytest.raises(GraftError, match=r"written with another instruct than pair.instruct is now"):
        make_trainer(tmp_path, GraftCallback()).fit(module, RandomData(), ckpt_path=tmp_path / "last.ckpt")


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

    class Spy(Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            seen.append((trainer.sanity_checking, module.subject))

    class Recorder(ShadowModule):
        def validation_step(self, *args):
            seen.append((self.trainer.sanity_checking, self.subject))
            super().validation_step(*args)

    module = make_module(folders, cls=Recorder)
    trainer = make_trainer(tmp_path, GraftCallback(), max_steps=1, val_check_interval=None, limit_val_batches=0.5)
    trainer.num_sanity_val_steps = 1
    trainer.fit(module, RandomData())
    assert seen.count((True, "tuned")) == seen.count((True, "grafted")) == 2  # one batch of each set
    assert not any(name.startswith("val/") for name in trainer.callback_metrics)


def test_the_untouched_models_are_measured_once_and_kept_over_a_resume(tmp_path, folders):
    subjects = []

    class Recorder(ShadowModule):
        def validation_step(self, *args):
            if not self.trainer.sanity_checking:
                subjects.append(self.subject)
            super().validation_step(*args)

    module = make_module(folders, cls=Recorder)
    callbacks = [GraftCallback(), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    first = make_trainer(tmp_path, *callbacks)
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


def test_the_validation_data_are_hashed_once(tmp_path, folders, monkeypatch):
    """Four validations, one hash; other limits are other data."""
    hashed, asked = [], []
    original = graft_module._signature
    monkeypatch.setattr(graft_module, "_signature", lambda *given: hashed.append(given) or original(*given))

    class Asked(GraftCallback):
        def _signature(self, loaders, limits):
            asked.append(super()._signature(loaders, limits))
            return asked[-1]

    graft = Asked()
    _, trainer = fit(tmp_path, folders, callbacks=[graft])
    assert (len(asked), len(set(asked)), len(hashed)) == (4, 1, 1)
    assert graft._signature(trainer.val_dataloaders, [1, 1]) != asked[0]


def test_nothing_selected_is_an_error_and_the_coverage_is_said(tmp_path, folders, caplog):
    """Hazard 7."""
    with pytest.raises(GraftError, match="0 of 24 tensors matched selection 'wqkv' for model type 'qwen3'"):
        fit(tmp_path, folders, callbacks=[GraftCallback(select="wqkv")])
    with caplog.at_level(logging.INFO):
        fit(tmp_path, folders, max_epochs=1)
    (line,) = [record.message for record in caplog.records if record.message.startswith("graft:")]
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


def test_callbacks_that_swap_weights_themselves_are_refused(tmp_path, folders):
    with pytest.raises(GraftError, match="can't share a run with EMAWeightAveraging"):
        fit(tmp_path, folders, callbacks=[GraftCallback(), EMAWeightAveraging()])


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
    assert read_manifest(tmp_path / "x/model")["logits_against_validated"]["max_abs"] < 1e-5


def test_an_export_that_is_not_the_graft_is_told(tmp_path, folders):
    callbacks = [GraftCallback(), ExportCallback(folder=str(tmp_path / "x"))]
    module = make_module(folders)
    trainer = make_trainer(tmp_path, *callbacks)
    genuine = callbacks[0].build

    def build(pl_module):
        graft = genuine(pl_module)
        graft.grafted_tensors = lambda scale: (
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
