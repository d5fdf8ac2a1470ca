"""Scales that are fitted when a training ends: what is exported has them, and nothing else notices."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shadowlit
from shadowlit.callbacks import fit_scales as callback_module
from shadowlit.callbacks import graft as graft_module
from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.cli.main import main
from shadowlit.data.module import ShadowData
from shadowlit.delta.delta import Delta
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.evaluation.forgetting import Divergence
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.scales import FitScales, FittedScales, Measured, group_of
from shadowlit.training import fit_scales as module_of_pass
from shadowlit.training.fit_scales import Calibration, require_fittable
from shadowlit.training.objectives import DFT, DPO, SFT
from tests.callbacks.test_graft import KINDS, assert_same, make_module, make_trainer, metrics, weights
from tests.data.templates import talk
from tests.distributed import run_ranks
from tests.tiny import save_pair
from tests.training import test_distributed as distributed
from tests.training import test_fit_scales as by_hand

FIT = {"groups": "kind", "steps": 3, "pull": 0.001}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows for each use, by its name; none is in two of them."""
    folder = tmp_path_factory.mktemp("rows")
    for place, name in enumerate(("train", "validation", "calibration", "neutral")):
        rows = ({"messages": talk(f"{name} {i}", chr(97 + place) * (3 + i % 4))} for i in range(7 + place))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "calibration", "neutral")}


class Watch(Callback):
    """What the optimizer and the parameters are like when the training is over, and when the fit is."""

    def on_train_end(self, trainer, module):
        self.before = self._state(trainer, module)

    def teardown(self, trainer, module, stage):
        self.after = self._state(trainer, module)

    def _state(self, trainer, module):
        states = [value for one in trainer.optimizers[0].state.values() for value in one.values()]
        named = dict(module.model.named_parameters())
        return {
            "weights": weights(module),
            "states": [value.clone() if isinstance(value, torch.Tensor) else value for value in states],
            "requires_grad": {name: p.requires_grad for name, p in named.items()},
            "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in named.items()},
            "hooks": [name for name, p in named.items() if p._post_accumulate_grad_hooks],
            "modes": [each.training for each in module.model.modules()],
        }


def run(
    tmp_path, folders, files, kind, fit_scales, *callbacks, parts=("model", "adapter", "delta"), module=None, data=None,
    ckpt_path=None, test=None, **options,
):  # fmt: skip
    module = module or make_module(folders, kind, lr=3e-3)
    export = ExportCallback(folder=str(tmp_path / "x"), parts=list(parts), subject=options.pop("subject", "grafted"))
    graft = GraftCallback(fit_scales=fit_scales, **options)
    trainer = make_trainer(tmp_path, graft, export, *callbacks, max_epochs=2, val_check_interval=None)
    data = data or ShadowData(
        module.pair, train=files["train"], validation=files["validation"], test=test, cache=False, max_length=64,
        batch_size=2,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer, graft


def loss_by_hand(model, data_file, folders):
    pair = make_module(folders).pair
    data = ShadowData(pair, validation=data_file, cache=False, max_length=64)
    data.setup("validate")
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in data.dataset("val/val"):
            labels = torch.tensor(sample["labels"])[1:]
            logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1].double()
            chosen = labels != -100
            total -= logits.log_softmax(-1)[chosen].gather(1, labels[chosen][:, None]).sum().item()
            count += int(chosen.sum())
    return total / count


