"""Vision-language models end to end: trained with images, grafted, exported, reloaded with the Instruct's processor."""

import json

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from shadowlit.analysis.similarity import compare, in_one_layout, open_reader
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.checkpoint.names import tower_of
from shadowlit.cli.graft import graft as graft_on_disk
from shadowlit.data.module import ShadowData
from shadowlit.distributed import local, reshard_all, whole
from shadowlit.errors import GraftError, ShadowlitError
from shadowlit.grafting.manifest import read_manifest
from shadowlit.pair.pair import ModelPair
from shadowlit.training.head import HeadLoss
from shadowlit.training.module import ShadowModule
from tests.distributed import run_ranks
from tests.rounding import Start, require_same_update
from tests.tiny import store_head
from tests.vision.tiny import FAMILIES, make_config, make_processor, rename_tensors, save_pair, write_rows


def run(folders, root, kind="full", callbacks=(), strategy="auto", world_size=1, precision="32-true", **options):
    """Train on 8 rows for two epochs; return the module and the trainer."""
    seed_everything(0)
    adapter = LoraConfig(r=4) if kind == "lora" else None
    pair = ModelPair(*map(str, folders))
    module = ShadowModule(pair, adapter, lr=1e-2 if adapter else 2e-3, **options)
    data = ShadowData(
        pair,
        train=str(root / "train.jsonl"),
        validation=str(root / "val.jsonl"),
        batch_size=4 // world_size,
        cache=False,
    )
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=strategy, max_epochs=2, logger=False, precision=precision,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, inference_mode=False,
        use_distributed_sampler=False, default_root_dir=root, callbacks=list(callbacks), num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module, trainer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    write_rows(root, 8)
    write_rows(root, 6, "val", seed=1)
    return root


