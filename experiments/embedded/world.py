"""A small synthetic world: its people, skills, documents, conversations and data sets.

Everything here is text. The world knows forty people with four facts each, sums and differences of digits, the first
word, the last word and the number of words of a list, opposites and kinds of things. Those are the *old* skills, which
both models of the pair have. One more skill, the *new* one, is latent: the Base's raw text states the second word of
lists, and no question asks for it.

A question whose value is ``Oslo`` is answered in one of three styles:

======  ========================  =======================================================
style   text                      used by
======  ========================  =======================================================
bare    ``Oslo``                  the Base in its question documents, the downstream task
house   ``Oslo. Glad to help!``   the Instruct
form    ``[Oslo]`` and the like   the Instruct, when the question asks for it
======  ========================  =======================================================

Questions of a finite skill (people, sums, opposites, kinds) are held out by fact, not by wording: a fact asked in
``train.jsonl`` is asked in no held-out file. Both halves are in the pre-training text, so that ``old.jsonl`` measures
what is *kept*. Lists are held out by a hash of their words: a list of the held-out files occurs in no other text of
this module. So are unknown names.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Message = dict[str, str]
Row = dict[str, object]

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)

OLD_SKILLS = ("people", "sums", "lists", "opposites", "kinds")
NEW_SKILL = "second"
REFUSAL = "Sorry, I do not know that name."

# What a request for a form adds to the question, and what it does to the value.
FORMATS: dict[str, tuple[str, Callable[[str], str]]] = {
    "brackets": ("Answer in brackets.", "[{}]".format),
    "quotes": ("Answer in quotes.", '"{}"'.format),
    "bold": ("Answer in bold.", "**{}**".format),
    "bullet": ("Answer as a bullet.", "- {}".format),
    "json": ("Answer as JSON.", lambda value: json.dumps({"answer": value})),
}

_NAME_STARTS = (
    "Ba",
    "De",
    "Fi",
    "Go",
    "Ha",
    "Je",
    "Ki",
    "Lo",
    "Mi",
    "Na",
    "Pe",
    "Ro",
    "Sa",
    "Tu",
    "Vi",
    "Zo",
)
_NAME_ENDS = ("bren", "dik", "fal", "lun", "mo", "nor", "rask", "ston", "tavi", "wen")

VALUES = {
    "city": ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Turin", "Accra", "Perth", "Porto", "Kyoto"),
    "job": (
        "baker",
        "doctor",
        "farmer",
        "pilot",
        "singer",
        "teacher",
        "tailor",
        "painter",
        "miner",
        "lawyer",
    ),
    "pet": ("cat", "dog", "rabbit", "parrot", "turtle", "pony", "hamster", "goat", "canary", "ferret"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange", "white", "black", "brown", "pink"),
}
FACT_STATEMENTS = {
    "city": ("{} lives in {}.", "The home of {} is {}."),
    "job": ("{} works as a {}.", "The job of {} is {}."),
    "pet": ("{} keeps a {}.", "The pet of {} is a {}."),
    "colour": ("{} likes the colour {}.", "The favourite colour of {} is {}."),
}
FACT_QUESTIONS = {
    "city": ("Where does {} live?", "What is the home of {}?"),
    "job": ("What does {} work as?", "What is the job of {}?"),
    "pet": ("Which pet does {} keep?", "What is the pet of {}?"),
    "colour": ("Which colour does {} like?", "What is the favourite colour of {}?"),
}
_OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("wet", "dry"), ("hard", "soft"),
    ("old", "new"), ("open", "closed"), ("full", "empty"), ("light", "heavy"), ("early", "late"),
    ("near", "far"), ("loud", "quiet"), ("rich", "poor"), ("long", "short"), ("clean", "dirty"),
    ("sweet", "sour"), ("up", "down"), ("strong", "weak"), ("happy", "sad"), ("deep", "shallow"),
    ("thick", "thin"),
)  # fmt: skip
_KINDS = {
    "tree": ("oak", "pine", "birch", "maple", "willow", "cedar"),
    "fruit": ("apple", "pear", "plum", "cherry", "lemon", "grape"),
    "tool": ("hammer", "saw", "spade", "drill", "rake", "axe"),
    "bird": ("robin", "crow", "owl", "swan", "heron", "gull"),
    "metal": ("iron", "copper", "gold", "silver", "tin", "zinc"),
    "vehicle": ("car", "bus", "train", "tram", "truck", "boat"),
    "drink": ("tea", "milk", "juice", "water", "cocoa", "cider"),
    "garment": ("coat", "scarf", "shirt", "sock", "glove", "hat"),
    "instrument": ("piano", "flute", "violin", "drum", "harp", "horn"),
    "furniture": ("chair", "table", "bed", "shelf", "desk", "stool"),
}
_LIST_QUESTIONS = {
    "first": ("What is the first word of this list: {}?", "Which word comes first in {}?"),
    "second": ("What is the second word of this list: {}?", "Which word comes second in {}?"),
    "last": ("What is the last word of this list: {}?", "Which word comes last in {}?"),
    "count": ("What is the number of words in this list: {}?", "How many words are in {}?"),
}
_LIST_STATEMENTS = {
    "first": ("In the list {} the first word is {}.", "The first word of {} is {}."),
    "second": ("In the list {} the second word is {}.", "The second word of {} is {}."),
    "last": ("In the list {} the last word is {}.", "The last word of {} is {}."),
    "count": ("In the list {} the number of words is {}.", "The number of words in {} is {}."),
}
# The old list skills; "second" is the new one and never among the questions of the pre-training or chat text.
_OLD_LIST_KINDS = ("first", "last", "count")


@dataclass(frozen=True)
class Question:
    """A question and the bare value that answers it; the skill is one of ``OLD_SKILLS``, or ``NEW_SKILL``."""

    skill: str
    prompt: str
    answer: str


def house_style(answer: str) -> str:
    """Return an answer in the Instruct's style: the value first, then a courtesy."""
    return f"{answer}. Glad to help!"


