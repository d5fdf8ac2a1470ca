"""Real processes: one process, DDP and FSDP2 train the same model, export the same tensors, resume alike."""

import errno
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.data.module import ShadowData
from shadowlit.delta.delta import Delta
from shadowlit.distributed import local, local_slices, reshard_all, whole
from shadowlit.errors import CheckpointError, DataError, ShadowlitError
from shadowlit.grafting.scales import Keep
from shadowlit.pair.pair import ModelPair
from shadowlit.training import checkpoints
from shadowlit.training.anchors import Anchors
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import SFT
from tests.distributed import Forked, run_command, run_ranks, shadowlit
from tests.rounding import Start, require_same_update
from tests.synthetic import RandomData, StreamedData
from tests.tiny import make_tokenizer, save_pair

ROOT = Path(__file__).parents[2]
PAD = make_tokenizer().pad_token_id


def make_trainer(strategy, world_size, callbacks, **options):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    return Trainer(
        accelerator="cpu", devices=world_size, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, inference_mode=False, gradient_clip_val=1.0,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{
            "max_epochs": 2, "val_check_interval": 4, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2,
            **options,
        },
    )  # fmt: skip


def make_module(folders, kind, **options):
    adapters = {
        "lora": {},
        "qlora": {},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "dropout": {"lora_dropout": 0.5},
        "attention": {"target_modules": ["q_proj", "v_proj"]},
        "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
    }
    adapter = LoraConfig(r=4, **adapters[kind]) if kind in adapters else None
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        options["quantization"] = "nf4"
    return ShadowModule(ModelPair(*map(str, folders)), adapter, lr=1e-2 if adapter else 1e-3, **options)


def whole_parameters(module):
    reshard_all(module.model)
    return {name: whole(local(p), p).clone() for name, p in module.model.named_parameters()}


# Of two trainings that add the same numbers in another order. graft/gain is a difference of two losses of about 5.6.
SAME = {"rel": 2e-4, "abs": 1e-5 * 5.6}


def tensors(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name).float() for name in reader.tensors}


def train(folders, kind, strategy, world_size, out, checkpointing=False):
    """Train and export; return the logged numbers, the weights, and how they were held."""
    seed_everything(0)
    module = make_module(folders, kind, activation_checkpointing=checkpointing)
    graft, start = GraftCallback(scales=[1.0, 0.5], dtype="float32"), Start()
    export = ExportCallback(parts=["model", "delta"], folder=str(out))
    trainer = make_trainer(strategy, world_size, [start, graft, export])
    trainer.fit(module, RandomData(8))
    sharded = [p for p in module.model.parameters() if isinstance(p, DTensor)]
    return {
        "metrics": {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k},
        "weights": whole_parameters(module),
        "frozen_bytes": graft.build(module).frozen_bytes,
        "start": start.weights,
        "share": sum(local(p).numel() for p in sharded) / max(1, sum(p.numel() for p in sharded)),
        "tied": module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight,
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("tied", "kind"), [
    (True, "lora"), (False, "full"), pytest.param(True, "full", marks=SLOW), pytest.param(False, "lora", marks=SLOW),
    (False, "qlora"), (False, "dora"), pytest.param(False, "pissa", marks=SLOW),
])  # fmt: skip
def test_two_processes_are_one(tmp_path, kind, tied):
    """Same losses, weights and exported tensors; every rank holds half of everything under FSDP2."""
    folders = save_pair(tmp_path, "qwen3", tied=tied)
    (one,) = run_ranks(train, 1, folders, kind, "auto", 1, tmp_path / "one")
    exported = tensors(tmp_path / "one/model")
    for strategy in ("ddp", "fsdp2"):
        ranks = run_ranks(train, 2, folders, kind, strategy, 2, tmp_path / strategy, strategy == "fsdp2")
        assert ranks[0]["metrics"] == ranks[1]["metrics"]
        for rank in ranks:
            assert rank["metrics"].keys() == one["metrics"].keys()
            for name, value in one["metrics"].items():
                assert rank["metrics"][name] == pytest.approx(value, **SAME), name
            require_same_update(rank["weights"], one["weights"], one["start"])
            assert rank["tied"] is tied
        require_same_update(tensors(tmp_path / strategy / "model"), exported, tensors(folders[1]))
        assert Delta.open(tmp_path / strategy / "delta").cosine(Delta.open(tmp_path / "one/delta")) > 0.9999
        if strategy == "fsdp2":
            assert [rank["share"] for rank in ranks] == [pytest.approx(0.5, abs=0.02)] * 2
            assert sum(rank["frozen_bytes"] for rank in ranks) == one["frozen_bytes"]
    manifest = json.loads((tmp_path / "fsdp2/model/shadowlit.json").read_text())
    assert manifest["logits_against_validated"]["max_abs"] == 0


