"""The estimate of memory, next to what a training on a small pair holds: equal to the byte where both count tensors."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils._pytree import tree_leaves

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.subject import ANCHORED
from shadowlit.lightning_cli import main
from shadowlit.planning.memory import Alive, num_bytes
from shadowlit.planning.plan import parse_bytes
from shadowlit.training.anchors import AnchoredTraining
from tests.tiny import save_pair

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")

LORA = "--model.adapter={r: 4, target_modules: all-linear}"
# Seven layers, of which the simulation runs two; Gemma 3 repeats itself after six.
CASES = {
    "LoRA": (LORA,),
    "full": (),
    "LoRA, bfloat16": (LORA, "--trainer.precision=bf16-mixed"),
    "full, bfloat16": ("--trainer.precision=bf16-mixed",),
    "recomputed": ("--model.activation_checkpointing=full",),
    "selectively recomputed": (LORA, "--model.activation_checkpointing=selective"),
    "LoRA, two anchors": (LORA, "--model.anchors={instruct: 0.3}"),
    "LoRA, bfloat16, two anchors": (LORA, "--trainer.precision=bf16-mixed", "--model.anchors={instruct: 0.3}"),
    "full, two anchors": ("--model.anchors={instruct: 0.3}",),
    "whole logits": (LORA, "--model.head_loss=logits"),
}
ALWAYS = ("LoRA, bfloat16", "recomputed", "full, two anchors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    save_pair(root, "qwen3", tied=True, dtype=torch.bfloat16, layers=7, hidden=64)
    rows = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * 40}]}
        for n in (10, 20, 40, 30)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


class Watch(Callback):
    """Counts what is held, and what a micro-batch has alive whose gradients add to those of the one before."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 1:
            self.batch = batch
            self.alive = Alive(module.model)
            graft = next(c for c in trainer.callbacks if isinstance(c, GraftCallback)).build(module)
            frozen = [t for host in graft._hosts for t in (host.instruct, host.base) if t is not None]
            self.alive._seen.update(t.untyped_storage() for t in frozen)  # which an anchor reads
            self.alive.__enter__()

    def on_after_backward(self, trainer, module):
        if hasattr(self, "alive") and not hasattr(self, "peak"):
            self.alive.__exit__(None, None, None)
            self.peak = self.alive.peak

    def on_train_end(self, trainer, module):
        graft = next(c for c in trainer.callbacks if isinstance(c, GraftCallback))
        states = trainer.optimizers[0].state_dict()["state"]
        parameters = list(module.model.parameters())
        self.held = {
            "weights": num_bytes([*parameters, *module.model.buffers()]),
            "gradients": num_bytes(p for p in parameters if p.requires_grad),
            "moments": num_bytes(t for t in tree_leaves(states) if isinstance(t, torch.Tensor) and t.dim()),
            "frozen": graft.graft.frozen_bytes,
        }
        graft.graft.apply(ANCHORED)
        copies = num_bytes(host.saved for host in graft.graft._hosts if host.saved is not None)
        graft.graft.restore()
        if module.anchors is not None:
            self.held["anchored"] = copies


def arguments(pair, *more):
    return [
        f"--pair.base={pair / 'base'}", f"--pair.instruct={pair / 'instruct'}", f"--data.train={pair / 'rows.jsonl'}",
        "--data.batch_size=2", "--data.cache=false", "--data.shuffle=false", "--trainer.accelerator=cpu",
        f"--run.root={pair / 'runs'}", "--trainer.accumulate_grad_batches=2",
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=[] if case in ALWAYS else [pytest.mark.slow])
    for case in CASES
])  # fmt: skip
def test_the_estimate_is_what_a_step_holds(pair, case):
    watch, args = Watch(), arguments(pair, *CASES[case])
    found = main(["plan", *args, "--measure_steps=0"]).planned.memory()
    main([
        "fit", *args, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false", "--export.enabled=false",
        "--throughput.enabled=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0",
    ], callbacks=[watch])  # fmt: skip
    assert (found.rows, found.length) == tuple(watch.batch["input_ids"].shape)
    assert {name: getattr(found, name) for name in watch.held} == watch.held
    # A real batch also has a few integers by token, and its own share of supervised tokens.
    assert found.activations + found.head + found.anchored == pytest.approx(watch.peak, rel=0.02)


