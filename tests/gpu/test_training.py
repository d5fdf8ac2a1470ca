"""On a GPU: the graft is the equation, restoring is bitwise, sharded is plain, offloaded is on the device."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.evaluation.scores import TokenScores
from shadowlit.graft.export import reload_logits
from shadowlit.graft.manifest import read_manifest
from tests.callbacks.test_graft import score_by_hand
from tests.gpu.conftest import DEVICE
from tests.gpu.runs import (
    KINDS,
    PRECISIONS,
    SETS,
    Watch,
    differing,
    files_of,
    fit,
    grafted_model,
    logged,
    make_module,
    make_trainer,
    weights,
)
from tests.synthetic import RandomData, random_samples

pytestmark = pytest.mark.gpu


def score_on_device(model):
    """The validation loss of a whole model on the device in its own dtype, through the module's own metric."""
    scores = TokenScores().to(DEVICE)
    model.to(DEVICE).eval()
    with torch.no_grad():
        for count, seed in SETS:
            for sample in random_samples(count, seed):
                batch = {name: value[None].to(DEVICE) for name, value in sample.items()}
                labels = batch.pop("labels")
                scores.update(model(**batch).logits, labels)
    return scores.compute()["loss"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_grafted_validation_is_the_equation_and_the_export_is_what_was_validated(tmp_path, pairs, kind, precision):
    """Also: restoring is bitwise in every validation, masters are float32, all of it lies on the device."""
    folders = pairs[files_of(precision)]
    watch = Watch()
    callbacks = [watch, GraftCallback(scales=[1.0, 0.5]), ExportCallback(folder=str(tmp_path / "export"))]
    module, found = fit(tmp_path, folders, kind, *callbacks, precision=precision)
    trained = [p for p in module.model.parameters() if p.requires_grad]
    assert {p.device.type for p in module.model.parameters()} == {DEVICE.type}
    assert {p.dtype for p in trained} == {torch.float32}
    assert watch.validations == 4 and watch.changed == []
    exact = {
        scale: score_by_hand(grafted_model(module, folders, scale, files_of(precision)), SETS) for scale in (1.0, 0.5)
    }
    untouched = {
        who: score_by_hand(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), SETS)
        for who, folder in zip(("base", "instruct"), folders, strict=True)
    }
    # What the float64 numbers differ by is what a wrong set of weights would be off by.
    tolerance = 2e-5 if precision == "32-true" else 1e-2
    assert min(abs(exact[1.0] - other) for other in (exact[0.5], untouched["instruct"])) > 4 * tolerance
    assert found["val/grafted/loss"] == pytest.approx(exact[1.0], abs=tolerance)
    assert found["val/grafted@0.5/loss"] == pytest.approx(exact[0.5], abs=tolerance)
    for who, loss in untouched.items():
        assert found[f"val/{who}/loss"] == pytest.approx(loss, abs=tolerance)
    assert found["graft/gain"] == pytest.approx(found["val/instruct/loss"] - found["val/grafted/loss"], abs=1e-6)
    difference = read_manifest(tmp_path / "export/model")["logits_against_validated"]
    assert difference["max_abs"] < (1e-3 if precision == "32-true" else 0.5)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export/model", dtype=torch.float32)
    assert score_on_device(exported) == pytest.approx(found["val/grafted/loss"], abs=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_the_graft(tmp_path, pairs, kind, precision):
    runs = [
        fit(tmp_path, pairs[torch.bfloat16], kind, *callbacks, precision=precision)
        for callbacks in ([GraftCallback(scales=[1.0, 0.5])], [])
    ]
    start = weights(make_and_fill(tmp_path, pairs[torch.bfloat16], kind))
    assert len(differing(weights(runs[0][0]), start)) > 10
    assert differing(*[weights(module) for module, _ in runs]) == []
    assert runs[0][1]["val/tuned/loss"] == runs[1][1]["val/tuned/loss"]


def make_and_fill(tmp_path, folders, kind):
    module = make_module(folders, kind)
    make_trainer(tmp_path).validate(module, RandomData(), verbose=False)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_graft_is_the_instruct_to_the_last_bit(tmp_path, pairs, kind):
    """Under autocast too: no cast of the Base's weights outlives the swap."""
    module = make_module(pairs[torch.bfloat16], kind)
    trainer = make_trainer(tmp_path, GraftCallback(scales=[1.0, 2.0]), precision="bf16-mixed")
    trainer.validate(module, RandomData(), verbose=False)
    found = logged(trainer)
    for what in ("loss", "accuracy", "left/loss"):
        assert found[f"val/grafted/{what}"] == found[f"val/instruct/{what}"] == found[f"val/grafted@2/{what}"]
        assert found[f"val/tuned/{what}"] == found[f"val/base/{what}"]
    assert found["val/instruct/loss"] != found["val/base/loss"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_is_on_the_device(tmp_path, pairs, kind, precision):
    """The frozen shards on the CPU give the same bits, in the metrics, the weights and the export."""
    runs = []
    for offload in (False, True):
        watch, graft = Watch(), GraftCallback(offload=offload)
        export = ExportCallback(folder=str(tmp_path / f"export-{offload}"), parts=["model"], verify=False)
        module, found = fit(tmp_path, pairs[torch.bfloat16], kind, watch, graft, export, precision=precision)
        held = {t.device.type for host in graft.graft._hosts for t in (host.instruct, host.base) if t is not None}
        assert held == ({"cpu"} if offload else {DEVICE.type})
        assert watch.changed == []
        ids = random_samples(1, 3)[0]["input_ids"][None]
        logits = reload_logits(export.exported, ids, torch.ones_like(ids), dtype=torch.float32)
        runs.append((found, weights(module), logits))
    assert runs[0][0] == runs[1][0]
    assert differing(runs[0][1], runs[1][1]) == []
    assert torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_on_one_rank_is_the_plain_strategy(tmp_path, pairs, kind, precision):
    """NCCL carries the collectives; every parameter and frozen shard is a DTensor's."""
    folders, runs = pairs[files_of(precision)], []
    for strategy in ("auto", "fsdp2"):
        watch, graft = Watch(), GraftCallback(scales=[1.0, 0.5])
        export = ExportCallback(folder=str(tmp_path / strategy), parts=["model", "delta"], verify=False)
        module, found = fit(tmp_path, folders, kind, watch, graft, export, strategy=strategy, precision=precision)
        assert watch.validations == 4 and watch.changed == []
        sharded = [isinstance(p, DTensor) for p in module.model.parameters()]
        assert all(sharded) if strategy == "fsdp2" else not any(sharded)
        if strategy == "fsdp2":
            assert torch.distributed.get_backend() == ("nccl" if DEVICE.type == "cuda" else "gloo")
        runs.append((found, weights(module)))
    (plain, left), (sharded, right) = runs
    assert plain.keys() == sharded.keys() and left.keys() == right.keys()
    if precision == "32-true":
        for name, value in plain.items():
            assert sharded[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, rtol=0, atol=2e-5)
        return
    # FSDP2's policy computes the norms in bfloat16 too, where autocast keeps float32: other roundings.
    for subject in ("tuned", "grafted", "grafted@0.5", "base", "instruct"):
        assert sharded[f"val/{subject}/loss"] == pytest.approx(plain[f"val/{subject}/loss"], abs=2e-2)
    assert sharded["graft/delta_norm"] == pytest.approx(plain["graft/delta_norm"], rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_bit(tmp_path, pairs, kind):
    """With dropout, whose state the recomputation restores on the device."""
    runs = [
        fit(tmp_path, pairs[torch.bfloat16], kind, model={"activation_checkpointing": checkpointing},
            precision="bf16-mixed", limit_val_batches=0)
        for checkpointing in (False, True)
    ]  # fmt: skip
    assert differing(*[weights(module) for module, _ in runs]) == []


class Graphs(Callback):
    """How many graphs torch.compile has made when each pass of a validation ends."""

    def __init__(self):
        self.after = []

    def on_validation_epoch_end(self, *_):
        self.after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    on_validation_end = on_validation_epoch_end


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_under_compiled_layers_compiles_nothing(tmp_path, pairs, kind):
    """Graphs are counted after the tuned pass and after the grafted one, in all four validations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, watch = Graphs(), Watch()
    callbacks = [watch, graphs, GraftCallback(baselines=False)]
    module, found = fit(tmp_path, pairs[torch.bfloat16], kind, *callbacks, model={"compile_layers": True})
    assert graphs.after[0] > 0 and len(set(graphs.after)) == 1, graphs.after
    assert watch.changed == []
    exact = score_by_hand(grafted_model(module, pairs[torch.bfloat16], 1.0, torch.bfloat16), SETS)
    assert found["val/grafted/loss"] == pytest.approx(exact, abs=1e-4)
