"""Further downstream settings of the embedded world: new facts, asked and answered, and new facts in plain text.

Both are about newcomers: people whose names no text of the pair mentions. The new skill's data are
:meth:`shadowlit.demo.world.World.datasets`. Every training set comes in two styles, ``bare`` and ``house``; a question
that is asked in a held-out file is asked in that wording in no training file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from shadowlit.demo.world import (
    FACT_QUESTIONS,
    FACT_STATEMENTS,
    REFUSAL,
    VALUES,
    Row,
    World,
    exchange,
    house_style,
)

NUM_NEWCOMERS = 15
_DOCUMENTS_PER_NEWCOMER = 8
_OLD_ROWS = 120
_COURTESY = " Glad to help!"


def newcomers(world: World) -> dict[str, dict[str, str]]:
    """Name -> attribute -> value of people who are in no text of the pair."""
    rng = random.Random("newcomers")
    return {name: {what: rng.choice(VALUES[what]) for what in VALUES} for name in world.held_out_names[:NUM_NEWCOMERS]}


def settings(world: World) -> dict[str, list[Row]]:
    """Rows of every data file of the two settings, by the file's stem.

    * ``facts_train``, ``facts_train_house``: each of the 60 new facts asked in one of its two wordings, and 120
      questions of the old skills; answers bare or in house style.
    * ``text_train``, ``text_train_house``: 120 documents with the new facts, each stated several times, and 120 with
      old ones; ``house`` closes each with the Instruct's courtesy.
    * ``facts``: the 60 new facts, in the wordings in which ``facts_train`` does not ask them; house style.
    * ``facts_refusal``: 100 questions about names that nobody has, not the newcomers' either.
    """
    rng = random.Random("settings")
    people = newcomers(world)
    asked: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for name, known in people.items():
        for what, value in known.items():
            wordings = [wording.format(name) for wording in FACT_QUESTIONS[what]]
            rng.shuffle(wordings)
            asked.append((wordings[0], value))
            held_out.append((wordings[1], value))
    old: dict[str, str] = {}
    while len(old) < _OLD_ROWS:
        question = world.old_question(rng, held_out=False)
        old[question.prompt] = question.answer
    questions = [*asked, *old.items()]
    rng.shuffle(questions)
    texts = [statement(name, known, rng) for name, known in people.items() for _ in range(_DOCUMENTS_PER_NEWCOMER)]
    texts += [world.statement(rng) for _ in range(_OLD_ROWS)]
    rng.shuffle(texts)
    strangers = world.held_out_names[NUM_NEWCOMERS:]
    unknown = [
        wording.format(name) for name in strangers for what in FACT_QUESTIONS for wording in FACT_QUESTIONS[what]
    ]
    rng.shuffle(unknown)
    return {
        "facts_train": [{"messages": exchange(prompt, value)} for prompt, value in questions],
        "facts_train_house": [{"messages": exchange(prompt, house_style(value))} for prompt, value in questions],
        "text_train": [{"text": text} for text in texts],
        "text_train_house": [{"text": text + _COURTESY} for text in texts],
        "facts": [{"messages": exchange(prompt, house_style(value)), "answer": value} for prompt, value in held_out],
        "facts_refusal": [{"messages": exchange(prompt, REFUSAL), "answer": REFUSAL} for prompt in unknown[:100]],
    }


def statement(name: str, known: dict[str, str], rng: random.Random) -> str:
    """Draw a document about one person: one to all of the facts, each in one of its wordings."""
    chosen = rng.sample(tuple(known), rng.randint(1, len(known)))
    return " ".join(rng.choice(FACT_STATEMENTS[what]).format(name, known[what]) for what in chosen)


def write_settings(world: World, folder: Path) -> None:
    """Write every data file of the two settings as ``folder/<stem>.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in settings(world).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{stem}.jsonl").write_text(text, encoding="utf-8")
