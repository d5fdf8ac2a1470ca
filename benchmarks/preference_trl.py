"""DPO's losses and gradients beside TRL's, on the same batch and the same weights.

    python benchmarks/preference_trl.py --trl path/to/an/environment/with/trl/bin/python

Trains the embedded Base on 16 pairs with each of DPO's losses, and keeps weights, loss and gradient of the first step,
at which policy and reference are one, and of the eighth. TRL's ``DPOTrainer``, in an environment of its own, computes
both again from the same weights and texts: its own tokenisation, collation, reference and loss. Last run (TRL 1.16,
torch 2.13, CPU, float32)::

    loss             ours          TRL  difference  gradient, relative   step
    sigmoid     0.6931472    0.6931472     1.9e-09             8.4e-07   1
    sigmoid     0.2737275    0.2737275     2.6e-08             1.3e-06   8
    hinge       1.0000000    1.0000000     0.0e+00             8.4e-07   1
    hinge       0.1329036    0.1329036     4.0e-09             1.8e-06   8
    ipo         2.7777778    2.7777777     1.1e-07             8.8e-07   1
    ipo         0.2954759    0.2954756     2.5e-07             1.6e-06   8
    robust      0.6931472    0.6931472     1.9e-09             8.5e-07   1
    robust      0.0998897    0.0998896     1.6e-07             1.8e-06   8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BASE, INSTRUCT = ROOT / "shadowlit/demo/pair/base", ROOT / "shadowlit/demo/pair/instruct"
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.1},
}
BETA, NUM_PAIRS, STEPS = 0.3, 16, 8


def ours(folder: Path) -> None:
    """Train with each loss; write the pairs as texts, and what two steps of each were."""
    from lightning.pytorch import Trainer, seed_everything
    from safetensors.torch import save_file

    from experiments.embedded.preference_pairs import preferences
    from experiments.embedded.world import World
    from shadowlit.callbacks.graft import GraftCallback
    from shadowlit.data.module import ShadowData
    from shadowlit.data.template import render_prompt
    from shadowlit.pair.pair import ModelPair
    from shadowlit.training.module import ShadowModule
    from shadowlit.training.objectives import DPO

    class Recording(ShadowModule):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            """Keep the first and the last step."""
            super().on_before_optimizer_step(optimizer)
            if self.trainer.global_step in (0, STEPS - 1):
                assert self.model is not None
                named = dict(self.model.named_parameters())
                name = f"{self.objective.loss}_{self.trainer.global_step}"  # type: ignore[attr-defined]
                save_file({n: p.detach().clone() for n, p in named.items()}, folder / f"{name}.weights.safetensors")
                save_file({n: p.grad.clone() for n, p in named.items()}, folder / f"{name}.gradient.safetensors")
                (folder / f"{name}.loss").write_text(repr(self.trainer.callback_metrics["train/loss"].item()))

    pair = ModelPair(str(BASE), str(INSTRUCT))
    rows = preferences(World())["skill_pairs"][:NUM_PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = pair.tokenizer()
    texts = [
        {
            "prompt": render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}]),
            **{name: f"{row[name]}{tokenizer.eos_token}" for name in ("chosen", "rejected")},
        }
        for row in rows
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    for loss, options in LOSSES.items():
        seed_everything(0)
        module = Recording(pair, None, DPO(BETA, loss, **options), lr=3e-4, warmup_ratio=0)  # type: ignore[arg-type]
        data = ShadowData(
            pair, train=str(folder / "pairs.jsonl"), samples="pairs", batch_size=NUM_PAIRS, max_length=128, cache=False
        )
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, use_distributed_sampler=False, callbacks=[GraftCallback()], max_epochs=STEPS,
        )  # fmt: skip
        trainer.fit(module, data)


def theirs(folder: Path) -> None:
    """Compute losses and gradients with TRL, and print how far apart the two are."""
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    print(f"{'loss':<8} {'ours':>12} {'TRL':>12} {'difference':>11} {'gradient, relative':>19}   step")
    for loss, options in LOSSES.items():
        for step in (0, STEPS - 1):
            model, reference = (AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32) for _ in range(2))
            model.load_state_dict(load_file(folder / f"{loss}_{step}.weights.safetensors"), strict=False)
            model.tie_weights()
            trainer = DPOTrainer(
                model=model,
                ref_model=reference,
                args=DPOConfig(
                    output_dir=str(folder / "trl"), beta=BETA, loss_type=[loss], use_cpu=True, bf16=False,
                    report_to="none", per_device_train_batch_size=NUM_PAIRS, gradient_checkpointing=False, **options,
                ),
                train_dataset=Dataset.from_list(json.loads((folder / "texts.json").read_text())),
                processing_class=AutoTokenizer.from_pretrained(INSTRUCT),
            )  # fmt: skip
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(NUM_PAIRS)])
            found = trainer.compute_loss(trainer.model, batch)
            found.backward()
            own = float((folder / f"{loss}_{step}.loss").read_text())
            gradient = load_file(folder / f"{loss}_{step}.gradient.safetensors")
            named = dict(trainer.model.named_parameters())
            apart = sum((gradient[n] - named[n].grad).double().square().sum() for n in gradient).sqrt()
            norm = sum(g.double().square().sum() for g in gradient.values()).sqrt()
            ratio = f"{(apart / norm).item():19.1e}" if norm else f"{apart.item():19.1e}"
            print(f"{loss:<8} {own:12.7f} {found.item():12.7f} {abs(own - found.item()):11.1e} {ratio}   {step + 1}")


def main() -> None:
    """Run ours here, and this file again in TRL's environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs is not None:
        theirs(options.theirs)
        return
    with tempfile.TemporaryDirectory() as folder:
        ours(Path(folder))
        quiet = {**os.environ, "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        subprocess.run([options.trl, __file__, "--theirs", folder], check=True, env=quiet)


if __name__ == "__main__":
    main()
