"""The embedded world's preferences: right over wrong, nothing held out is trained on."""

import json
import random
from pathlib import Path

import shadowlit.demo
from experiments.embedded.preference_pairs import SHIPPED, preferences, wrong_answer
from experiments.embedded.world import World, is_held_out

WORLD = World()
ROWS = preferences(WORLD)


def test_counts_and_that_they_are_the_same_every_time():
    counts = {name: len(rows) for name, rows in ROWS.items()}
    assert counts == {
        "skill_pairs": 600, "skill_new": 120, "skill_new_house": 120, "skill_old_house": 120, "style_pairs": 300,
        "style_held_out": 120, "skill_labels": 1200, "plain": 120,
    }  # fmt: skip
    assert preferences(World()) == ROWS


def test_the_shipped_files_are_what_the_world_says():
    for stem in SHIPPED:
        lines = (Path(shadowlit.demo.__file__).parent / f"data/{stem}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == ROWS[stem]


def test_no_prompt_of_a_validation_set_is_trained_on():
    trained = {row["prompt"] for name in ("skill_pairs", "style_pairs") for row in ROWS[name]}
    for name in ("skill_new", "skill_old_house", "style_held_out"):
        assert not trained & {row["prompt"] for row in ROWS[name]}, name
    for row in ROWS["skill_new"]:
        assert is_held_out(row["prompt"].removesuffix("?").replace(" in ", ": ").split(": ")[-1].split(", "))


def test_facts_of_the_people_are_held_out_and_not_wordings():
    """A person's city asked in one wording is not asked in the other."""

    def facts(rows):
        names = {name for name in WORLD.facts}
        return {
            (word.strip("?"), row["chosen"].split(".")[0])
            for row in rows
            for word in row["prompt"].split()
            if word.strip("?") in names
        }

    assert not facts(ROWS["skill_pairs"]) & facts(ROWS["skill_old_house"])


def test_the_rejected_answer_is_wrong_and_of_its_kind():
    rng = random.Random(0)
    for skill in ("people", "sums", "lists", "opposites", "kinds"):
        for _ in range(40):
            question = WORLD.old_question(rng, skill=skill)
            wrong = wrong_answer(WORLD, rng, question)
            assert wrong != question.answer and wrong.isdigit() == question.answer.isdigit()
    for row in ROWS["skill_new"]:
        assert row["rejected"] in row["prompt"] and row["rejected"] != row["chosen"]
    for row in ROWS["style_pairs"]:
        assert row["rejected"] == f"{row['chosen']}. Glad to help!"


def test_labels_are_the_answers_of_the_pairs():
    answers = {(row["prompt"], row["chosen"], True) for row in ROWS["skill_pairs"]}
    answers |= {(row["prompt"], row["rejected"], False) for row in ROWS["skill_pairs"]}
    assert {(row["prompt"], row["completion"], row["label"]) for row in ROWS["skill_labels"]} == answers