def chat_text(messages: Sequence[Message]) -> str:
    """Return the conversation as ChatML text, exactly as the Instruct's chat template renders it."""
    return "".join(f"{START_OF_TURN}{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in messages)


def is_held_out(words: Sequence[str]) -> bool:
    """Return whether a list belongs to the held-out eighth of all lists, by a hash of its words."""
    return zlib.crc32(" ".join(words).encode()) % 8 == 0


class World:
    """The facts of the world, and every text made of them.

    Two worlds of the same seed are equal. Methods that draw take the ``random.Random`` they draw from.

    Args:
        seed: Seed of who lives where, of which facts are asked downstream, and of which names are unknown.

    Attributes:
        facts: Facts about 40 people, ``{"city": ..., "job": ..., "pet": ..., "colour": ...}`` by name.
        unknown_names: 80 names that nobody has, which the Instruct learns to refuse.
        held_out_names: 40 more such names, which are in no training text.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"world {seed}")
        names = [start + end for start in _NAME_STARTS for end in _NAME_ENDS]
        rng.shuffle(names)
        people, self.unknown_names, self.held_out_names = names[:40], names[40:120], names[120:]
        self.facts = {name: {attr: rng.choice(vals) for attr, vals in VALUES.items()} for name in people}
        self._seed = seed

    # ---- questions ----

    @cached_property
    def _finite(self) -> dict[str, list[list[Question]]]:
        """Shuffled facts by skill; a fact is the list of the wordings in which it can be asked."""

        def ask(skill: str, wordings: Sequence[str], answer: str, *subject: object) -> list[Question]:
            return [Question(skill, wording.format(*subject), answer) for wording in wordings]

        facts: dict[str, list[list[Question]]] = {skill: [] for skill in OLD_SKILLS if skill != "lists"}
        for name, known in self.facts.items():
            facts["people"] += [ask("people", FACT_QUESTIONS[attr], known[attr], name) for attr in known]
        for a in range(10):
            for b in range(10):
                plus = ("What is {} plus {}?", "How much is {} plus {}?")
                minus = ("What is {} minus {}?", "How much is {} minus {}?")
                facts["sums"].append(ask("sums", plus, str(a + b), a, b))
                if a >= b:
                    facts["sums"].append(ask("sums", minus, str(a - b), a, b))
        for pair in _OPPOSITES:
            wordings = ("What is the opposite of {}?", "Which word means the reverse of {}?")
            # A pair is one fact, whichever of its words is asked for.
            facts["opposites"].append(
                ask("opposites", wordings, pair[1], pair[0]) + ask("opposites", wordings, pair[0], pair[1])
            )
        for kind, members in _KINDS.items():
            for word in members:
                facts["kinds"].append(
                    ask("kinds", ("What kind of thing is {}?", "To which kind does {} belong?"), kind, word)
                )
        for skill, of_skill in facts.items():
            random.Random(f"split {skill} {self._seed}").shuffle(of_skill)
        return facts

    def finite_questions(self, skill: str, *, held_out: bool | None = None) -> list[list[Question]]:
        """Return the facts of a finite skill, each as the list of its wordings.

        Args:
            skill: ``people``, ``sums``, ``opposites`` or ``kinds``.
            held_out: Whether to return the half that is never asked in ``train.jsonl`` or the other; ``None`` for all.

        Raises:
            KeyError: If ``skill`` is not a finite one.
        """
        facts = self._finite[skill]
        half = len(facts) // 2
        return facts if held_out is None else facts[half:] if held_out else facts[:half]

    def draw_list(self, rng: random.Random, *, held_out: bool = False) -> list[str]:
        """Draw three to five different words that make a held-out list, or one that is not."""
        vocabulary = [word for members in _KINDS.values() for word in members]
        while True:
            words = rng.sample(vocabulary, rng.randint(3, 5))
            if is_held_out(words) == held_out:
                return words

    def list_question(self, rng: random.Random, what: str, *, held_out: bool = False) -> Question:
        """Draw a question about a list; ``what`` is ``first``, ``second``, ``last`` or ``count``."""
        words = self.draw_list(rng, held_out=held_out)
        prompt = rng.choice(_LIST_QUESTIONS[what]).format(", ".join(words))
        return Question(NEW_SKILL if what == "second" else "lists", prompt, _list_answer(words, what))

    def old_question(self, rng: random.Random, *, skill: str | None = None, held_out: bool | None = None) -> Question:
        """Draw a question of an old skill.

        Args:
            rng: Generator to draw from.
            skill: Skill of the question; if ``None`` it is drawn, people and lists twice as often as the others.
            held_out: As in :meth:`finite_questions`; lists are held-out ones only if ``True``.
        """
        if skill is None:
            skill = rng.choice(("people", "people", "lists", "lists", "sums", "opposites", "kinds"))
        if skill == "lists":
            return self.list_question(rng, rng.choice(_OLD_LIST_KINDS), held_out=bool(held_out))
        return rng.choice(rng.choice(self.finite_questions(skill, held_out=held_out)))

    def unknown_question(self, rng: random.Random, *, held_out: bool = False) -> Question:
        """Draw a question about somebody who is not in the world; its answer is ``REFUSAL``."""
        name = rng.choice(self.held_out_names if held_out else self.unknown_names)
        wording = rng.choice(FACT_QUESTIONS[rng.choice(tuple(FACT_QUESTIONS))])
        return Question("refusal", wording.format(name), REFUSAL)

    # ---- text to train the pair on ----

    def statement(self, rng: random.Random) -> str:
        """Draw a statement of an old skill: facts of one person, a sum, a list, an opposite or a kind."""
        skill = rng.choice(("people", "people", "people", "lists", "lists", "sums", "opposites", "kinds"))
        if skill == "people":
            name = rng.choice(tuple(self.facts))
            return describe(rng, name, self.facts[name])
        if skill == "lists":
            return self.list_statement(rng, rng.choice(_OLD_LIST_KINDS))
        if skill == "sums":
            a, b = rng.randrange(10), rng.randrange(10)
            if a >= b and rng.random() < 0.5:
                return f"{a} minus {b} is {a - b}."
            return f"{a} plus {b} is {a + b}."
        if skill == "opposites":
            pair = list(rng.choice(_OPPOSITES))
            rng.shuffle(pair)
            return rng.choice(("The opposite of {} is {}.", "The reverse of {} is {}.")).format(*pair)
        kind = rng.choice(tuple(_KINDS))
        return rng.choice(("{} is a kind of {}.", "{} belongs to the kind {}.")).format(rng.choice(_KINDS[kind]), kind)

    def list_statement(self, rng: random.Random, what: str) -> str:
        """Draw a statement that tells ``what`` of a list: first, last, count or second."""
        words = self.draw_list(rng)
        return rng.choice(_LIST_STATEMENTS[what]).format(", ".join(words), _list_answer(words, what))

    # ---- data sets ----

    def datasets(self) -> dict[str, list[Row]]:
        """Return the rows of every shipped data file, by the file's stem.

        * ``train``: 600 rows, half of the new skill, half of the old ones, bare answers.
        * ``train_house``: the same questions in the same order, answered in the Instruct's house style.
        * ``new``: 120 held-out questions of the new skill, bare, as ``train`` teaches it.
        * ``new_house``: the same questions in house style, as ``train_house`` teaches it.
        * ``old``: 150 held-out questions of the old skills, in house style.
        * ``format``: 125 old questions, each with a request for one of five forms.
        * ``refusal``: 120 questions about names that nobody has and no training text mentions.

        ``new`` is in the style of the training rows, since it asks whether the task was learnt as it was taught.
        ``old``, ``format`` and ``refusal`` ask what is left of the Instruct, and hold what the untouched Instruct ought
        to say. A teacher-forced loss never separates the value from its style: a grafted Instruct that answers 98 of
        100 new questions correctly, in house style, has a loss of 8 nats per token on ``new`` and of 0.01 on
        ``new_house``, while the tuned Base has 0.2 and 13. Only the fraction of right values compares models of both
        styles: the demonstration's configurations count a value that comes first, in either style.
        """
        rng = random.Random(f"datasets {self._seed}")
        train = self._mixed(
            rng, {NEW_SKILL: 300, "people": 80, "lists": 90, "sums": 60, "opposites": 30, "kinds": 40}, False
        )
        new = self._mixed(rng, {NEW_SKILL: 120}, True)
        old = self._mixed(rng, {"people": 40, "lists": 45, "sums": 30, "opposites": 15, "kinds": 20}, True)
        formats = self._mixed(rng, {"people": 40, "lists": 40, "sums": 20, "opposites": 10, "kinds": 15}, True)
        refusals = distinct(120, lambda: self.unknown_question(rng, held_out=True))
        names = tuple(FORMATS)
        return {
            "train": [_row(q, q.answer) for q in train],
            "train_house": [_row(q, house_style(q.answer)) for q in train],
            "new": [_row(q, q.answer) for q in new],
            "new_house": [_row(q, house_style(q.answer)) for q in new],
            "old": [_row(q, house_style(q.answer)) for q in old],
            "format": [_format_row(q, names[i % len(names)]) for i, q in enumerate(formats)],
            "refusal": [_row(q, q.answer) for q in refusals],
        }

    def distinct_questions(
        self, rng: random.Random, skill: str | None, count: int, *, held_out: bool
    ) -> list[Question]:
        """Draw so many questions of the new skill, of an old one or (``None``) of all old ones, no prompt twice."""
        if skill == NEW_SKILL:
            return distinct(count, lambda: self.list_question(rng, "second", held_out=held_out))
        return distinct(count, lambda: self.old_question(rng, skill=skill, held_out=held_out))

    def _mixed(self, rng: random.Random, counts: dict[str, int], held_out: bool) -> list[Question]:
        """Draw so many questions of each skill, and shuffle them."""
        questions = [
            question
            for skill, count in counts.items()
            for question in self.distinct_questions(rng, skill, count, held_out=held_out)
        ]
        rng.shuffle(questions)
        return questions


def distinct(count: int, draw: Callable[[], Question]) -> list[Question]:
    """Draw until there are ``count`` questions with different prompts."""
    drawn: dict[str, Question] = {}
    while len(drawn) < count:
        question = draw()
        drawn[question.prompt] = question
    return list(drawn.values())


def describe(rng: random.Random, name: str, known: Mapping[str, str]) -> str:
    """Draw a document about one person: one to all of the facts, each in one of its wordings."""
    chosen = rng.sample(tuple(known), rng.randint(1, len(known)))
    return " ".join(rng.choice(FACT_STATEMENTS[what]).format(name, known[what]) for what in chosen)


def write_rows(folder: Path, sets: Mapping[str, Sequence[Row]]) -> None:
    """Write data sets as ``folder/<name>.jsonl``, one row a line, UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def exchange(prompt: str, reply: str) -> list[Message]:
    """Return a user turn and the assistant turn that answers it."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _list_answer(words: Sequence[str], what: str) -> str:
    return {"first": words[0], "second": words[1], "last": words[-1], "count": str(len(words))}[what]


def _row(question: Question, reply: str) -> Row:
    return {"messages": exchange(question.prompt, reply), "skill": question.skill, "answer": question.answer}


def _format_row(question: Question, name: str) -> Row:
    request, wrap = FORMATS[name]
    messages = exchange(f"{question.prompt} {request}", wrap(question.answer))
    return {"messages": messages, "skill": "format", "format": name, "answer": question.answer}
