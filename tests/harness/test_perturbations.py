"""Questions asked in another way: what changes, what must not, and what is left alone."""

import json
import re

import pytest

from shadowlit.harness.models import Evaluation
from shadowlit.harness.perturbations import PERTURBATIONS, in_words, perturb
from shadowlit.harness.perturbed import Perturbed, change
from shadowlit.harness.report import make_report
from shadowlit.harness.suites import Score, SuiteScore, TaskScore

DUCKS = {
    "question": "Janet has 16 ducks and 30 geese. Mr. Bob eats three of them and sells the rest to Janet's son for "
    "$9 each. How much does Bob make?",
    "answer": "Janet has 16+30=<<16+30=46>>46 birds.\nBob keeps 46-3=<<46-3=43>>43.\nHe makes 43*9=$<<43*9=387>>387.\n"
    "#### 387",
}


def perturbed(kind, row=DUCKS, seed=0, index=0):
    return perturb(kind, row, "question", seed, index)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_choice_follows_from_seed_and_row(kind):
    before = json.dumps(DUCKS)
    assert perturbed(kind) == perturbed(kind) and json.dumps(DUCKS) == before
    if kind != "words":
        assert len({json.dumps(perturbed(kind, seed=seed, index=index)) for seed in (0, 1) for index in (0, 1)}) > 2


def test_names_are_replaced_everywhere_by_others_of_the_same_gender():
    found = perturbed("names", {**DUCKS, "choices": ["Janet", "Bob"]})
    woman, man = found["choices"]
    assert woman != "Janet" and man != "Bob" and found["question"].startswith(f"{woman} has 16 ducks")
    assert f"Mr. {man} eats" in found["question"] and f"{woman}'s son" in found["question"]
    assert found["answer"] == DUCKS["answer"].replace("Janet", woman).replace("Bob", man)
    assert perturbed("names", {"question": "How many cities are called Paris?"}) is None


def test_numbers_change_with_the_whole_solution():
    found = perturbed("numbers")
    a, b = map(int, re.search(r"has (\d+) ducks and (\d+) geese", found["question"]).groups())
    price = int(re.search(r"\$(\d+) each", found["question"])[1])
    assert (a, b, price) != (16, 30, 9) and b == 30  # 30 may be the days of a month
    birds, left = a + b, a + b - 3
    assert found["answer"] == (
        f"Janet has {a}+{b}=<<{a}+{b}={birds}>>{birds} birds.\nBob keeps {birds}-3=<<{birds}-3={left}>>{left}.\n"
        f"He makes {left}*{price}=$<<{left}*{price}={left * price}>>{left * price}.\n#### {left * price}"
    )


@pytest.mark.parametrize(("old", "new"), [
    ("<<46-3=43>>", "<<46-3=42>>"),  # a step that doesn't compute
    ("46-3=<<46-3=43>>43", "46-3*17=<<46-51=-5>>-5"),  # a number that nobody told
    ("#### 387", "#### 388"),  # an answer that no step gives
    ("\n#### 387", ""),
    ("<<16+30=46>>", ""),
])  # fmt: skip
def test_numbers_stay_where_the_solution_cannot_be_recomputed(old, new):
    row = {**DUCKS, "answer": DUCKS["answer"].replace(old, new)}
    assert row != DUCKS and perturbed("numbers", row) is None
    assert perturbed("numbers", {"question": "What is 16 and 17?", "answer": "33"}) is None


@pytest.mark.parametrize(("step", "is_certain"), [
    ("a fee of 40*.25 = $10.00", False),  # 10 may be a constant, so that the chain alone would not show it
    ("a fee of 40/4 = 10/1 dollars", False),
    ("a fee of 40*.25 = 20/2 = $<<40*.25=10>>10", True),
    ("a fee = 40*.25 = $<<40*.25=10>>10", True),
    ("a fee of 40*.25 = $<<40*.25=10>>10", True),
])  # fmt: skip
def test_numbers_stay_where_a_result_is_not_annotated(step, is_certain):
    row = {
        "question": "The bill is $40 before a fee of 25%, and delivery is $8. What is the price?",
        "answer": f"There is {step}.\nThe price is 40+10+8=<<40+10+8=58>>58.\n#### 58",
    }
    assert any(perturbed("numbers", row, seed) for seed in range(5)) == is_certain


