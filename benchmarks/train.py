"""Training beside what a user would take instead: a plain PyTorch loop, TRL's SFTTrainer, LLaMA-Factory.

    python benchmarks/train.py --profile cpu-vocab [--repetitions 5] [--kinds full lora] [--only NAME ...]
                               [--python trl=ENV/bin/python llamafactory=ENV/bin/python] [--out FOLDER]
                               [--deadline SECONDS] [--fork]
    python benchmarks/train.py --curve [--repetitions 3] [--out FOLDER]

Every contestant trains in a process of its own, in turns, on one folder of random weights and one file of
conversations whose lengths are log-normal, half of each tokens of the assistant, which alone carry loss; with AdamW at
a constant rate, the gradient clipped to 1, the same start of the LoRA factors, float32 masters, and the same number of
samples in a step (tokens, where rows are packed). The first steps are not counted. Tokens are those of the
conversations, padding left out. Memory is the peak of what the allocator gave out on a GPU, and the peak of resident
memory of the process elsewhere. Where a contestant trains on the samples in the file's order, its losses are compared
with the plain loop's, step by step.

Profiles: ``cpu-vocab`` (19.6M parameters, 19.4M of them a tied head of a vocabulary of 151,936), ``cpu-100m``,
``gpu-0.6b`` and ``gpu-8b`` (shapes of Qwen3, bfloat16 files, computed in bfloat16), ``smoke``. The Instruct of
``gpu-8b`` is a link to its Base: the graft moves the same bytes. The contestants named graft measure a validation
with and without the graft, and its swaps.

TRL and LLaMA-Factory want an environment of their own where their needs differ: ``--python trl=ENV/bin/python``. A
contestant whose package is missing is left out. LLaMA-Factory pads to a multiple of 8, and recomputes activations by
default, which is switched off where the others keep them. ``--curve`` trains models of four sizes on samples of four
lengths, at 2,048 tokens a step: what grows with what. ``--fork`` forks the processes from a server that has imported
everything, which saves a GPU's time; the resident memory of such processes says nothing. Full tuning of 8B takes 16
bytes a parameter for weights, gradients and AdamW alone, 131 GB: not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant")
CHAT_OVERHEAD = 6  # tokens of the template around the words of a question and its answer
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by the vendor's datasheets
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
RATES = {"full": 1e-5, "lora": 1e-4}


@dataclass(frozen=True)
class Profile:
    """A model, data and a length of training.

    Attributes:
        shape: arguments of the Qwen3 configuration.
        accelerator: cpu or gpu.
        batch: samples of an optimizer step.
        micro: samples of a forward pass.
        median: of the log-normal lengths, in tokens.
        longest: where longer ones are cut off, in tokens.
        sigma: of the logarithms.
        pack: tokens of a packed row.
        warmup: optimizer steps that are not counted.
        steps: optimizer steps that are.
        checkpointing: recompute activations, in every contestant.
        kinds: full, lora or both.
        contestants: by default, in the order of their turns; ``name:kind`` for one kind only.
        linked: the Instruct is a link to the Base.
    """

    shape: dict[str, Any]
    contestants: tuple[str, ...]
    accelerator: str = "cpu"
    batch: int = 8
    micro: int = 8
    median: int = 180
    longest: int = 1024
    sigma: float = 0.7
    pack: int = 1024
    warmup: int = 2
    steps: int = 6
    checkpointing: bool = False
    kinds: tuple[str, ...] = ("full", "lora")
    linked: bool = False

    @property
    def precision(self) -> str:
        """Lightning's name of the arithmetic."""
        return "bf16-mixed" if self.accelerator == "gpu" else "32-true"

    @property
    def rows(self) -> int:
        """Packed rows that hold about as many tokens as a step of samples."""
        mean = min(self.longest, self.median * 2.718281828 ** (self.sigma**2 / 2))
        return max(1, round(self.batch * mean / self.pack))


def qwen3(hidden: int, ff: int, layers: int, heads: int, kv: int, head: int, vocab: int, tied: bool) -> dict[str, Any]:
    """Arguments of a Qwen3 configuration."""
    return {
        "hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096, "rope_theta": 1e6,
    }  # fmt: skip


