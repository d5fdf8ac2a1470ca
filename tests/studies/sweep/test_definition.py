"""What a sweep runs: which trials, under which names, with which command lines; and what can't be run."""

import json
from pathlib import Path

import pytest
import yaml

from shadowlit.errors import ShadowlitError
from shadowlit.studies.sweep.definition import Definition, TrialKey

ROOT = Path(__file__).parents[3]
FIT = str(ROOT / "configs/demo_lora.yaml")


def define(**options):
    given = {"name": "s", "fit": FIT, "grid": {"model.lr": [1e-3, 2e-3], "model.adapter.r": [1, 4]}}
    return Definition(**{**given, **options})


def told(arguments):
    return dict(part.removeprefix("--").split("=", 1) for part in arguments if "=" in part)


def test_all_combinations_with_all_seeds_whole_seeds_first():
    definition = define(seeds=[3, 5], arms=["B2I", "I2I"])
    planned = definition.planned()
    assert len(planned) == len(set(planned)) == 2 * 2 * 2 * 2 == definition.num_planned
    assert [key.seed for key in planned] == [3] * 8 + [5] * 8
    assert [(dict(k.setting), k.source) for k in planned[:2]] == [
        ({"model.lr": "0.001", "model.adapter.r": "1"}, "B"), ({"model.lr": "0.001", "model.adapter.r": "1"}, "I")
    ]  # fmt: skip


def test_what_is_to_be_dropped_is_not_planned():
    definition = define(drop=[{"model.lr": 2e-3, "model.adapter.r": [1, 4]}])
    assert [dict(key.setting) for key in definition.planned()] == [
        {"model.lr": "0.001", "model.adapter.r": "1"}, {"model.lr": "0.001", "model.adapter.r": "4"}
    ]  # fmt: skip
    assert len(define(drop=[{"model.adapter.r": 4}]).planned()) == 2


def test_variants_set_several_keys_together():
    definition = define(
        grid={"model.lr": [1e-3]},
        variants={"rank": {"low": {"model.adapter.r": 1, "model.adapter.lora_alpha": 2}, 64: {"model.adapter.r": 64}}},
    )
    first, second = definition.planned()
    assert definition.overrides_of(first) == {"model.lr": 1e-3, "model.adapter.r": 1, "model.adapter.lora_alpha": 2}
    assert definition.overrides_of(second) == {"model.lr": 1e-3, "model.adapter.r": 64}
    assert definition.name_of(second) == "lr=0.001_rank=64_seed=0"


def test_names_come_from_what_is_changed_and_tell_trials_apart():
    definition = define(seeds=[0, 1], arms=["B2I", "I2I"])
    names = [definition.name_of(key) for key in definition.planned()]
    assert names[:2] == ["lr=0.001_r=1_seed=0", "train=I_lr=0.001_r=1_seed=0"] and len(set(names)) == 16
    alone = define()  # another arm changes no name
    assert {alone.name_of(key) for key in alone.planned()} <= set(names)
    # The last word alone would be the same for both: one more is taken.
    both = define(grid={"model.seed_x.r": [1], "model.adapter.r": [2]})
    assert both.name_of(both.planned()[0]) == "seed_x.r=1_adapter.r=2_seed=0"
    # What no folder should be called is replaced, and a digest keeps different ones apart.
    strange = define(grid={"graft.select": [["a/b"], ["a?b"]]})
    odd = [strange.name_of(key) for key in strange.planned()]
    assert len(set(odd)) == 2 and all("/" not in name and "?" not in name for name in odd)
    assert (
        len(define(grid={"data.system": ["x" * 500]}).name_of(define(grid={"data.system": ["x" * 500]}).planned()[0]))
        < 140
    )


def test_the_command_line_of_a_trial(tmp_path):
    definition = define(
        overrides={"trainer.max_epochs": 3}, seeds=[7], arms=["B2I", "I2I"], scales=[1.0, 0.5], task_scales=[0.5]
    )
    base, instruct = (told(definition.arguments(key, tmp_path / "t")) for key in definition.planned()[:2])
    assert base["model.lr"] == "0.001" and base["model.adapter.r"] == "1" and base["trainer.max_epochs"] == "3"
    assert base["seed_everything"] == base["model.seed"] == base["data.seed"] == "7"
    assert json.loads(base["graft.scales"]) == [1.0, 0.5] and json.loads(base["evaluation.scales"]) == [0.5]
    assert base["export.enabled"] == "false" and base["graft.baselines"] == "false"
    assert base["model.on_nan"] == "warn"  # one that diverges is a result, and not run again
    assert base["run.root"] == str(tmp_path) and base["run.name"] == "t"
    pair = yaml.safe_load(Path(FIT).read_text())["pair"]
    assert "pair.base" not in base
    assert instruct["pair.base"] == pair["instruct"] and instruct["pair.instruct"] == pair["base"]


