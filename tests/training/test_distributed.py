"""Real processes: one process, DDP and FSDP2 train the same model, export the same tensors, resume alike."""

import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.errors import ShadowlitError
from shadowlit.graft.checkpoint import CheckpointReader
from shadowlit.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.parallel import local, reshard_all, whole
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair


def make_trainer(strategy, world_size, callbacks, **options):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    return Trainer(
        accelerator="cpu", devices=world_size, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, inference_mode=False, accumulate_grad_batches=2,
        gradient_clip_val=1.0, val_check_interval=4, callbacks=callbacks,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **{"max_epochs": 2, **options},
    )  # fmt: skip


def make_module(folders, kind, **options):
    adapter = LoraConfig(r=4) if kind == "lora" else None
    return ShadowModule(ModelPair(*map(str, folders)), adapter, lr=1e-2 if adapter else 1e-3, **options)


def whole_parameters(module):
    reshard_all(module.model)
    return {name: whole(local(p), p).clone() for name, p in module.model.named_parameters()}


def train(folders, kind, strategy, world_size, out, checkpointing=False):
    """Train and export; return the logged numbers, the weights, and how they were held."""
    seed_everything(0)
    module = make_module(folders, kind, activation_checkpointing=checkpointing)
    graft = GraftCallback(scales=[1.0, 0.5], dtype="float32")
    trainer = make_trainer(strategy, world_size, [graft, ExportCallback(folder=str(out))])
    trainer.fit(module, RandomData())
    sharded = [p for p in module.model.parameters() if isinstance(p, DTensor)]
    return {
        "metrics": {
            k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k
        },
        "weights": whole_parameters(module),
        "frozen_bytes": graft.graft.frozen_bytes,
        "share": sum(local(p).numel() for p in sharded) / max(1, sum(p.numel() for p in sharded)),
        "tied": module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight,
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_are_one(tmp_path, kind, tied):
    """Same losses, weights and exported tensors; every rank holds half of everything under FSDP2."""
    folders = save_pair(tmp_path, "qwen3", tied=tied)
    (one,) = run_ranks(train, 1, folders, kind, "auto", 1, tmp_path / "one")
    exported = CheckpointReader(tmp_path / "one/model")
    for strategy in ("ddp", "fsdp2"):
        ranks = run_ranks(train, 2, folders, kind, strategy, 2, tmp_path / strategy, strategy == "fsdp2")
        assert ranks[0]["metrics"] == ranks[1]["metrics"]
        for rank in ranks:
            assert rank["metrics"].keys() == one["metrics"].keys()
            for name, value in one["metrics"].items():
                assert rank["metrics"][name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
            for name, value in one["weights"].items():
                torch.testing.assert_close(rank["weights"][name], value, rtol=0, atol=5e-6)
            assert rank["tied"] is tied
        for name in exported.tensors:
            other = CheckpointReader(tmp_path / strategy / "model").read(name)
            torch.testing.assert_close(other, exported.read(name), rtol=0, atol=1e-6)
        if strategy == "fsdp2":
            assert [rank["share"] for rank in ranks] == [pytest.approx(0.5, abs=0.02)] * 2
            assert sum(rank["frozen_bytes"] for rank in ranks) == one["frozen_bytes"]
    manifest = json.loads((tmp_path / "fsdp2/model/shadowlit.json").read_text())
    assert manifest["logits_against_validated"]["max_abs"] < 1e-5


def train_and_resume(folders, kind, out, distributed_checkpoint):
    """Weights of three epochs at once, and of the last two after a resume from the first one's checkpoint."""
    ends = []
    for resume in (None, out / "step=4.ckpt"):
        seed_everything(0)
        module = make_module(folders, kind)
        checkpoint = ModelCheckpoint(out, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint
        )
        trainer = make_trainer(strategy, 2, [GraftCallback(), checkpoint], max_epochs=3)
        trainer.fit(module, RandomData(), ckpt_path=resume, weights_only=True)
        ends.append((whole_parameters(module), trainer.callback_metrics["val/grafted/loss"]))
    return *ends, (out / "step=4.ckpt").is_dir()


@pytest.mark.parametrize(("kind", "distributed"), [("full", True), ("full", False), ("lora", True), ("lora", False)])
def test_sharded_checkpoints_resume(tmp_path, kind, distributed):
    folders = save_pair(tmp_path, "qwen3")
    uninterrupted, resumed, is_folder = run_ranks(train_and_resume, 2, folders, kind, tmp_path, distributed)[0]
    assert is_folder is distributed
    assert resumed[1] == uninterrupted[1]
    for name, value in uninterrupted[0].items():
        assert torch.equal(resumed[0][name], value), name


def wrong_mesh(folders):
    module = make_module(folders, "full")
    with pytest.raises(ShadowlitError) as caught:
        make_trainer(ModelParallelStrategy(), 2, [GraftCallback()]).fit(module, RandomData())
    return str(caught.value)


def test_a_strategy_that_shards_nothing_is_refused(tmp_path):
    message = run_ranks(wrong_mesh, 2, save_pair(tmp_path, "qwen3"))[0]
    assert "would split tensors, and shard nothing" in message
    assert "data_parallel_size=2 and tensor_parallel_size=1" in message


def pissa(folders):
    module = ShadowModule(ModelPair(*map(str, folders)), LoraConfig(r=4, init_lora_weights="pissa"))
    with pytest.raises(ShadowlitError) as caught:
        make_trainer("fsdp2", 2, []).fit(module, RandomData())
    return str(caught.value)


def test_an_adapter_that_needs_whole_matrices_is_refused_under_fsdp(tmp_path):
    assert "starts from whole weight matrices" in run_ranks(pissa, 2, save_pair(tmp_path, "qwen3"))[0]