PEERS = ("loop", "trl", "trl-free", "trl-packed", "llamafactory", "llamafactory-packed")
OTHERS = ("trl", "llamafactory")  # packages of their own
PROFILES = {
    "smoke": Profile(
        qwen3(32, 64, 2, 4, 2, 8, 512, True),
        (*PEERS, "shadowlit", "shadowlit-free", "shadowlit-free-varlen", "shadowlit-packed-varlen", "graft",
         "shadowlit-logits:full", "shadowlit-free-compiled:full"),
        batch=4, micro=2, median=24, longest=64, pack=64, warmup=1, steps=2, linked=True,
    ),
    "cpu-vocab": Profile(
        qwen3(128, 384, 1, 4, 2, 32, 151936, True),
        (*PEERS, "shadowlit-logits", "shadowlit", "shadowlit-free", "shadowlit-free-varlen", "shadowlit-packed-varlen",
         "graft"),
        warmup=1, steps=2,
    ),
    "cpu-100m": Profile(
        qwen3(768, 2304, 12, 12, 4, 64, 32768, True),
        (*PEERS, "shadowlit-logits", "shadowlit", "shadowlit-free", "shadowlit-free-varlen", "shadowlit-packed-varlen",
         "graft"),
        warmup=1, steps=2,
    ),
    "gpu-0.6b": Profile(
        qwen3(1024, 3072, 28, 16, 8, 128, 151936, True),
        ("loop", "trl-free", "shadowlit-free-varlen", "trl-packed", "shadowlit-packed-varlen", "graft",
         "shadowlit-free-varlen-compiled", "shadowlit-free:full", "shadowlit:full", "shadowlit-logits:full", "trl:full",
         "trl-free-flex:full", "shadowlit-free-flex:full"),
        accelerator="gpu", batch=32, micro=16, median=350, longest=2048, sigma=0.8, pack=2048, warmup=3, steps=12,
    ),
    "gpu-8b": Profile(
        qwen3(4096, 12288, 36, 32, 8, 128, 151936, False),
        ("shadowlit-free-varlen", "trl-free", "graft", "loop", "shadowlit-packed-varlen", "trl-packed"),
        accelerator="gpu", batch=16, micro=8, median=350, longest=2048, sigma=0.8, pack=2048, warmup=2, steps=6,
        checkpointing=True, kinds=("lora",), linked=True,
    ),
}  # fmt: skip