@pytest.mark.parametrize("share", [0.22, 1.22, 0.78, 0.25])
def test_a_rate_that_a_solution_also_uses_as_a_share_stays(share):
    """The share would not change with it; 1/4 could also be a constant."""
    rate = 25 if share == 0.25 else 22
    part, left = 50 * share, 190 - rate
    row = {
        "question": f"A coat costs $50 before {rate}% tax. How much is the tax, and 190 less the rate?",
        "answer": f"<<190-{rate}={left}>>\n<<50*{share}={part:g}>>\n<<{left}+{part:g}={left + part:g}>>\n"
        f"#### {left + part:g}",
    }
    copies = [perturbed("numbers", row, seed) for seed in range(5)]
    assert any(copies) and all(f"before {rate}% tax" in copy["question"] for copy in copies if copy)


def test_a_number_that_is_told_twice_stays():
    row = {
        "question": "Ann has 16 red and 16 blue pens and 21 caps. How many things?",
        "answer": "<<16+16=32>>32 and <<32+21=53>>53\n#### 53",
    }
    for seed in range(5):
        found = perturbed("numbers", row, seed)
        assert found["question"].startswith("Ann has 16 red and 16 blue pens and ")


def test_numbers_in_words_and_sentences_that_do_not_matter():
    found = perturbed("words")
    assert "has sixteen ducks and thirty geese" in found["question"] and "$9 each" in found["question"]
    assert found["answer"] == DUCKS["answer"]
    assert (
        perturbed("words", {"question": "16 of 20% in 1,000 or 3.5?"})["question"] == "Sixteen of 20% in 1,000 or 3.5?"
    )
    signs = """The 200$ for #7, 64", 6'2 and 3*5 or 30°."""
    assert perturbed("words", {"question": signs}) is None
    assert [in_words(n) for n in (0, 20, 42, 100, 421)] == [
        "zero", "twenty", "forty-two", "one hundred", "four hundred twenty-one",
    ]  # fmt: skip
    found = perturbed("distractors")["question"]
    first, last = "sells the rest to Janet's son for $9 each. ", " How much does Bob make?"
    assert first in found and found.endswith(last)
    added = found.split(first)[1].removesuffix(last)
    assert added.endswith(".") and found.replace(f"{added} ", "") == DUCKS["question"]
    assert perturbed("distractors", {"question": "What is 2 + 2?"})["question"].endswith(". What is 2 + 2?")


def test_the_difference_is_paired_by_row():
    """Of rows 1, 3 and 4: 1, 1, 0 before and 1, 0, 0 after; the standard error is that of 0, -1, 0."""
    one = Perturbed("t", "names", "question", 5, (1, 3, 4), ())

    def score(task, values):
        return TaskScore(task, task, "acc,none", Score(0.5), True, 0, len(values), {task: values})

    old, new = score("t", {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 0.0}), score("t_names", {0: 1.0, 1: 0.0, 2: 0.0})
    found = change(one, [old, new])
    assert (found.before, found.after) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found.difference.value == pytest.approx(-1 / 3) and found.difference.stderr == pytest.approx(1 / 3)
    assert found.interval == (pytest.approx(-1 / 3 - 1.96 / 3), pytest.approx(-1 / 3 + 1.96 / 3))
    assert change(one, [old]) is None
    same = score("t_names", {0: 1.0, 1: 1.0, 2: 0.0})
    assert change(one, [old, same]).interval is None  # not one of zero width
    row = make_report([Evaluation("m", True, (SuiteScore(None, (old, same)),), {}, {})], [one]).perturbed[0]
    assert row[-2:] == ("+0.0000 ± 0.0000", "none: the same on all rows")