@pytest.mark.parametrize(
    "arch", ["gemma3_text", *(pytest.param(name, marks=SLOW) for name in ("llama", "qwen2", "mistral"))]
)
def test_the_other_architectures_shard_too(tmp_path, arch):
    folders = save_pair(tmp_path, arch)
    (one,) = run_ranks(train, 1, folders, "lora", "auto", 1, tmp_path / "one")
    for rank in run_ranks(train, 2, folders, "lora", "fsdp2", 2, tmp_path / "two"):
        assert rank["metrics"] == pytest.approx(one["metrics"], **SAME)
        assert rank["share"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", [pytest.param("full", marks=SLOW), "experts", pytest.param("attention", marks=SLOW)])
def test_a_mixture_of_experts_on_two_processes_is_one(tmp_path, kind):
    """The ranks hold other experts; what they train, log and export is the same, routing included."""
    folders = save_pair(tmp_path, "qwen3_moe", tied=False, distance=0.3)
    (one,) = run_ranks(train, 1, folders, kind, "auto", 1, tmp_path / "one")
    ranks = run_ranks(train, 2, folders, kind, "fsdp2", 2, tmp_path / "two", True)
    exported, other, instruct = map(tensors, (tmp_path / "one/model", tmp_path / "two/model", folders[1]))
    for rank in ranks:
        assert rank["metrics"].keys() == one["metrics"].keys()
        assert 0.2 < rank["metrics"]["val/grafted/routing_agreement"] < 1
        for name, value in one["metrics"].items():
            # Where two experts are as good as equal, another order of the same sums may choose the other one.
            exact = SAME if "routing" not in name else {"abs": 5e-3}
            assert rank["metrics"][name] == pytest.approx(value, **exact), name
        require_same_update(rank["weights"], one["weights"], one["start"])
    assert [rank["share"] for rank in ranks] == [pytest.approx(0.5, abs=0.02)] * 2
    assert sum(rank["frozen_bytes"] for rank in ranks) == one["frozen_bytes"]
    require_same_update(other, exported, instruct)
    assert any(".experts.3." in name for name in exported)
    assert Delta.open(tmp_path / "two/delta").cosine(Delta.open(tmp_path / "one/delta")) > 0.9999
    manifest = json.loads((tmp_path / "two/model/shadowlit.json").read_text())
    assert manifest["logits_against_validated"]["max_abs"] == 0


def reductions(folders, kind, strategy, when):
    """How often the ranks added gradients in two steps of two micro-batches, and the weights before and then."""
    seed_everything(0)
    module = make_module(folders, kind, reduce_gradients=when)
    trainer = make_trainer(strategy, 2, [], max_steps=2, limit_val_batches=0)
    with patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as counted:
        trainer.fit(module, RandomData(8))
    start = dict(AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).named_parameters())
    return counted.call_count, whole_parameters(module), start


