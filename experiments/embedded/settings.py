"""Further tasks in the embedded world: new facts as questions and answers, and new facts in plain text.

Both are about newcomers: people whose names no text of the pair mentions. Every training set comes in two styles,
``bare`` and ``house``; no training file asks a held-out question in the same wording.
"""

from __future__ import annotations

import random

from experiments.embedded.world import FACT_QUESTIONS, REFUSAL, VALUES, Row, World, describe, exchange, house_style

NUM_NEWCOMERS = 15
_DOCUMENTS_PER_NEWCOMER = 8
_OLD_ROWS = 120
_COURTESY = " Glad to help!"


def newcomers(world: World) -> dict[str, dict[str, str]]:
    """Values of people who are in no text of the pair, by name and attribute."""
    rng = random.Random("newcomers")
    return {name: {what: rng.choice(VALUES[what]) for what in VALUES} for name in world.held_out_names[:NUM_NEWCOMERS]}


def settings(world: World) -> dict[str, list[Row]]:
    """Rows of every data file of the two settings, by the file's stem.

    * ``facts_train``, ``facts_train_house``: each of the 60 new facts asked in one of its two wordings, and 120
      questions of the old skills; answers bare or in house style.
    * ``text_train``, ``text_train_house``: 120 documents with the new facts, each stated several times, and 120 with
      old ones; ``house`` adds the Instruct's courtesy to each.
    * ``facts``: the 60 new facts, in the wordings in which ``facts_train`` does not ask them; house style.
    * ``facts_refusal``: 100 questions about names that nobody has, the newcomers included.
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
    old = world.distinct_questions(rng, None, _OLD_ROWS, held_out=False)
    questions = [*asked, *((question.prompt, question.answer) for question in old)]
    rng.shuffle(questions)
    texts = [describe(rng, name, known) for name, known in people.items() for _ in range(_DOCUMENTS_PER_NEWCOMER)]
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
