"""Variants of the graft: scored in one validation, each as it is exported, and the best one chosen."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.variants import Variant, all_grafts, candidates, choose, criterion
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.errors import ExportError, GraftError, ShadowlitError
from shadowlit.grafting.manifest import read_manifest
from shadowlit.lightning_cli import main
from tests.callbacks.test_graft import (
    KINDS,
    assert_same,
    fit,
    make_module,
    make_trainer,
    metrics,
    score_by_hand,
    weights,
)
from tests.callbacks.test_transforms import config
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.training import test_distributed as distributed

DARE = [{"name": "dare", "density": 0.5, "seed": 1}]
SVD = [{"name": "svd", "rank": 1, "explained_variance": None}]
TIES = [{"name": "ties", "density": 0.3}]
MAGNITUDE = [{"name": "magnitude", "density": 0.2}]
VARIANTS = {"dare": {"transforms": DARE}, "svd1": {"transforms": SVD, "scale": 0.7}, "half": {"scale": 0.5}}
SETS = [(8, 1), (4, 2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


def scored(logged, who):
    return {name.split("/", 2)[2]: value for name, value in logged.items() if name.startswith(f"val/{who}/")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_is_scored_as_it_is_exported_and_nothing_else_changes(tmp_path, folders, kind):
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["model", "adapter", "delta"], subject="grafted@svd1")
    alone = {"dare": DARE, "ties": TIES, "magnitude": MAGNITUDE}
    variants = VARIANTS | {name: {"transforms": transforms} for name, transforms in alone.items()}
    callback = GraftCallback(variants=variants, scales=[1.0, 0.5])
    module, trainer = fit(tmp_path, folders, kind, [callback, export])
    logged = metrics(trainer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    assert logged["val/grafted@svd1/loss"] == pytest.approx(score_by_hand(model, SETS), rel=1e-6)
    manifest = read_manifest(tmp_path / "x/model")
    assert (manifest["subject"], manifest["scale"], manifest["transforms"]) == ("grafted@svd1", 0.7, SVD)
    assert manifest["logits_against_validated"]["max_abs"] == 0 and "choice" not in manifest
    assert not (tmp_path / "x/adapter").exists()
    # The files hold the live variant's weights, and its update has the rank that it is cut to.
    exported, instruct = CheckpointReader(tmp_path / "x/model"), CheckpointReader(folders[1])
    assert all(torch.equal(t, exported.read(n)) for n, t in callback.build(module).grafted_tensors(0.7, "svd1"))
    name = "model.layers.0.mlp.up_proj.weight"
    singular = torch.linalg.svdvals(exported.read(name).double() - instruct.read(name).double())
    assert singular[0] > 0 and singular[1] < 1e-4 * singular[0]
    # Each variant is what it would be as the only graft; one without transforms is the plain graft at its scale.
    assert scored(logged, "grafted@half") == scored(logged, "grafted@0.5")
    for name, transforms in alone.items():
        _, other = fit(tmp_path, folders, kind, [GraftCallback(transforms=transforms)])
        assert scored(metrics(other), "grafted") == scored(logged, f"grafted@{name}")
    plain, other = fit(tmp_path, folders, kind, [GraftCallback()])
    assert_same(weights(module), weights(plain))
    kept = {name: value for name, value in metrics(other).items() if "seconds" not in name and "time" not in name}
    assert {name: logged[name] for name in kept} == kept
    assert len({logged[f"val/{who}/loss"] for who in ("grafted", *(f"grafted@{n}" for n in variants))}) == 6


def test_the_best_graft_of_the_best_checkpoint_is_exported(tmp_path, folders, capsys):
    saved = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val/grafted/first_token_loss")
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["model"], subject="best")
    fit(tmp_path, folders, "lora", [GraftCallback(variants=VARIANTS), saved, export], max_epochs=2)
    manifest = read_manifest(tmp_path / "x/model")
    choice, best = manifest["choice"], manifest.get("subject", "grafted")
    values = {who: manifest["metrics"][f"val/{who}/first_token_loss"] for who in choice["values"]}
    assert (choice["metric"], choice["mode"], choice["values"]) == ("first_token_loss", "min", values)
    assert values.keys() == {"grafted", *(f"grafted@{name}" for name in VARIANTS)}
    assert values[best] == min(values.values()) and "optimistic" in choice["note"]
    assert manifest["metrics"]["val/grafted/first_token_loss"] == pytest.approx(saved.best_model_score.item())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    assert manifest["metrics"][f"val/{best}/loss"] == pytest.approx(score_by_hand(model, SETS), rel=1e-6)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"best graft: {best}, with val/{best}/first_token_loss" in shown and "is optimistic" in shown
    assert "losses of the grafts: grafted " in shown


def test_without_scores_of_the_exported_weights_the_main_graft_is_exported(tmp_path, folders, recwarn):
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["model"], subject="best")
    fit(tmp_path, folders, "lora", [GraftCallback(variants=VARIANTS), export], max_steps=3)
    manifest = read_manifest(tmp_path / "x/model")
    assert "subject" not in manifest and "choice" not in manifest and manifest["scale"] == 1
    (told,) = [str(w.message) for w in recwarn if "so the main graft is exported" in str(w.message)]
    assert "the exported weights have no val/<graft>/loss" in told


def test_the_adapter_is_exported_where_its_factors_give_the_chosen_graft(tmp_path, folders):
    """A variant without transforms next to transformed ones, at its own scale."""
    callbacks = [GraftCallback(variants=VARIANTS), ExportCallback(folder=str(tmp_path), subject="grafted@half")]
    fit(tmp_path, folders, "lora", callbacks, max_steps=2)
    assert (tmp_path / "adapter").is_dir()
    assert read_manifest(tmp_path / "adapter")["subject"] == "grafted@half"


def test_before_the_first_step_every_variant_is_the_instruct(tmp_path, folders):
    trainer = make_trainer(tmp_path, GraftCallback(variants=VARIANTS))
    trainer.validate(make_module(folders, "lora"), RandomData(), verbose=False)
    logged = metrics(trainer)
    for name in VARIANTS:
        assert scored(logged, f"grafted@{name}").items() >= scored(logged, "instruct").items() != set()


def test_a_resumed_run_reports_other_variants(tmp_path, folders, recwarn):
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    fit(tmp_path, folders, "lora", [GraftCallback(variants=VARIANTS), saved], max_steps=2)

    def resumed(**options):
        recwarn.clear()
        trainer = make_trainer(tmp_path, GraftCallback(**options), max_steps=4)
        trainer.fit(make_module(folders, "lora"), RandomData(), ckpt_path=tmp_path / "last.ckpt")
        return [str(w.message) for w in recwarn if "written with another graft" in str(w.message)]

    assert resumed(variants=VARIANTS) == []
    assert "variants {'dare': {'scale': 1.0, 'transforms': [{'name': 'dare'" in resumed()[0]
    assert "(now {'half': {'scale': 0.5, 'transforms': []}})" in resumed(variants={"half": {"scale": 0.5}})[0]


# --- the choice ---

GRAFTS = all_grafts([1.0, 0.5], {"dare": Variant(DARE)})


def test_the_lowest_or_the_highest_is_chosen_and_the_first_of_equal_ones():
    metrics = {"val/grafted/loss": 2.0, "val/grafted@0.5/loss": 1.5, "val/grafted@dare/loss": 1.5}
    choice = choose(GRAFTS, metrics, "loss", "min")
    assert choice.best == GRAFTS[1] and choose(GRAFTS, metrics, "loss", "max").best == GRAFTS[0]
    assert choice.entry()["values"] == {"grafted": 2.0, "grafted@0.5": 1.5, "grafted@dare": 1.5}
    assert choice.line.startswith(
        "best graft: grafted@0.5, with val/grafted@0.5/loss 1.500 (grafted 2.000, grafted@dare"
    )
    # One without a score is not chosen, and neither is one that diverged.
    metrics["val/grafted@0.5/loss"] = math.nan
    assert choose(GRAFTS, metrics, "loss", "min").best == GRAFTS[2]
    assert choose(GRAFTS, metrics, "loss", "min").values["grafted@0.5"] is None
    assert choose(GRAFTS, metrics, "accuracy", "max") is None


def test_grafts_are_compared_by_what_the_checkpoints_monitor():
    assert criterion("val/grafted/loss", "min") == ("loss", "min")
    assert criterion("val/tuned/math/score", "max") == ("math/score", "max")
    for other in (None, "graft/gain", "train/loss", "val/loss"):
        assert criterion(other, "max") == ("loss", "min")


@pytest.mark.parametrize(
    ("name", "are_scored", "message"),
    [
        ("dare", True, r"export\.subject is 'dare'; expected best or one of grafted, grafted@0\.5, grafted@dare\. Cor"),
        ("best", False, r"compares the scores of several grafts, but graft\.validate is false\. Add"),
    ],
)
def test_a_wrong_subject_is_an_error(name, are_scored, message):
    with pytest.raises(ExportError, match=message):
        candidates(name, GRAFTS, are_scored)
    with pytest.raises(ExportError, match="but there is one graft"):
        candidates("best", GRAFTS[:1], True)
    assert candidates("grafted@dare", GRAFTS, False) == GRAFTS[2:] and candidates("best", GRAFTS, True) == GRAFTS


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a b": {}}, r"graft\.variants has the name 'a b'; expected letters"),
        ({"5": {}}, r"graft\.variants has the name '5', as which a scale"),
        ({"a": {"scale": math.inf}}, r"graft\.variants\.a\.scale is inf; expected a finite number"),
        ({"a": {"transforms": [{"name": "dar"}]}}, r"graft\.variants\.a\.transforms\[0\]\.name is 'dar'; expected"),
        ({"a": {"transform": DARE}}, r"graft\.variants is .*no option transform\. Did you mean transforms\?"),
    ],
)
def test_a_wrong_variant_is_an_error(variants, message):
    with pytest.raises(ShadowlitError, match=message):
        GraftCallback(variants=variants)


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_variants_in_a_configuration(tmp_path):
    torch.set_num_threads(1)
    arguments = config(tmp_path, [])
    with pytest.raises(SystemExit):
        main([*arguments, '--graft.variants={"a": {"transform": []}}'])
    with pytest.raises(ExportError, match=r"export\.subject is 'dare'"):
        main([*arguments, "--export.subject=dare"])
    variants = '--graft.variants={"svd1": {"transforms": [{"name": "svd", "rank": 1}]}, "half": {"scale": 0.5}}'
    main([*arguments, variants, "--export.subject=best", "--export.parts=[delta]"])
    manifest = read_manifest(tmp_path / "export/delta")
    assert manifest["choice"]["values"].keys() == {"grafted", "grafted@svd1", "grafted@half"}
    assert manifest["config"]["graft"]["variants"]["half"] == {"scale": 0.5, "transforms": []}


# --- several processes ---


def train(folders, strategy, world_size, out, transforms):
    """Train a few steps with a variant, and export it; the logged numbers, or the error."""
    module = distributed.make_module(folders, "full")
    export = ExportCallback(parts=["model"], folder=str(out), subject="grafted@it")
    graft = GraftCallback(variants={"it": {"transforms": transforms}}, dtype="float32")
    trainer = distributed.make_trainer(strategy, world_size, [graft, export], max_epochs=1)
    try:
        trainer.fit(module, RandomData())
    except GraftError as error:
        return str(error), module.model is None
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}


def test_two_processes_are_one(tmp_path, folders):
    (one,) = run_ranks(train, 1, folders, "auto", 1, tmp_path / "one", DARE)
    for rank in run_ranks(train, 2, folders, "fsdp2", 2, tmp_path / "two", DARE):
        assert rank == pytest.approx(one, **distributed.SAME)
    assert one["val/grafted@it/loss"] != one["val/grafted/loss"]
    manifest = read_manifest(tmp_path / "two/model")
    assert manifest["logits_against_validated"]["max_abs"] == 0 and manifest["transforms"] == DARE
    message, before_loading = run_ranks(train, 2, folders, "fsdp2", 2, tmp_path / "three", SVD)[0]
    assert message.startswith("graft.variants.it.transforms has transforms of whole tensors (svd), but FSDP2 shards")
    assert before_loading
