"""Python takes what a configuration takes: plain values become what their types ask for, or are short errors."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torchmetrics import MeanMetric

from shadowlit import (
    Divergence,
    EvaluationCallback,
    ExportCallback,
    Generation,
    GraftCallback,
    ModelPair,
    MultipleChoice,
    ShadowData,
    ShadowModule,
)
from shadowlit.errors import ShadowlitError
from shadowlit.training.objectives import DPO

PAIR = ModelPair("base", "instruct")
SIDES = {"base": "base", "instruct": "instruct"}


def test_plain_values_are_read_as_in_a_configuration():
    module = ShadowModule(
        SIDES, {"r": 4, "lora_alpha": 8}, {"class_path": "DPO", "init_args": {"beta": 0.25}}, lr="2e-4",
        betas=[0.9, 0.95], optimizer={"class_path": "torch.optim.Muon", "init_args": {"momentum": 0.5}},
        metrics={"a": {"class_path": "torchmetrics.MeanMetric"}, "b": MeanMetric()},
    )  # fmt: skip
    assert module.pair == PAIR and isinstance(module.adapter, LoraConfig)
    assert (module.adapter.r, module.adapter.lora_alpha, module.adapter.target_modules) == (4, 8, "all-linear")
    assert isinstance(module.objective, DPO) and module.objective.beta == 0.25
    assert (module.lr, module.betas) == (2e-4, (0.9, 0.95))
    muon = module.optimizer([torch.nn.Parameter(torch.ones(2, 2))])
    assert isinstance(muon, torch.optim.Muon) and muon.defaults["momentum"] == 0.5
    assert {name: type(metric) for name, metric in module.metrics.items()} == {"a": MeanMetric, "b": MeanMetric}
    evaluators = {"ours": {"class_path": "Generation", "init_args": {"data": "a.jsonl", "every": 2}}}
    (found,) = EvaluationCallback(evaluators).evaluators.values()
    assert isinstance(found, Generation) and found.every == 2


def test_paths_are_strings_and_tuples_are_lists():
    here = Path("some") / "where"
    assert ModelPair(here, here / "instruct") == ModelPair("some/where", "some/where/instruct")
    data = ShadowData(PAIR, train=(here, "b.jsonl"), validation={"a": here}, test=here)
    assert [source.path for source in data.train_sources] == ["some/where", "b.jsonl"]
    assert (data.validation_sets["a"].path, data.test_sets["test"].path) == ("some/where", "some/where")
    assert ExportCallback(folder=here, parts=("delta",)).folder == "some/where"
    assert GraftCallback(select=("q_proj",), scales=(1, 0.5)).scales == [1, 0.5]
    assert all(make(data=here).data == "some/where" for make in (Divergence, Generation, MultipleChoice))


def test_what_has_its_type_is_passed_on_as_it_is():
    adapter, metrics = LoraConfig(r=2), {"mean": MeanMetric()}
    module = ShadowModule(PAIR, adapter, metrics=metrics)
    assert module.adapter is adapter and module.pair is PAIR and module.metrics["mean"] is metrics["mean"]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ShadowModule("base"), "model.pair is 'base'; expected ModelPair."),
    (lambda: ShadowModule(None), "model.pair is None; expected ModelPair."),
    (lambda: ShadowModule({"base": "b", "instrct": "i"}), "model.pair is {'base': 'b', 'instrct': 'i'}, but the class "
     "has no option instrct. Did you mean instruct?\nKnown: base, instruct, "),
    (lambda: ShadowModule(PAIR, {"rank": 4}), "model.adapter is {'rank': 4}, but the class has no option rank."),
    (lambda: ShadowModule(PAIR, {"r": "x"}), "model.adapter is {'r': 'x'}, but r is x; expected int."),
    (lambda: ShadowModule(PAIR, "lora"), "model.adapter is lora; expected LoraConfig, PeftConfig, null."),
    (lambda: GraftCallback(fit_scales={"data": "d", "keep": {"dta": "k"}}), "graft.fit_scales is {'data': 'd', 'keep': "
     "{'dta': 'k'}}, but keep is {'dta': 'k'}, which has no option dta. Did you mean data?\nKnown: data, weight."),
    (lambda: GraftCallback(fit_scales={"data": "d", "keep": {"weight": 1}}),
     "graft.fit_scales is {'data': 'd', 'keep': {'weight': 1}}, but keep.data is missing."),
    (lambda: GraftCallback(fit_scales={"data": "d", "keep": {"data": "k", "weight": "x"}}),
     "graft.fit_scales is {'data': 'd', 'keep': {'data': 'k', 'weight': 'x'}}, but keep.weight is x; expected float."),
    (lambda: ShadowModule(PAIR, objective="DPX"), "model.objective is DPX; expected Objective, null."),
    (lambda: ShadowModule(PAIR, lr=None), "model.lr is None; expected float."),
    (lambda: ShadowModule(PAIR, optimizer="adamx"), "model.optimizer is adamx; expected adamw, adamw_8bit, Callable"),
    (lambda: ShadowModule(PAIR, schedule="cosin"), "model.schedule is cosin; expected cosine, linear, constant."),
    (lambda: ShadowModule(PAIR, metrics=["f1"]), "model.metrics is ['f1']; expected dict[str, Metric], null."),
    (lambda: ModelPair(3, "instruct"), "pair.base is 3; expected str."),
    (lambda: ModelPair("a", "b", template_owner="c"), "pair.template_owner is c; expected instruct, base."),
    (lambda: ShadowData("base"), "data.pair is 'base'; expected ModelPair."),
    (lambda: ShadowData(PAIR, train={"a": "b"}), "data.train is {'a': 'b'}; expected a path, or a mapping of path and"),
    (lambda: ShadowData(PAIR, train={"path": "a", "b": 1}), "data.train has the key 'b'; expected some of path, "),
    (lambda: GraftCallback(scales=1.0), "graft.scales is 1.0; expected list[float]."),
    (lambda: GraftCallback(scales=["x"]), "graft.scales is ['x']; expected list[float]."),
    (lambda: GraftCallback(transforms="dare"), "graft.transforms is dare; expected list[dict[str, Any]]."),
    (lambda: ExportCallback(parts="model"), "export.parts is model; expected list[model, adapter, delta]."),
    (lambda: EvaluationCallback(["mc"]), "evaluation.evaluators is ['mc']; expected dict[str, Evaluator], null."),
    (lambda: Generation("a.jsonl", every="often"), "evaluator.every is often; expected int."),
])  # fmt: skip
def test_a_wrong_form_is_a_short_error(make, message):
    with pytest.raises(ShadowlitError) as error:
        make()
    assert str(error.value).startswith(message) and len(str(error.value).splitlines()) <= 2
