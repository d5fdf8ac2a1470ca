"""Where evaluators run in tests: a model of a folder, in this process; and rows in files."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from shadowlit.evaluation.evaluator import EvalContext
from shadowlit.evaluation.matching import Matcher
from shadowlit.pair.pair import ModelPair
from shadowlit.training.head import HeadLoss

DEMO = Path(__file__).parents[2] / "shadowlit/demo"
DEMO_PAIR = (DEMO / "pair/base", DEMO / "pair/instruct")


def make_context(folders, model=None, rank=0, world_size=1, **template_kwargs):
    """The Instruct of ``folders`` (base, instruct) in evaluation mode, or another model."""
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    return EvalContext(
        model=model.eval(),
        head=HeadLoss(model),
        pair=ModelPair(*map(str, folders)),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        autocast=nullcontext,
        reference=nullcontext,
        template_kwargs=template_kwargs,
    )


def evaluate(evaluator, context):
    """Read, run."""
    evaluator.read(context.pair, context.template_kwargs)
    return evaluator.run(context)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def demo_evaluators():
    """The evaluators of the demonstration's configuration: arguments by name."""
    content = yaml.safe_load((DEMO.parents[1] / "configs/demo_lora.yaml").read_text(encoding="utf-8"))
    return {name: each["init_args"] for name, each in content["evaluation"]["evaluators"].items()}


def demo_matcher(name):
    """How the demonstration compares the answers of one of its sets."""
    own = demo_evaluators()[name]
    return Matcher(own["match"], own.get("pattern"))


def demo_rows(name, count):
    """Some of the demonstration's rows, as questions with answers."""
    lines = (DEMO / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [{**row, "question": row["messages"][0]["content"]} for row in map(json.loads, lines)]
