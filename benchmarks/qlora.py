"""LoRA, QLoRA, DoRA and full tuning of one pair: losses, the graft next to a plain loop, time and memory.

    python benchmarks/qlora.py --instruct FOLDER --rows alpaca_en_demo.json [--kinds lora qlora dora full] [--steps 8]
                               [--speed]
    python benchmarks/qlora.py --llama

The Base is a copy of the Instruct plus noise of standard deviation 1e-3. Each kind trains in a process of its own, on 3
rows a step in float32, with a validation at the end, and exports. A plain loop of transformers then scores the exported
folder, and of QLoRA the same in 4 bits, on the same rows, one by one. Times are the CPU's of training steps alone, the
first one left out; tokens are those of the rows, padding left out. Memory is the process's resident peak up to the end
of the last step, with freed tensors given back at once (``MALLOC_MMAP_THRESHOLD_``), and what the model's tensors take.
``--speed`` leaves out all scores.

``--llama`` computes the memory of QLoRA on a model of Llama-3.1-8B's shapes: the operations of two training steps run
on fake tensors, which have sizes and no data, and what is alive is counted after each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ROWS, SET = 3, 12  # rows of a step, and of the validation set


def make_base(instruct: Path, base: Path) -> None:
    """Write the Base."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(instruct, base)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(instruct / "model.safetensors")
    noisy = {n: (t.float() + 1e-3 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in tensors.items()}
    save_file(noisy, base / "model.safetensors", metadata={"format": "pt"})


def train(kind: str, root: Path, steps: int, speed: bool) -> dict[str, Any]:
    """Train and, unless only ``speed`` counts, validate and export; return what was logged and measured."""
    import torch
    from lightning.pytorch import Callback, Trainer
    from peft import LoraConfig

    from shadowlit.callbacks.export import ExportCallback
    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.data.module import ShadowData
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule

    torch.set_num_threads(1)

    class Clock(Callback):
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.tokens: list[int] = []
            self.losses: list[float] = []
            self.peak = 0.0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            self.tokens.append(int(batch["attention_mask"].sum()))
            self.start = time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.append(time.process_time() - self.start)
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    pair = ModelPair(str(root / "base"), str(root / "instruct"))
    module = ShadowModule(
        pair,
        None if kind == "full" else LoraConfig(**LORA, use_dora=kind == "dora"),
        lr=2e-5 if kind == "full" else 2e-4,
        quantization="nf4" if kind == "qlora" else None,
    )
    data = ShadowData(pair, train=str(root / "train.json"), validation=str(root / "val.json"), batch_size=ROWS)
    clock = Clock()
    export = [] if speed else [ExportCallback(folder=str(root / kind), parts=["model"], verify=False)]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0 if speed else 1.0, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False, inference_mode=False,
        check_val_every_n_epoch=None, val_check_interval=steps,
        callbacks=[GraftCallback(adapter=False), clock, *export],
    )  # fmt: skip
    trainer.fit(module, data)
    tensors = [t.untyped_storage() for t in [*module.parameters(), *module.buffers()]]
    held = {t.data_ptr(): t.nbytes() for t in tensors}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {
        "losses": clock.losses,
        "step_s": sum(clock.steps[1:]) / (len(clock.steps) - 1),
        "tokens_per_s": sum(clock.tokens[1:]) / sum(clock.steps[1:]),
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "peak_gb": clock.peak,
        "weights_gb": sum(held.values()) / 1e9,
        "survival": metrics.get("graft/survival"),
        "logged": {name: value for name, value in metrics.items() if name.startswith("val/") and "loss" in name},
    }


def plain_loss(folder: Path, root: Path, in_4_bits: bool = False) -> float:
    """The loss per answer token of a folder on the validation rows, without anything of this package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if in_4_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        options["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss, count = 0.0, 0
    for row in json.loads((root / "val.json").read_text()):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        ).input_ids
        answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return loss / count


def peak_of_llama(rank: int = 64, tokens: int = 4096, chunk: int = 256) -> dict[str, float]:
    """Bytes that are alive between and at the peak of steps of one sample, bf16-mixed, in GB."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoModelForCausalLM, LlamaConfig

    from shadowlit.training.parallel import parallelize
    from shadowlit.training.quantisation import quantise_layers

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

        def add(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())

        def free(self, num_bytes: int) -> None:
            self.now -= num_bytes

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in filter(torch.is_tensor, tree_iter(out)):
                self.add(tensor)
            return out

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        quantise_layers(model)
        model = get_peft_model(model, LoraConfig(**{**LORA, "r": rank}), low_cpu_mem_usage=True)
    parallelize(model, None, activation_checkpointing="full")
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        host = model.to_empty(device="cpu").train().get_base_model()
        for tensor in [*model.parameters(), *model.buffers()]:
            alive.add(tensor)
        weights = alive.now
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)

        def loss_of(part: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(host.lm_head(part).float(), torch.zeros(len(part), dtype=torch.long))

        for _ in range(2):  # the first one creates gradients and moments
            alive.peak = alive.now
            with torch.autocast("cpu", torch.bfloat16):
                hidden = host.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)[0][0]
                losses = [checkpoint(loss_of, part, use_reentrant=False) for part in hidden.split(chunk)]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            del hidden, losses
    return {"weights_gb": weights / 1e9, "between_steps_gb": alive.now / 1e9, "peak_gb": alive.peak / 1e9}


def main() -> None:
    """Run all kinds, and print one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--instruct", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["lora", "qlora", "dora", "full"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    if options.llama:
        print(json.dumps(peak_of_llama()))
        return
    rows = [row for row in json.loads(options.rows.read_text()) if len(row["output"]) < 400]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # of the processes that are started
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "instruct").symlink_to(options.instruct.resolve())
        make_base(options.instruct, root / "base")
        (root / "train.json").write_text(json.dumps(rows[: ROWS * options.steps]))
        (root / "val.json").write_text(json.dumps(rows[-SET:]))
        for kind in options.kinds:
            with spawned.Pool(1) as pool:
                found = pool.apply(train, (kind, root, options.steps, options.speed))
            if options.speed:
                print(json.dumps({"kind": kind, **found}), flush=True)
                continue
            with spawned.Pool(1) as pool:
                plain = {"grafted": pool.apply(plain_loss, (root / kind / "model", root))}
                if kind == "qlora":
                    plain["grafted_4bit"] = pool.apply(plain_loss, (root / kind / "model", root, True))
                    plain["base"] = pool.apply(plain_loss, (root / "base", root, True))
            found["plain"] = plain
            found["differences"] = {name: found["logged"][f"val/{name}/loss"] - loss for name, loss in plain.items()}
            print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main()
