"""Losses per token and their gradients next to TRL's and LLaMA-Factory's, on the same batch and the same weights.

    pip install --target peers --no-deps trl==0.24.0 llamafactory==0.9.5 omegaconf fire termcolor av \
        antlr4-python3-runtime==4.9.3
    DISABLE_VERSION_CHECK=1 python benchmarks/token_losses.py --peers peers

The embedded Base on 16 rows of the demonstration, with the embedded Instruct as reference. The peers get whole logits;
shadowlit's go through the chunked head. LLaMA-Factory divides EAFT's entropy by 3.0 where the paper has log 20, for
which its loss is scaled here. Its ASFT is DFT with a forward KL.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from shadowlit.data.module import ShadowData
from shadowlit.pair.pair import ModelPair
from shadowlit.training import linear_loss
from shadowlit.training.head import HeadLoss
from shadowlit.training.objectives import DFT, EAFT, TokenObjective
from shadowlit.training.outputs import Outputs, model_inputs

DEMO = Path(__file__).parents[1] / "shadowlit/demo"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder in which TRL and LLaMA-Factory are installed")
    sys.path.append(str(parser.parse_args().peers))
    from llamafactory.train.trainer_utils import asft_loss_func, dft_loss_func, eaft_loss_func
    from trl.trainer.sft_trainer import dft_loss

    linear_loss._CHUNK_ELEMENTS["cpu"] = 1  # 16 tokens a chunk
    pair = ModelPair(str(DEMO / "pair/base"), str(DEMO / "pair/instruct"))
    data = ShadowData(
        pair, train=str(DEMO / "data/train.jsonl"), ignore_columns=["skill", "answer", "format"], max_length=128,
        batch_size=16, cache=False, num_workers=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    base, instruct = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (pair.base, pair.instruct))
    head = HeadLoss(base)
    predictions = Outputs(HeadLoss(instruct), batch).predictions(None, live=True)

    def ours(objective: TokenObjective) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            outputs = Outputs(head, batch, predictions=predictions if objective.token_reference else None)
            sums = objective.step(outputs)
            return torch.as_tensor(sums["loss"]) / sums["count"]

        return loss

    def theirs(function: Callable[..., Tensor], factor: float = 1.0, **options: Any) -> Callable[[], Tensor]:
        return lambda: factor * function(base(**model_inputs(batch)), batch["labels"], **options)

    with torch.no_grad():
        logits = instruct(**model_inputs(batch)).logits
    anchored = {"ref_logits": logits, "asft_alpha": 0.3}
    print(f"{'':24}{'ours':>12}{'peer':>12}{'difference':>12}{'gradient, relative':>20}")
    for name, objective, peer in (
        ("DFT, TRL", DFT(), theirs(dft_loss)),
        ("DFT, LLaMA-Factory", DFT(), theirs(dft_loss_func)),
        ("EAFT, LLaMA-Factory", EAFT(), theirs(eaft_loss_func, 3.0 / math.log(20))),
        ("DFT + KL, LLaMA-Factory", DFT(0.3, kl_to="instruct"), theirs(asft_loss_func, **anchored)),
    ):
        found = []
        for compute in (ours(objective), peer):
            base.zero_grad()
            loss = compute()
            loss.backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in base.parameters() if p.grad is not None])))
        (left, gradient), (right, expected) = found
        apart = (gradient - expected).norm() / expected.norm()
        print(f"{name:24}{left:12.7f}{right:12.7f}{abs(left - right):12.1e}{apart:20.1e}")


if __name__ == "__main__":
    main()
