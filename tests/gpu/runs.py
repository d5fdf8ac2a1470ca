"""Short trainings on the device, and what they must come to, computed on the CPU in float64."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shadowlit.checkpoint.names import canonical_name
from shadowlit.distributed import local, reshard_all, whole
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from tests.gpu.conftest import ACCELERATOR
from tests.synthetic import RandomData

LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
KINDS = ["full", "lora"]
PRECISIONS = ["32-true", "bf16-mixed"]
SETS = [(8, 1), (4, 2)]  # size and seed of RandomData's validation sets


def files_of(precision):
    """The dtype of the pair's files that goes with a precision."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def make_module(folders, kind, cls=ShadowModule, dropout=0.1, **options):
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout) if kind == "lora" else None
    return cls(ModelPair(*map(str, folders)), adapter, **{"lr": 2e-2 if kind == "lora" else 3e-3, **options})


def make_trainer(tmp_path, *callbacks, strategy="auto", **options):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    seed_everything(0)
    defaults = {
        "max_epochs": 2, "val_check_interval": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0,
        "precision": "32-true", "num_sanity_val_steps": 0, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(
        accelerator=ACCELERATOR, devices=1, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, inference_mode=False, default_root_dir=tmp_path,
        callbacks=list(callbacks), **{**defaults, **options},
    )  # fmt: skip


class End(Callback):
    """What the module was when the training ended: Lightning moves it to the CPU before ``fit`` returns."""

    def on_train_end(self, trainer, module):
        parameters = list(module.model.parameters())
        self.weights = weights(module)
        self.devices = {p.device.type for p in parameters}
        self.dtypes = {p.dtype for p in parameters if p.requires_grad}
        self.sharded = [isinstance(p, DTensor) for p in parameters]
        self.optimizer_state = trainer.optimizers[0].state


@dataclass
class Run:
    """A training that has ended: its module, what it logged, and the trainer."""

    module: ShadowModule
    trainer: Trainer
    end: End
    logged: dict[str, float]


def fit(tmp_path, folders, kind, *callbacks, model=None, **options):
    """Train for eight steps with four validations."""
    module, end = make_module(folders, kind, **(model or {})), End()
    trainer = make_trainer(tmp_path, *callbacks, end, **options)
    trainer.fit(module, RandomData())
    return Run(module, trainer, end, logged(trainer))


def logged(trainer):
    """All numbers that the run logged but for times."""
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "seconds" not in k and "time" not in k}


def weights(module):
    """Every parameter, whole and on the CPU."""
    reshard_all(module.model)
    return {name: whole(local(p), p).cpu().clone() for name, p in module.model.named_parameters()}


def differing(left, right):
    """Names of tensors that aren't equal bit for bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


class Watch(Callback):
    """Listed first: the weights when a validation starts, and the names of those that it changed."""

    def __init__(self):
        self.before, self.changed, self.validations = {}, [], 0

    def on_validation_start(self, trainer, module):
        self.before = weights(module)

    def on_validation_end(self, trainer, module):
        self.validations += 1
        self.changed += differing(self.before, weights(module))


def grafted_model(run, folders, scale=1.0, dtype=torch.float32):
    """The equation in float64 on the CPU, rounded once to ``dtype``: a model of its own with the grafted weights."""
    start, goal = (
        {n: p.detach().double() for n, p in AutoModelForCausalLM.from_pretrained(f).named_parameters()} for f in folders
    )
    tuned = {canonical_name(name): p.double() for name, p in run.end.weights.items()}
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not LINEAR.search(name):
                continue
            if run.module.adapter is None:
                update = tuned[name] - start[name]
            else:
                layer = name.removesuffix(".weight")
                factors = [next(p for n, p in tuned.items() if n.startswith(layer) and f"lora_{x}" in n) for x in "BA"]
                update = run.module.adapter.lora_alpha / run.module.adapter.r * factors[0] @ factors[1]
            parameter.copy_((goal[name] + scale * update).to(dtype).double())
    return model
