"""A transformed graft in training: what is validated is what is exported, in one process and in two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.alignment import AlignedReader
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.delta.delta import Delta
from shadowlit.delta.transforms import Transforms
from shadowlit.distributed import local, local_slices
from shadowlit.errors import GraftError
from shadowlit.grafting.live import LiveGraft
from shadowlit.grafting.manifest import read_manifest
from shadowlit.grafting.subject import Subject
from shadowlit.lightning_cli import main
from shadowlit.training.loading import load_for_training
from shadowlit.training.parallel import parallelize
from tests.callbacks.test_graft import assert_same, fit, metrics, score_by_hand, weights
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_pair
from tests.training import test_distributed as distributed

ROOT = Path(__file__).parents[2]
DARE = [{"name": "dare", "density": 0.5, "seed": 1}]
TWO = [{"name": "svd", "rank": 2, "explained_variance": None}, {"name": "ties", "density": 0.5}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3")


@pytest.mark.parametrize(("kind", "transforms"), [("full", DARE), ("lora", DARE), ("lora", TWO)])
def test_the_exported_model_is_the_validated_one(tmp_path, folders, kind, transforms):
    export = ExportCallback(folder=str(tmp_path / "x"), parts=["model", "adapter", "delta"])
    callback = GraftCallback(transforms=transforms, scales=[1.0, 0.5])
    module, trainer = fit(tmp_path, folders, kind, [callback, export])
    logged = metrics(trainer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    assert logged["val/grafted/loss"] == pytest.approx(score_by_hand(model, [(8, 1), (4, 2)]), rel=1e-5)
    manifest = read_manifest(tmp_path / "x/model")
    assert manifest["transforms"] == transforms
    assert manifest["logits_against_validated"]["max_abs"] == 0
    assert manifest["survival"]["delta_norm"] == pytest.approx(logged["graft/delta_norm"], rel=1e-6)
    with callback.grafted(module):
        exported = CheckpointReader(tmp_path / "x/model")
        for name, parameter in module.model.named_parameters():
            stored = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert stored not in exported.tensors or torch.equal(parameter, exported.read(stored)), name
    # The delta is what the Instruct got, and the factors of an adapter are not.
    delta, instruct = Delta.open(tmp_path / "x/delta"), CheckpointReader(folders[1])
    for name in delta.shapes:
        gained = exported.read(name).double() - instruct.read(name).double()
        torch.testing.assert_close(delta.tensor(name).double(), gained, rtol=2**-8, atol=1e-7)
    zeros = sum(tensor.num_zeros for tensor in delta.statistics())
    assert delta.manifest["transforms"] == transforms and zeros > 0.45 * delta.num_elements
    assert not (tmp_path / "x/adapter").exists()
    # Nothing of this reaches the training.
    plain, other = fit(tmp_path, folders, kind, [GraftCallback(scales=[1.0, 0.5])])
    assert_same(weights(module), weights(plain))
    for name, value in metrics(other).items():
        same = name.startswith(("val/tuned", "val/base", "val/instruct"))
        assert not same or logged[name] == value, name
    assert logged["val/grafted/loss"] != metrics(other)["val/grafted/loss"]


def test_checkpoints_hold_the_trained_weights(tmp_path, folders):
    """Also under an adapter, whose frozen weights are overwritten."""
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    module, _ = fit(tmp_path, folders, "lora", [GraftCallback(transforms=DARE), saved])
    plain, _ = fit(tmp_path, folders, "lora", [GraftCallback()])
    assert_same(weights(module), weights(plain))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    own = {f"model.{name}": p for name, p in weights(plain).items()}
    assert state.keys() <= own.keys() and all(torch.equal(state[name], own[name]) for name in state)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"name": "darre", "density": 0.5}], r"graft\.transforms\[0\]\.name is 'darre'; .* Did you mean 'dare'"),
        ([*DARE, {"name": "svd"}], r"graft\.transforms\[1\], svd: rank is None and explained_variance is None"),
    ],
)
def test_errors_come_with_the_constructor(transforms, message):
    with pytest.raises(GraftError, match=message):
        GraftCallback(transforms=transforms)


# --- the command line ---


def config(root, transforms):
    pair, data = ROOT / "shadowlit/demo/pair", ROOT / "shadowlit/demo/data"
    settings = {
        "run": {"root": str(root)},
        "pair": {"base": str(pair / "base"), "instruct": str(pair / "instruct")},
        "model": {"adapter": {"r": 4, "target_modules": "all-linear"}, "lr": 1e-3},
        "data": {
            "train": str(data / "train.jsonl"), "validation": {"new": str(data / "new.jsonl")}, "max_length": 128,
            "ignore_columns": ["skill", "answer"],
            "batch_size": 4, "eval_batch_size": 4,
        },
        "graft": {"transforms": transforms, "baselines": False},
        "export": {"folder": str(root / "export")},
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2,
            "enable_progress_bar": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(root / "run.yaml")]


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_a_function_of_another_package_in_a_configuration(tmp_path, monkeypatch):
    """Its elements are all of one size, so that the exported model differs from the Instruct by that."""
    source = "def sign_only(update, *, size: float):\n    return size * update.sign()\n"
    (tmp_path / "configured_transforms.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_num_threads(1)
    main(config(tmp_path, [{"name": "configured_transforms.sign_only", "size": 0.03125}]))
    exported = CheckpointReader(tmp_path / "export/model")
    instruct = CheckpointReader(ROOT / "shadowlit/demo/pair/instruct")
    name = next(name for name in instruct.tensors if "up_proj" in name)
    gained = exported.read(name).float() - instruct.read(name).float()
    assert gained.abs().median().item() == pytest.approx(0.03125, rel=2**-6)
    manifest = read_manifest(tmp_path / "export/model")
    assert manifest["transforms"] == [{"name": "configured_transforms.sign_only", "size": 0.03125}]
    assert manifest["config"]["graft"]["transforms"] == manifest["transforms"]


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_a_mistake_in_a_configuration_ends_before_anything_is_loaded(tmp_path):
    args = config(tmp_path, [])
    with pytest.raises(GraftError, match=r"graft\.transforms\[0\]\.densty is given, but 'dare' has no such parameter"):
        main([*args, '--graft.transforms=[{"name": "dare", "densty": 0.2}]'])


# --- several processes ---


def sharded_graft(folders, kind, world_size):
    """The exported tensors of a graft of a fixed update with dare; of two ranks each holds half of every parameter."""
    mesh = None
    if world_size > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data_parallel",))
    adapter = LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None
    reader = AlignedReader.open(folders[0], folders[0])
    model = load_for_training(
        reader, AutoConfig.from_pretrained(folders[0]), adapter=adapter, device=torch.device("cpu"), mesh=mesh,
        parallelize=lambda model: parallelize(model, mesh),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                local(parameter).add_(noise[local_slices(parameter)])
    before = [local(p).clone() for p in model.parameters()]
    readers = AlignedReader.open(*folders), CheckpointReader(folders[1])
    graft = LiveGraft(model, *readers, transforms=Transforms(DARE))
    with graft.applied(Subject("grafted", 0.5)):
        applied = [local(p).clone() for p in model.parameters()]
    restored = all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))
    changed = sum(not torch.equal(a, b) for a, b in zip(before, applied, strict=True))
    if world_size > 1:
        with pytest.raises(GraftError, match=r"transforms of whole tensors \(svd\), but FSDP2 shards"):
            LiveGraft(model, *readers, transforms=Transforms(TWO[:1]))
    return dict(graft.grafted_tensors(0.5)), restored, changed


@pytest.mark.parametrize(("arch", "kind"), [("qwen3", "full"), ("qwen3", "lora"), ("qwen3_moe", "full")])
def test_shards_get_the_bits_that_the_whole_gets(tmp_path, arch, kind):
    """Of a mixture the ranks hold other experts, which are single matrices in the files."""
    folders = save_pair(tmp_path, arch, tied=False)
    ((one, restored, _),) = run_ranks(sharded_graft, 1, folders, kind, 1)
    assert restored
    instruct = CheckpointReader(folders[1])
    assert sum(not torch.equal(tensor, instruct.read(name)) for name, tensor in one.items()) >= 14
    for two, restored, changed in run_ranks(sharded_graft, 2, folders, kind, 2):
        assert restored and changed >= 12
        assert two.keys() == one.keys()
        if kind == "full":
            assert [name for name in one if not torch.equal(one[name], two[name])] == []
        for name, tensor in one.items():  # under an adapter the product of the factors is summed in another order
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


def train(folders, strategy, world_size, out, transforms):
    """Train a few steps with a transform, and export; the logged numbers, or the error."""
    module = distributed.make_module(folders, "full")
    export = ExportCallback(parts=["model"], folder=str(out))
    trainer = distributed.make_trainer(
        strategy, world_size, [GraftCallback(transforms=transforms, dtype="float32"), export], max_epochs=1
    )
    try:
        trainer.fit(module, RandomData())
    except GraftError as error:
        return str(error), module.model is None
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}


def test_two_processes_are_one(tmp_path, folders):
    (one,) = run_ranks(train, 1, folders, "auto", 1, tmp_path / "one", DARE)
    for rank in run_ranks(train, 2, folders, "fsdp2", 2, tmp_path / "two", DARE):
        assert rank == pytest.approx(one, **distributed.SAME)
    manifest = read_manifest(tmp_path / "two/model")
    assert manifest["logits_against_validated"]["max_abs"] == 0 and manifest["transforms"] == DARE
    message, before_loading = run_ranks(train, 2, folders, "fsdp2", 2, tmp_path / "three", [*DARE, *TWO])[0]
    assert message.startswith(
        "graft.transforms has transforms of whole tensors (svd, ties), but FSDP2 shards the tensors"
    )
    assert "Use elementwise transforms (dare)" in message and before_loading