def test_gradients_do_not_count_in_a_validation_before_which_they_are_freed(pair):
    freed = []
    watch = LambdaCallback(on_validation_start=lambda _, m: freed.append(all(p.grad is None for p in m.parameters())))
    given = arguments(pair, f"--data.validation={pair / 'rows.jsonl'}")
    main([
        "fit", *given, "--trainer.max_steps=1", "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_checkpointing=false", "--export.enabled=false", "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
    ], callbacks=[watch])  # fmt: skip
    assert freed == [True]
    found = main(["plan", *given, "--measure_steps=0"]).planned.memory()
    held = found.weights + found.moments + found.frozen
    assert found.phases["validation"] == held + found.swapped + found.scoring
    assert found.phases["training"] == held + found.gradients + found.activations + found.head


def test_two_anchors_keep_copies_while_the_instruct_trains(pair):
    """Full tuning: 4 bytes per parameter of the tuned weights, and 4 of gradients where two micro-batches follow."""

    def anchored(weight, micro_batches):
        more = f"--model.anchors={{instruct: {weight}}}", f"--trainer.accumulate_grad_batches={micro_batches}"
        found = main(["plan", *arguments(pair, *more), "--measure_steps=0"]).planned.memory()
        held = found.weights + found.moments + found.frozen + found.gradients + found.activations + found.head
        assert found.phases["training"] == held + found.anchored
        return found.anchored / found.num_trained

    assert [anchored(0.3, 4), anchored(0.3, 8), anchored(0, 8), anchored(1, 8)] == [4, 8, 0, 4]
    with pytest.raises(ShadowlitError, match="as it is configured: 1 error"):
        anchored(0.3, 1)


