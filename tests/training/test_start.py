"""``model.start_from``: training from an adapter or a tuned Base, with the update counted from the pair's Base."""

import csv
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoHaConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.cli.main import main
from shadowlit.data.module import ShadowData
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import DPO, SFT
from tests.callbacks.test_graft import make_trainer, metrics
from tests.cli.test_export import require_equal_export
from tests.distributed import run_ranks
from tests.synthetic import RandomData
from tests.tiny import save_model, save_pair
from tests.training.test_preference_training import write_rows

ROOT = Path(__file__).parents[2]
ADAPTERS = {
    "full": None,
    "lora": LoraConfig(r=4, lora_alpha=6),
    "dora": LoraConfig(r=4, use_dora=True),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
}
PARTS = ["model", "adapter", "delta"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pair, and a tuned Base in bfloat16, all of whose weights have moved."""
    root = tmp_path_factory.mktemp("start")
    save_pair(root, "qwen3", tied=False)
    save_model(root / "tuned", "qwen3", tied=False, seed=2, near=root / "base", dtype=torch.bfloat16)
    write_rows(root)
    return root


def make_module(home, kind, start=None, **options):
    adapter = None if (found := ADAPTERS[kind]) is None else type(found)(**_given(found))
    pair = ModelPair(str(home / "base"), str(home / "instruct"))
    start = None if start is None else str(start)
    return ShadowModule(pair, adapter, lr=1e-2 if adapter else 1e-3, start_from=start, **options)


def _given(config):
    names = ("r", "lora_alpha", "use_dora", "target_modules", "modules_to_save")
    return {name: getattr(config, name) for name in names if getattr(config, name, None)}


def fit(folder, home, kind, start=None, world_size=1, steps=2, **options):
    """Train two steps and leave the checkpoints, the configuration and the export of the command line."""
    graft = {"select": "all", "dtype": "float32"}
    module = make_module(home, kind, start, **options)
    adapter, peft_class = ADAPTERS[kind], type(ADAPTERS[kind]).__name__
    section = adapter and {"class_path": f"peft.{peft_class}", "init_args": _given(adapter)}
    config = {
        "pair": {"base": str(home / "base"), "instruct": str(home / "instruct")}, "graft": graft,
        "export": {"parts": PARTS}, "model": {"adapter": section, "start_from": None if start is None else str(start)},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    saving = ModelCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1)
    callbacks = [GraftCallback(**graft), saving, ExportCallback(parts=PARTS, folder=str(folder / "export"))]
    more = {"strategy": ModelParallelStrategy(world_size, 1)} if world_size > 1 else {}
    trainer = make_trainer(folder, *callbacks, devices=world_size, max_steps=steps, val_check_interval=2, **more)
    trainer.fit(module, RandomData())
    return module, metrics(trainer)


def fit_on_a_rank(*args):
    fit(*args)  # whose results can't be pickled


def validated(folder, home, kind, start, **options):
    trainer = make_trainer(folder, GraftCallback(select="all", dtype="float32"))
    trainer.validate(make_module(home, kind, start, **options), RandomData(), verbose=False)
    return metrics(trainer)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["lora", "full", *(pytest.param(k, marks=SLOW) for k in ("dora", "saved", "loha"))])
def test_a_training_starts_where_an_earlier_one_has_ended(tmp_path, home, kind):
    """From the run's folder and a checkpoint, and from the exported adapter: the same scores, bit for bit."""
    _, found = fit(tmp_path / "run", home, kind)
    sources = [tmp_path / "run", tmp_path / "run/checkpoints/step=2.ckpt"]
    if kind in ("lora", "loha"):
        sources.append(tmp_path / "run/export/adapter")
    for source in sources:
        again = validated(tmp_path, home, kind, source)
        for name in ("val/tuned/loss", "val/grafted/loss", "val/base/loss", "graft/delta_norm"):
            assert again[name] == found[name], (source, name)
        assert again["val/tuned/loss"] != again["val/base/loss"]


def test_an_adapter_saved_by_peft(tmp_path, home):
    """DoRA, whose magnitudes depend on the Base, by peft's own files; its logits by peft itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    model = PeftModel(model, LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    module = make_module(home, "dora", tmp_path / "adapter")
    trainer = make_trainer(tmp_path, GraftCallback())
    trainer.validate(module, RandomData(), verbose=False)
    ids = torch.arange(12)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(batch), model.eval()(**batch).logits)


@pytest.mark.parametrize(("kind", "start"), [("lora", "tuned"), ("full", "tuned"), ("dora", "tuned")])
def test_the_update_is_counted_from_the_base(tmp_path, home, capsys, kind, start):
    """``instruct + (tuned and adapted - base)`` in float64, live and from the checkpoint on disk, byte for byte."""
    module, _ = fit(tmp_path / "run", home, kind, home / start)
    with torch.no_grad():
        module.model.eval()
        adapted = module.model if kind == "full" else module.model.double().merge_and_unload()
    base, instruct = (load_file(home / who / "model.safetensors") for who in ("base", "instruct"))
    exported = load_file(tmp_path / "run/export/model/model.safetensors")
    assert not (tmp_path / "run/export/adapter").exists()
    moved = 0
    for name, weights in adapted.state_dict().items():
        exact = instruct[name].double() + (weights.double() - base[name].double())
        bound = 8 * 2**-24 * max(exact.abs().max(), weights.abs().max().double())
        assert (exported[name].double() - exact).abs().max() <= bound, name
        moved += not torch.equal(exported[name], instruct[name])
    assert moved == len(exported)  # norms and embedding too, in which the adapter has no part
    require_equal_export(tmp_path / "run", capsys)
    names = [str(path) for path in (home / "base", tmp_path / "run", home / "base", tmp_path / "merged")]
    assert main(["graft", *names, "--select", "all", "--dtype", "float32"]) == 0  # as the errors advise
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, weights in adapted.state_dict().items():
        assert (merged[name].double() - weights.double()).abs().max() <= 8 * 2**-24 * weights.abs().max().double()
    if kind != "full":
        assert main(["export", str(tmp_path / "run/checkpoints/step=2.ckpt"), "--parts", "adapter"]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "can't be written. It was trained on the tuned weights of model.start_from, whose own update" in told


@pytest.mark.parametrize(("kind", "start"), [
    ("lora", "tuned"), ("lora", "run"), ("full", "tuned"), pytest.param("dora", "run", marks=SLOW),
    pytest.param("dora", "tuned", marks=SLOW),
])  # fmt: skip
def test_shards_start_there_too(tmp_path, home, capsys, kind, start):
    source = home / start
    if start == "run":
        fit(source := tmp_path / "first", home, kind)
    run_ranks(fit_on_a_rank, 2, tmp_path / "run", home, kind, source, 2)
    fit(tmp_path / "single", home, kind, source)
    require_equal_export(tmp_path / "run", capsys)
    one, two = (load_file(tmp_path / where / "export/model/model.safetensors") for where in ("single", "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-3 if kind == "full" else 1e-4)


def test_a_base_in_4_bits_starts_from_an_adapter(tmp_path, home):
    pytest.importorskip("bitsandbytes")
    save_pair(tmp_path, "qwen3", tied=False, hidden=64)
    _, found = fit(tmp_path / "run", tmp_path, "lora", quantization="nf4")
    again = validated(tmp_path, tmp_path, "lora", tmp_path / "run/export/adapter", quantization="nf4")
    for name in ("val/tuned/loss", "val/grafted/loss", "val/grafted_4bit/loss"):
        assert again[name] == found[name]


def preferences(home, kind, start, steps, folder, objective=None, ckpt=None):
    seed_everything(0)
    module = make_module(home, kind, start, objective=objective or DPO(0.3), warmup_ratio=0)
    data = ShadowData(
        module.pair, train=str(home / "train_pairs.jsonl"), validation=str(home / "val_pairs.jsonl"),
        samples="pairs", batch_size=4, cache=False, max_length=64,
    )  # fmt: skip
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        folder, GraftCallback(select="all", dtype="float32"), saving, losses := Losses(), max_steps=steps, max_epochs=4,
        accumulate_grad_batches=1, val_check_interval=None,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    return losses.losses, module, metrics(trainer)


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize(("kind", "start"), [("lora", "run"), ("lora", "tuned"), ("full", "tuned")])
def test_preferences_are_relative_to_the_start_and_resume_so(tmp_path, home, kind, start):
    source = home / start
    if start == "run":
        fit(source := tmp_path / "first", home, kind)
    losses, module, whole = preferences(home, kind, source, 3, tmp_path / "whole")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in losses[1:])
    _, resumed, again = preferences(home, kind, source, 3, tmp_path / "again", ckpt=tmp_path / "whole/step=1.ckpt")
    for (name, one), (_, two) in zip(module.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert {k: v for k, v in whole.items() if k.startswith("val/")} == {
        k: v for k, v in again.items() if k.startswith("val/")
    }


def test_a_distance_from_the_start(tmp_path, home):
    """The divergence from an adapter's start is zero at the first step, and grows."""
    fit(tmp_path / "first", home, "lora")
    seen = []

    class Kl(Callback):
        def on_train_batch_end(self, trainer, *_):
            if "train/kl" in trainer.callback_metrics:
                seen.append(trainer.callback_metrics["train/kl"].item())

    module = make_module(home, "lora", tmp_path / "first", objective=SFT(kl_weight=0.1), warmup_ratio=0)
    trainer = make_trainer(tmp_path, GraftCallback(), Kl(), max_steps=3, accumulate_grad_batches=1)
    trainer.fit(module, RandomData())
    assert abs(seen[0]) < 1e-9 and all(value > 1e-5 for value in seen[1:])
    with pytest.raises(ShadowlitError, match="would be a third copy of all weights"):
        refused(home, "full", home / "tuned", objective=SFT(kl_weight=0.1))


def refused(home, kind, start, **options):
    """Begin a training on data that are not there: whatever is found before them is raised first."""
    module = make_module(home, kind, start, **options)
    data = ShadowData(module.pair, train=str(home / "missing.jsonl"))
    make_trainer(home, GraftCallback()).fit(module, data)


def test_what_does_not_fit_is_told_before_the_data_are_read(tmp_path, home):
    fit(tmp_path / "run", home, "lora")
    stored = tmp_path / "run/export/adapter"

    def told(kind, start, **options):
        with pytest.raises(ShadowlitError) as error:
            refused(home, kind, start, **options)
        assert "\n" not in str(error.value) and "start_from" in str(error.value)
        return str(error.value)

    assert "is not a folder, and cannot be a hub id" in told("lora", tmp_path / "nothing")
    assert "is null. Set model.adapter to the settings of the stored adapter" in told("full", stored)
    assert "holds a LORA adapter, but model.adapter is LOHA" in told("loha", stored)
    ADAPTERS["other"] = LoraConfig(r=8, lora_alpha=6)
    assert "lora_A is (4, 32), not (8, 32)" in told("other", stored)
    ADAPTERS["other"] = LoraConfig(r=4, lora_alpha=8)
    assert "lora_alpha is 6, not 8" in told("other", stored)
    ADAPTERS["other"] = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    assert "is not trained" in told("other", stored)
    ADAPTERS["other"] = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "lm_head is missing" in told("other", stored)

    shutil.copytree(stored, of_another := tmp_path / "of_another")
    manifest = json.loads((of_another / "shadowlit.json").read_text())
    manifest["base"]["fingerprint"] = "0" * 64
    (of_another / "shadowlit.json").write_text(json.dumps(manifest))
    assert "it was trained on another Base than" in told("lora", of_another)
    shutil.copytree(stored, wider := tmp_path / "wider")
    (wider / "shadowlit.json").unlink()
    tensors = load_file(wider / "adapter_model.safetensors")
    wide = {name: t.repeat(1, 2) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, wider / "adapter_model.safetensors", {"format": "pt"})
    assert "don't fit. Give the Base that the adapter was trained on" in told("lora", wider)

    save_model(tmp_path / "llama", "llama", tied=False)
    assert "llama" in told("lora", tmp_path / "llama")
    save_model(tmp_path / "deep", "qwen3", tied=False, layers=3)
    assert "layer_types is ['full_attention', 'full_attention'] in" in told("lora", tmp_path / "deep")
    save_model(tmp_path / "vocabulary", "qwen3", tied=False, vocab_size=280)
    assert "its vocabulary was resized" in told("lora", tmp_path / "vocabulary")
    assert "is already a graft onto this Instruct" in told("lora", tmp_path / "run/export/model")
    assert "holds whole weights, but with model.quantization" in told("lora", home / "tuned", quantization="nf4")
    (tmp_path / "empty").mkdir()
    assert "empty" in told("lora", tmp_path / "empty")


def test_the_documented_stages(tmp_path, monkeypatch, capsys):
    """The two commands in the documentation, cut short: DPO begins at the reference, which is what SFT has trained."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/reference/preference.md").read_text(encoding="utf-8").partition("## Two stages")[2]
    commands = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1].strip().splitlines()
    short = [
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1", "--evaluation.evaluators={}",
        "--data.cache=false", "--model.warmup_ratio=0", "--export.parts=[adapter]", f"--run.root={tmp_path / 'runs'}",
    ]  # fmt: skip
    for command in commands:
        words = shlex.split(command.replace("runs/", f"{tmp_path}/runs/"))
        assert words[0] == "shadowlit"
        assert main([*words[1:], *short]) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "runs/dpo/metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    sft, dpo = (load_file(tmp_path / f"runs/{run}/export/adapter/adapter_model.safetensors") for run in ("sft", "dpo"))
    name = next(name for name in sft if "lora_B" in name)
    assert 0 < (dpo[name] - sft[name]).norm() < sft[name].norm()  # it continues; B started at 0


def test_other_weights_at_the_start_are_not_resumed(tmp_path, home):
    shutil.copytree(home / "tuned", tmp_path / "tuned")
    fit(tmp_path / "run", home, "lora", tmp_path / "tuned")
    last = tmp_path / "run/checkpoints/step=2.ckpt"
    for start in (None, tmp_path / "tuned"):
        if start:
            tensors = load_file(start / "model.safetensors")
            save_file({n: t * 1.5 for n, t in tensors.items()}, start / "model.safetensors", {"format": "pt"})
        trainer = make_trainer(tmp_path, GraftCallback(), max_steps=3)
        with pytest.raises(ShadowlitError, match=r"written with another start than model\.start_from is now"):
            trainer.fit(make_module(home, "lora", start), RandomData(), ckpt_path=last)
    assert main(["export", str(last), "--parts", "delta"]) == 1
    with pytest.raises(ShadowlitError, match="Merge both: 'shadowlit graft"):
        shutil.copy(home / "tuned/model.safetensors", tmp_path / "tuned")
        refused(home, "lora", tmp_path / "run")
