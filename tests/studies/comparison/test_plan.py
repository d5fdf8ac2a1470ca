"""Two trainings serve four arms; what each of them is told."""

import json

import pytest
import yaml

from shadowlit.errors import DataError
from shadowlit.studies.comparison.plan import Training, plan, rates_of_arms
from shadowlit.studies.trials.recipe import Recipe


def test_two_trainings_serve_four_arms():
    rates = {"B2I": [2e-3], "I2I": [3e-4]}
    found = plan(["B2I", "I2I", "B2B", "I2B"], rates, [0, 1])
    assert found == [
        Training("I", 3e-4, 0), Training("B", 2e-3, 0), Training("I", 3e-4, 1), Training("B", 2e-3, 1)
    ]  # fmt: skip
    assert [t.name for t in found[:2]] == ["I_lr0.0003_seed0", "B_lr0.002_seed0"]
    assert [t.source for t in found[:2]] == ["I", "B"]
    assert rates_of_arms(["B2B", "I2I"], rates) == {"B2B": (2e-3,), "I2I": (3e-4,)}


def test_a_source_is_trained_at_the_rates_of_all_its_arms_and_no_other_is_trained():
    assert plan(["B2I", "B2B"], {"B2I": [3, 1], "B2B": [2, 1, 1]}, [7]) == [
        Training("B", 1.0, 7), Training("B", 2.0, 7), Training("B", 3.0, 7)
    ]  # fmt: skip


@pytest.mark.parametrize(("arms", "rates", "seeds", "message"), [
    (["B2X"], {"B2X": [1.0]}, [0], "arms are B2X"),
    (["B2I"], {"I2I": [1.0]}, [0], r"the arm B2I has the learning rates \[\]"),
    (["B2I"], {"B2I": [0.0]}, [0], r"the arm B2I has the learning rates \[0.0\]"),
    (["B2I"], {"B2I": [1.0]}, [], "no seed is given"),
    ([], {}, [0], "arms are missing"),
])  # fmt: skip
def test_plans_that_cannot_be(arms, rates, seeds, message):
    with pytest.raises(DataError, match=message):
        plan(arms, rates, seeds)


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "fit.yaml"
    pair = {"base": "b", "instruct": "i", "instruct_revision": "abc"}
    file.write_text(yaml.safe_dump({"pair": pair, "model": {"lr": 1e-3, "adapter": None}}))
    return Recipe(file, {"data.train": "x.jsonl", "trainer.max_epochs": 3}, (1.0, 0.5), (0.5,))


def told(arguments):
    """Arguments as a dictionary."""
    assert arguments[1] == "--config"
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments[3:])


def test_both_sources_get_one_recipe_and_the_instruct_swaps_the_roles(recipe, tmp_path):
    base = told(Training("B", 1e-3, 4).job(recipe, tmp_path).arguments)
    instruct = told(Training("I", 1e-3, 4).job(recipe, tmp_path).arguments)
    swapped = {
        "pair.base": "i", "pair.instruct": "b", "pair.base_revision": "abc", "pair.instruct_revision": "null",
        "pair.template_owner": "base", "evaluation.reference": "base", "run.name": "I_lr0.001_seed4",
    }  # fmt: skip
    folders = {key: value.replace("/B_", "/I_") for key, value in base.items()}
    assert instruct == {**folders, **swapped}
    assert {key: base[key] for key in ("model.lr", "seed_everything", "model.seed", "data.seed")} == {
        "model.lr": "0.001", "seed_everything": "4", "model.seed": "4", "data.seed": "4"
    }  # fmt: skip
    assert base["data.train"] == "x.jsonl" and base["trainer.max_epochs"] == "3"
    assert json.loads(base["graft.scales"]) == [1.0, 0.5] and json.loads(base["evaluation.scales"]) == [0.5]
    untouched = told(recipe.untouched_job(tmp_path).arguments)
    assert "pair.base" not in untouched and untouched["evaluation.baselines"] == "true"