CURVE_TOKENS = 2048
CURVE_SIZES = {"s": (192, 576, 4), "m": (320, 960, 6), "l": (512, 1536, 8), "xl": (768, 2304, 12)}  # width, MLP, layers
CURVE_LENGTHS = (128, 256, 512, 1024)
PROFILES |= {
    f"curve-{name}-{length}": Profile(
        qwen3(hidden, ff, layers, hidden // 64, hidden // 64, 64, 8192, True), ("shadowlit-free-varlen", "graft"),
        batch=CURVE_TOKENS // length, micro=CURVE_TOKENS // length, median=length, longest=length, sigma=0.0,
        warmup=1, steps=2, kinds=("full",),
    )
    for name, (hidden, ff, layers) in CURVE_SIZES.items() for length in CURVE_LENGTHS
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one process does: a contestant's training, or ``make``, which writes the folder."""

    contestant: str
    profile: str
    kind: str
    root: str
    out: str
    threads: int
    steps: int | None = None

    def run(self) -> None:
        """Do it, and leave the figures in ``out``, or what went wrong."""
        try:
            figures = WORKERS[self.contestant.split("-")[0]](self, PROFILES[self.profile])
        except BaseException:
            figures = {"error": traceback.format_exc()}
        Path(self.out).write_text(json.dumps(figures))

    @property
    def ways(self) -> frozenset[str]:
        """The switches in a contestant's name: free, packed, varlen, flex, logits, compiled."""
        return frozenset(self.contestant.split("-")[1:])

    @property
    def pair(self) -> tuple[str, str]:
        """Folders of Base and Instruct."""
        return f"{self.root}/base", f"{self.root}/instruct"

    def data(self, name: str) -> str:
        """Path of the conversations ``train`` or ``validation``."""
        return f"{self.root}/{name}.jsonl"

    @property
    def last(self) -> int:
        """Optimizer steps of the training."""
        profile = PROFILES[self.profile]
        return profile.warmup + (self.steps or profile.steps)


# --- the folder ------------------------------------------------------------------------------------------------------


def make(work: Work, profile: Profile) -> dict[str, Any]:
    """Write Base, Instruct and conversations; return the model's counts."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    root, start = Path(work.root), time.perf_counter()
    on_gpu = profile.accelerator == "gpu"
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    config = AutoConfig.for_model("qwen3", **profile.shape, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = dict(model.named_parameters())
    tokenizer = make_tokenizer(profile.shape["vocab_size"])
    generator = torch.Generator(device).manual_seed(0)
    for folder in ("base", "instruct"):
        (root / folder).mkdir(parents=True)
        config.save_pretrained(root / folder)
        tokenizer.save_pretrained(root / folder)
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in names.items():
        if sum(t.nbytes for t in shards[-1].values()) > 4e9:
            shards.append({})
        tensor = torch.ones(parameter.shape, device=device)
        if parameter.dim() > 1:
            tensor.normal_(std=0.02, generator=generator)
        shards[-1][name] = tensor.to(dtype).cpu()
        del tensor
    index = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(tensors, root / "base" / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        if profile.linked:
            os.link(root / "base" / file, root / "instruct" / file)
            continue
        noise = {name: (t.to(device).float() * (1 + 0.01 * torch.randn(t.shape, device=device, generator=generator)))
                 for name, t in tensors.items()}  # fmt: skip
        save_file({n: t.to(dtype).cpu() for n, t in noise.items()}, root / "instruct" / file, metadata={"format": "pt"})
    if len(shards) > 1:
        for folder in ("base", "instruct"):
            table = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())}, "weight_map": index}
            (root / folder / "model.safetensors.index.json").write_text(json.dumps(table))

    random = np.random.default_rng(0)
    lengths = write_data(Path(work.data("train")), profile, random, int(1.5 * profile.batch * (work.last + 1)))
    write_data(Path(work.data("validation")), profile, random, 4 * profile.batch)
    in_layers = sum(p.numel() for n, p in names.items() if p.dim() > 1 and "embed" not in n and "lm_head" not in n)
    return {
        "parameters": sum(p.numel() for p in names.values()),
        "matrices": in_layers + profile.shape["vocab_size"] * profile.shape["hidden_size"],
        "mean_length": float(lengths.mean()),
        "mean_context": float((lengths.astype(float) ** 2).sum() / lengths.sum()),
        "bytes": sum(f.stat().st_size for f in root.glob("base/*.safetensors")),
        "make_s": time.perf_counter() - start,
    }


def make_tokenizer(vocabulary: int) -> Any:
    """One token a word, ``w6`` to the vocabulary's end; the chat template of the tests."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import CHATML

    words = {word: i for i, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token=PAD, unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    return tokenizer


def write_data(path: Path, profile: Profile, random: Any, count: int) -> Any:
    """Write ``count`` conversations of random words; return their lengths in tokens."""
    import numpy as np

    drawn = np.exp(random.normal(np.log(profile.median), profile.sigma, count))
    lengths = np.clip(drawn.astype(int), CHAT_OVERHEAD + 4, profile.longest)
    with path.open("w") as file:
        for length in lengths - CHAT_OVERHEAD:
            words = [f"w{i}" for i in random.integers(len(SPECIAL), profile.shape["vocab_size"], length)]
            question, answer = " ".join(words[: length // 2]), " ".join(words[length // 2 :])
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return lengths


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Counts the tokens of the batches and takes the time at the end of every optimizer step."""

    warmup: int
    on_gpu: bool
    started: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    counts: list[list[Any]] = field(default_factory=lambda: [[0, 0, 0]])

    def add(self, input_ids: Any, labels: Any) -> None:
        """Count a batch before its forward pass; what lies on a device is counted there, and read at the end."""
        new = (input_ids != 0).sum(), (labels != -100).sum(), labels.numel()
        self.counts[-1] = [a + b for a, b in zip(self.counts[-1], new, strict=True)]

    def step(self, loss: float) -> None:
        """An optimizer step is over."""
        self.losses.append(loss)
        self.counts.append([0, 0, 0])
        self.times.append(self.now())

    def now(self) -> float:
        """The time when all work given to the device is done."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Rates over the steps that count."""
        seconds = self.times[-1] - self.times[self.warmup - 1]
        counts = [[int(count) for count in step] for step in self.counts[: len(self.times)]]
        real, supervised, positions = (sum(step[i] for step in counts[self.warmup :]) for i in range(3))
        return {
            "tokens_s": real / seconds,
            "supervised_s": supervised / seconds,
            "fill": real / positions,
            "step_s": seconds / (len(self.times) - self.warmup),
            "first_step_s": self.times[0] - self.started,
            "peak_bytes": peak_bytes(self.on_gpu),
            "losses": self.losses,
            "tokens": [step[0] for step in counts],
        }


def peak_bytes(on_gpu: bool) -> int:
    """Peak of allocated device memory, or of this process's resident memory."""
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def same_start(model: Any) -> None:
    """Fill the LoRA factors that start at random from a seed of each one's place: equal in every contestant."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name[name.index("layers.") :].encode()))
                start = torch.empty(parameter.shape)
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(start.uniform_(-bound, bound, generator=generator))


# --- contestants -----------------------------------------------------------------------------------------------------


def load_peer(work: Work, profile: Profile) -> Any:
    """The Base as a peer loads it: float32 to train all of it; with LoRA as stored, its factors float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if work.kind == "full" else "auto"
    attention = "flex_attention" if "flex" in work.ways else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        work.pair[0], dtype=dtype, attn_implementation=attention, **({"device_map": "cuda"} if on_gpu(profile) else {})
    )
    model.config.use_cache = False
    if work.kind == "lora":
        model = get_peft_model(model, LoraConfig(**LORA))
        same_start(model)
    return model


def on_gpu(profile: Profile) -> bool:
    """Whether the profile needs one."""
    return profile.accelerator == "gpu"


def train_loop(work: Work, profile: Profile) -> dict[str, Any]:
    """A loop as the tutorials have it: padded batches, the model's own loss, autocast, fused AdamW on a GPU."""
    import torch
    from torch.nn.utils import clip_grad_norm_
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    device = "cuda" if on_gpu(profile) else "cpu"
    meter = Meter(profile.warmup, on_gpu(profile))
    tokenizer = AutoTokenizer.from_pretrained(work.pair[0])
    samples = []
    for line in Path(work.data("train")).read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
        samples.append((ids, torch.where(mask.bool(), ids, -100)))

    def collate(rows: list) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = (pad([row[i] for row in rows], batch_first=True, padding_value=(0, -100)[i]) for i in (0, 1))
        lengths = torch.tensor([len(row[0]) for row in rows])
        return {
            "input_ids": ids, "labels": labels, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        }  # fmt: skip

    model = load_peer(work, profile).to(device).train()
    if profile.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[work.kind], weight_decay=0.0, fused=device == "cuda")
    batches = iter(DataLoader(samples, batch_size=profile.micro, collate_fn=collate, pin_memory=device == "cuda"))
    for _ in range(work.last):
        micro = [next(batches) for _ in range(profile.batch // profile.micro)]
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        loss = torch.zeros((), device=device)
        for batch in micro:
            meter.add(batch["input_ids"], batch["labels"])
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu(profile)):
                part = model(**batch, num_items_in_batch=total).loss
            part.backward()
            loss += part.detach()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(loss.item())
    return meter.figures()


def train_trl(work: Work, profile: Profile) -> dict[str, Any]:
    """TRL's SFTTrainer: padded, padding-free (the same samples in a step) or packed."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    free, packed = "free" in work.ways, "packed" in work.ways
    meter = Meter(profile.warmup, on_gpu(profile))

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            meter.add(inputs["input_ids"], inputs["labels"])
            return super().training_step(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                meter.step(logs["loss"])

    size, accumulate = profile.micro, profile.batch // profile.micro
    if packed:
        accumulate = min(accumulate, profile.rows)
        size = max(1, round(profile.rows / accumulate))
    trainer = Counted(
        model=load_peer(work, profile),
        args=SFTConfig(
            output_dir=f"{work.root}/trl", max_steps=work.last, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, learning_rate=RATES[work.kind], lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, bf16=on_gpu(profile), use_cpu=not on_gpu(profile), logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=0, assistant_only_loss=True,
            gradient_checkpointing=profile.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            packing=packed, padding_free=free, max_length=None if free else profile.pack if packed else profile.longest,
            train_sampling_strategy="random" if packed else "sequential", pad_to_multiple_of=None,
            logging_nan_inf_filter=False,
        ),
        train_dataset=load_dataset("json", data_files=work.data("train"), split="train", cache_dir=f"{work.root}/hf"),
        processing_class=AutoTokenizer.from_pretrained(work.pair[0]),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return meter.figures()


def train_llamafactory(work: Work, profile: Profile) -> dict[str, Any]:
    """LLaMA-Factory: padded, or packed with the samples kept apart (neat_packing)."""
    import torch
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow
    from transformers import TrainerCallback

    packed = "packed" in work.ways
    meter = Meter(profile.warmup, on_gpu(profile))

    class Counted(workflow.CustomSeq2SeqTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            meter.add(inputs["input_ids"], inputs["labels"])
            return super().training_step(model, inputs, *args, **kwargs)

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            """No contestant writes its result."""

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                meter.step(logs["loss"])

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_as_given(*args, **kwargs)
        if not on_gpu(profile):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
        same_start(model)
        return model

    load_as_given, workflow.load_model, workflow.CustomSeq2SeqTrainer = workflow.load_model, load, Counted
    size, accumulate = profile.micro, profile.batch // profile.micro
    if packed:
        accumulate = min(accumulate, profile.rows)
        size = max(1, round(profile.rows / accumulate))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    source = {"file_name": work.data("train"), "formatting": "sharegpt", "columns": {"messages": "messages"}}
    Path(f"{work.root}/dataset_info.json").write_text(json.dumps({"train": source | {"tags": tags}}))
    lora = {
        "lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": 0.0, "lora_target": "all",
    }  # fmt: skip
    tuner.run_exp(
        {
            "model_name_or_path": work.pair[0], "stage": "sft", "do_train": True, "finetuning_type": work.kind,
            **(lora if work.kind == "lora" else {}), "dataset_dir": work.root, "dataset": "train",
            "template": "chatml", "overwrite_cache": True, "disable_shuffling": not packed, "flash_attn": "sdpa",
            "cutoff_len": profile.pack if packed else profile.longest, "packing": packed, "neat_packing": packed,
            "disable_gradient_checkpointing": not profile.checkpointing, "use_reentrant_gc": False,
            "output_dir": f"{work.root}/llamafactory", "overwrite_output_dir": True, "max_steps": work.last,
            "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate,
            "learning_rate": RATES[work.kind], "lr_scheduler_type": "constant", "weight_decay": 0.0,
            "max_grad_norm": 1.0, "bf16": on_gpu(profile), "use_cpu": not on_gpu(profile), "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
            "logging_nan_inf_filter": False,
        },
        callbacks=[Watch()],
    )  # fmt: skip
    return meter.figures()


def open_shadowlit(work: Work, profile: Profile, **options: Any) -> tuple[Any, Any]:
    """The module and its data, with the switches that a contestant's name holds."""
    from peft import LoraConfig

    from shadowlit.data.module import ShadowData
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule
    from tests.gpu.older_torch import accept_grouped_heads

    accept_grouped_heads()
    packed = "packed" in work.ways
    pair = ModelPair(*work.pair)
    module = ShadowModule(
        pair, LoraConfig(**LORA) if work.kind == "lora" else None, lr=RATES[work.kind], schedule="constant",
        warmup_ratio=0.0, activation_checkpointing=profile.checkpointing, compile_layers="compiled" in work.ways,
        head_loss="logits" if "logits" in work.ways else "auto",
        attn_implementation="flex_attention" if "flex" in work.ways else "varlen" if "varlen" in work.ways else "sdpa",
    )  # fmt: skip
    data = ShadowData(
        pair, train=work.data("train"), max_length=profile.longest, shuffle=packed,
        packing="best_fit" if packed else "padding_free" if "free" in work.ways else None,
        **{"batch_size": profile.micro, **options}, **({"pack_length": profile.pack} if packed else {}),
    )  # fmt: skip
    return module, data


def shadowlit_trainer(profile: Profile, callbacks: list, **options: Any) -> Any:
    """A Lightning trainer without anything that writes."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator=profile.accelerator, devices=1, precision=profile.precision, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        use_distributed_sampler=False, num_sanity_val_steps=0, max_epochs=-1, **options,
    )  # fmt: skip


def train_shadowlit(work: Work, profile: Profile) -> dict[str, Any]:
    """shadowlit, with its switches."""
    from lightning.pytorch import Callback

    meter = Meter(profile.warmup, on_gpu(profile))
    size, accumulate = profile.micro, profile.batch // profile.micro
    if "packed" in work.ways:
        accumulate = min(accumulate, profile.rows)
        size = max(1, round(profile.rows / accumulate))

    class Watch(Callback):
        done = 0

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            same_start(module)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            meter.add(batch["input_ids"], batch["labels"])

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > self.done:
                self.done = trainer.global_step
                meter.step(trainer.callback_metrics["train/loss"].item())

    module, data = open_shadowlit(work, profile, batch_size=size)
    trainer = shadowlit_trainer(
        profile, [Watch()], max_steps=work.last, accumulate_grad_batches=accumulate, limit_val_batches=0
    )
    trainer.fit(module, data)
    return meter.figures()


def measure_graft(work: Work, profile: Profile) -> dict[str, Any]:
    """A validation with and without the graft, its swaps beside plain copies, on the device and offloaded."""
    from lightning.pytorch import Callback

    from shadowlit.callbacks.graft import GraftCallback

    meter = Meter(profile.warmup, on_gpu(profile))

    class Watch(Callback):
        def __init__(self) -> None:
            self.start, self.plain = 0.0, []

        def on_validation_start(self, *_: Any) -> None:
            self.start = meter.now()

        def on_validation_epoch_end(self, *_: Any) -> None:  # listed before the graft: the plain pass is over
            self.plain.append(meter.now() - self.start)
            self.start = meter.now()

    class After(Callback):
        def __init__(self) -> None:
            self.grafted: list[float] = []
            self.figures: dict[str, Any] = {}

        def on_validation_epoch_end(self, *_: Any) -> None:
            self.grafted.append(meter.now() - watch.start)

        def on_train_end(self, trainer: Any, module: Any) -> None:  # later the module is no longer on the device
            self.figures = graft_figures(work, profile, meter, module, graft)

    # Validated three times: the first time warms up.
    module, data = open_shadowlit(work, profile)
    data.validation, data.eval_batch_size = {"val": work.data("validation")}, profile.micro
    watch, graft, after = Watch(), GraftCallback(baselines=False, statistics=False), After()
    trainer = shadowlit_trainer(
        profile, [watch, graft, after], max_steps=3, val_check_interval=1, check_val_every_n_epoch=None
    )
    trainer.fit(module, data)
    return {
        "plain_s": statistics.median(watch.plain[1:]),
        "grafted_s": statistics.median(after.grafted[1:]),
        "loss": trainer.callback_metrics["val/grafted/loss"].item(),
        **after.figures,
        "peak_bytes": peak_bytes(on_gpu(profile)),
    }


def graft_figures(work: Work, profile: Profile, meter: Meter, module: Any, callback: Any) -> dict[str, Any]:
    """Times of the swaps, on the device and offloaded, and of a plain copy of the parameters."""
    import torch

    from shadowlit.checkpoint.alignment import AlignedReader
    from shadowlit.checkpoint.folder import CheckpointReader
    from shadowlit.grafting.live import LiveGraft
    from shadowlit.grafting.parameters import host_parameters

    live = callback.graft
    parameters = [p.detach() for p in host_parameters(module.model).values()]
    copies = [torch.empty_like(p) for p in parameters]

    def copy() -> None:
        for target, source in zip(copies, parameters, strict=True):
            target.copy_(source)

    figures = {
        "frozen_bytes": live.frozen_bytes,
        "parameters": sum(p.numel() for p in parameters),
        "statistics_s": timed(meter, live.statistics),
        "copy_s": timed(meter, copy),
        **swap_times(meter, live, "device"),
    }
    copies.clear()
    if on_gpu(profile):
        callback.graft = live = None
        start = time.perf_counter()
        base, instruct = (Path(folder) for folder in work.pair)
        live = LiveGraft(module.model, AlignedReader.open(base, instruct), CheckpointReader(instruct), offload=True)
        figures |= {"read_s": time.perf_counter() - start, **swap_times(meter, live, "offload")}
    return figures


def swap_times(meter: Meter, live: Any, name: str) -> dict[str, float]:
    """Median seconds of swapping the grafted weights in and out; the first time is not counted."""
    from shadowlit.grafting.subject import Subject

    ins, outs = [], []
    for _ in range(4):
        start = meter.now()
        live.apply(Subject("grafted", 1.0))
        middle_ = meter.now()
        live.restore()
        ins.append(middle_ - start)
        outs.append(meter.now() - middle_)
    return {f"{name}_in_s": statistics.median(ins[1:]), f"{name}_out_s": statistics.median(outs[1:])}


def timed(meter: Meter, function: Callable[[], Any], repetitions: int = 3) -> float:
    """Median seconds of a call, the device's work included; the first is not counted where there are several."""
    times = []
    for _ in range(repetitions):
        start = meter.now()
        function()
        times.append(meter.now() - start)
    return statistics.median(times[1:] or times)


WORKERS: dict[str, Callable[[Work, Profile], dict[str, Any]]] = {
    "make": make, "loop": train_loop, "trl": train_trl, "llamafactory": train_llamafactory,
    "shadowlit": train_shadowlit, "graft": measure_graft,
}  # fmt: skip


# --- processes -------------------------------------------------------------------------------------------------------

PRELOAD = (
    "torch", "transformers.models.qwen3.modeling_qwen3", "transformers.trainer", "peft", "datasets",
    "lightning.pytorch", "torchmetrics", "trl.trainer.sft_trainer", "shadowlit.callbacks.graft",
    "shadowlit.data.module", "shadowlit.training.module",
)  # fmt: skip


def work_in_process(work: Work, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run ``work`` in a process of its own and return its figures, or ``{"error": …}``."""
    out = Path(work.out)
    out.unlink(missing_ok=True)
    start = time.perf_counter()
    python = options.python.get(work.contestant.split("-")[0])
    if options.fork and python is None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in PRELOAD if importlib.util.find_spec(name.split(".")[0])])
        process = context.Process(target=work.run)
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
    else:
        command = [python or sys.executable, __file__, "--work", json.dumps(asdict(work))]
        quiet = {} if options.verbose else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet) as child:
            try:
                child.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, 9)
    wall_s = time.perf_counter() - start
    figures = json.loads(out.read_text()) if out.exists() else {"error": f"ended without a result after {wall_s:.0f} s"}
    if "error" in figures and options.fork and python is None and "CUDA" in figures["error"] and wall_s < limit_s / 2:
        # A driver that was opened before the fork can't be used after it.
        print("the forked process can't use the GPU; going on without --fork", flush=True)
        options.fork = False
        return work_in_process(work, options, limit_s)
    return {**figures, "wall_s": wall_s}


def available(contestant: str, options: argparse.Namespace) -> bool:
    """Whether the package of a contestant can be imported."""
    package = contestant.partition(":")[0].split("-")[0]
    return package not in OTHERS or package in options.python or importlib.util.find_spec(package) is not None


# --- tables ----------------------------------------------------------------------------------------------------------

Runs = dict[str, dict[str, list[dict[str, Any]]]]


def middle(runs: list[dict[str, Any]], key: str) -> float:
    """Median of a figure."""
    return statistics.median(run[key] for run in runs)


def table(profile: Profile, model: dict[str, Any], runs: Runs, device: str) -> str:
    """All figures so far as Markdown."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    lines = [
        f"{device}; {model['parameters'] / 1e6:.1f}M parameters, {profile.precision}, {profile.batch} samples of "
        f"{model['mean_length']:.0f} tokens a step (packed: {profile.rows} rows of {profile.pack})"
        f"{', activations recomputed' if profile.checkpointing else ''}.", "",
    ]  # fmt: skip
    for kind, by_name in runs.items():
        trained = {name: good for name, all_ in by_name.items() if (good := [r for r in all_ if "tokens_s" in r])}
        lines += [
            f"| {kind} | runs | tokens/s (range) | supervised tokens/s | tokens of positions | peak memory, GB | "
            "first step after, s | of the chip's peak | largest difference of a loss from the loop's |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, good in trained.items():
            rates = [run["tokens_s"] for run in good]
            share = f"{middle(good, 'tokens_s') * flops_per_token(profile, model, kind) / peak:.1%}" if peak else "–"
            lines.append(
                f"| {name} | {len(good)} | {middle(good, 'tokens_s'):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) | "
                f"{middle(good, 'supervised_s'):,.0f} | {middle(good, 'fill'):.1%} | "
                f"{middle(good, 'peak_bytes') / 1e9:.2f} | {middle(good, 'first_step_s'):.1f} | {share} | "
                f"{difference(name, trained)} |"
            )
        lines += ["", *compared(trained), *graft_lines(kind, by_name.get("graft", [])), ""]
        lines += [f"{kind}, {name}: {run['error'].strip().splitlines()[-1]}"
                  for name, all_ in by_name.items() for run in all_ if "error" in run]  # fmt: skip
    return "\n".join(lines)


def flops_per_token(profile: Profile, model: dict[str, Any], kind: str) -> float:
    """Arithmetic of one trained token: matrices (with LoRA without the gradients of frozen ones) and attention."""
    shape = profile.shape
    width = shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    return (6 if kind == "full" else 4) * model["matrices"] + 3 * 2 * model["mean_context"] * width


def difference(name: str, trained: dict[str, list[dict[str, Any]]]) -> str:
    """How far the losses are from the loop's on the same samples."""
    if name == "loop" or "packed" in name or "loop" not in trained:
        return "–"
    own, loop = trained[name][0], trained["loop"][0]
    if own["tokens"] != loop["tokens"]:
        return "other samples"
    return f"{max(abs(a - b) for a, b in zip(own['losses'], loop['losses'], strict=True)):.1e}"


def compared(trained: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The best of ours beside the best of the peers."""
    ours = {name: runs for name, runs in trained.items() if name.startswith("shadowlit")}
    peers = {name: runs for name, runs in trained.items() if name not in ours}
    if not ours or not peers:
        return []
    fast, lean = max(peers, key=lambda n: middle(peers[n], "tokens_s")), min(
        peers, key=lambda n: middle(peers[n], "peak_bytes"))  # fmt: skip
    own = max(ours, key=lambda n: middle(ours[n], "tokens_s"))
    return [
        f"{own}: {middle(ours[own], 'tokens_s') / middle(peers[fast], 'tokens_s'):.2f} × the tokens/s of the fastest "
        f"peer ({fast}), {middle(ours[own], 'peak_bytes') / middle(peers[lean], 'peak_bytes'):.2f} × the memory of the "
        f"leanest ({lean}).",
        "",
    ]


def graft_lines(kind: str, runs: list[dict[str, Any]]) -> list[str]:
    """What the grafted validation costs."""
    good = [run for run in runs if "error" not in run]
    if not good:
        return []
    figure = {key: middle(good, key) for key in good[0]}
    line = (
        f"{kind}, graft: plain validation {figure['plain_s']:.3f} s, grafted {figure['grafted_s']:.3f} s "
        f"({figure['grafted_s'] / figure['plain_s'] - 1:+.1%}); a plain copy of the parameters "
        f"{1e3 * figure['copy_s']:.1f} ms, in {1e3 * figure['device_in_s']:.1f} ms, out "
        f"{1e3 * figure['device_out_s']:.1f} ms"
    )
    if "offload_in_s" in figure:
        line += f"; offloaded in {1e3 * figure['offload_in_s']:.0f} ms, out {1e3 * figure['offload_out_s']:.0f} ms"
    return [
        f"{line}; statistics {1e3 * figure['statistics_s']:.0f} ms; frozen "
        f"{figure['frozen_bytes'] / figure['parameters']:.1f} bytes per parameter; peak memory "
        f"{figure['peak_bytes'] / 1e9:.2f} GB.",
        "",
    ]


def shown(run: dict[str, Any]) -> str:
    """A run in a line, or what it ended with."""
    if "error" in run:
        return run["error"].strip()
    if "tokens_s" in run:
        return f"{run['tokens_s']:,.0f} tokens/s, {run['peak_bytes'] / 1e9:.2f} GB"
    return f"plain {run['plain_s']:.3f} s, grafted {run['grafted_s']:.3f} s"


def device_name(profile: Profile, threads: int) -> str:
    """The card, by its driver's tool, or the threads of the processor."""
    if not on_gpu(profile):
        return f"{threads} threads of a CPU"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown GPU"


def curve(root: Path, options: argparse.Namespace) -> None:
    """Print what a step, the memory and the graft's swaps cost, by size and length."""
    set_environment(options)
    found: dict[str, list[dict[str, Any]]] = {}
    models: dict[str, dict[str, Any]] = {}
    for repetition in range(options.repetitions):
        for name in (name for name in PROFILES if name.startswith("curve-")):
            folder = root / name
            job = {"profile": name, "kind": "full", "root": str(folder), "out": f"{root}/out.json"}
            for contestant in ("make", *PROFILES[name].contestants):
                done = folder.exists() if contestant == "make" else contestant == "graft" and not name.endswith("-256")
                if done:
                    continue
                run = work_in_process(
                    Work(contestant, threads=options.threads, steps=options.steps, **job), options, options.limit
                )
                if "error" in run:
                    raise SystemExit(run["error"])
                if contestant == "make":
                    models[name] = run
                else:
                    found.setdefault(f"{name} {contestant}", []).append(run)
                    print(f"{repetition} {name}: {shown(run)}", file=sys.stderr, flush=True)
    print("| parameters, M | in the layers, M | tokens of a sample | step, s | µs per token | µs per token and "
          "million parameters of the layers and the head | peak memory, GB | graft in, ms | out, ms | one copy, ms |\n"
          "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, model in models.items():
        runs, graft = found[f"{name} shadowlit-free-varlen"], found.get(f"{name} graft")
        profile = PROFILES[name]
        step, total = middle(runs, "step_s"), model["parameters"] / 1e6
        in_layers = model["matrices"] / 1e6 - profile.shape["vocab_size"] * profile.shape["hidden_size"] / 1e6
        swaps = [
            f"{1e3 * middle(graft, key):.1f}" if graft else "–" for key in ("device_in_s", "device_out_s", "copy_s")
        ]
        print(
            f"| {total:.1f} | {in_layers:.1f} | {profile.median} | {step:.2f} | {1e6 * step / CURVE_TOKENS:,.0f} | "
            f"{1e6 * step / CURVE_TOKENS / (model['matrices'] / 1e6):,.0f} | {middle(runs, 'peak_bytes') / 1e9:.2f} | "
            f"{' | '.join(swaps)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="smoke")
    parser.add_argument("--curve", action="store_true", help="the cost by size of the model and length of the samples")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=["full", "lora"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants instead of the profile's")
    parser.add_argument("--steps", type=int, help="optimizer steps that count, instead of the profile's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=EXECUTABLE")
    parser.add_argument("--out", help="writes FOLDER.json and FOLDER.md", metavar="FOLDER")
    parser.add_argument("--workdir", help="where the folder of the models is made")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--limit", type=float, default=3600.0, help="longest run of one process, in seconds")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.python = dict(item.split("=", 1) for item in options.python)
    if options.work:
        Work(**json.loads(options.work)).run()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and the folder is removed
    root = Path(tempfile.mkdtemp(dir=options.workdir, prefix="train-"))
    try:
        curve(root, options) if options.curve else benchmark(root, options)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def set_environment(options: argparse.Namespace) -> None:
    """What every process shall find."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        # Whether there is a GPU is asked of its driver's library, so that the server of forks opens no context.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }  # fmt: skip


def benchmark(root: Path, options: argparse.Namespace) -> None:
    """Make the folder, run everything in turns, and print the table after each round."""
    began, profile = time.perf_counter(), PROFILES[options.profile]
    set_environment(options)

    def work(contestant: str, kind: str, limit_s: float) -> dict[str, Any]:
        job = Work(
            contestant, options.profile, kind, f"{root}/models", f"{root}/out.json", options.threads, options.steps
        )
        return work_in_process(job, options, limit_s)

    model = work("make", "full", min(options.limit, options.deadline))
    if "error" in model:
        raise SystemExit(model["error"])
    print(f"made {model['bytes'] / 1e9:.2f} GB in {model['make_s']:.1f} s, {model['wall_s']:.1f} s in all", flush=True)
    kinds = tuple(options.kinds or profile.kinds)
    turns = [
        (kind, name.partition(":")[0]) for name in options.only or profile.contestants for kind in kinds
        if name.partition(":")[2] in ("", kind) and available(name, options)
    ]  # fmt: skip
    runs: Runs = {kind: {name: [] for where, name in turns if where == kind} for kind in kinds}
    device = device_name(profile, options.threads)
    for repetition in range(options.repetitions):
        for kind, name in turns if repetition % 2 == 0 else turns[::-1]:
            past = runs[kind][name]
            if past and "error" in past[0]:
                continue
            left = options.deadline - (time.perf_counter() - began)
            known = [run["wall_s"] for each in runs.values() for all_ in each.values() for run in all_]
            if left < (past[0]["wall_s"] if past else statistics.median(known) if known else 0):
                print(f"{kind} {name}: no time left", flush=True)
                continue
            past.append(work(name, kind, min(options.limit, left)))
            spent = time.perf_counter() - began
            print(f"[{spent:.0f} s] {kind} {name}: {shown(past[-1])} ({past[-1]['wall_s']:.1f} s)", flush=True)
            if options.out:
                report = {"profile": options.profile, "device": device, "model": model, "runs": runs}
                Path(f"{options.out}.json").write_text(json.dumps(report, indent=1))
                Path(f"{options.out}.md").write_text(table(profile, model, runs, device))
    print("\n" + table(profile, model, runs, device), flush=True)


if __name__ == "__main__":
    main()
