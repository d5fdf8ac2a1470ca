"""Preferences in the embedded world: the right value over a wrong one, and a bare answer over the Instruct's style.

Lists are held out by a hash of their words and everything else by fact, as in
:meth:`experiments.embedded.world.World.datasets`, so that no validation pair shares a prompt or a fact with a training
pair.
"""

from __future__ import annotations

import random
import re

from experiments.embedded.world import NEW_SKILL, VALUES, Question, Row, World, exchange, house_style

SHIPPED = ("skill_pairs", "skill_new", "skill_old_house")
"""The files that are shipped with the pair."""

_NUM_NEW, _NUM_OLD, _NUM_HELD_OUT = 300, 300, 120
_LIST = re.compile(r"(?:list: | in )(?P<words>[a-z]+(?:, [a-z]+)+)\?$")


def preferences(world: World) -> dict[str, list[Row]]:
    """Rows of every data file of preferences, by the file's stem.

    * ``skill_pairs``: 600 prompts, half of the new skill, half of the old ones; the right value over a wrong one of the
      same kind, both bare.
    * ``skill_new``, ``skill_new_house``: 120 held-out pairs of the new skill, bare and in the Instruct's style.
    * ``skill_old_house``: 120 held-out pairs of the old skills in its style: what it knew before.
    * ``style_pairs``: 300 prompts of the old skills; the bare right value over the same in the Instruct's style.
    * ``style_held_out``: 120 held-out pairs like those of ``style_pairs``.
    * ``skill_labels``: the answers of ``skill_pairs`` one by one, with labels.
    * ``plain``: 120 held-out questions of the old skills with bare answers, to be generated.
    """
    rng = random.Random("preferences")
    new = world.distinct_questions(rng, NEW_SKILL, _NUM_NEW, held_out=False)
    old = world.distinct_questions(rng, None, _NUM_OLD, held_out=False)
    held_new = world.distinct_questions(rng, NEW_SKILL, _NUM_HELD_OUT, held_out=True)
    held_old = world.distinct_questions(rng, None, _NUM_HELD_OUT, held_out=True)
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
    """Draw a wrong value of the same kind as the answer."""
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


def _pair(question: Question, chosen: str, rejected: str) -> Row:
    return {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}