def answered_loss(folder, file):
    """Mean loss of the answers of a folder's model, by its own processor, row by row, with nothing of the package's."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = ModelPair(str(folder), str(folder)).processor()
    loss, tokens = 0.0, 0
    for line in file.read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        images = [Image.open(file.parent / part["path"]) for part in question["content"] if part["type"] == "image"]
        text = processor.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        inputs = processor(
            images=[images] if images else None, text=[f"{text}{answer['content']}<|im_end|>"], return_tensors="pt"
        )
        told = processor.tokenizer(f"{answer['content']}<|im_end|>", return_tensors="pt")["input_ids"][0]
        with torch.no_grad():
            log_probs = model(**inputs, use_cache=False).logits[0, -len(told) - 1 : -1].double().log_softmax(-1)
        loss -= log_probs.gather(1, told[:, None]).sum().item()
        tokens += len(told)
    return loss / tokens


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, "full") for f in FAMILIES), *((f, "lora") for f in ("qwen3_vl", "gemma3", "llava"))]
)
def test_the_export_is_the_validated_graft(tmp_path, rows, family, kind):
    folders = save_pair(tmp_path, family, tied=family != "llava")
    export = ExportCallback(folder=str(tmp_path / "export"), parts=["model", "adapter"])
    module, trainer = run(folders, rows, kind, [GraftCallback(), export])
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    model = tmp_path / "export/model"
    base, instruct, grafted = (load_file(f / "model.safetensors") for f in (*folders, model))
    assert grafted.keys() == instruct.keys()
    moved = [name for name in instruct if not torch.equal(grafted[name], instruct[name])]
    assert {tower_of(name) for name in moved} == {"language"}
    assert len(moved) == (20 if family == "qwen2_5_vl" and kind == "full" else 14)  # Qwen2 has biases

    # The exported model is what was validated, and so is the untouched Instruct.
    assert answered_loss(model, rows / "val.jsonl") == pytest.approx(logged["val/grafted/loss"], abs=1e-5)
    assert answered_loss(folders[1], rows / "val.jsonl") == pytest.approx(logged["val/instruct/loss"], abs=1e-5)
    assert abs(logged["val/grafted/loss"] - logged["val/instruct/loss"]) > 1e-2
    assert read_manifest(model)["logits_against_validated"]["max_abs"] == 0
    kept = {path.name: path.read_bytes() for path in folders[1].iterdir() if path.suffix != ".safetensors"}
    assert {name: (model / name).read_bytes() for name in kept} == kept

    trained = {name.removeprefix("base_model.model."): p for name, p in module.model.named_parameters()}
    for name, parameter in trained.items():
        assert parameter.requires_grad == (tower_of(name) == "language" and (kind == "full" or "lora_" in name)), name
    if kind == "full":  # the update of the tuned Base, by the names of the files
        module.model.save_pretrained(tmp_path / "tuned")
        tuned = load_file(tmp_path / "tuned/model.safetensors")
        for name in instruct:
            if tower_of(name) != "language":
                assert torch.equal(tuned[name], base[name])
            if name in moved:
                expected = instruct[name].double() + (tuned[name].double() - base[name].double())
                torch.testing.assert_close(grafted[name].double(), expected, rtol=0, atol=1e-6)
        tuned_folder = tmp_path / "tuned"
    else:
        tuned_folder = tmp_path / "export/adapter"  # sits on the Instruct: the same update

    # The graft on disk is the live one, bit for bit.
    graft_on_disk(str(folders[0]), str(tuned_folder), str(folders[1]), str(tmp_path / "disk"))
    on_disk = load_file(tmp_path / "disk/model.safetensors")
    for name in instruct:
        torch.testing.assert_close(on_disk[name], grafted[name], rtol=0, atol=0 if kind == "full" else 1e-7)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_heads_are_tied_as_transformers_ties_them(tmp_path, family):
    folders = save_pair(tmp_path, family)
    store_head(folders[1], own=True)
    loaded = [AutoModelForImageTextToText.from_pretrained(folder) for folder in folders]
    shared = [model.lm_head.weight is model.get_input_embeddings().weight for model in loaded]
    pair = ModelPair(*map(str, folders))
    assert list(pair.ties()) == shared == [True, False]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_other_names_in_the_files_train_and_graft_alike(tmp_path, rows, family):
    new = save_pair(tmp_path / "new", family)
    old = save_pair(tmp_path / "old", family)
    rename_tensors(old[1])
    names = [set(load_file(f / "model.safetensors")) for f in (new[1], old[1])]
    assert names[0] != names[1]
    results = {}
    for kind, folders in (("new", new), ("mixed", old)):  # an Instruct with names that its Base doesn't have
        export = ExportCallback(folder=str(tmp_path / kind / "export"), parts=["model"])
        module, trainer = run(folders, rows, callbacks=[GraftCallback(), export])
        results[kind] = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    assert results["new"] == results["mixed"]
    model = tmp_path / "mixed/export/model"
    assert set(load_file(model / "model.safetensors")) == names[1]
    assert answered_loss(model, rows / "val.jsonl") == pytest.approx(results["new"]["val/grafted/loss"], abs=1e-5)
    # On disk too, from a Base and a tuned model with other names than the Instruct's.
    module.model.save_pretrained(tmp_path / "tuned")
    graft_on_disk(str(old[0]), str(tmp_path / "tuned"), str(old[1]), str(tmp_path / "disk"))
    on_disk, live = (load_file(f / "model.safetensors") for f in (tmp_path / "disk", model))
    assert [name for name in live if not torch.equal(on_disk[name], live[name])] == []
    readers = [open_reader(folder)[0] for folder in old]
    (similarity,) = compare(in_one_layout(readers)).similarities
    assert len(similarity.tensors) == len(names[1])


def test_towers_learn_and_are_grafted_as_chosen(tmp_path, rows):
    folders = save_pair(tmp_path, "llava")
    for towers, select, expected in (
        (["language", "projector"], ["language", "projector", "linear"], {"language", "projector"}),
        (["projector"], "projector", {"projector"}),
        (["vision", "projector"], ["vision", "linear"], {"vision"}),
        ([r"vision_tower\.encoder\.layers\.0\."], "all", {"vision"}),
    ):
        export = ExportCallback(folder=str(tmp_path / "-".join(expected) / select[0]), parts=["model"])
        callback = GraftCallback(select=select)
        module, _ = run(folders, rows, callbacks=[callback, export], train_towers=towers)
        learning = {name for name, p in module.model.named_parameters() if p.requires_grad}
        if towers[0].startswith("vision_tower"):
            assert len(learning) == 16 and all(".layers.0." in name for name in learning)
        else:
            assert {tower_of(name) for name in learning} == set(towers)
        grafted, instruct = (load_file(f / "model.safetensors") for f in (export.exported, folders[1]))
        assert {tower_of(n) for n in instruct if not torch.equal(grafted[n], instruct[n])} == expected
        for tower in expected:
            assert f"{tower} " in str(callback.build(module).coverage)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_sits_on_the_chosen_towers_only(tmp_path, rows, targets):
    folders = save_pair(tmp_path, "gemma3")
    for towers in (["language"], ["language", "vision"]):
        seed_everything(0)
        module = ShadowModule(
            ModelPair(*map(str, folders)), LoraConfig(r=2, target_modules=targets), train_towers=towers
        )
        Trainer(accelerator="cpu", logger=False, barebones=True).strategy.connect(module)
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.configure_model()
        adapted = {tower_of(name) for name, p in module.model.named_parameters() if p.requires_grad}
        assert adapted == set(towers)


def test_frozen_towers_have_no_masters(tmp_path, rows):
    folders = save_pair(tmp_path, "qwen2_5_vl", dtype=torch.bfloat16)
    graft = GraftCallback()
    module, trainer = run(folders, rows, callbacks=[graft], precision="bf16-mixed")
    for name, parameter in module.model.named_parameters():
        assert parameter.dtype == (torch.float32 if tower_of(name) == "language" else torch.bfloat16), name
        assert (parameter.grad is None) or tower_of(name) == "language"
    numbers = {tower: [p.numel() for n, p in module.model.named_parameters() if (tower_of(n) == "language") == tower]
               for tower in (True, False)}  # fmt: skip
    # Base and Instruct in half precision for what learns; the Instruct alone for what is frozen.
    assert graft.build(module).frozen_bytes == 4 * sum(numbers[True]) + 2 * sum(numbers[False])
    assert trainer.callback_metrics["val/grafted/loss"].isfinite()


def train_sharded(folders, root, strategy, world_size, kind, towers):
    start = Start()
    module, trainer = run(
        folders, root, kind, [start, GraftCallback(select="all" if kind == "full" else "linear")], strategy, world_size,
        train_towers=towers, activation_checkpointing=strategy == "fsdp2",
    )  # fmt: skip
    reshard_all(module.model)
    weights = {name: whole(local(p), p).clone() for name, p in module.model.named_parameters()}
    metrics = {n: v.item() for n, v in trainer.callback_metrics.items() if "second" not in n and "time" not in n}
    return weights, metrics, start.weights


@pytest.mark.parametrize(("kind", "towers"), [
    ("full", ["language", "vision", "projector"]), ("lora", ["language"]),
    pytest.param("full", ["language"], marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_are_one(tmp_path, kind, towers):
    """Also where one of them gets a batch without any image."""
    folders = save_pair(tmp_path, "qwen2_5_vl")
    write_rows(tmp_path, 8, text_every=2)
    write_rows(tmp_path, 6, "val", seed=1)
    ((one, metrics, start),) = run_ranks(train_sharded, 1, folders, tmp_path, "auto", 1, kind, towers)
    ranks = run_ranks(train_sharded, 2, folders, tmp_path, "fsdp2", 2, kind, towers)
    for rank, (weights, found, _) in enumerate(ranks):
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (rank, name)
        require_same_update(weights, one, start)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_past_the_logits_are_those_of_the_logits(tmp_path, rows, family):
    torch.manual_seed(0)
    folders = save_pair(tmp_path, family)
    data = ShadowData(ModelPair(*map(str, folders)), train=str(rows / "train.jsonl"), batch_size=8, cache=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    labels = batch.pop("labels")
    positions = (labels[:, 1:] != -100).nonzero()
    positions = positions[:, 0] * labels.shape[1] + positions[:, 1]
    targets = labels.flatten()[positions + 1]
    model = AutoModelForImageTextToText.from_pretrained(folders[0])
    ways = [HeadLoss(model, way) for way in ("auto", "logits")]
    assert ways[0].way == "chunked"
    losses = [way.loss(batch, positions, targets) for way in ways]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in losses]
    for left, right in zip(*gradients, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_chosen_is_said(tmp_path, rows):
    folders = save_pair(tmp_path, "llava")
    with pytest.raises(ShadowlitError, match=r"train_towers has 'tongue', which matches none of .* language \(\d+\)"):
        run(folders, rows, train_towers=["tongue"])
    with pytest.raises(ShadowlitError, match=r"'\(', which is not a regular expression"):
        run(folders, rows, train_towers=["("])
    with pytest.raises(ShadowlitError, match="train_towers is empty"):
        run(folders, rows, train_towers=[])
    with pytest.raises(ShadowlitError, match=r"'varlen', which is causal .* Use sdpa"):
        run(folders, rows, attn_implementation="varlen")
    with pytest.raises(GraftError, match="0 of 4 tensors"):
        run(folders, rows, callbacks=[GraftCallback(select=["projector", "self_attn"])])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_the_grafted_model_answers_about_images(tmp_path, rows, family):
    """``predict`` gives what the Instruct's model generates by its own processor, prompt by prompt."""
    folders = save_pair(tmp_path, family)
    pair = ModelPair(*map(str, folders))
    data = ShadowData(pair, predict=str(rows / "val.jsonl"), batch_size=3, cache=False)
    module = ShadowModule(pair, max_new_tokens=8)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, enable_checkpointing=False, callbacks=[GraftCallback()],
    )  # fmt: skip
    answers = [answer["answer"] for batch in trainer.predict(module, data) for answer in batch]
    model, processor = AutoModelForImageTextToText.from_pretrained(folders[1]), pair.processor()  # nothing was learned
    for line, answer in zip((rows / "val.jsonl").read_text().splitlines(), answers, strict=True):
        question = json.loads(line)["messages"][0]
        images = [Image.open(rows / part["path"]) for part in question["content"] if part["type"] == "image"]
        text = processor.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        inputs = processor(images=[images] if images else None, text=[text], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(generated, skip_special_tokens=True)


def test_the_tiny_models_are_of_their_families():
    for family in FAMILIES:
        assert make_config(family, make_processor(family)).model_type == family
