"""``shadowlit init``: write a configuration for a pair; the docstring is the help."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml

from shadowlit.errors import CheckpointError, PairError, ShadowlitError, counted
from shadowlit.files import replace_text
from shadowlit.pair.folders import local_folder
from shadowlit.pair.registry import find_pair
from shadowlit.progress import make_console

Tuning = Literal["lora", "qlora", "full"]

# Of each kind of tuning: the lines of model, and the arguments of the adapter.
_LORA = (
    "  adapter: {r: 32, lora_alpha: 64, target_modules: all-linear}  # null trains all weights\n"
    "  lr: 2.0e-4  # as in the paper for LoRA"
)
_MODELS = {
    "lora": _LORA,
    "qlora": f"{_LORA}\n  quantization: nf4  # the frozen weights of linear layers are stored in 4 bits",
    "full": "  adapter: null  # all weights are trained, in float32\n  lr: 1.0e-5",
}
_TITLES = {"lora": "LoRA", "qlora": "QLoRA", "full": "Full tuning"}
_EFFECTIVE = 32  # conversations per optimizer step


def init(
    pair: str | None = None,
    base: str | None = None,
    instruct: str | None = None,
    out: str = "run.yaml",
    tuning: Tuning = "lora",
    train: str | None = None,
    devices: int = 1,
    memory: str | None = None,
    max_length: int = 2048,
    overwrite: bool = False,
) -> None:
    """Write a commented configuration of 'fit' for a pair.

    The batch size is the largest that the estimate of 'plan' allows, up to 32 conversations per optimizer step. If
    one conversation is too large, the configuration offloads, recomputes or shards. For models on the hub only configs,
    tokenizers and headers are downloaded. If a model can't be read, e.g. without a network, the batch size is 1, and
    'plan' estimates it later.

    Args:
        pair: Name of a known pair, see 'pairs'.
        base: Folder or hub id of the Base, instead of a known pair.
        instruct: Folder or hub id of the Instruct, instead of a known pair.
        out: File to write.
        tuning: lora trains an adapter, qlora trains one on 4-bit weights, full trains all weights.
        train: File or data set to train on; can be set later, in the file.
        devices: Number of GPUs, or of processes on a CPU.
        memory: Memory of one GPU, e.g. 24GiB; null for that of this machine's GPU. With neither, the configuration is
            for the CPU.
        max_length: Maximum length of a conversation, in tokens.
        overwrite: Replace the file if it exists.
    """
    target = Path(out)
    if target.is_dir() or (target.exists() and not overwrite):
        remedy = "Name a file" if target.is_dir() else "Add --overwrite to replace it, or name another file"
        raise ShadowlitError(f"out is {out!r}, which exists. {remedy} with --out.")
    if devices < 1:
        raise ShadowlitError(f"devices is {devices}; expected at least 1.")
    if (pair is None) != (base is not None and instruct is not None) or (pair and (base or instruct)):
        raise ShadowlitError(
            "Give the name of a known pair ('shadowlit pairs' lists them), or both --base and --instruct."
        )
    if pair is not None:
        known = find_pair(pair)
        keys = {name: getattr(known, name) for name in ("base", "instruct", "base_revision", "instruct_revision")}
    else:
        keys = {"base": base, "instruct": instruct}
        for who, source in keys.items():
            local_folder(who, str(source), f"--{who}")
    pinned = {name: value for name, value in keys.items() if value is not None}
    text = Template(files("shadowlit.planning").joinpath("template.yaml").read_text(encoding="utf-8"))
    values = _planned(pinned, tuning, devices, memory, max_length) | {
        "title": f"{_TITLES[tuning]} on {keys['base']}, grafted onto {keys['instruct']}.",
        "file": out, "model": _MODELS[tuning], "train": _scalar(train), "max_length": max_length,
        "pair": "\n".join(f"  {line}" for line in yaml.safe_dump(pinned, sort_keys=False).splitlines()),
        "devices": devices,
    }  # fmt: skip
    replace_text(target, text.substitute(values))
    console = make_console()
    rows = counted(values["batch_size"], "conversation")
    how = f"without an estimate of the memory: {values['unread']}" if values["unread"] else values["reason"]
    console.print(f"{out}: {rows} of {max_length:,} tokens per micro-batch, {how}")
    console.print(f"Next: {'' if train else 'set data.train, then '}shadowlit plan --config {out}", style="dim")


def _scalar(text: str | None) -> str:
    """A text as YAML writes it, with quotes if it needs them."""
    return yaml.safe_dump(text, width=math.inf, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _planned(pair: dict[str, Any], tuning: str, devices: int, memory: str | None, max_length: int) -> dict[str, Any]:
    """Values of the template that depend on the memory."""
    # Imported late: a wrong argument needs none of the seconds that torch takes.
    import torch
    from peft import LoraConfig

    from shadowlit.callbacks.export import ExportCallback
    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.data.module import ShadowData
    from shadowlit.pair.folders import ProblemError
    from shadowlit.pair.pair import ModelPair
    from shadowlit.planning.plan import Plan, parse_bytes
    from shadowlit.text import size
    from shadowlit.training.module import ShadowModule

    on_gpu = memory is not None or torch.cuda.is_available()
    models = ModelPair(**pair)
    keys = yaml.safe_load(_MODELS[tuning])
    adapter = LoraConfig(**keys["adapter"]) if keys["adapter"] else None
    rows = 2 ** int(math.log2(max(1, _EFFECTIVE // devices)))
    data = ShadowData(models, max_length=max_length, batch_size=rows, packing="padding_free")
    options = {
        "accelerator": "gpu" if on_gpu else "cpu", "devices": devices, "num_nodes": 1, "strategy": "auto",
        "precision": "bf16-mixed" if on_gpu else "32-true", "accumulate_grad_batches": 1,
    }  # fmt: skip
    module = ShadowModule(models, adapter, quantization=keys.get("quantization"))
    plan = Plan(module, data, GraftCallback(), ExportCallback(), options)
    unread = ""
    try:
        plan.read_headers()
        limit = parse_bytes(memory) if memory else plan.limit() or math.inf
        found = [plan.memory(), *(memory for _, memory in plan.remedies(limit, devices))][-1]
        if plan.graft.offload:  # the first remedy; a later one may have made it superfluous, and it takes time
            plan.graft.offload = False
            whole = plan.memory()
            plan.graft.offload = not plan.fits(whole, limit)
            found = found if plan.graft.offload else whole
        reason = f"estimated to need {size(plan.peak(found))} of {size(limit)}"
        if not plan.fits(found, limit):
            reason = f"{reason}, which is too little: use more or larger devices"
    except (PairError, CheckpointError) as error:
        unread = error.problem.found if isinstance(error, ProblemError) else str(error)
        data.batch_size, reason = 1, "not estimated; 'shadowlit plan' estimates what it needs"
    sharded = (
        "\n    class_path: lightning.pytorch.strategies.ModelParallelStrategy  # FSDP2"
        f"\n    init_args: {{data_parallel_size: {devices}, tensor_parallel_size: 1}}"
    )
    accumulate = max(1, _EFFECTIVE // (data.batch_size * devices))
    return {
        "batch_size": data.batch_size, "reason": reason, "unread": unread, "accumulate": accumulate,
        "effective": data.batch_size * devices * accumulate, "offload": str(plan.graft.offload).lower(),
        "checkpointing": plan.module.activation_checkpointing or "false", "accelerator": options["accelerator"],
        "precision": options["precision"], "strategy": sharded if plan.trainer["sharing"] == "fsdp" else "auto",
    }  # fmt: skip
