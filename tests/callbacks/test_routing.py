"""Which experts tokens choose under the graft, the Instruct and the Base; mixtures of experts in a whole run."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ShadowlitError
from shadowlit.evaluation.routing import Routing, agreement_of, compare_routing, routers_of
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from tests.callbacks.test_graft import make_module, make_trainer
from tests.synthetic import RandomData, random_samples
from tests.tiny import MIXTURES, save_pair


@pytest.fixture(scope="module", params=MIXTURES)
def folders(request, tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp(request.param), request.param, tied=False, distance=0.3)


def val_batches(count=8, seed=1, size=2):
    samples = random_samples(count, seed)
    return [
        {name: torch.stack([s[name] for s in samples[i : i + size]]) for name in samples[0]}
        for i in range(0, count, size)
    ]


def chosen(model, batches):
    """From the router's logits that transformers returns: for each supervised token the k best, [N, layers, k]."""
    found = []
    for batch in batches:
        with torch.no_grad():
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        keep = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        position = keep[0] * batch["labels"].shape[1] + keep[1]
        found.append(torch.stack([layer.topk(2).indices[position] for layer in out.router_logits], dim=1))
    return found


def independent_agreement(mine, theirs):
    """Token by token, layer by layer, with sets."""
    shared = changed = tokens = 0
    for a, b in zip(mine, theirs, strict=True):
        for one, other in zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), strict=True):
            shared += len(set(one) & set(other))
            changed += one[0] != other[0]
            tokens += 1
    return {"routing_agreement": shared / (2 * tokens), "routing_top1_changed": changed / tokens}


def test_two_folders_against_transformers_own_logits(folders):
    batches = val_batches()
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    expected = independent_agreement(*(chosen(model, batches) for model in models))
    assert 0.2 < expected["routing_agreement"] < 1 and 0 < expected["routing_top1_changed"] < 1
    assert compare_routing(*folders, batches) == expected
    assert compare_routing(folders[0], folders[0], batches) == {"routing_agreement": 1, "routing_top1_changed": 0}


def test_agreement_by_hand():
    mine = [torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([[[1, 0]]])]
    theirs = [torch.tensor([[[1, 0]], [[2, 0]]]), torch.tensor([[[2, 3]]])]
    # Shared: both, one of two, none. The best one: another, the same, another.
    assert agreement_of(mine, theirs) == {"routing_agreement": 3 / 6, "routing_top1_changed": 2 / 3}
    assert math.isnan(agreement_of([], [])["routing_agreement"])


class EveryValidation(Callback):
    def __init__(self, graft=None):
        self.seen, self.graft = [], graft

    def on_validation_end(self, trainer, pl_module):
        if self.graft:
            self.recorded = set(self.graft._routing._choices)
        if not trainer.sanity_checking:
            self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_logs_what_the_exported_model_does(tmp_path, folders, kind):
    """Scored on the same batches by the offline function; before the first step everything agrees."""
    graft = GraftCallback(scales=[1.0, 0.5], select="all", dtype="float32")
    before, during = EveryValidation(), EveryValidation(graft)
    make_trainer(tmp_path, GraftCallback(), before).validate(make_module(folders, "full"), RandomData(), verbose=False)
    for subject in ("grafted", "tuned"):
        assert before.seen[0][f"val/{subject}/routing_agreement"] == 1
        assert before.seen[0][f"val/{subject}/routing_top1_changed"] == 0
    adapter = LoraConfig(r=4) if kind == "lora" else None
    module = ShadowModule(ModelPair(*map(str, folders)), adapter, lr=3e-2 if adapter else 1e-2)
    export = ExportCallback(parts=["model", "delta"], folder=str(tmp_path / "out"))
    trainer = make_trainer(tmp_path, graft, export, during)
    trainer.fit(module, RandomData())
    batches = [*val_batches(8, 1), *val_batches(4, 2)]
    measured = compare_routing(tmp_path / "out/model", folders[1], batches)
    assert 0 < measured["routing_agreement"] < 1
    for name, value in measured.items():
        assert during.seen[-1][f"val/grafted/{name}"] == pytest.approx(value, abs=2e-3)  # a tie in rounding
        assert f"val/grafted@0.5/{name}" in during.seen[-1]
        assert f"val/tuned/{name}" in during.seen[-1] and f"val/instruct/{name}" not in during.seen[-1]
    assert len(during.seen) == 2 and during.recorded == {"base", "instruct"}
    assert not any(m._forward_hooks for m in routers_of(module.model).values())
    manifest = json.loads((tmp_path / "out/model/shadowlit.json").read_text())
    assert manifest["logits_against_validated"]["max_abs"] == 0
    assert manifest["coverage"]["num_selected_routers"] == 2


def test_a_resumed_run_records_the_untouched_models_again(tmp_path, folders):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = EveryValidation()
    make_trainer(tmp_path, GraftCallback(), checkpoint, whole, max_epochs=2).fit(make_module(folders), RandomData())
    resumed = EveryValidation()
    make_trainer(tmp_path, GraftCallback(), resumed, max_epochs=2).fit(
        make_module(folders), RandomData(), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
    )
    for name in ("val/grafted/routing_agreement", "val/tuned/routing_agreement", "val/instruct/loss"):
        assert resumed.seen[-1][name] == whole.seen[-1][name]


@pytest.mark.parametrize("options", [{"routing": False}, {"baselines": False}])
def test_it_can_be_left_out(tmp_path, folders, options):
    seen = EveryValidation()
    trainer = make_trainer(tmp_path, GraftCallback(**options), seen)
    trainer.validate(make_module(folders), RandomData(), verbose=False)
    assert not any("routing" in name for name in seen.seen[0])


def test_models_without_routers(tmp_path):
    base, _ = save_pair(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert routers_of(model) == {}
    with pytest.raises(ShadowlitError, match="Qwen3ForCausalLM has no router: no module called gate or router next to"):
        Routing(model)


def test_routers_that_were_not_asked(folders):
    routing, batch = Routing(AutoModelForCausalLM.from_pretrained(folders[0])), val_batches()[0]
    routing.watch()
    with pytest.raises(ShadowlitError, match="were not called once for each of the 40 tokens of a batch"):
        routing.take("", batch)
    with pytest.raises(ShadowlitError, match="recorded on 0 and 0 batches; expected the same batches"):
        routing.agreement("a", "b")