def test_untouched_models_are_measured_once_unless_what_measures_them_is_varied():
    assert not define().measures_each
    assert not define(grid={"data.limit_train_samples": [10, 20]}).measures_each
    for key in ("data.validation.new", "pair.base", "evaluation.samples", "data.max_length"):
        definition = define(grid={key: [1, 2]})
        assert definition.measures_each, key
        assert "graft.baselines" not in told(definition.arguments(definition.planned()[0], Path("t")))


def test_what_a_trial_is_judged_by():
    logged = {"val/grafted/loss": 3.0, "val/tuned/loss": 2.0, "val/grafted/a": 1.0, "val/tuned/a": None}
    definition = define(arms=["B2I", "I2I", "B2B"])
    assert definition.judge(logged, "B") == 3.0 and definition.judge(logged, "I") == 2.0
    assert define(metric="val/tuned/loss").judge(logged, "B") == 2.0
    assert define(metric=["loss", "a"]).judge(logged, "B") == 2.0
    worth = define(metric=["loss", "a"], arms=["B2B"]).judge(logged, "B")
    assert worth != worth  # one of them is not a number
    with pytest.raises(KeyError, match="val/grafted/nothing"):
        define(metric="nothing").judge(logged, "B")


def test_a_definition_can_be_stored():
    definition = define(seeds=[0, 1], drop=[{"model.lr": 1e-3}], variants={"v": {"a": {"graft.select": "all"}}})
    again = Definition.from_json(definition.to_json())
    assert again.planned() == definition.planned() and again.identity() == definition.identity()


@pytest.mark.parametrize(("options", "message"), [
    ({"grid": {}}, "nothing is varied; set grid, variants or ranges"),
    ({"grid": {"model.lr": []}}, r"grid.model.lr is \[\], expected a list with at least one value"),
    ({"grid": {"model.lr": 1e-3}}, r"grid.model.lr is 0.001, expected a list"),
    ({"grid": {"model.lr": [1e-3, 0.001]}}, "grid.model.lr has a value twice"),
    ({"grid": {"model.lr": [float(i) for i in range(1, 1001)], "model.eps": list(range(1000))}},
     r"1,000,000 trials are more than max_trials=1,000; .*raise max_trials"),
    ({"variants": {"v": {}}}, "variants.v is empty"),
    ({"variants": {"v": {"a": {"model.lr": 1}}}}, "model.lr is varied twice, by model.lr and by v"),
    ({"overrides": {"model.lr": 1}}, "model.lr is in overrides and varied by model.lr"),
    ({"grid": {"model.seed": [1, 2]}}, "model.seed can't be varied as a key; set seeds"),
    ({"grid": {"graft.scales": [[1.0]]}}, "graft.scales can't be varied as a key; set scales"),
    ({"seeds": []}, r"seeds is \[\], expected at least one"),
    ({"seeds": [1, 1]}, r"seeds is \[1, 1\], expected at least one and each once"),
    ({"arms": ["B2X"]}, "arms names 'B2X', expected some of B2B, B2I, I2B, I2I"),
    ({"arms": []}, "arms is empty"),
    ({"scales": []}, "scales is"),
    ({"task_scales": [0.3]}, "task_scales is"),
    ({"drop": [{"model.rl": 1e-3}]}, "drop names 'model.rl', expected some of model.lr, model.adapter.r"),
    ({"drop": [{"model.lr": 5e-3}]}, "drop names model.lr=0.005, expected some of 0.001, 0.002"),
    ({"drop": [{"model.lr": [1e-3, 2e-3]}]}, "drop leaves no trial"),
    ({"ranges": {"model.eps": {"low": 1e-9, "high": 1e-8}}}, "are not a grid; set sampler: random or tpe"),
    ({"sampler": "tpe"}, "sampler is tpe but trials is not set"),
    ({"trials": 5}, "trials is set, but a grid runs all of its combinations"),
    ({"sampler": "random", "trials": 5, "ranges": {"model.eps": {"low": 2, "high": 1}}}, "expected low < high"),
    ({"sampler": "random", "trials": 5, "ranges": {"model.eps": {"low": 0, "high": 1, "log": True}}}, "positive low"),
    ({"sampler": "random", "trials": 5, "ranges": {"model.eps": {"low": 0, "hi": 1}}}, "expected low < high"),
    ({"name": "a/b"}, "name is 'a/b', expected letters"),
    ({"metric": []}, "metric is empty"),
])  # fmt: skip
def test_what_cannot_be_run_is_told_with_key_and_cure(options, message):
    with pytest.raises(ShadowlitError, match=message):
        define(**options)


def test_problems_are_told_together():
    with pytest.raises(ShadowlitError, match=r"nothing is varied.*seeds is \[\]"):
        define(grid={}, seeds=[])


def test_a_key_is_one_trial():
    assert TrialKey((("a", "1"),), "B", 0) == TrialKey((("a", "1"),), "B", 0)
