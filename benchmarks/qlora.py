"""LoRA, QLoRA and full tuning of one pair: losses, the graft next to a plain loop, time and memory.

    python benchmarks/qlora.py --instruct FOLDER --rows alpaca_en_demo.json [--kinds lora qlora full] [--steps 8]

The Base is a copy of the Instruct plus noise of standard deviation 1e-3. Each kind trains in a process of its own, on 3
rows a step in float32, with a validation at the end, and exports. A plain loop of transformers then scores the exported
folder, and the same in 4 bits, on the same rows, one by one. Times are the CPU's of training steps alone, the first one
left out; memory is the process's resident peak up to the end of the last step, and what its tensors take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
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


def train(kind: str, root: Path, steps: int) -> dict[str, Any]:
    """Train and export; return what was logged and measured."""
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
            self.losses: list[float] = []
            self.peak = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.append(time.process_time() - self.start)
            self.losses.append(trainer.callback_metrics["train/loss"].item())
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    pair = ModelPair(str(root / "base"), str(root / "instruct"))
    module = ShadowModule(
        pair,
        None if kind == "full" else LoraConfig(**LORA),
        lr=2e-5 if kind == "full" else 2e-4,
        quantization="nf4" if kind == "qlora" else None,
    )
    data = ShadowData(pair, train=str(root / "train.json"), validation=str(root / "val.json"), batch_size=ROWS)
    clock, export = Clock(), ExportCallback(folder=str(root / kind), parts=["model"], verify=False)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=1.0, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False, inference_mode=False,
        check_val_every_n_epoch=None, val_check_interval=steps, callbacks=[GraftCallback(adapter=False), clock, export],
    )  # fmt: skip
    trainer.fit(module, data)
    tensors = [t.untyped_storage() for t in [*module.parameters(), *module.buffers()]]
    held = {t.data_ptr(): t.nbytes() for t in tensors}
    return {
        "losses": clock.losses,
        "step_s": sum(clock.steps[1:]) / (len(clock.steps) - 1),
        "peak_gb": clock.peak,
        "weights_gb": sum(held.values()) / 1e9,
        "logged": {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith(("val/", "graft/"))},
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


def main() -> None:
    """Run all kinds, and print one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instruct", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["lora", "qlora", "full"])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    rows = [row for row in json.loads(options.rows.read_text()) if len(row["output"]) < 400]
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "instruct").symlink_to(options.instruct.resolve())
        make_base(options.instruct, root / "base")
        (root / "train.json").write_text(json.dumps(rows[: ROWS * options.steps]))
        (root / "val.json").write_text(json.dumps(rows[-SET:]))
        for kind in options.kinds:
            with spawned.Pool(1) as pool:
                found = pool.apply(train, (kind, root, options.steps))
            with spawned.Pool(1) as pool:
                found["plain"] = pool.apply(plain_loss, (root / kind / "model", root))
                if kind == "qlora":
                    found["plain_4bit"] = pool.apply(plain_loss, (root / kind / "model", root, True))
                    found["plain_base_4bit"] = pool.apply(plain_loss, (root / "base", root, True))
            print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main()
