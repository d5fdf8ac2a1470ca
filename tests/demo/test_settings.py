"""The further settings of the embedded world: nothing that is asked held out is asked in training."""

import json

import pytest

from experiments.embedded.settings import NUM_NEWCOMERS, newcomers, settings
from experiments.embedded.world import World, write_rows

WORLD = World(0)
ROWS = settings(WORLD)


def prompts(stem):
    return [row["messages"][0]["content"] for row in ROWS[stem]]


def test_newcomers_are_in_no_text_of_the_pair():
    assert len(newcomers(WORLD)) == NUM_NEWCOMERS == 15
    known = {*WORLD.facts, *WORLD.unknown_names}
    assert not known & newcomers(WORLD).keys()


@pytest.mark.parametrize("stem", ["facts_train", "facts_train_house"])
def test_held_out_questions_are_new_wordings_of_facts_that_were_asked(stem):
    assert not set(prompts(stem)) & set(prompts("facts"))
    assert not set(prompts(stem)) & set(prompts("facts_refusal"))
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"].partition(".")[0] for row in ROWS[stem]}
    of_newcomers = [p for p in asked if any(name in p for name in newcomers(WORLD))]
    assert len(of_newcomers) == len(set(prompts("facts"))) == 4 * NUM_NEWCOMERS
    values = sorted(asked[prompt] for prompt in of_newcomers)
    assert values == sorted(row["answer"] for row in ROWS["facts"])


def test_texts_state_every_fact_and_ask_nothing():
    for stem in ("text_train", "text_train_house"):
        text = " ".join(row["text"] for row in ROWS[stem])
        assert "?" not in text
        for name, known in newcomers(WORLD).items():
            assert all(
                any(name in row["text"] and value in row["text"] for row in ROWS[stem]) for value in known.values()
            )
    bare, house = ([row["text"] for row in ROWS[stem]] for stem in ("text_train", "text_train_house"))
    assert house == [f"{text} Glad to help!" for text in bare]


def test_nobody_of_the_refusals_exists():
    assert len(set(prompts("facts_refusal"))) == 100
    people = {*WORLD.facts, *WORLD.unknown_names, *newcomers(WORLD)}
    assert not [prompt for prompt in prompts("facts_refusal") if any(name in prompt for name in people)]


def test_files_hold_the_rows(tmp_path):
    write_rows(tmp_path, ROWS)
    for stem, rows in ROWS.items():
        assert [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text().splitlines()] == rows
