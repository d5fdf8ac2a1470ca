"""Settings of the adapter and of the training that can't work: one line of error before the data are read."""

import json
import re

import pytest
import torch
from peft import LoraConfig

from shadowlit.callbacks.graft import GraftCallback
from shadowlit.cli.main import main
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.adapter import adapt_all_linear, adapted_layers
from shadowlit.pair.pair import ModelPair
from shadowlit.training.loading import require_fitting
from shadowlit.training.module import ShadowModule
from shadowlit.training.schedules import make_schedule
from tests.callbacks.test_graft import make_trainer
from tests.synthetic import RandomData
from tests.test_configs import ROOT
from tests.tiny import make_config, save_pair


def error_of(capsys, monkeypatch, tmp_path, *arguments):
    """The one line of error of a fit whose data don't exist, so that it can't be found after they are read."""
    monkeypatch.chdir(ROOT)
    fit = ["fit", "--config", "configs/demo_lora.yaml", "--run.root", str(tmp_path), "--evaluation.evaluators={}"]
    status = main([*fit, "--data.train=missing.jsonl", *arguments])
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    return status, line.removeprefix("error: ")


def adapter(name, **options):
    return {"class_path": f"peft.{name}", "init_args": options}


ADAPTERS = [
    ({"r": 4, "target_modules": ["nope"]}, r"model\.adapter, a LoraConfig, doesn't fit Qwen3ForCausalLM \(No.*'nope'"),
    ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [99]}, r"model\.adapter, a Lora.*\[99\]"),
    ({"r": 0}, r"model\.adapter, a LoraConfig, .*\(ValueError: .*r.* positive .* 0\)\. Correct its options"),
    (adapter("LoHaConfig", r=4, target_modules=["embed_tokens"]), r"model\.adapter, a LoHaConfig, .*Embedding"),
    (adapter("C3AConfig", block_size=7), r"model\.adapter, a C3AConfig, .*block size is 7"),
    ({"r": 4, "trainable_token_indices": [1, 999999]}, r"model\.adapter\.trainable_token_indices has 999999; .* 0 to"),
    ({"r": 4, "modules_to_save": ["lm_head"]}, "the adapter changes the output head, but .* one tensor"),
    ({"r": 4, "modules_to_save": ["nope"]}, r"model\.adapter\.modules_to_save has 'nope', which is not a module"),
    ({"r": 4, "lora_bias": True}, r"adapter\.lora_bias=true adds a bias to"),
    (adapter("OFTConfig", r=8, oft_block_size=32), r"model\.adapter is .*OFTConfig, .*only specify either r \(8\) or"),
]  # fmt: skip
CLASSES = "--model.lr_scheduler=torch.optim.lr_scheduler."
MIN_LR, KWARGS = "--model.lr_scheduler=cosine_with_min_lr", "--model.lr_scheduler_kwargs="
STABLE = "--model.lr_scheduler=warmup_stable_decay"
SETTINGS = [
    ([f"{CLASSES}OneCycleLR", "--model.lr_scheduler.max_lr=0.1"], r"model\.lr_scheduler can't make .*total_steps"),
    ([f"{CLASSES}CosineAnnealingWarmRestarts", "--model.lr_scheduler.T_0=-1"], "model.lr_scheduler can't .* got -1"),
    (["--model.lr_scheduler=cosine_with_restarts", f"{KWARGS}{{num_cycles: two}}"], ".*num_cycles='two'; expected a n"),
    ([MIN_LR, f"{KWARGS}{{min_lr_rate: tenth}}"], r"model\.lr_scheduler_kwargs has min_lr_rate='tenth'; expected a sh"),
    ([MIN_LR, f"{KWARGS}{{min_lr_rate: 5}}"], r"model\.lr_scheduler_kwargs has min_lr_rate=5; expected a share"),
    ([STABLE, f"{KWARGS}{{num_decay_steps: -5}}"], r"model\.lr_scheduler_kwargs has num_decay_steps=-5; expected a"),
    (["--model.loraplus_lr_ratio=-1"], "model.loraplus_lr_ratio is -1; expected a number above 0"),
    (["--model.loraplus_lr_ratio=16", "--model.adapter=null"], "model.loraplus_lr_ratio is 16, but .* is null, which"),
    (["--model.loraplus_lr_ratio=16", "--model.adapter=peft.LoHaConfig"], "model.loraplus_.* is a LoHaConfig, which"),
    (["--model.start_from=shadowlit/demo/pair/instruct"], "model.start_from is .*: it holds the weights of pair.instr"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize(("value", "message"), ADAPTERS, ids=lambda _: "")
def test_an_adapter_that_does_not_fit_the_model(capsys, monkeypatch, tmp_path, value, message):
    status, line = error_of(capsys, monkeypatch, tmp_path, f"--model.adapter={json.dumps(value)}")
    assert status == 2 and re.match(message, line), line


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize(("arguments", "message"), SETTINGS, ids=lambda _: "")
def test_a_setting_that_can_not_work(capsys, monkeypatch, tmp_path, arguments, message):
    status, line = error_of(capsys, monkeypatch, tmp_path, *arguments)
    assert status == 2 and re.match(message, line), line


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_what_fits_gets_as_far_as_the_data(capsys, monkeypatch, tmp_path):
    """The control of the other tests: they would pass too if the data came first and the adapter were never tried."""
    arguments = ['--model.adapter={"r": 4, "modules_to_save": ["norm"], "trainable_token_indices": [999]}']
    status, line = error_of(capsys, monkeypatch, tmp_path, *arguments)
    assert status == 1 and "missing.jsonl does not exist" in line


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_the_instruct_may_start_its_own_training(capsys, monkeypatch, tmp_path):
    """Where the Instruct is trained in the Base's place, nothing is counted twice."""
    instruct = "shadowlit/demo/pair/instruct"
    arguments = [f"--pair.base={instruct}", f"--model.start_from={instruct}", "--model.loraplus_lr_ratio=16"]
    status, line = error_of(capsys, monkeypatch, tmp_path, *arguments)
    assert status == 1 and "missing.jsonl does not exist" in line


@pytest.mark.parametrize("layers", [1, [1]])
def test_chosen_layers_alone_are_adapted(tmp_path, layers):
    """Without targets, too, in a model with fewer linear layers than those from which on peft shortens their names."""
    base, instruct = save_pair(tmp_path, "qwen3")
    module = ShadowModule(ModelPair(str(base), str(instruct)), LoraConfig(r=2, layers_to_transform=layers), lr=1e-2)
    make_trainer(tmp_path, GraftCallback(), max_steps=2).fit(module, RandomData())
    moved = {name for name, p in module.named_parameters() if p.requires_grad and "lora_B" in name and p.any()}
    assert len(moved) == 7 and all(".layers.1." in name for name in moved)
    tuned = adapted_layers(module.model)
    assert len(tuned) == 7 and all(".layers.1." in name for name in tuned)


def test_layers_of_experts_can_not_be_chosen():
    adapter = LoraConfig(r=2, layers_to_transform=[1])
    adapt_all_linear(adapter)
    with pytest.raises(ShadowlitError, match=r"layers_to_transform is \[1\] without target_modules, but .* experts"):
        require_fitting({"config": make_config("qwen3_moe", tied=True), "adapter": adapter})


def test_a_number_in_quotes_is_no_number():
    """A parser reads it as one; in Python it failed after the warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ShadowlitError, match=r"has min_lr_rate='0\.1'; expected a share between 0 and 1"):
        make_schedule(optimizer, "cosine_with_min_lr", {"min_lr_rate": "0.1"}, "cosine", 2, 9)
    make_schedule(optimizer, "cosine_with_min_lr", {"min_lr": None, "min_lr_rate": 0.1}, "cosine", 2, 9)