def learned_by_hand(module, kind, folders):
    """What a training has learned, by the names of the weights that are grafted, in float64."""
    if kind == "full":
        base, tuned = CheckpointReader(folders[0]), weights(module)
        return {name: tuned[name].double() - base.read(name).double() for name in tuned if "proj" in name}
    layers = {name: layer for name, layer in module.model.named_modules() if hasattr(layer, "lora_A")}
    return {
        f"{name.removeprefix('base_model.model.')}.weight": layer.scaling["default"]
        * (layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double())
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(("kind", "groups"), [("full", "layer"), ("lora", "tensor")])
def test_slopes_of_a_training_are_those_of_finite_differences(tmp_path, folders, files, kind, groups, monkeypatch):
    """Of a model in float64 that has W_I + λ Δ by hand; embeddings and head are tied, and not grafted."""
    found, fit = {}, callback_module.fit

    def measured_first(measure, names, *rest):
        found["at"] = {group: 0.8 + 0.05 * n for n, group in enumerate({group_of(name, groups): 0 for name in names})}
        found["slopes"] = measure(found["at"]).slopes
        return fit(measure, names, *rest)

    monkeypatch.setattr(callback_module, "fit", measured_first)
    keep = {"data": files["neutral"], "weight": 0.7}
    options = {"groups": groups, "steps": 1, "data": files["calibration"], "keep": keep}
    module, _, _ = run(tmp_path, folders, files, kind, options, parts=["model"])
    update, at = learned_by_hand(module, kind, folders), found["at"]
    assert found["slopes"].keys() == at.keys() == {group_of(name, groups) for name in update}
    data = ShadowData(module.pair, validation={n: files[n] for n in ("calibration", "neutral")}, max_length=64)
    data.setup("validate")
    task, neutral = ([
        {name: list(sample[name]) for name in ("input_ids", "labels")} for sample in data.dataset(f"val/{name}")
    ] for name in ("calibration", "neutral"))  # fmt: skip
    instruct, hand = by_hand.load(folders), by_hand.load(folders)

    def objective(scales):
        hand.load_state_dict(instruct.state_dict())
        for name, part in update.items():
            hand.get_parameter(name).data.add_(part, alpha=scales[group_of(name, groups)])
        return by_hand.mean_loss(hand, task) + 0.7 * by_hand.mean_kl(hand, instruct, neutral)

    step, tolerance = 1e-4, 1e-4 * max(map(abs, found["slopes"].values()))
    for group in list(at)[:3] + list(at)[-1:]:
        high, low = (objective({**at, group: at[group] + sign * step}) for sign in (1, -1))
        assert found["slopes"][group] == pytest.approx((high - low) / (2 * step), rel=1e-3, abs=tolerance), group


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_fitted_scales(tmp_path, folders, files, kind):
    """Model, delta, adapter and manifest; equal to the graft on disk with scales.json; training is untouched."""
    fit_scales = {**FIT, "data": files["calibration"], "keep": {"data": files["neutral"], "weight": 0.5}}
    watch = Watch()
    module, trainer, callback = run(tmp_path, folders, files, kind, fit_scales, watch)
    stored = json.loads((tmp_path / "x/scales.json").read_text())
    scales = stored["tensors"]
    assert len(scales) == 14 and len(set(scales.values())) == 7 and 1.0 not in scales.values()
    assert all(stored["scales"][group_of(name, "kind")] == scale for name, scale in scales.items())
    assert (tmp_path / "x/scales.png").is_file() and (tmp_path / "x/scales.pdf").is_file()

    manifest = read_manifest(tmp_path / "x/model")
    for part in ("model", "delta", *(["adapter"] if kind == "lora" else [])):
        assert read_manifest(tmp_path / "x" / part)["fitted_scales"]["scales"] == stored["scales"]
    assert manifest["logits_against_validated"]["max_abs"] == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    by_hand = {use: loss_by_hand(exported, files[use], folders) for use in ("validation", "calibration")}
    assert manifest["metrics"]["val/fitted/loss"] == pytest.approx(by_hand["validation"], rel=1e-5)
    assert stored["after"]["loss"] == pytest.approx(by_hand["calibration"], rel=1e-5)
    assert stored["after"]["objective"] < stored["before"]["objective"] and stored["step"] > 0
    assert manifest["metrics"]["val/grafted/loss"] == metrics(trainer)["val/grafted/loss"]
    assert any("the exported model has the fitted ones" in line for line in callback.exported)

    # The update of the export is λ Δ.
    delta = Delta.open(tmp_path / "x/delta")
    instruct, grafted = CheckpointReader(folders[1]), CheckpointReader(tmp_path / "x/model")
    learned = learned_by_hand(module, kind, folders)
    assert learned.keys() == scales.keys()
    for name, update in learned.items():
        expected = instruct.read(name).double() + scales[name] * update
        torch.testing.assert_close(grafted.read(name).double(), expected, rtol=2**-22, atol=1e-8)
    for name in delta.shapes:
        gained = grafted.read(name).double() - instruct.read(name).double()
        torch.testing.assert_close(delta.tensor(name).double(), gained, rtol=2**-8, atol=1e-7)
    module.model.save_pretrained(tmp_path / "tuned")
    scale = str(tmp_path / "x/scales.json")
    sides = [folders[0], tmp_path / "tuned", folders[1], tmp_path / "disk"]
    done = shadowlit.graft(*map(str, sides), scale=scale)
    assert_same(load_file(tmp_path / "disk/model.safetensors"), load_file(tmp_path / "x/model/model.safetensors"))
    assert done.survival == pytest.approx(manifest["survival"]["survival"], rel=1e-5)
    if kind == "full":
        assert not (tmp_path / "x/adapter").exists()
    else:
        sides[1] = tmp_path / "x/adapter"
        with pytest.raises(GraftError, match="fitted to another update"):  # this one is scaled already
            shadowlit.graft(*map(str, sides[:3]), str(tmp_path / "twice"), scale=scale)
        untouched = AutoModelForCausalLM.from_pretrained(folders[1])
        served = PeftModel.from_pretrained(untouched, str(tmp_path / "x/adapter"))
        ids = torch.arange(20)[None]
        torch.testing.assert_close(served(input_ids=ids).logits, exported(input_ids=ids).logits, rtol=1e-4, atol=1e-5)

    # The fit leaves everything as it was.
    assert_same(watch.before["weights"], watch.after["weights"])
    for part in ("requires_grad", "hooks", "modes"):
        assert watch.before[part] == watch.after[part], part
    assert len(watch.before["states"]) == len(watch.after["states"])
    for one, other in zip(watch.before["states"], watch.after["states"], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    for name, gradient in watch.before["gradients"].items():
        after = watch.after["gradients"][name]
        assert after is None if gradient is None else torch.equal(gradient, after)

    # And the training is the one without it.
    plain, other, _ = run(tmp_path / "plain", folders, files, kind, None, parts=["model"])
    assert_same(weights(module), weights(plain))
    for name, value in metrics(other).items():
        assert "seconds" in name or "time" in name or metrics(trainer)[name] == value, name
    assert "fitted_scales" not in read_manifest(tmp_path / "plain/x/model")
    assert not (tmp_path / "plain/x/scales.json").exists()


@pytest.mark.parametrize("main", [True, False])
def test_scales_start_at_the_exported_grafts_and_count_its_transforms(tmp_path, folders, files, main):
    """With one pass they stay at 0.5, and the export is that of scale 0.5, with the transforms."""
    transforms = [{"name": "dare", "density": 0.5}]
    options = {"transforms": transforms, "scales": [0.5], "select": "all"}
    if not main:
        options = {"variants": {"thin": {"transforms": transforms, "scale": 0.5}}, "select": "all"}
        options |= {"subject": "grafted@thin"}
    fit_scales = FitScales(files["calibration"], groups="layer", steps=1)
    run(tmp_path, folders, files, "full", fit_scales, parts=["model"], **options)
    stored = json.loads((tmp_path / "x/scales.json").read_text())
    assert stored["scales"] == {"layer_00": 0.5, "layer_01": 0.5, "other": 0.5}
    assert stored["update"]["transforms"] == [{**transforms[0], "seed": 0}]
    run(tmp_path / "plain", folders, files, "full", None, parts=["model"], **options)
    assert_same(*(load_file(tmp_path / f"{part}x/model/model.safetensors") for part in ("", "plain/")))
    scores = [read_manifest(tmp_path / f"{part}x/model")["metrics"] for part in ("", "plain/")]
    whole = "val/grafted/loss" if main else "val/grafted@thin/loss"
    assert scores[0]["val/fitted/loss"] == pytest.approx(scores[1][whole], rel=1e-6)


@pytest.mark.parametrize("objective", [DFT(), SFT(kl_weight=0.1)])
def test_the_loss_is_the_cross_entropy_whatever_the_training_minimises(tmp_path, folders, files, objective):
    """DFT's own value is p · −log p, which rises with p below 1/e, as here."""
    module = make_module(folders, lr=3e-3, objective=objective)
    run(tmp_path, folders, files, "full", {**FIT, "data": files["calibration"]}, module=module, parts=["model"])
    stored = json.loads((tmp_path / "x/scales.json").read_text())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    assert stored["after"]["loss"] == pytest.approx(loss_by_hand(exported, files["calibration"], folders), rel=1e-5)
    assert stored["step"] > 0 and stored["after"]["loss"] < stored["before"]["loss"]


def test_another_fit_reads_its_own_rows(tmp_path, folders, files):
    """With the data module of the one before."""
    module = make_module(folders, "lora")
    data = ShadowData(
        module.pair, train=files["train"], validation=files["validation"], cache=False, max_length=64, batch_size=2
    )
    for name in ("calibration", "neutral"):
        (tmp_path / name).mkdir()
        fit_scales = {**FIT, "steps": 1, "data": files[name]}
        run(tmp_path / name, folders, files, "lora", fit_scales, data=data, parts=["model"])
        stored = json.loads((tmp_path / name / "x/scales.json").read_text())
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / "x/model")
        assert stored["after"]["loss"] == pytest.approx(loss_by_hand(exported, files[name], folders), rel=1e-5)


def test_a_finished_training_that_resumes_exports_the_same(tmp_path, folders, files):
    """Its loops don't run, so that nothing else reads the validation data."""
    fit_scales = {**FIT, "data": files["calibration"]}
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    found = []
    for name, ckpt_path in (("one", None), ("two", tmp_path / "last.ckpt")):
        (tmp_path / name).mkdir()
        callbacks = [saved] if ckpt_path is None else []
        run(tmp_path / name, folders, files, "lora", fit_scales, *callbacks, ckpt_path=ckpt_path, parts=["model"])
        found.append((tmp_path / name / "x", read_manifest(tmp_path / name / "x/model")["metrics"]))
    (one, scores), (two, again) = found
    assert scores["val/fitted/loss"] == again["val/fitted/loss"]
    assert (one / "scales.json").read_bytes() == (two / "scales.json").read_bytes()
    assert_same(*(load_file(each / "model/model.safetensors") for each in (one, two)))


def test_an_error_restores_everything(tmp_path, folders, files, monkeypatch):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("a hook failed")
        return torch.zeros(())

    monkeypatch.setattr(module_of_pass, "inner_product", fail)
    watch = Watch()
    module = make_module(folders, "lora")
    graft = GraftCallback(fit_scales={**FIT, "data": files["calibration"]})
    export = ExportCallback(folder=str(tmp_path / "x"))
    trainer = make_trainer(tmp_path, graft, export, watch, val_check_interval=None)
    data = ShadowData(module.pair, train=files["train"], validation=files["validation"], cache=False, max_length=64)
    with pytest.raises(RuntimeError, match="a hook failed"):
        trainer.fit(module, data)
    assert_same(watch.before["weights"], weights(module))
    assert {name: p.requires_grad for name, p in module.model.named_parameters()} == watch.before["requires_grad"]
    assert not any(p._post_accumulate_grad_hooks for p in module.model.parameters())


@pytest.mark.parametrize(("options", "message"), [
    ({"data": "validation"}, r"graft\.fit_scales\.data is .*validation\.jsonl, which is data\.validation\.val too"),
    ({"data": "train"}, r"which is data\.train too"),
    ({"data": {"path": "train", "max_rows": 3}}, r"data is .*train\.jsonl, which is data\.train too"),
    ({"data": "calibration", "keep": {"data": "neutral"}}, r"keep\.data is .* is evaluation\.evaluators\.kl\.data too"),
    ({"data": "neutral"}, r"which is data\.test\.test and evaluation\.evaluators\.kl\.data too"),
    ({"data": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_rows_of_other_uses_are_refused(tmp_path, folders, files, options, message):
    options = json.loads(json.dumps(options))
    if isinstance(options["data"], dict):
        options["data"]["path"] = files[options["data"]["path"]]
    else:
        options["data"] = files.get(options["data"], options["data"])
    if "keep" in options:
        options["keep"]["data"] = files[options["keep"]["data"]]
    evaluation = EvaluationCallback({"kl": Divergence(files["neutral"])})
    with pytest.raises(ShadowlitError, match=message):
        run(
            tmp_path,
            folders,
            files,
            "full",
            options,
            evaluation,
            test=files["neutral"] if "keep" not in options else None,
        )


def test_what_has_no_effect_or_no_derivative_is_refused(tmp_path, folders, files):
    fit_scales = {**FIT, "data": files["calibration"]}
    data = {"train": files["train"], "validation": files["validation"], "cache": False}
    for export in ([], [ExportCallback(enabled=False)]):
        module = make_module(folders)
        trainer = make_trainer(tmp_path, GraftCallback(fit_scales=fit_scales), *export)
        with pytest.raises(GraftError, match="but nothing is exported"):
            trainer.fit(module, ShadowData(module.pair, **data))
    with pytest.raises(ShadowlitError, match=r"graft\.fit_scales"):
        GraftCallback(fit_scales={"data": "x", "groups": "layers"})
    with pytest.raises(GraftError, match=r"the rows of .*DPO are pairs"):
        require_fittable(DPO())


def test_fitted_scales_that_are_not_better_are_reported(tmp_path, folders, files, monkeypatch):
    def bad(measure, names, options, start):
        scales = dict.fromkeys(names, 30.0)
        history = [{"loss": 1.0, "kl": 0.0, "objective": 1.0}]
        return FittedScales("tensor", scales, scales, start, 0, history)

    shown = []
    monkeypatch.setattr(graft_module, "show", lambda _, doing: shown.append(doing))
    monkeypatch.setattr(callback_module, "fit", bad)
    with pytest.warns(UserWarning, match="not better than at scale 1 everywhere, but it is what is exported"):
        _, _, callback = run(tmp_path, folders, files, "full", {**FIT, "data": files["calibration"]}, parts=["model"])
    (line,) = (line for line in callback.exported if "not better, by -" in line)
    assert not math.isnan(float(line.rpartition("± ")[2]))
    assert shown[-1] == "validation of fitted 4/4"


def test_a_file_of_scales_need_not_have_tensors_that_were_not_trained(tmp_path, folders, files):
    module = make_module(folders, lr=3e-3, train_towers=["mlp"])
    run(tmp_path, folders, files, "full", {**FIT, "data": files["calibration"]}, module=module, parts=["model"])
    assert len(json.loads((tmp_path / "x/scales.json").read_text())["tensors"]) == 6
    module.model.save_pretrained(tmp_path / "tuned")
    sides = [folders[0], tmp_path / "tuned", folders[1], tmp_path / "disk"]
    shadowlit.graft(*map(str, sides), scale=str(tmp_path / "x/scales.json"))
    assert_same(load_file(tmp_path / "disk/model.safetensors"), load_file(tmp_path / "x/model/model.safetensors"))


def test_scales_of_an_adapter_on_a_tuned_base_whose_other_layers_are_the_bases(tmp_path, folders, files):
    """The update of these is the adapter's product alone; on disk it comes from a sum, as that of all others."""
    shutil.copytree(folders[0], tmp_path / "start")
    tensors = load_file(tmp_path / "start/model.safetensors")
    moved = {name: tensor + 0.01 * ("mlp" in name) for name, tensor in tensors.items()}
    save_file(moved, tmp_path / "start/model.safetensors", {"format": "pt"})
    start = str(tmp_path / "start")
    module = make_module(folders, "lora", lr=3e-3, start_from=start)
    saved = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    fit_scales = {**FIT, "data": files["calibration"]}
    run(tmp_path, folders, files, "lora", fit_scales, saved, module=module, parts=["model"])
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_dropout": 0.1}}
    pair = {"base": str(folders[0]), "instruct": str(folders[1])}
    config = {"pair": pair, "model": {"adapter": adapter, "start_from": start}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    sides = [folders[0], tmp_path / "checkpoints/last.ckpt", folders[1], tmp_path / "disk"]
    shadowlit.graft(*map(str, sides), scale=str(tmp_path / "x/scales.json"))
    assert_same(load_file(tmp_path / "disk/model.safetensors"), load_file(tmp_path / "x/model/model.safetensors"))


def test_scales_by_name_must_be_those_of_the_graft(tmp_path, folders):
    sides = [str(folders[0]), str(folders[1]), str(folders[1])]
    (tmp_path / "s.json").write_text('{"tensors": {"x": 1}}')
    with pytest.raises(GraftError, match="differ in"):
        shadowlit.graft(*sides, str(tmp_path / "out"), scale=str(tmp_path / "s.json"))


# -- several processes ----------------------------------------------------------------------------------------------


def fit_on_ranks(folders, files, kind, strategy, world_size, out):
    """Train, fit and export; return the scales, their history, and the metrics of the fitted graft."""
    seed_everything(0)
    module = distributed.make_module(folders, kind)
    fit_scales = {**FIT, "steps": 2, "data": files["calibration"], "keep": {"data": files["neutral"]}}
    export = ExportCallback(folder=str(out), parts=["model"])
    trainer = distributed.make_trainer(
        strategy, world_size, [GraftCallback(fit_scales={**fit_scales, "batch_size": 4 // world_size}), export],
        max_epochs=1, val_check_interval=None,
    )  # fmt: skip
    data = ShadowData(
        module.pair, train=files["train"], validation=files["validation"], cache=False, max_length=64,
        batch_size=4 // world_size,
    )  # fmt: skip
    slopes, fit = [], callback_module.fit

    def keep(found):
        slopes.append(found.slopes)
        return found

    # The first step has one length, whatever the size of the slopes is, so these are compared too. The process is this
    # test's own. Another rank must not run the optimizer, which might take another number of passes there.
    def on_first_rank(measure, *rest):
        assert module.global_rank == 0
        return fit(lambda *args: keep(measure(*args)), *rest)

    callback_module.fit = on_first_rank
    trainer.fit(module, data)
    found = export._fitted
    return {
        "slopes": slopes[:1],
        "scales": found.found.scales,
        "history": found.found.history,
        "metrics": found.metrics,
    }


@pytest.mark.parametrize(("kind", "strategies"), [("full", ["ddp", "fsdp2"]), ("lora", ["ddp"])])
def test_two_processes_are_one(tmp_path, folders, files, kind, strategies):
    """9 and 10 rows, which leave a filler to one of the ranks."""
    (one,) = run_ranks(fit_on_ranks, 1, folders, files, kind, "auto", 1, tmp_path / "one")
    assert len(set(one["scales"].values())) == 7
    for strategy in strategies:
        ranks = run_ranks(fit_on_ranks, 2, folders, files, kind, strategy, 2, tmp_path / strategy)
        assert ranks[1] == {**ranks[0], "slopes": []}
        (slopes,), (expected,) = ranks[0]["slopes"], one["slopes"]
        assert slopes == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected.values())))
        assert ranks[0]["scales"] == pytest.approx(one["scales"], abs=2e-3)
        for mine, theirs in zip(ranks[0]["history"], one["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
        assert ranks[0]["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert read_manifest(tmp_path / strategy / "model")["logits_against_validated"]["max_abs"] == 0


def fail_on_ranks(folders, files, out):
    """A loss that is not finite, which rank 0 alone looks at: the message that this rank fails with."""

    def measure(self, scales):
        return Measured(float("nan"), 0.0, dict.fromkeys(scales, 0.0))

    Calibration.__call__ = measure  # the process is this test's own
    with pytest.raises(GraftError) as error:
        fit_on_ranks(folders, files, "full", "ddp", 2, out)
    return str(error.value)


def test_every_rank_raises_the_error_of_a_fit(tmp_path, folders, files):
    messages = run_ranks(fail_on_ranks, 2, folders, files, tmp_path)
    assert messages[0] == messages[1] and "loss of the calibration rows is nan" in messages[0]


def fail_on_one_rank(folders, files, out):
    """An error of the second pass on rank 1 alone, such as of its memory."""
    call = Calibration.__call__
    passes = []

    def measure(self, scales):
        passes.append(scales)
        if dist.get_rank() == 1 and len(passes) == 2:
            raise GraftError("no memory")
        return call(self, scales)

    Calibration.__call__ = measure
    fit_on_ranks(folders, files, "full", "ddp", 2, out)


def test_an_error_of_one_rank_ends_the_fit(tmp_path, folders, files):
    with pytest.raises(AssertionError, match=r"rank 1 of 2(.|\n)*no memory|Connection closed by peer"):
        run_ranks(fail_on_one_rank, 2, folders, files, tmp_path, timeout_s=120)


def test_an_adapter_under_fsdp2_is_refused(folders, files):
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(2, 1), world_size=2)
    with pytest.raises(GraftError, match="doesn't work with an adapter under FSDP2"):
        callback_module.open_rows(trainer, make_module(folders, "lora"), FitScales(files["calibration"]))


# -- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_scales_are_fitted_on_disk(tmp_path, folders, files, kind, capsys):
    """From the folders of a run's own export: the same scales as fit's, and a model that has them."""
    (tmp_path / "fit").mkdir()
    options = {**FIT, "data": files["calibration"], "batch_size": 2}
    module, _, _ = run(tmp_path / "fit", folders, files, "full" if kind == "model" else "lora", options)
    module.model.save_pretrained(tmp_path / "tuned")
    sides = [str(folders[0]), str(tmp_path / "tuned"), str(folders[1])]
    out, rows = tmp_path / "out", tmp_path / "with_ids.jsonl"
    lines = Path(files["calibration"]).read_text().splitlines()
    rows.write_text("".join(json.dumps({**json.loads(line), "id": f"row {n}"}) + "\n" for n, line in enumerate(lines)))
    options["data"] = {"path": str(rows), "ignore_columns": ["id"]}  # the same rows
    assert main(["graft", *sides, str(out), "--fit-scales", json.dumps(options)]) == 0
    assert "scales: 7 groups by kind" in " ".join(capsys.readouterr().out.split())
    mine, fits = (json.loads((place / "scales.json").read_text()) for place in (out, tmp_path / "fit/x"))
    assert mine["tensors"] == pytest.approx(fits["tensors"], abs=1e-3)
    assert mine["after"] == pytest.approx(fits["after"], rel=1e-4) and (out / "scales.png").is_file()
    assert read_manifest(out)["fitted_scales"]["scales"] == mine["scales"]
    assert mine["update"] == fits["update"]  # of the Instruct too
    again = shadowlit.graft(*sides, str(tmp_path / "again"), scale=str(out / "scales.json"))
    assert again.survival == read_manifest(out)["survival"]["survival"]
    assert_same(*(load_file(tmp_path / f"{name}/model.safetensors") for name in ("out", "again")))
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert mine["after"]["loss"] == pytest.approx(loss_by_hand(exported, files["calibration"], folders), rel=1e-5)


def test_fitting_on_disk_is_refused_before_the_model_is_loaded(tmp_path, folders, files, capsys):
    sides = [str(folders[0]), str(folders[1]), str(folders[1])]
    fitting = ["--fit-scales", json.dumps({"data": files["calibration"]})]
    assert main(["graft", *sides, str(tmp_path / "out"), *fitting, "--scale", "1;q_proj=0.5"]) != 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert main(["graft", *sides, str(tmp_path / "full"), *fitting]) != 0
    with pytest.raises(SystemExit):
        main(["graft", *sides, str(tmp_path / "out"), "--fit-scales", '{"data": "x", "group": "kind"}'])
    unread = Path(files["calibration"]).read_text().replace('"messages"', '"id": "a", "messages"')
    (tmp_path / "unread.jsonl").write_text(unread)
    fitting[1] = json.dumps({"data": str(tmp_path / "unread.jsonl")})
    assert main(["graft", *sides, str(tmp_path / "out"), *fitting, "--allow-zero"]) != 0
    text = " ".join(capsys.readouterr().err.split())
    assert "(or ignore_columns of this source)" in text
    assert "--scale gives several" in text and "is not empty" in text and "group" in text
