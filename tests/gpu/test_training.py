"""On a GPU: the graft is the equation, restoring is bitwise, sharded is plain, offloaded is on the device."""

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.data.packing import pack_samples
from shadowlit.grafting.manifest import read_manifest
from shadowlit.training.head import HeadLoss
from shadowlit.training.metrics import TokenScores
from shadowlit.training.objective import supervised_positions
from tests.callbacks.test_graft import score_by_hand
from tests.evaluation.contexts import write_rows
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
)
from tests.reloading import reload_logits
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
    run = fit(tmp_path, folders, kind, *callbacks, precision=precision)
    found = run.logged
    assert run.end.devices == {DEVICE.type} and run.end.dtypes == {torch.float32}
    assert watch.validations == 4 and watch.changed == []
    exact = {
        scale: score_by_hand(grafted_model(run, folders, scale, files_of(precision)), SETS) for scale in (1.0, 0.5)
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
    assert read_manifest(tmp_path / "export/model")["logits_against_validated"]["max_abs"] == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export/model", dtype=torch.float32)
    assert score_on_device(exported) == pytest.approx(found["val/grafted/loss"], abs=tolerance)
    # Once more, after Lightning has moved the module off the device and back.
    run.trainer.validate(run.module, RandomData(), verbose=False)
    assert logged(run.trainer)["val/grafted/loss"] == pytest.approx(found["val/grafted/loss"], abs=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_with_and_without_the_graft(tmp_path, pairs, kind, precision):
    folders = pairs[torch.bfloat16]
    first, second, grafted = (
        fit(tmp_path, folders, kind, *callbacks, precision=precision)
        for callbacks in ([], [], [GraftCallback(scales=[1.0, 0.5])])
    )
    if differing(first.end.weights, second.end.weights):
        pytest.skip("the kernels of this device give other bits in every run, with or without a graft")
    assert differing(first.end.weights, grafted.end.weights) == []
    assert first.logged["val/tuned/loss"] == grafted.logged["val/tuned/loss"]
    start = fit(tmp_path, folders, kind, precision=precision, max_steps=1)
    assert len(differing(first.end.weights, start.end.weights)) > 10


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

    class Held(Callback):
        def on_train_end(self, *_):
            tensors = (tensor for host in graft.graft._hosts for tensor in (host.instruct, host.base))
            self.devices = {tensor.device.type for tensor in tensors if tensor is not None}

    runs = []
    for offload in (False, True):
        watch, graft, held = Watch(), GraftCallback(offload=offload), Held()
        export = ExportCallback(folder=str(tmp_path / f"export-{offload}"), parts=["model"], verify=False)
        run = fit(tmp_path, pairs[torch.bfloat16], kind, watch, graft, held, export, precision=precision)
        assert held.devices == ({"cpu"} if offload else {DEVICE.type})
        assert watch.changed == []
        ids = random_samples(1, 3)[0]["input_ids"][None]
        logits = reload_logits(export.exported, ids, torch.ones_like(ids), dtype=torch.float32)
        runs.append((run.logged, run.end.weights, logits))
    assert runs[0][0] == runs[1][0]
    assert differing(runs[0][1], runs[1][1]) == []
    assert torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_offloaded_moments_are_those_of_the_device(tmp_path, pairs, strategy):
    """The same weights bit for bit, with the moments in the CPU's pinned memory."""
    runs = []
    for offload in (False, True):
        run = fit(tmp_path, pairs[torch.float32], "full", strategy=strategy, model={"offload_optimizer": offload})
        runs.append(run.end.weights)
    assert differing(*runs) == []
    moments = [state["exp_avg"] for state in run.end.optimizer_state.values()]
    assert moments and {moment.device.type for moment in moments} == {"cpu"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_on_one_rank_is_the_plain_strategy(tmp_path, pairs, kind, precision):
    """NCCL carries the collectives; every parameter and frozen shard is a DTensor's."""
    folders, runs = pairs[files_of(precision)], []
    for strategy in ("auto", "fsdp2"):
        watch, graft = Watch(), GraftCallback(scales=[1.0, 0.5])
        export = ExportCallback(folder=str(tmp_path / strategy), parts=["model", "delta"], verify=False)
        run = fit(tmp_path, folders, kind, watch, graft, export, strategy=strategy, precision=precision)
        assert watch.validations == 4 and watch.changed == [] and run.end.devices == {DEVICE.type}
        assert all(run.end.sharded) if strategy == "fsdp2" else not any(run.end.sharded)
        if strategy == "fsdp2":
            assert torch.distributed.get_backend() == ("nccl" if DEVICE.type == "cuda" else "gloo")
        runs.append((run.logged, run.end.weights))
    (plain, left), (sharded, right) = runs
    assert plain.keys() == sharded.keys() and left.keys() == right.keys()
    if precision == "32-true":
        for name, value in plain.items():
            assert sharded[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
        for name, value in left.items():
            assert (right[name] - value).norm() <= 1e-4 * value.norm(), name
        return
    # FSDP2's policy computes the norms in bfloat16 too, where autocast keeps float32: 0.3 % apart on an H200.
    for subject in ("tuned", "grafted", "grafted@0.5", "base", "instruct"):
        assert sharded[f"val/{subject}/loss"] == pytest.approx(plain[f"val/{subject}/loss"], rel=1e-2)
    assert sharded["graft/delta_norm"] == pytest.approx(plain["graft/delta_norm"], rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_bit(tmp_path, pairs, kind):
    """With dropout, whose state the recomputation restores on the device."""
    runs = [
        fit(tmp_path, pairs[torch.bfloat16], kind, model={"activation_checkpointing": checkpointing},
            precision="bf16-mixed", limit_val_batches=0)
        for checkpointing in (False, True)
    ]  # fmt: skip
    assert differing(*[run.end.weights for run in runs]) == []


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
    folders = pairs[torch.float32]
    run = fit(tmp_path, folders, kind, *callbacks, model={"compile_layers": True})
    assert graphs.after[0] > 0 and len(set(graphs.after)) == 1, graphs.after
    assert watch.changed == []
    exact = score_by_hand(grafted_model(run, folders), SETS)
    assert run.logged["val/grafted/loss"] == pytest.approx(exact, abs=1e-4)


def packed(samples):
    """Samples of RandomData as one row without padding, and its labels and positions."""
    lengths = [int(sample["attention_mask"].sum()) for sample in samples]
    rows = [
        {name: sample[name][:length].tolist() for name in ("input_ids", "labels")}
        for sample, length in zip(samples, lengths, strict=True)
    ]
    return {name: torch.tensor(row, device=DEVICE)[None] for name, row in pack_samples(rows).items()}, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_packed_samples_do_not_see_each_other(pairs, attention, dtype):
    """Logits and gradients of a packed row are those of its samples by themselves, with the device's own kernels."""
    model = AutoModelForCausalLM.from_pretrained(pairs[torch.float32][0], dtype=dtype, attn_implementation=attention)
    model.to(DEVICE)
    samples = random_samples(6, 5, length=48)
    row, lengths = packed(samples)
    towards = torch.randn(sum(lengths), 272, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(logits):
        """Of a random functional of the logits: of the whole first layer, and the embedding below it."""
        model.zero_grad()
        (logits.float() * towards).sum().backward()
        return torch.cat([p.grad.float().flatten() for n, p in model.named_parameters() if ".1." not in n])

    together = model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0]
    alone = torch.cat([
        model(input_ids=sample["input_ids"][None, :length].to(DEVICE), use_cache=False).logits[0]
        for sample, length in zip(samples, lengths, strict=True)
    ])  # fmt: skip
    joined = model(input_ids=row["input_ids"], position_ids=torch.arange(sum(lengths), device=DEVICE)[None],
                   use_cache=False).logits[0]  # fmt: skip
    close = 1e-5 if dtype == torch.float32 else 4e-2
    assert distance(together, alone) < close < 0.1 < distance(joined, alone)
    assert distance(gradients(together), gradients(alone)) < close


def distance(found, expected):
    return ((found - expected).float().norm() / expected.float().norm()).item()


class Losses(Callback):
    """The logged loss of every optimizer step."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, *_):
        self.all.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_free_training_has_the_losses_of_padded_training(tmp_path, pairs, kind, precision):
    """The same samples in every step, by attention of variable length, with the graft's validation in between."""
    folders = pairs[files_of(precision)]
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ok " * (i % 7 + 1)}]}
        for i in range(24)
    ]
    file, runs = write_rows(tmp_path / "rows.jsonl", rows), []
    for packing, attention in ((None, "sdpa"), ("padding_free", "varlen")):
        module, losses = make_module(folders, kind, dropout=0.0, attn_implementation=attention), Losses()
        data = ShadowData(module.pair, train=file, validation=file, packing=packing, batch_size=4, shuffle=False,
                          cache=False)  # fmt: skip
        trainer = make_trainer(tmp_path, GraftCallback(), losses, precision=precision, accumulate_grad_batches=1,
                               max_epochs=1, val_check_interval=None)  # fmt: skip
        trainer.fit(module, data)
        runs.append((losses.all, trainer.callback_metrics["val/grafted/loss"].item()))
    close = 1e-4 if precision == "32-true" else 5e-2
    assert len(runs[0][0]) == 6 and runs[0][0][-1] < runs[0][0][0] - 0.2
    assert runs[1][0] == pytest.approx(runs[0][0], abs=close)
    assert runs[1][1] == pytest.approx(runs[0][1], abs=close)


@pytest.mark.parametrize("way", ["chunked", "recomputed", "logits"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_past_the_logits_is_that_of_float64(pairs, way, precision):
    """Loss and gradients of the embedding, which is the head too, beside the whole logits in float64 on the CPU."""
    folder, samples = pairs[torch.float32][0], random_samples(6, 5, length=48)
    row, _ = packed(samples)
    positions = supervised_positions(row["labels"], row["position_ids"])
    targets = row["labels"].flatten()[positions + 1]
    inputs = {name: row[name] for name in ("input_ids", "position_ids")}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).train()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        head = HeadLoss(model, way)
        loss = head.loss(inputs, positions, targets)
        losses, _ = head.token_losses(inputs, positions, targets)
    loss.backward()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    logits = exact(**{name: value.cpu() for name, value in inputs.items()}, use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[positions.cpu()], targets.cpu(), reduction="sum")
    expected.backward()
    close, closer = (1e-5, 1e-6) if precision == "32-true" else (6e-2, 3e-3)
    assert loss.item() == pytest.approx(expected.item(), rel=closer)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=closer)
    for name, parameter in exact.named_parameters():
        found = dict(model.named_parameters())[name].grad.double().cpu()
        assert (found - parameter.grad).norm() < close * parameter.grad.norm(), name
