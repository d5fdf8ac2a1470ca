"""Copies of questions that ask the same: other names, other numbers, a sentence that doesn't matter.

A model that has learned to solve a question solves its copy too; one that remembers it may not. The idea is that of
GSM-Symbolic and GSM-NoOp (arXiv 2410.05229), without templates written by hand: a row whose copy has no certain answer
is left alone. Pure functions of a row and a random generator.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

Perturbation = Literal["names", "numbers", "words", "distractors"]
PERTURBATIONS: tuple[str, ...] = get_args(Perturbation)

Row = Mapping[str, Any]

# fmt: off
_SENTENCES = (
    "A neighbor's cat is {n} years old.", "The library around the corner opened {n} years ago.",
    "The sign on the street has {n} letters.", "A poster on the wall shows {n} mountains.",
    "The nearest bus stop is called number {n}.", "An old song about the town has {n} verses.",
    "A cousin who lives far away turned {n} last week.", "The radio in the kitchen has {n} buttons.",
    "The local newspaper has a page with {n} jokes.", "A museum in another city owns {n} old clocks.",
)
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_QUANTITIES = {
    **{word: value for value, word in enumerate(_UNITS)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
    "half": 2, "twice": 2, "double": 2, "doubled": 2, "pair": 2, "couple": 2, "both": 2, "third": 3, "thrice": 3,
    "triple": 3, "tripled": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fifth": 5, "sixth": 6, "week": 7,
    "dozen": 12, "score": 20, "hundred": 100, "thousand": 1000,
}
# What a solution may know without being given: halves, days, months, hours, minutes, weeks, per cent.
_CONSTANTS = frozenset(map(Fraction, (
    "0", "1", "2", "3", "4", "7", "10", "12", "24", "30", "31", "52", "60", "100", "365", "1000",
    "1/2", "1/4", "1/10", "1/100", "3/4",
)))
# fmt: on
_WORD = re.compile(r"\b[A-Z][a-z]+\b")
_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")
# Not where a sign belongs to the number: $5, 5$, #5, 5", 5°, 2*5.
_WHOLE = re.compile(r"""(?<![\w.,$€£#"'′″’/:%*+=^-])\d{1,3}(?![\w$€£%°"'′″’/:*+=^-]|[.,]\d)""")
_PER_CENT = re.compile(rf"({_NUMBER.pattern})\s*(?:%|per ?cent)")
_STEP = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
# A result without an annotation: what stands behind "=" up to its unit, unless another "=" follows.
_BARE_RESULT = re.compile(r"=(?![^<>]*>>)[\s$]*[\d.][\d.,$%()/*+×x\s-]*+(?![=<])")
_FINAL = re.compile(r"####\s*(-?[\d,.]+)\s*$")
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)[.!?][\"'”’)]*\s+(?=\S)")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_TRIES = 30


def perturb(kind: str, row: Row, field: str, seed: int, index: int) -> dict[str, Any] | None:
    """Return a copy of a row that asks the same in another way; None if its answer isn't certain.

    ``names``: common first names in the question become others of the same gender, in all texts of the row.
    ``numbers``: numbers of the question become others, and the answer is computed again. It takes a solution with
    annotations as in GSM8K (``<<16-3-4=9>>9``, ``#### 9``) whose whole chain recomputes before and after; every result
    must be annotated, and every number must come from the question, an earlier step, or be a usual constant (12 months,
    100 per cent).
    ``words``: whole numbers below 1,000 are written in words. ``distractors``: a sentence that doesn't matter is
    inserted before the question's last one.

    Args:
        kind: One of :data:`PERTURBATIONS`.
        row: Columns by name; all that hold text are kept consistent.
        field: Column with the question.
        seed: Seed of all choices, together with ``index`` and ``kind``.
        index: Number of the row in its file.
    """
    if not isinstance(row.get(field), str):
        return None
    return _FUNCTIONS[kind](dict(row), field, random.Random(f"{seed} {kind} {index}"))


@cache
def _first_names() -> dict[str, tuple[str, ...]]:
    """The names that may take its place, by name."""
    lists = yaml.safe_load((files("shadowlit.harness") / "names.yaml").read_text(encoding="utf-8")).values()
    return {name: tuple(names) for names in lists for name in names}


def _names(row: dict[str, Any], field: str, rng: random.Random) -> dict[str, Any] | None:
    known = _first_names()
    taken = set(re.findall(r"\b[A-Z]\w+\b", " ".join(_texts(row))))
    new: dict[str, str] = {}
    for name in dict.fromkeys(word for word in _WORD.findall(row[field]) if word in known):
        new[name] = rng.choice([other for other in known[name] if other not in taken])
        taken.add(new[name])
    return _mapped(row, lambda text: _WORD.sub(lambda match: new.get(match[0], match[0]), text)) if new else None


def _words(row: dict[str, Any], field: str, rng: random.Random) -> dict[str, Any] | None:
    text = row[field]

    def spelled(match: re.Match[str]) -> str:
        word = in_words(int(match[0]))
        starts = not text[: match.start()].strip() or re.search(r"[.!?]\s+$", text[: match.start()])
        return word.capitalize() if starts else word

    changed = _WHOLE.sub(spelled, text)
    return {**row, field: changed} if changed != text else None


def _distractors(row: dict[str, Any], field: str, rng: random.Random) -> dict[str, Any] | None:
    text, sentence = row[field], rng.choice(_SENTENCES).format(n=rng.randint(5, 40))
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    at = ends[-1] if ends else 0
    return {**row, field: f"{text[:at]}{sentence} {text[at:]}"}


def _numbers(row: dict[str, Any], field: str, rng: random.Random) -> dict[str, Any] | None:
    solutions = [name for name, text in row.items() if name != field and isinstance(text, str) and _STEP.search(text)]
    if len(solutions) != 1:
        return None
    question, solution = row[field], row[solutions[0]]
    changes: dict[Fraction, Fraction] = {}
    for value in _changeable(question, solution):
        step = max(1, int(value) // 2)
        for _ in range(_TRIES):
            drawn = Fraction(max(2, int(value) + rng.randint(-step, step)))
            found = _recomputed(question, solution, {**_given(changes, question), value: drawn})
            if drawn != value and found is not None:
                changes = found
                break
    if not changes:
        return None
    new = lambda text: _NUMBER.sub(lambda match: _renumbered(match[0], changes), text)  # noqa: E731
    return {**row, field: new(question), solutions[0]: new(solution)}


def _given(changes: Mapping[Fraction, Fraction], question: str) -> dict[Fraction, Fraction]:
    """Those of the changes that are made to the question itself."""
    own = set(_values(question))
    return {old: new for old, new in changes.items() if old in own}


def _changeable(question: str, solution: str) -> list[Fraction]:
    """The whole numbers of a question that a solution computes with, if each occurs once and no other has its value."""
    values, words = _values(question), _spoken(question)
    used = {value for expression, _ in _STEP.findall(solution) for value in _values(expression)}
    return [
        value
        for value in dict.fromkeys(values)
        if value.denominator == 1
        and value > 2
        and values.count(value) == 1
        and value in used
        and value not in words
        and value not in _CONSTANTS
    ]


def _recomputed(question: str, solution: str, given: Mapping[Fraction, Fraction]) -> dict[Fraction, Fraction] | None:
    """All values that change with those of the question, results included; None unless the chain recomputes."""
    if _BARE_RESULT.search(solution):
        return None  # it would stay as it is, and its value may be taken for a constant
    asked = set(_values(question))
    known = asked | _spoken(question) | {value / 100 for value in asked} | {1 + value / 100 for value in asked}
    known |= {1 - value / 100 for value in asked} | _CONSTANTS
    rates = given.keys() & {_value(match[1]) for match in _PER_CENT.finditer(question)}
    shares = {share for rate in rates for share in (rate / 100, 1 + rate / 100, 1 - rate / 100)}
    changes, results = dict(given), set[Fraction]()
    new_values = set(given.values())
    for expression, stated in _STEP.findall(solution):
        operands, old = _values(expression), _computed(expression, {})
        result = _values(stated)
        if old is None or len(result) != 1 or result[0] != old or any(v not in known | results for v in operands):
            return None
        # A share such as 1.5 may be 150 per cent of the question, or 50 more: it doesn't change with it.
        if any(v in shares - asked - results for v in operands):
            return None
        if any(v not in asked | results | _CONSTANTS and v * 100 in changes for v in operands):
            return None
        new = _computed(expression, changes)
        if new is None or new <= 0 or (old.denominator == 1) != (new.denominator == 1) or new.denominator > 1000:
            return None
        if new.denominator > 1 and not _is_decimal(new):
            return None
        if changes.get(old, old) != new and (old in changes or old in results or old in asked | _spoken(question)):
            return None  # two values of one look, of which one changes
        if new != old:
            if old in _CONSTANTS:
                return None  # where else it stands, it may be the constant
            changes[old] = new
        results.add(old)
        new_values.add(new)
    final = _FINAL.search(solution)
    answer = None if final is None else _values(final[1])
    if not answer or answer[0] not in results or answer[0] not in changes:
        return None
    unchanged = (asked | results) - changes.keys()
    return None if new_values & unchanged & (set(given.values())) else changes


def _computed(expression: str, changes: Mapping[Fraction, Fraction]) -> Fraction | None:
    """The value of a sum of numbers with other values in their places; None if it is none."""
    # A number is one name, so that a fraction can stand in its place.
    names: dict[str, Fraction] = {}

    def named(match: re.Match[str]) -> str:
        old = _value(match[0])
        names[name := f"n{len(names)}"] = changes.get(old, old)
        return name

    plain = _NUMBER.sub(named, expression.replace("%", "/100").replace("$", "").replace("x", "*"))

    def evaluated(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Expression):
            return evaluated(node.body)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](evaluated(node.left), evaluated(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluated(node.operand)
        raise ValueError(expression)

    try:
        return evaluated(ast.parse(plain.strip(), mode="eval"))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _renumbered(text: str, changes: Mapping[Fraction, Fraction]) -> str:
    """A number as it is written, or the one in its place, written likewise."""
    new = changes.get(_value(text))
    if new is None:
        return text
    if new.denominator == 1:
        return f"{int(new):,}" if "," in text else str(int(new))
    return f"{float(new):.2f}" if re.search(r"\.\d\d$", text) else f"{float(new):g}"


def in_words(number: int) -> str:
    """Return a whole number from 0 to 999 in words: ``four hundred twenty-one``."""
    hundreds, rest = divmod(number, 100)
    small = _UNITS[rest] if rest < 20 else _TENS[rest // 10 - 2] + (f"-{_UNITS[rest % 10]}" if rest % 10 else "")
    parts = [f"{_UNITS[hundreds]} hundred" if hundreds else "", small if rest or not hundreds else ""]
    return " ".join(filter(None, parts))


def _texts(value: Any) -> list[str]:
    """All texts in columns and lists."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """The same columns, lists and texts with every text replaced."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _mapped(part, function) for name, part in value.items()}
    return [_mapped(part, function) for part in value] if isinstance(value, list) else value


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _values(text: str) -> list[Fraction]:
    return [_value(match[0]) for match in _NUMBER.finditer(text)]


def _spoken(text: str) -> set[Fraction]:
    """The values of the numbers that are written in words."""
    return {Fraction(_QUANTITIES[word]) for word in re.findall(r"[a-z]+", text.lower()) if word in _QUANTITIES}


def _is_decimal(value: Fraction) -> bool:
    """Whether two digits behind the point are enough."""
    return (value * 100).denominator == 1


_FUNCTIONS: Mapping[str, Callable[[dict[str, Any], str, random.Random], dict[str, Any] | None]] = {
    "names": _names, "numbers": _numbers, "words": _words, "distractors": _distractors,
}  # fmt: skip