def test_gradients_are_added_once_per_step_where_that_is_wanted(tmp_path):
    """Three units of which two learn under an adapter; two steps of two micro-batches each."""
    folders = save_pair(tmp_path, "qwen3")
    runs = {
        (kind, when): run_ranks(reductions, 2, folders, kind, "fsdp2", when)[0]
        for kind, when in (("full", "auto"), ("full", "step"), ("lora", "auto"))
    }
    sums = {run: count for run, (count, *_) in runs.items()}
    assert sums == {("full", "auto"): 12, ("full", "step"): 6, ("lora", "auto"): 4}
    require_same_update(runs["full", "step"][1], *runs["full", "auto"][1:])


def updates_of_an_adapter(folders):
    """For each adapted weight whether this rank's part of the update is its rows of the whole product."""
    seed_everything(0)
    module = ShadowModule(ModelPair(*map(str, folders)), LoraConfig(r=16), lr=1e-2)
    graft = GraftCallback()
    make_trainer("fsdp2", 2, [graft], max_steps=2).fit(module, RandomData(8))
    found = {}
    live = graft.build(module)
    for host in live._hosts:
        if host.adapted is None:
            continue
        layer, name = host.adapted.layer, host.adapted.adapter
        factors = (layer.lora_B[name].weight, layer.lora_A[name].weight)
        up, down = (whole(local(p), p) for p in factors)
        rows = local_slices(host.parameter)[0]
        part = live._update(host)
        expected = host.adapted.scaling * (up @ down)[rows]
        found[host.name] = part.shape == expected.shape and torch.allclose(part, expected, atol=1e-7)
    return found


def test_the_update_of_a_sharded_adapter_lies_as_its_host(tmp_path):
    """At sizes at which DTensor multiplies the factors otherwise than by rows."""
    folders = save_pair(tmp_path, "qwen3", hidden=512, layers=1)
    for found in run_ranks(updates_of_an_adapter, 2, folders):
        assert len(found) == 7
        assert [name for name, right in found.items() if not right] == []


def train_on_two_anchors(folders, kind, strategy, world_size, when="auto"):
    """Weights of two epochs of steps of four micro-batches, two of them on the Instruct, and the last losses."""
    seed_everything(0)
    module, start = make_module(folders, kind, anchors=Anchors(0.6), reduce_gradients=when), Start()
    options = {"accumulate_grad_batches": 4, "val_check_interval": 8, "limit_val_batches": 1}
    trainer = make_trainer(strategy, world_size, [start, GraftCallback()], **options)
    trainer.fit(module, RandomData(16))
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}
    return whole_parameters(module), metrics, start.weights


@pytest.mark.parametrize("kind", [pytest.param("full", marks=SLOW), "lora"])
def test_two_anchors_on_two_processes_are_those_on_one(tmp_path, kind):
    """The ranks' counts differ, and each part of a step is divided by that of all of them."""
    folders = save_pair(tmp_path, "qwen3", distance=0.5)
    ((expected, losses, start),) = run_ranks(train_on_two_anchors, 1, folders, kind, "auto", 1)
    assert abs(losses["train/loss_base"] - losses["train/loss_instruct"]) > 1e-3
    for strategy, when in (("ddp", "auto"), ("fsdp2", "micro_batch"), ("fsdp2", "step")):
        for weights, metrics, _ in run_ranks(train_on_two_anchors, 2, folders, kind, strategy, 2, when):
            require_same_update(weights, expected, start)
            assert metrics == pytest.approx(losses, **SAME)


def train_at_the_ends(folders, strategy, world_size):
    """Factors trained on the Base, with a weight of 0 and without anchors, and on the Instruct, with 1 and without."""
    direct, found = (folders[1], folders[1]), []
    for pair, anchors in (
        (folders, Anchors(0.0)), (folders, None), (folders, Anchors(1.0)), (direct, None),
    ):  # fmt: skip
        seed_everything(0)
        module = make_module(pair, "lora", anchors=anchors)
        trainer = make_trainer(strategy, world_size, [GraftCallback()] if pair == folders else [])
        trainer.fit(module, RandomData(8))
        found.append({name: value for name, value in whole_parameters(module).items() if "lora_" in name})
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_either_end_of_two_anchors_is_the_training_of_one_model_bit_for_bit(tmp_path, strategy):
    folders = save_pair(tmp_path, "qwen3", distance=0.5)
    for of_base, plain, of_instruct, direct in run_ranks(train_at_the_ends, 2, folders, strategy, 2):
        assert len(plain) > 10 and any(not torch.equal(value, direct[name]) for name, value in plain.items())
        assert [name for name, value in plain.items() if not torch.equal(value, of_base[name])] == []
        assert [name for name, value in direct.items() if not torch.equal(value, of_instruct[name])] == []


