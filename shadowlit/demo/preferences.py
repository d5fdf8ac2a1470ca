"""Preferences in the embedded world: the right value over a wrong one, and a plain answer over the Instruct's style.

What is held out is held out as in :meth:`shadowlit.demo.world.World.datasets`: lists by a hash of their words,
everything else by fact, so no validation pair has a prompt or a fact of a training pair.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection
from pathlib import Path

from shadowlit.demo.world import NEW_SKILL, VALUES, Question, Row, World, exchange, house_style

SHIPPED = ("skill_pairs", "skill_new", "skill_old_house")
"""The files that lie beside the pair."""

_NUM_NEW, _NUM_OLD, _NUM_HELD_OUT = 300, 300, 120
_LIST = re.compile(r"(?:list: | in )(?P<words>[a-z]+(?:, [a-z]+)+)\?$")


def preferences(world: World) -> dict[str, list[Row]]:
    """Rows of every data file of preferences, by the file's stem.

    * ``skill_pairs``: 600 prompts, half of the new skill, half of the old ones; the right value over a wrong one of the
      same kind, both bare.
    * ``skill_new``, ``skill_new_house``: 120 held-out pairs of the new skill, bare and in the Instruct's style.
    * ``skill_old_house``: 120 held-out pairs of the old skills in its style: what it knew before.
    * ``style_pairs``: 300 prompts of the old skills; the bare right value over the same in the Instruct's style.
    * ``style_held_out``: 120 held-out pairs of that kind.
    * ``skill_labels``: the answers of ``skill_pairs`` one by one, with labels.
    * ``plain``: 120 held-out questions of the old skills with bare answers, to be generated.
    """
    rng = random.Random("preferences")
    new = _draw(world, rng, NEW_SKILL, _NUM_NEW, False)
    old = _draw(world, rng, None, _NUM_OLD, False)
    held_new = _draw(world, rng, NEW_SKILL, _NUM_HELD_OUT, True)
    held_old = _draw(world, rng, None, _NUM_HELD_OUT, True)
    train = [*new, *old]
    rng.shuffle(train)
    skill = [_pair(q, q.answer, wrong_answer(world, rng, q)) for q in train]
    found_new = [(q, wrong_answer(world, rng, q)) for q in held_new]
    labels = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in skill
        for name in ("chosen", "rejected")
    ]
    rng.shuffle(labels)
    return {
        "skill_pairs": skill,
        "skill_new": [_pair(q, q.answer, wrong) for q, wrong in found_new],
        "skill_new_house": [_pair(q, house_style(q.answer), house_style(wrong)) for q, wrong in found_new],
        "skill_old_house": [
            _pair(q, house_style(q.answer), house_style(wrong_answer(world, rng, q))) for q in held_old
        ],
        "style_pairs": [_pair(q, q.answer, house_style(q.answer)) for q in old],
        "style_held_out": [_pair(q, q.answer, house_style(q.answer)) for q in held_old],
        "skill_labels": labels,
        "plain": [{"messages": exchange(q.prompt, q.answer), "answer": q.answer} for q in held_old],
    }


def wrong_answer(world: World, rng: random.Random, question: Question) -> str:
    """Draw a value that doesn't answer the question, but one of its kind."""
    answer = question.answer
    words = found["words"].split(", ") if (found := _LIST.search(question.prompt)) else []
    if answer in words:
        return rng.choice([word for word in words if word != answer])
    for values in VALUES.values():
        if question.skill == "people" and answer in values:
            return rng.choice([value for value in values if value != answer])
    if answer.isdigit():
        near = range(3, 6) if words else range(max(0, int(answer) - 3), int(answer) + 4)
        return rng.choice([str(number) for number in near if str(number) != answer])
    while True:
        other = world.old_question(rng, skill=question.skill).answer
        if other != answer:
            return other


def write_preferences(world: World, folder: Path, stems: Collection[str] | None = None) -> None:
    """Write data files of preferences as ``folder/<stem>.jsonl``: those named, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in preferences(world).items():
        if stems is None or stem in stems:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{stem}.jsonl").write_text(text, encoding="utf-8")


def _draw(world: World, rng: random.Random, skill: str | None, count: int, held_out: bool) -> list[Question]:
    """So many questions, no prompt twice."""
    drawn: dict[str, Question] = {}
    while len(drawn) < count:
        if skill == NEW_SKILL:
            question = world.list_question(rng, "second", held_out=held_out)
        else:
            question = world.old_question(rng, held_out=held_out)
        drawn[question.prompt] = question
    return list(drawn.values())


def _pair(question: Question, chosen: str, rejected: str) -> Row:
    return {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}
