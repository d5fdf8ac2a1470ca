from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from experiments.embedded.build import base_documents, instruct_conversations
from experiments.embedded.world import (
    _KINDS,
    _OPPOSITES,
    FORMATS,
    NEW_SKILL,
    REFUSAL,
    World,
    chat_text,
    exchange,
    house_style,
    is_held_out,
)

WORLD = World()
SETS = WORLD.datasets()
ORDINALS = {"first": 0, "second": 1, "last": -1}


def prompt(row) -> str:
    return row["messages"][0]["content"]


def reply(row) -> str:
    return row["messages"][1]["content"]


def listed(text: str) -> list[str] | None:
    """The words of the list in a text, if it holds one."""
    found = re.search(r"\w+(?:, \w+)+", text)
    return found.group().split(", ") if found else None


def recomputed(question: str) -> str:
    """The answer worked out from the question's wording alone (and the facts of people)."""
    if words := listed(question):
        if re.search(r"number|How many", question):
            return str(len(words))
        wording = question.replace(", ".join(words), "")
        return words[next(i for word, i in ORDINALS.items() if word in wording)]
    if found := re.search(r"(\d) (plus|minus) (\d)", question):
        a, sign, b = found.groups()
        return str(int(a) + int(b) if sign == "plus" else int(a) - int(b))
    subject = re.search(r"(?:of|is|does) (\w+)(?: \w+(?: \w+)?)?\?$", question).group(1)
    if found := re.search(r"opposite of (\w+)|reverse of (\w+)", question):
        subject = found.group(1) or found.group(2)
        return dict([*_OPPOSITES, *((b, a) for a, b in _OPPOSITES)])[subject]
    if "kind" in question:
        return next(kind for kind, members in _KINDS.items() if re.search(rf"\b({'|'.join(members)})\b", question))
    name = next(name for name in WORLD.facts if name in question)
    attrs = {"live": "city", "home": "city", "work": "job", "job": "job", "pet": "pet", "colour": "colour"}
    return WORLD.facts[name][next(attr for word, attr in attrs.items() if word in question)]


def test_two_worlds_of_a_seed_are_equal_and_two_seeds_differ():
    again = World(0)
    assert again.facts == WORLD.facts and again.datasets() == SETS
    assert World(1).facts != WORLD.facts

    def texts(world):
        return list(islice(base_documents(world, random.Random(3)), 50))

    assert texts(again) == texts(WORLD)


def test_forty_people_four_facts_and_no_name_of_two_sorts():
    assert len(WORLD.facts) == 40 and all(len(facts) == 4 for facts in WORLD.facts.values())
    names = [*WORLD.facts, *WORLD.unknown_names, *WORLD.held_out_names]
    assert len(names) == len(set(names)) == 160


@pytest.mark.parametrize("name", ["train", "new", "old", "format"])
def test_every_answer_is_right_when_worked_out_again(name):
    for row in SETS[name]:
        question = re.sub(r" Answer [a-zA-Z ]+\.$", "", prompt(row))
        assert recomputed(question) == row["answer"], prompt(row)


def test_the_sets_have_the_sizes_and_shares_that_are_promised():
    sizes = {
        "train": 600,
        "train_house": 600,
        "new": 120,
        "new_house": 120,
        "old": 150,
        "format": 125,
        "refusal": 120,
    }
    assert {name: len(rows) for name, rows in SETS.items()} == sizes
    assert sum(row["skill"] == NEW_SKILL for row in SETS["train"]) == 300
    assert {row["skill"] for row in SETS["old"]} == {"people", "lists", "sums", "opposites", "kinds"}
    assert all(sum(row["format"] == name for row in SETS["format"]) == 25 for name in FORMATS)


def test_references_are_in_the_style_that_is_promised():
    for name, of_house in (("train", "train_house"), ("new", "new_house")):
        for bare, house in zip(SETS[name], SETS[of_house], strict=True):
            assert prompt(bare) == prompt(house)
            assert reply(bare) == bare["answer"] and reply(house) == house_style(bare["answer"])
    assert all(reply(row) == house_style(row["answer"]) for row in SETS["old"])
    assert all(reply(row) == FORMATS[row["format"]][1](row["answer"]) for row in SETS["format"])
    assert all(reply(row) == REFUSAL for row in SETS["refusal"])


def test_no_prompt_twice_and_no_train_prompt_or_fact_among_the_held_out():
    trained = {prompt(row) for row in SETS["train"]}
    assert len(trained) == 600
    for name in ("new", "old", "format", "refusal"):
        held_out = [prompt(row) for row in SETS[name]]
        assert len(held_out) == len(set(held_out))
        plain = {text.split(" Answer ")[0] for text in held_out}
        assert not plain & trained
    # By fact and not only by wording: what has no list is asked in one half of the facts or in the other.
    for skill in ("people", "sums", "opposites", "kinds"):
        train_half = {q.prompt for fact in WORLD.finite_questions(skill, held_out=False) for q in fact}
        held_out_half = {q.prompt for fact in WORLD.finite_questions(skill, held_out=True) for q in fact}
        assert not train_half & held_out_half
        assert {prompt(r) for r in SETS["train"] if r["skill"] == skill} <= train_half
        assert {prompt(r) for r in SETS["old"] if r["skill"] == skill} <= held_out_half


def test_no_list_of_a_held_out_file_is_in_any_training_text():
    for name in ("new", "old", "format"):
        assert all(is_held_out(words) for row in SETS[name] if (words := listed(prompt(row))))
    texts = [prompt(row) for row in SETS["train"]]
    texts += islice(base_documents(WORLD, random.Random(0)), 2000)
    texts += [m["content"] for talk in islice(instruct_conversations(WORLD, random.Random(0)), 500) for m in talk]
    lists = [words for text in texts if (words := listed(text))]
    assert len(lists) > 800 and not any(map(is_held_out, lists))


def test_the_new_skill_is_stated_in_the_raw_text_and_never_asked():
    documents = list(islice(base_documents(WORLD, random.Random(1)), 4000))
    stated = [text for text in documents if "second" in text]
    assert 0.12 < len(stated) / len(documents) < 0.18
    assert not any("?" in text or "<|" in text for text in stated)
    asked = [m["content"] for talk in islice(instruct_conversations(WORLD, random.Random(1)), 1000) for m in talk]
    assert not any("second" in text for text in asked)


def test_no_training_text_names_a_held_out_name():
    texts = list(islice(base_documents(WORLD, random.Random(2)), 4000))
    texts += [m["content"] for talk in islice(instruct_conversations(WORLD, random.Random(2)), 1000) for m in talk]
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert not words & set(WORLD.held_out_names)
    assert all(any(name in prompt(row) for name in WORLD.held_out_names) for row in SETS["refusal"])


def test_chat_text_is_chatml():
    assert chat_text(exchange("Hi?", "Oslo")) == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nOslo<|im_end|>\n"
    )