def test_a_training_measures_its_arms_alone(recipe, tmp_path):
    recipe = Recipe(recipe.config, {"evaluation.evaluators": {"new": {}}}, (1.0, 0.5))
    keys = ("graft.validate", "evaluation.subjects", "evaluation.last_only")

    def of(source, arms, recipe=recipe):
        job = Training(source, 1e-3, 0).job(recipe, tmp_path, arms)
        return [json.loads(told(job.arguments)[key]) for key in keys], job.measures

    assert of("I", ["B2I", "I2I"]) == ([False, ["tuned"], True], ("val/tuned/", "val/tuned/new/"))
    assert of("B", ["B2I", "I2I"]) == ([True, ["grafted"], True], ("val/grafted/", "val/grafted/new/"))
    assert of("B", ["B2I", "B2B"])[0] == [True, ["grafted", "tuned"], True]


def test_evaluators_that_the_report_does_not_need_do_not_run(recipe, tmp_path):
    own = {"evaluation.evaluators": {"new": {}, "old": {}}}
    recipe = Recipe(recipe.config, own)
    job = Training("I", 1e-3, 0).job(recipe, tmp_path, ["I2I"], ["new"])
    assert json.loads(told(job.arguments)["evaluation.only"]) == ["new"]
    assert job.measures == ("val/tuned/", "val/tuned/new/")
    untouched = recipe.untouched_job(tmp_path, ["new"])
    assert json.loads(told(untouched.arguments)["evaluation.only"]) == ["new"]
    assert untouched.measures == ("val/base/new/", "val/instruct/new/")
    assert "evaluation.only" not in told(
        Training("I", 1e-3, 0).job(recipe, tmp_path, ["I2I"], ["old", "new"]).arguments
    )
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/tuned/old/kl"}}
    watched = Recipe(recipe.config, {**own, "trainer.callbacks": [callback]})
    assert "evaluation.only" not in told(Training("I", 1e-3, 0).job(watched, tmp_path, ["I2I"], ["new"]).arguments)


@pytest.mark.parametrize(("monitor", "expected"), [
    ("val/tuned/loss", [False, ["tuned"], True]),
    ("graft/gain", [True, ["tuned"], True]),
    ("val/grafted/new/score", [True, ["tuned", "grafted"], False]),
    ("graft/gain/new", [True, ["tuned", "grafted"], False]),
    ("val/tuned/new_house/loss", [False, ["tuned"], True]),  # a validation set's
])  # fmt: skip
def test_what_is_monitored_is_measured(recipe, tmp_path, monitor, expected):
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": monitor}}
    own = {"evaluation.evaluators": {"new": {}}, "trainer.callbacks": [callback]}
    found = told(Training("I", 1e-3, 0).job(Recipe(recipe.config, own), tmp_path, ["I2I"]).arguments)
    assert [
        json.loads(found[key]) for key in ("graft.validate", "evaluation.subjects", "evaluation.last_only")
    ] == expected


@pytest.mark.parametrize(("monitor", "kept"), [("val/grafted/loss", False), ("val/grafted@dare/loss", True)])
def test_variants_that_nobody_reads_are_left_out(recipe, tmp_path, monitor, kept):
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": monitor}}
    variants = {"dare": {"transforms": [{"name": "dare", "density": 0.5}]}}
    changes = {"graft.variants": variants, "trainer.callbacks": [callback], "export.subject": "best"}
    own = Recipe(recipe.config, changes)
    found = told(Training("B", 1e-3, 0).job(own, tmp_path, ["B2I"]).arguments)
    assert json.loads(found["graft.variants"]) == (variants if kept else None) and found["export.subject"] == "grafted"
    assert told(own.untouched_job(tmp_path).arguments)["graft.variants"] == "null"


def test_values_are_those_of_the_overrides_then_of_the_file(recipe):
    assert recipe.get("trainer.max_epochs") == 3 and recipe.get("model.lr") == 1e-3
    assert recipe.get("trainer.devices") is None and recipe.get("pair.base.deeper") is None
    assert recipe.pair() == {"base": "b", "instruct": "i", "instruct_revision": "abc"}


def test_a_configuration_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"none\.yaml can't be read"):
        Recipe(tmp_path / "none.yaml", {}).get("model.lr")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(DataError, match="holds no keys"):
        Recipe(tmp_path / "list.yaml", {}).get("model.lr")