@pytest.mark.parametrize("given", [(), (LORA,), (LORA, "--trainer.precision=bf16-mixed")])
def test_the_estimate_is_what_the_divergence_holds(pair, given, monkeypatch):
    """Its rows are the longest; with the copies of the swap, and of the head where it is trained."""
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z" * n}]} for n in (90, 80)
    ]
    (pair / "neutral.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add, peaks = AnchoredTraining._add_divergence, []

    def watched(self, module, *args):
        module.head_losses()
        alive = Alive(module.model)
        alive._seen.update(
            t.untyped_storage() for h in self._graft._hosts for t in (h.instruct, h.base) if t is not None
        )
        with alive:
            found = add(self, module, *args)
        peaks.append(alive.peak)
        return found

    monkeypatch.setattr(AnchoredTraining, "_add_divergence", watched)
    kl = f"{{data: {pair / 'neutral.jsonl'}, weight: 0.5}}"
    args = arguments(pair, *given, f"--model.anchors={{instruct: 0.3, kl: {kl}}}", "--data.validation=null")
    found = main(["plan", *args, "--measure_steps=0"]).planned.memory()
    main([
        "fit", *args, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false", "--export.enabled=false",
        "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    assert found.neutral > 0 and len(peaks) == 1
    assert found.activations + found.head + found.anchored + found.neutral == pytest.approx(peaks[0], rel=0.03)


def test_fsdp_divides_what_is_held_and_gathers_a_layer(pair):
    one = main(["plan", *arguments(pair), "--measure_steps=0"]).planned.memory()
    sharded = "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}"
    two = main(["plan", *arguments(pair, sharded, "--trainer.devices=2"), "--measure_steps=0"]).planned.memory()
    for part in ("weights", "gradients", "moments", "frozen"):
        assert getattr(two, part) == getattr(one, part) / 2, part
    assert (two.activations, two.head) == (one.activations, one.head)
    # Derived by hand: the tied embedding and the last norm twice; 4 copies of a layer, its gradients, and 2 reduced.
    root, layer = 272 * 64 + 64, (one.weights / 4 - 272 * 64 - 64) // 7
    accumulated = 4 * one.num_trained  # until the last micro-batch of a step they are whole only for an adapter
    assert two.buffers == pytest.approx(4 * (2 * root + 5 * layer) + 8 * layer, rel=0.01) and accumulated


def test_what_does_not_fit_ends_with_what_to_change(pair, capsys):
    with pytest.raises(ShadowlitError, match=r"doesn't fit into 1\.00 MB; see above"):
        main(["plan", *arguments(pair), "--measure_steps=0", "--memory=1MB"])
    shown = capsys.readouterr().out
    assert "Apply these changes in order" in shown
    places = [shown.index(setting) for setting in (
        "data.batch_size=1, trainer.accumulate_grad_batches=4", "model.activation_checkpointing=full",
        "model.optimizer=adamw_8bit", "2 devices under FSDP2",
    )]  # fmt: skip
    assert places == sorted(places)


def test_missing_data_and_a_missing_device_still_give_an_estimate(pair, capsys):
    args = [arg.replace("rows.jsonl", "none.jsonl") for arg in arguments(pair)]
    with pytest.raises(ShadowlitError, match=r"can't run as it is configured: 1 error; see above"):
        main(["plan", *args, "--trainer.accelerator=gpu", "--trainer.devices=4", "--memory=80GB"])
    shown = capsys.readouterr().out
    assert "none.jsonl does not exist" in shown and "note: this machine can't run the training: " in shown
    assert "estimated memory of a GPU, 4 ranks under DDP: 2 × 4,096 tokens" in shown
    assert "it fits" in shown and "time: not measured" in shown


def test_a_missing_device_is_an_error_unless_another_machine_is_planned_for(pair, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = [*arguments(pair), "--trainer.accelerator=gpu"]
    main(["plan", *given, "--memory=80GB"])
    shown = capsys.readouterr().out
    assert "note: this machine can't run the training: No supported gpu" in shown and "it fits" in shown
    assert shown.endswith("time: not measured\n")
    with pytest.raises(ShadowlitError, match="as it is configured: 1 error; see above"):
        main(["plan", *given])
    shown = capsys.readouterr().out
    assert "error: this machine can't run the training: " in shown and "e.g. --memory=24GiB" in shown


def test_problems_of_several_sets_are_one_list(pair, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"other": 1}\n')
    given = [f"--data.train={tmp_path / 'bad.jsonl'}", f"--data.validation={{task: {tmp_path / 'none.jsonl'}}}"]
    with pytest.raises(ShadowlitError, match="as it is configured: 3 errors"):
        main(["plan", *arguments(pair), *given, "--measure_steps=0"])
    shown = capsys.readouterr().out
    assert shown.startswith("error: 3 problems with the data:\n  1. sample 0 of ") and shown.count("problems with") == 1
    assert "\n  3. " in shown and shown.count("  1. ") == 1


@pytest.mark.parametrize("given", [
    "--model.anchors={instruct: 0.3, kl: {data: none.jsonl}}",
    "--graft.fit_scales={data: none.jsonl}",
    "--graft.fit_scales={data: rows.jsonl, keep: {data: {path: none.jsonl}}}",
    "--graft.variants={fix: {transforms: [{name: gradfix, data: none.jsonl}]}}",
])  # fmt: skip
def test_rows_of_other_uses_are_read_too(pair, capsys, given):
    with pytest.raises(ShadowlitError, match="as it is configured: 1 error"):
        main(["plan", *arguments(pair), given.replace("rows.jsonl", str(pair / "rows.jsonl")), "--measure_steps=0"])
    assert "none.jsonl does not exist" in capsys.readouterr().out


def test_steps_are_measured_with_the_words_of_the_command_line(pair, capsys):
    main(["plan", *arguments(pair), "--measure_steps", "1", "--memory", "200GB"])
    assert "per epoch without validations, from " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80e9), ("512mib", 512 * 2**20), ("1.5T", 1.5e12), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["", "GiB", "24 apples", "1.2.3G"])
def test_what_is_no_size(text):
    with pytest.raises(ShadowlitError, match="expected a size such as 24GiB"):
        parse_bytes(text)
