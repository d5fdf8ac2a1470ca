"""What is logged of the graft is what plain transformers and peft compute with the exported files."""

import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.scores import error_of_gain, error_of_paired, opening_line, score_table, survival_line
from shadowlit.errors import GraftError
from shadowlit.pair.pair import ModelPair
from shadowlit.text import number
from shadowlit.training.module import ShadowModule
from shadowlit.training.objective import token_sums
from tests.distributed import run_ranks
from tests.evaluation.contexts import DEMO_PAIR
from tests.synthetic import RandomData, random_samples
from tests.tiny import save_pair

ADAPTERS = {"full": None, "lora": {"r": 4}, "rslora": {"r": 4, "use_rslora": True}}
ROWS = [*random_samples(8, 1), *random_samples(4, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3", dtype=torch.bfloat16)


def fit(folders, kind, precision="32-true", lr=None, data=None, **options):
    seed_everything(0)
    adapter = ADAPTERS[kind] and LoraConfig(**ADAPTERS[kind])
    module = ShadowModule(ModelPair(*map(str, folders)), adapter, lr=lr or (1e-3 if adapter is None else 1e-2))
    graft = GraftCallback(**options.pop("graft", {}))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, num_sanity_val_steps=0, precision=precision,
        callbacks=[graft, *options.pop("callbacks", [])], **{"devices": 1, "max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(module, data or RandomData())
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, graft


def loss_of(model, rows=ROWS):
    losses = sample_losses(model, rows)
    return losses[:, 0].sum().item() / losses[:, 1].sum().item()


@torch.no_grad()
def sample_losses(model, rows):
    found = []
    for row in rows:
        mask = row["attention_mask"].bool()
        logits = model(input_ids=row["input_ids"][mask][None], use_cache=False).logits[0, :-1]
        chosen = row["labels"][mask][1:] != -100
        log_probs = logits.double().log_softmax(-1)[chosen]
        found.append([-log_probs.gather(1, row["labels"][mask][1:][chosen][:, None]).sum().item(), int(chosen.sum())])
    return torch.tensor(found, dtype=torch.float64)


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_graft_that_is_scored_is_the_one_that_is_exported(tmp_path, folders, kind):
    logged, _ = fit(folders, kind, callbacks=[ExportCallback(folder=str(tmp_path))])
    grafted = loss_of(loaded(tmp_path / "model"))
    assert loaded(tmp_path / "model", "auto").dtype == torch.bfloat16
    assert logged["val/grafted/loss"] == pytest.approx(grafted, rel=1e-6)
    assert logged["val/instruct/loss"] == pytest.approx(loss_of(loaded(folders[1])), rel=1e-6)
    if kind != "full":
        served = loss_of(PeftModel.from_pretrained(loaded(folders[1]), tmp_path / "adapter"))
        assert logged["val/adapter/loss"] == pytest.approx(served, rel=1e-6)
        assert abs(served - grafted) > 5e-6  # rounding to bfloat16 is seen
        gain = logged["val/instruct/loss"] - logged["val/adapter/loss"]
        assert logged["graft/gain_unrounded"] == pytest.approx(gain, abs=1e-6)


def fit_sharded(kind, out):
    """What a rank of two under FSDP2 logs."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [ExportCallback(folder=str(out), verify=False)]
    return fit(DEMO_PAIR, kind, callbacks=callbacks, strategy=strategy, devices=2, max_steps=2, val_check_interval=2)[0]


@pytest.mark.parametrize("kind", ["full", "lora", pytest.param("rslora", marks=pytest.mark.slow)])
def test_two_processes_score_what_they_export(tmp_path, kind):
    """Of the embedded pair, sharded."""
    ranks = run_ranks(fit_sharded, 2, kind, tmp_path)
    losses = {
        who: loss_of(loaded(folder)) for who, folder in (("grafted", tmp_path / "model"), ("instruct", DEMO_PAIR[1]))
    }
    for logged in ranks:
        for who, loss in losses.items():
            assert logged[f"val/{who}/loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bf16_mixed_scores_what_bfloat16_computes_of_the_exported_model(tmp_path, folders, kind):
    logged, _ = fit(folders, kind, "bf16-mixed", callbacks=[ExportCallback(folder=str(tmp_path))])
    # Frozen weights are bfloat16, trained ones float32 masters, in both cases with the exported values.
    model = loaded(tmp_path / "model", torch.float32 if kind == "full" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = loss_of(model)
    assert logged["val/grafted/loss"] == pytest.approx(by_hand, rel=2**-9)  # of logits in bfloat16, padded or not


def test_a_small_update_that_rounding_loses_is_told_with_both_gains(folders, recwarn):
    logged, _ = fit(folders, "full", lr=1e-6)
    assert logged["graft/survival"] < 0.5
    told = [str(w.message) for w in recwarn if "survives rounding" in str(w.message)]
    assert len(told) == 1
    assert f"only {logged['graft/survival']:.0%} of the update survives" in told[0]
    assert f"{logged['graft/gain']:.4g} as exported, {logged['graft/gain_unrounded']:.4g} without rounding" in told[0]
    assert "graft.dtype=float32" in told[0] and "export.parts" in told[0]
    gain = logged["val/instruct/loss"] - logged["val/unrounded/loss"]
    assert logged["graft/gain_unrounded"] == pytest.approx(gain, abs=1e-6)
    exact, _ = fit(folders, "full", lr=1e-6, graft={"dtype": "float32"})
    assert exact["val/grafted/loss"] == logged["val/unrounded/loss"]
    assert "graft/gain_unrounded" not in exact and exact["graft/survival"] > 0.99


def test_the_adapter_is_scored_where_it_is_exported_or_asked_for(tmp_path, folders):
    def scored(parts, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        callbacks = [ExportCallback(folder=str(folder), parts=parts, verify=False)]
        logged, _ = fit(folders, "lora", callbacks=callbacks if parts else [], **options)
        return "val/adapter/loss" in logged

    assert scored(["adapter"]) and not scored(["model"]) and not scored([])
    assert scored(["model"], graft={"adapter": True})
    assert not scored(["adapter", "model"], graft={"adapter": False})
    assert not scored(["delta"], graft={"transforms": [{"name": "dare", "density": 0.5}], "adapter": True})


def test_where_both_start_from_one_model_the_graft_is_the_tuned_model(folders):
    same = (folders[1], folders[1])
    logged, _ = fit(same, "lora", graft={"adapter": True})
    for what in ("loss", "accuracy", "left/loss", "right/loss"):
        assert logged[f"val/adapter/{what}"] == logged[f"val/tuned/{what}"]
    logged, _ = fit(same, "full", graft={"dtype": "float32", "select": "all"})
    assert logged["val/grafted/loss"] == pytest.approx(logged["val/tuned/loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_scores_do_not_depend_on_the_batches(folders, kind):
    class Batched(RandomData):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def val_dataloader(self):
            whole, self.batch_size = self.batch_size, self.size
            loaders = super().val_dataloader()
            self.batch_size = whole
            return loaders

    found = [fit(folders, kind, data=Batched(size))[0] for size in (1, 2, 8)]
    for name in (name for name in found[0] if name.startswith("val/") and name.endswith("loss")):
        assert [one[name] for one in found] == pytest.approx([found[0][name]] * 3, rel=2e-7), name


def test_the_error_of_the_gain_is_that_of_a_ratio_over_paired_samples(tmp_path, folders):
    logged, graft = fit(folders, "full", callbacks=[ExportCallback(folder=str(tmp_path))])
    before, after = (sample_losses(loaded(f), ROWS) for f in (folders[1], tmp_path / "model"))
    difference, tokens = (before - after)[:, 0], before[:, 1]
    gain = difference.sum() / tokens.sum()
    count = len(ROWS)
    # By leaving out one sample at a time (the jackknife), which agrees to the order of 1 / N.
    left_out = (difference.sum() - difference) / (tokens.sum() - tokens)
    jackknife = ((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt().item()
    error = graft.finished.errors["loss"]
    assert error == pytest.approx(jackknife, rel=0.15)
    assert error == pytest.approx(error_of_gain(before, after), rel=1e-4)
    residual = difference - gain * tokens
    linearised = (residual.square().sum() / (count - 1) / count).sqrt() / tokens.mean()
    assert error == pytest.approx(linearised.item(), rel=1e-4)
    assert logged["graft/gain"] == pytest.approx(gain.item(), rel=1e-4)
    assert graft.finished.errors.keys() == {"loss", "left/loss", "right/loss"}


def test_other_samples_have_no_error():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert math.isnan(error_of_gain(losses, losses[:1]))
    assert math.isnan(error_of_gain(losses, losses.flip(0)))
    assert math.isnan(error_of_gain(losses[:1], losses[:1]))
    assert error_of_gain(losses, losses) == 0
    ones, others = ([{"index": i, "score": s} for i, s in enumerate(scores)] for scores in ([1, 0, 1, 1], [0, 0, 1, 0]))
    assert error_of_paired(ones, others) == pytest.approx((4 / 3 * (0.5 - 0.25) / 4) ** 0.5)
    assert math.isnan(error_of_paired([], others))


def test_what_survives_is_said_in_words():
    assert survival_line({}) == "survival: not measured"
    assert survival_line({"graft/delta_norm": 0.0}) == "survival: the update is zero"
    assert survival_line({"graft/delta_norm": math.nan}) == "survival: not measured"
    assert survival_line({"graft/delta_norm": 1.0, "graft/survival": 0.25}).startswith("survival: 25.0% of the update")


def test_a_graft_that_opens_its_answers_otherwise_than_the_tuned_base_is_named():
    def line(tuned, grafted, **others):
        values = {"tuned": tuned, "grafted": grafted, **others}
        return opening_line({f"val/{who}/first_token_loss": value for who, value in values.items()})

    assert "of 6.300 under the graft and of 0.2700 under the tuned Base" in (line(0.27, 6.3) or "")
    assert "tuned Base (0.5000 under the untouched Instruct): the graft is less" in (
        line(0.27, 6.3, instruct=0.5) or ""
    )
    assert line(0.27, 1.27) is None and line(0.27, 1.28) is not None
    assert line(math.nan, 6.3) is None and line(2.0, 0.1) is None and opening_line({}) is None


def test_the_fit_ends_with_the_scores_and_how_the_export_is_loaded(tmp_path, folders, capsys):
    logged, graft = fit(folders, "lora", callbacks=[ExportCallback(folder=str(tmp_path))])
    shown = capsys.readouterr().out
    table = score_table(graft.finished.metrics, graft.finished.errors)
    assert [next(column.cells) for column in table.columns[1:5]] == [
        number(logged[f"val/{who}/loss"]) for who in ("base", "instruct", "tuned", "grafted")
    ]
    for place in ("loss", "left: loss", "right: loss"):
        name = f"{place.partition(':')[0]}/" if ":" in place else ""
        gain = logged[f"val/instruct/{name}loss"] - logged[f"val/grafted/{name}loss"]
        error = graft.finished.errors[f"{name}loss"]
        (line,) = (line for line in shown.splitlines() if line.strip("│ ").startswith(place + " "))
        assert f"{number(gain, signed=True)} ± {number(error, digits=3)}" in line
    assert f"survival: {logged['graft/survival']:.1%} of the update is left after rounding" in shown
    gain, unrounded = (number(logged[name], signed=True) for name in ("graft/gain", "graft/gain_unrounded"))
    assert f"the gain is {gain}, and without rounding {unrounded}" in shown
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path / 'model'}')" in shown
    assert f"PeftModel.from_pretrained(instruct, '{tmp_path / 'adapter'}')" in shown


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_weights_are_fitted_and_exported(tmp_path, folders, start, monkeypatch):
    monkeypatch.setitem(ADAPTERS, start, {"r": 4, "init_lora_weights": start})
    logged, _ = fit(folders, start, callbacks=[ExportCallback(folder=str(tmp_path))])
    assert logged["val/grafted/loss"] == pytest.approx(loss_of(loaded(tmp_path / "model")), rel=1e-6)
    assert not (tmp_path / "adapter").exists()


def test_an_adapted_head_is_no_linear_layer(tmp_path, monkeypatch):
    folders = save_pair(tmp_path, "qwen3", tied=False)
    monkeypatch.setitem(ADAPTERS, "head", {"r": 4, "target_modules": ["q_proj", "lm_head"]})
    fit(folders, "head", callbacks=[ExportCallback(folder=str(tmp_path / "export"), parts=["model"])])
    exported, instruct = (loaded(folder).lm_head.weight for folder in (tmp_path / "export/model", folders[1]))
    assert torch.equal(exported, instruct)


@pytest.mark.parametrize("kind", ["full", "some"])
def test_a_narrower_dtype_rounds_the_graft_and_not_the_untouched(tmp_path, kind, monkeypatch):
    """Of float32 files: every tensor of the graft is rounded, frozen ones too, and none of the Instruct's."""
    folders = save_pair(tmp_path, "qwen3")
    monkeypatch.setitem(ADAPTERS, "some", {"r": 4, "target_modules": ["q_proj"]})
    export = ExportCallback(folder=str(tmp_path / "export"))
    logged, _ = fit(folders, kind, graft={"dtype": "bfloat16"}, callbacks=[export])
    assert loaded(tmp_path / "export/model", "auto").dtype == torch.bfloat16
    assert logged["val/grafted/loss"] == pytest.approx(loss_of(loaded(tmp_path / "export/model")), rel=1e-6)
    assert logged["val/instruct/loss"] == pytest.approx(loss_of(loaded(folders[1])), rel=1e-6)
    if kind == "some":
        served = loss_of(PeftModel.from_pretrained(loaded(folders[1]), tmp_path / "export/adapter"))
        assert logged["val/adapter/loss"] == pytest.approx(served, rel=1e-6)


def test_other_weights_than_those_scored_are_told(tmp_path, folders, caplog, recwarn, capsys):
    caplog.set_level("INFO")
    export = ExportCallback(folder=str(tmp_path), parts=["delta"])
    fit(folders, "full", callbacks=[export], max_steps=3, val_check_interval=2)
    told = "weights are those of step 3, but the last scores are those of step 2"
    assert any(told in str(w.message) for w in recwarn)
    assert "Scores at step 2" in capsys.readouterr().out
    assert any(record.message.startswith("graft: step 2: gain ") for record in caplog.records)


def test_what_was_not_measured_is_not_reported_as_a_number(tmp_path, folders, caplog):
    caplog.set_level("INFO")
    fit(folders, "full", max_steps=1, val_check_interval=1, graft={"baselines": False, "statistics": False})
    (line,) = (r.message for r in caplog.records if r.message.startswith("graft: step 1: "))
    assert line.startswith("graft: step 1: grafted loss ") and "nan" not in line and "," not in line


def test_an_export_that_nobody_has_scored_is_told(tmp_path, folders):
    export = ExportCallback(folder=str(tmp_path), parts=["delta"])
    with pytest.warns(UserWarning, match="weights are those of step 1, but there are no scores"):
        fit(folders, "full", callbacks=[export], max_steps=1, val_check_interval=2)


def test_nothing_chosen_that_is_trained_is_an_error(folders, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "q", {"r": 4, "target_modules": ["q_proj"]})
    with pytest.raises(GraftError, match=r"chooses nothing that is trained: .*v_proj.* whereas .*q_proj.* are trained"):
        fit(folders, "q", graft={"select": ["v_proj"]})


def test_a_scale_of_zero_is_the_instruct(folders, capsys):
    logged, _ = fit(folders, "lora", graft={"scales": [0.0, 1.0]})
    assert logged["val/grafted/loss"] == logged["val/instruct/loss"] and logged["graft/gain"] == 0
    assert "gain" in capsys.readouterr().out


@pytest.mark.parametrize("position_ids", [None, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)])
def test_of_a_batch_only_the_samples_numbers_are_kept(position_ids):
    labels = torch.tensor([[-100, 1, 2, 3, -100, -100, 2, -100], [-100, -100, 1, -100, -100, 2, 2, 2]])
    kept = token_sums(torch.randn(2, 8, 5), labels, position_ids).by_sample
    counts = [[4, 4], [3, 1, 1, 3]][position_ids is not None]
    assert kept[:, 1].tolist() == counts and kept.untyped_storage().nbytes() == kept.numel() * 8
