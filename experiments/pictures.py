"""A vision-language pair made from nothing, and a picture task that it learns: ``python experiments/pictures.py``.

Pictures of 28 pixels show a shape in a colour in a corner. The Base is pre-trained on captions of them; the Instruct is
the Base, tuned to say colours and places in full sentences. The task is new to both: name the shape, in one word. It is
trained on the Base's language tower and grafted onto the Instruct, by ``python -m shadowlit fit`` with
configs/pictures.yaml. Held out of everything, the pre-training too, are some combinations of shape, colour and place.

Writes the pair and the data into ``--out``, the run beside them, and the curves of the tuned and the grafted model into
``experiments/results/pictures``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from shadowlit.data.module import ShadowData
from shadowlit.pair.pair import ModelPair

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments/results/pictures"
SIZE, PATCH, WIDTH = 28, 7, 64
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (225, 205, 40)}
PLACES = tuple(product(("top", "bottom"), ("left", "right")))
ALL = tuple(product(SHAPES, COLOURS, PLACES))
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Pre-training: the picture, then its caption, without turns.
CAPTIONS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'][0]['text'] + '<|endoftext|>' }}{% endgeneration %}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}"
)
WHO, SETS, WHAT = ("tuned", "grafted", "instruct", "base"), ("shape", "old"), ("loss", "sequence_accuracy")
Thing = tuple[str, str, tuple[str, str]]


def is_held_out(thing: Thing) -> bool:
    """A quarter of all combinations, such that every shape, colour and place also stands outside of it."""
    return (SHAPES.index(thing[0]) + list(COLOURS).index(thing[1]) + PLACES.index(thing[2])) % 4 == 0


def draw(thing: Thing, rng: random.Random) -> Image.Image:
    """The thing about its place, of a size that varies, on a dark ground with noise."""
    shape, colour, (row, column) = thing
    noise = np.random.default_rng(rng.getrandbits(64)).integers(0, 40, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    left, top = (1 + SIZE // 2 * (word in ("right", "bottom")) for word in (column, row))
    side = rng.randrange(10, 13)
    box = (left, top, left + side, top + side)
    pen, fill = ImageDraw.Draw(picture), tuple(value + rng.randrange(-20, 20) for value in COLOURS[colour])
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(left + side // 2, top), (left, top + side), (left + side, top + side)], fill=fill)
    return picture


def answers(thing: Thing) -> dict[str, tuple[str, str]]:
    """What is asked about a thing, by kind: question and answer."""
    shape, colour, place = thing
    where = " ".join(place)
    return {
        "caption": ("Describe it.", f"a {colour} {shape}, {where}"),
        "plain colour": ("Which colour?", colour),
        "plain place": ("Where?", where),
        "shape": ("Which shape?", shape),
        "colour": ("Which colour?", f"The colour is {colour}."),
        "place": ("Where?", f"You find it at the {where}."),
    }


def write(folder: Path, name: str, kinds: tuple[str, ...], count: int, held_out: bool, seed: int) -> Path:
    """Write ``count`` conversations about pictures of their own."""
    rng = random.Random(f"{name} {seed}")
    things = [thing for thing in ALL if is_held_out(thing) == held_out]
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        thing = things[i % len(things)] if held_out else rng.choice(things)
        draw(thing, rng).save(folder / name / f"{i}.png")
        question, answer = answers(thing)[kinds[i % len(kinds)] if not held_out else rng.choice(kinds)]
        turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"images": [f"{name}/{i}.png"], "messages": turns}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder / f"{name}.jsonl"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the words of all conversations."""
    texts = [part for thing in ALL for pair in answers(thing).values() for part in pair] + ["user\n", "assistant\n"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0], clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=list(SPECIAL[1:3]),
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """A LLaVA of two decoder layers and a vision tower of two, of random weights."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, "tie_word_embeddings": True,
            "initializer_range": 0.08, "max_position_embeddings": 128, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **shape,
        },
        vision_config={
            "model_type": "clip_vision_model", "image_size": SIZE, "patch_size": PATCH, "projection_dim": WIDTH,
            "initializer_range": 0.08, **shape,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, template: str | None) -> None:
    """Write a Hugging Face folder with the processor."""
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|im_end|>" if template else "<|endoftext|>"
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)  # they have their size already
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip


def fit(
    model: torch.nn.Module, folder: Path, sources: list[tuple[Path, str]], steps: int, lr: float, name: str
) -> None:
    """Train in place on batches of the sources in turn, each with its template; AdamW, warm-up, cosine."""
    pair, iterators = ModelPair(str(folder), str(folder)), []
    for number, (source, template) in enumerate(sources):
        path = folder.parent / f"{source.stem}-{number}.jinja"
        path.write_text(template)
        data = ShadowData(pair, train=str(source), chat_template=str(path), batch_size=48, cache=False)
        data.setup("fit")
        iterators.append(_forever(data))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    start, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rate = min(step / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        loss = model(**next(iterators[step % len(iterators)]), use_cache=False).loss
        loss.backward()
        total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 8) == 0:
            every = max(1, steps // 8)
            print(f"{name}: step {step} of {steps}, loss {total / every:.3f}, {time.perf_counter() - start:.0f} s")
            total = 0.0


def _forever(data: ShadowData):
    loader = data.train_dataloader()
    while True:
        yield from loader


def build(out: Path, base_steps: int, instruct_steps: int, seed: int) -> None:
    """Make ``out/base``, ``out/instruct`` and the data sets ``out/*.jsonl`` with their pictures."""
    torch.manual_seed(seed)
    captions = write(out, "captions", ("caption",), 1200, False, seed)
    plain = write(out, "plain", ("caption", "plain colour", "plain place"), 1200, False, seed)
    house = write(out, "house", ("colour", "place"), 800, False, seed)
    write(out, "train", ("shape",), 320, False, seed)
    write(out, "shape", ("shape",), 96, True, seed)
    write(out, "old", ("colour", "place"), 96, True, seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    save(model, tokenizer, out / "base", TEMPLATE)
    # Half of the rows in turns, so that the Base can follow a conversation.
    fit(model, out / "base", [(captions, CAPTIONS), (plain, TEMPLATE)], base_steps, 2e-3, "base")
    save(model, tokenizer, out / "base", None)
    save(model, tokenizer, out / "instruct", TEMPLATE)
    fit(model, out / "instruct", [(house, TEMPLATE)], instruct_steps, 1e-3, "instruct")
    save(model, tokenizer, out / "instruct", TEMPLATE)


def curves(metrics: Path) -> list[dict[str, float]]:
    """The validations of a run: one row each, by metric."""
    with metrics.open() as stream:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]
    return [row for row in rows if "val/grafted/loss" in row]


def report(rows: list[dict[str, float]]) -> str:
    """Loss and exact answers at every validation, as a table."""
    columns = [(who, name) for name in SETS for who in WHO]
    lines = ["| step | " + " | ".join(f"{who} {name}" for who, name in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for row in rows:
        cells = [
            f"{row[f'val/{who}/{name}/loss']:.3f}, {row[f'val/{who}/{name}/sequence_accuracy']:.0%}"
            for who, name in columns
        ]
        lines.append(f"| {row['step'] + 1:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """Loss and exact answers of all four models, on the new task and on what the Instruct could before."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for column, name in enumerate(SETS):
        for row, what in enumerate(WHAT):
            for who in WHO:
                style = {"ls": "--", "lw": 1} if who in ("instruct", "base") else {"marker": "o", "ms": 3}
                axes[row, column].plot(
                    [r["step"] + 1 for r in rows], [r[f"val/{who}/{name}/{what}"] for r in rows], label=who, **style
                )
            axes[row, column].set(title=f"{name}: {what}", xlabel="step" if row else "")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Build, train, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/pictures", help="folder of the pair and the run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the curves")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--instruct-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-build", action="store_true", help="take the pair that is there")
    args, more = parser.parse_known_args()
    start = time.perf_counter()
    if not args.skip_build:
        build(args.out, args.base_steps, args.instruct_steps, args.seed)
    built = time.perf_counter() - start
    out = args.out
    sets = json.dumps({name: str(out / f"{name}.jsonl") for name in ("shape", "old")})
    command = [
        sys.executable, "-m", "shadowlit", "fit", "--config", str(ROOT / "configs/pictures.yaml"),
        f"--pair.base={out / 'base'}", f"--pair.instruct={out / 'instruct'}", f"--data.train={out / 'train.jsonl'}",
        f"--data.validation={sets}", f"--run.root={out}", *more,
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    run = max((out / "pictures").glob("version_*"), key=lambda path: path.stat().st_mtime)
    rows = curves(run / "metrics.csv")
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "curves.csv").open("w", newline="") as stream:
        names = ["step", *(f"val/{who}/{name}/{what}" for name in SETS for what in WHAT for who in WHO)]
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([names, *([f"{row[name]:.6g}" for name in names] for row in rows)])
    plot(rows, args.results / "curves.png")
    print(report(rows))
    print(f"built in {built:.0f} s, trained and grafted in {time.perf_counter() - start - built:.0f} s")


if __name__ == "__main__":
    main()