class Seen(Callback):
    """Writes down what a training takes: the batches of this rank and the learning rates; and what it ends with."""

    def on_fit_start(self, trainer, module):
        self.batches, self.rates = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch["input_ids"].tolist())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_fit_end(self, trainer, module):
        reshard_all(module.model)
        names = {id(p): name for name, p in module.model.named_parameters()}
        self.weights = whole_parameters(module)
        self.moments = {
            f"{names[id(p)]} {key}": (whole(local(value), value) if isinstance(value, DTensor) else value).clone()
            for p, state in trainer.optimizers[0].state.items()
            for key, value in state.items()
        }


def write_rows(folder):
    """13 rows of unequal lengths, which don't divide by the batches."""
    rows = ({"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab" * (i % 5 + 1)}]}
            for i in range(13))  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit_rows(folders, kind, out, strategy, world_size, ckpt_path=None, callbacks=(), model=None, **options):
    """Train on shuffled rows; 4 batches of an epoch are two steps. Return what was seen, and the trainer."""
    seed_everything(0)
    module = make_module(folders, kind, **(model or {}))
    data = {name: options.pop(name) for name in ("streaming", "stream_window", "seed", "batch_size") if name in options}
    rows = str(out / "rows.jsonl")
    files = ShadowData(
        module.pair, train=rows, validation=rows, max_length=64, **{"batch_size": 4 // world_size, **data}
    )
    seen = Seen()
    options = {"max_epochs": 2, "val_check_interval": None, **options}
    trainer = make_trainer(strategy, world_size, [seen, *callbacks], **options)
    trainer.fit(module, files, ckpt_path=ckpt_path)
    kept = ("batches", "rates", "weights", "moments")  # Lightning leaves its own in callbacks
    return SimpleNamespace(**{name: getattr(seen, name) for name in kept}), trainer


def require_rest(resumed, uninterrupted, steps):
    """A run that was resumed has seen the batches and rates that were left, and ends with the same numbers."""
    assert resumed.rates == uninterrupted.rates[steps:]
    assert resumed.batches == uninterrupted.batches[2 * steps :]
    for what in ("weights", "moments"):
        found, expected = getattr(resumed, what), getattr(uninterrupted, what)
        assert found.keys() == expected.keys()
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def train_and_resume(folders, kind, out, distributed, from_one):
    """Resume in the middle and at the end of an epoch, and a stream; load what one process has saved."""

    def strategy():
        return ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
        )

    def saver(folder):
        return ModelCheckpoint(out / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    graft = GraftCallback()
    whole_run, trainer = fit_rows(folders, kind, out, strategy(), 2, callbacks=[graft, saver("two")])
    gain = trainer.callback_metrics["val/grafted/loss"]
    assert len(whole_run.batches) == 8 and trainer.global_step == 4
    assert whole_run.batches[:4] != whole_run.batches[4:]  # another order in each epoch
    offload = {"offload_optimizer": kind == "full"}  # changes nothing: from a checkpoint of one without
    for step, options in ((1, {"callbacks": [GraftCallback()], "model": offload}), (2, {"limit_val_batches": 0})):
        resumed, trainer = fit_rows(folders, kind, out, strategy(), 2, out / f"two/step={step}.ckpt", **options)
        require_rest(resumed, whole_run, step)
        assert step == 2 or trainer.callback_metrics["val/grafted/loss"] == gain
    loaded = fit_rows(folders, kind, out, strategy(), 2, from_one, max_steps=1, limit_val_batches=0)[0]
    stream = {"streaming": True, "stream_window": 5, "max_epochs": -1, "max_steps": 4, "limit_val_batches": 0}
    other = kind if kind == "full" else "dropout"
    whole_stream = fit_rows(folders, other, out, strategy(), 2, callbacks=[saver("stream")], **stream)[0]
    require_rest(fit_rows(folders, other, out, strategy(), 2, out / "stream/step=2.ckpt", **stream)[0], whole_stream, 2)
    if kind != "full":
        return whole_run, loaded

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = out / "two/step=1.ckpt"
    before = [(file, file.stat().st_mtime_ns) for file in (path, *path.rglob("*"))]
    what, rank = ("checksums", 1) if distributed else ("write_file", 0)
    on_one = full if dist.get_rank() == rank else getattr(checkpoints, what)
    message = r"step=1.ckpt can't be written \(No space left on device\). Earlier"
    with patch.object(checkpoints, what, on_one), pytest.raises(CheckpointError, match=message):
        trainer.save_checkpoint(path)
    assert before == [(file, file.stat().st_mtime_ns) for file in (path, *path.rglob("*"))]
    with pytest.raises(DataError, match=r"after 2 batches of an epoch.*: seed 0 → 1. Resume"):
        fit_rows(folders, kind, out, strategy(), 2, path, seed=1)
    return whole_run, loaded


@pytest.mark.parametrize(("kind", "distributed"), [
    ("full", True), ("lora", False),
    pytest.param("full", False, marks=SLOW), pytest.param("lora", True, marks=SLOW),
    pytest.param("qlora", True, marks=SLOW), pytest.param("dora", True, marks=SLOW),
])  # fmt: skip
def test_sharded_checkpoints_resume(tmp_path, kind, distributed):
    """With real data, exactly; and between one process and two, each tensor by its name, at the same sample."""
    folders = save_pair(tmp_path, "qwen3")
    write_rows(tmp_path)
    saver = ModelCheckpoint(tmp_path / "one", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    one, _ = fit_rows(folders, kind, tmp_path, "auto", 1, callbacks=[saver], limit_val_batches=0)
    at = fit_rows(folders, kind, tmp_path, "auto", 1, tmp_path / "one/step=1.ckpt", max_steps=1)[0]
    ranks = run_ranks(train_and_resume, 2, folders, kind, tmp_path, distributed, tmp_path / "one/step=1.ckpt")
    for _, loaded in ranks:
        require_rest(loaded, at, 1)
    folder = tmp_path / "two/step=1.ckpt"
    assert folder.is_dir() is distributed and sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        f"step={step}.ckpt" for step in range(1, 5)
    ]
    alone, _ = fit_rows(folders, kind, tmp_path, "auto", 1, folder, limit_val_batches=0)
    together = [[*left, *right] for left, right in zip(*(seen.batches[2:] for seen, _ in ranks), strict=True)]
    assert list(map(samples, alone.batches)) == list(map(samples, together))
    start = load_file(folders[0] / "model.safetensors")
    require_same_update(
        alone.weights, ranks[0][0].weights, {name: start.get(name, p * 0) for name, p in one.weights.items()}
    )
    with pytest.raises(DataError, match=r"after 2 batches of an epoch.*global_batch_size 4 → 2\. Resume"):
        fit_rows(folders, kind, tmp_path, "auto", 1, folder, batch_size=2)


def train_on_two_anchors_and_resume(folders, kind, out):
    """With the divergence term, whose rows pass in an order of their own."""
    strategy = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    saver = ModelCheckpoint(out / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    anchors = {"anchors": Anchors(0.5, kl=Keep(str(out / "neutral.jsonl"), 0.5))}
    uninterrupted = fit_rows(folders, kind, out, strategy(), 2, callbacks=[GraftCallback(), saver], model=anchors)[0]
    path = out / "saved/step=1.ckpt"
    return uninterrupted, fit_rows(folders, kind, out, strategy(), 2, path, [GraftCallback()], model=anchors)[0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_anchors_resume_on_two_processes(tmp_path, kind):
    """In the middle of an epoch, bit for bit."""
    folders = save_pair(tmp_path, "qwen3", distance=0.5)
    write_rows(tmp_path)
    (tmp_path / "neutral.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("q", "n"))
    for uninterrupted, resumed in run_ranks(train_on_two_anchors_and_resume, 2, folders, kind, tmp_path):
        assert len(uninterrupted.rates) == 4
        require_rest(resumed, uninterrupted, 1)


def samples(batch):
    """The rows of a batch without padding and fillers, in some fixed order."""
    return sorted(filter(None, ([token for token in row if token != PAD] for row in batch)))


def train_on_files(folders, data, strategy, world_size):
    """Train on real files whose rows don't divide by the ranks; return what was logged and how much was scored."""
    seed_everything(0)
    module = make_module(folders, "full")
    files = ShadowData(
        module.pair, train=str(data / "train.jsonl"), validation={n: str(data / f"{n}.jsonl") for n in ("one", "five")},
        max_length=64, batch_size=4 // world_size, eval_batch_size=4 // world_size,
    )  # fmt: skip
    trainer = make_trainer(strategy, world_size, [GraftCallback()], val_check_interval=None)
    trainer.fit(module, files)
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_unequal_shards_neither_hang_nor_count_twice(tmp_path, strategy):
    """Hazard 11: 7 training rows and validation sets of 1 and 5 rows on two ranks are those of one."""
    for name, count in (("train", 7), ("one", 1), ("five", 5)):
        rows = (
            {"messages": [{"role": "user", "content": f"{name}{i}"}, {"role": "assistant", "content": "ab" * (i + 1)}]}
            for i in range(count)
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = save_pair(tmp_path, "qwen3")
    (one,) = run_ranks(train_on_files, 1, folders, tmp_path, "auto", 1)
    for rank in run_ranks(train_on_files, 2, folders, tmp_path, strategy, 2):
        assert rank == pytest.approx(one, **SAME)


class ForkedRank(Forked):
    """The rank that Lightning's launcher starts, forked in place of the fresh interpreter that it asks for."""

    def __init__(self, command, env, cwd):
        assert command[:3] == [sys.executable, "-m", "shadowlit.__main__"] and cwd is None
        super().__init__(shadowlit, *command[3:], out=Path(env["RANK_OUT"]), env=env)

    @property
    def returncode(self):
        return self.poll()


def fit_with_forked_ranks(*args):
    subprocess_script.subprocess = SimpleNamespace(Popen=ForkedRank)
    return shadowlit(*args)


@pytest.mark.parametrize(
    "launcher", ["forked", pytest.param("lightning", marks=SLOW), pytest.param("torchrun", marks=SLOW)]
)
def test_the_fsdp_configuration_under_both_launchers(tmp_path, launcher):
    args = [
        "fit", "--config", "configs/demo_fsdp.yaml", "--trainer.max_steps=2", "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false",
        "--data.limit_train_samples=64", f"--run.root={tmp_path}",
        *(f"--evaluation.evaluators.{name}.init_args.limit=2"
          for name in ("new", "old", "format", "refusal", "forgetting")),
    ]  # fmt: skip
    if launcher == "forked":
        env = {"RANK_OUT": str(tmp_path / "rank.txt")}
        finished = run_command(tmp_path, *args, function=fit_with_forked_ranks, env=env)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *(torchrun if launcher == "torchrun" else []), "-m", "shadowlit", *args]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    (manifest,) = tmp_path.glob("*/version_0/export/model/shadowlit.json")
    found = json.loads(manifest.read_text())
    assert found["logits_against_validated"]["max_abs"] == 0
    assert (
        found["config"]["model"]["lr"] == yaml.safe_load((ROOT / "configs/demo_fsdp.yaml").read_text())["model"]["lr"]
    )
    assert {"val/tuned/loss", "val/grafted/loss", "graft/gain"} <= found["metrics"].keys()
    assert not (manifest.parents[1] / "adapter").exists()  # every weight is trained


def train_in_slurm(folders, out):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    result = train(folders, "lora", "fsdp2", 2, out)
    assert SLURMEnvironment.detect()
    return result["metrics"]


def test_tasks_of_a_slurm_job_are_ranks(tmp_path):
    """Simulated by SLURM's variables: Lightning takes ranks and address from them."""
    folders = save_pair(tmp_path, "qwen3")
    slurm = run_ranks(train_in_slurm, 2, folders, tmp_path / "slurm", slurm=True)
    torchrun = run_ranks(train, 2, folders, "lora", "fsdp2", 2, tmp_path / "torchrun")
    assert slurm[0] == slurm[1] == torchrun[0]["metrics"]


class Spoiled(SFT):
    """A loss that is not finite on rank 1 alone, in the third micro-batch."""

    def step(self, outputs):
        self.calls = getattr(self, "calls", 0) + 1
        sums = dict(super().step(outputs))
        return {**sums, "loss": sums["loss"] * math.nan} if self.calls == 3 and dist.get_rank() == 1 else sums


def fail(folders, path):
    """The errors of a loss that is not finite, and of a checkpoint that rank 0 can't write."""
    errors = []
    trainer = make_trainer("ddp", 2, [], max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(folders, "lora"), RandomData(8))
    with patch.object(torch, "save", side_effect=RuntimeError("unexpected pos")) as save:
        save.side_effect.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of torch's archive
        try:
            trainer.save_checkpoint(path)
        except ShadowlitError as error:
            errors.append(str(error))
    try:
        make_trainer("ddp", 2, []).fit(make_module(folders, "lora", objective=Spoiled()), RandomData(8))
    except ShadowlitError as error:
        errors.append(str(error))
    return errors


def test_all_ranks_stop_at_an_error_of_one(tmp_path):
    (full, one), other = run_ranks(fail, 2, save_pair(tmp_path, "qwen3"), tmp_path / "a.ckpt")
    assert other == [full, one] and not list(tmp_path.glob("a.ckpt*"))
    assert "a.ckpt can't be written (No space left on device). Earlier" in full
    assert "the training loss is nan at step 2" in one and "at step 1. Lower" in one


def wrong_mesh(folders):
    module = make_module(folders, "full")
    with pytest.raises(ShadowlitError) as caught:
        make_trainer(ModelParallelStrategy(), 2, [GraftCallback()]).fit(module, RandomData(8))
    return str(caught.value)


def test_a_strategy_that_shards_nothing_is_refused(tmp_path):
    message = run_ranks(wrong_mesh, 2, save_pair(tmp_path, "qwen3"))[0]
    assert "would split tensors, and shard nothing" in message
    assert "data_parallel_size=2 and tensor_parallel_size=1" in message


def streamed(folders):
    module = make_module(folders, "lora", schedule="constant", warmup_ratio=0)
    message = r"after 6 micro-batches.*Set trainer.limit_train_batches=6"
    for epochs in (1, 2):
        trainer = make_trainer(
            "fsdp2", 2, [GraftCallback()], limit_val_batches=0, val_check_interval=1.0, limit_train_batches=8,
            accumulate_grad_batches=4, max_epochs=epochs,
        )  # fmt: skip
        if epochs == 1:
            trainer.fit(module, StreamedData(6, 1))
            assert trainer.global_step == 1
        else:
            with pytest.raises(ShadowlitError, match=message):
                trainer.fit(module, StreamedData(6, 1))


def test_a_step_that_fsdp2_holds_ends_the_training(tmp_path):
    """Its gradients lie in buffers of FSDP2, which would add them to those of the next epoch's first step."""
    run_ranks(streamed, 2, save_pair(tmp_path, "qwen3"))
