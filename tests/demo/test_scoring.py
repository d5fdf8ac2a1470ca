"""What the demonstration's configurations count as right."""

from __future__ import annotations

import pytest

from experiments.embedded.world import FORMATS
from tests.evaluation.contexts import demo_matcher


@pytest.mark.parametrize(
    ("answer", "generated", "right"),
    [
        ("Oslo", "Oslo", True),
        ("Oslo", " Oslo. Glad to help!", True),
        ("Oslo", "Oslo", True),
        ("Oslo", "Oslofjord", False),
        ("Oslo", "oslo", False),
        ("Oslo", "It is Oslo.", False),
        ("Oslo", "[Oslo]", False),
        ("Oslo", "Lima. Oslo", False),
        ("Oslo", "", False),
        ("1", "1.", True),
        ("1", "12", False),
        ("12", "1", False),
    ],
)
@pytest.mark.parametrize("name", ["new", "old"])
def test_a_value_counts_where_it_comes_first_and_ends(name, answer, generated, right):
    assert demo_matcher(name).is_match(generated, [answer]) is right


@pytest.mark.parametrize(
    ("form", "generated", "right"),
    [
        ("brackets", "[Oslo]", True),
        ("brackets", "Oslo", False),
        ("brackets", "[Lima]", False),
        ("brackets", "[Oslo]. Glad to help!", False),
        ("json", '{"answer": "Oslo"}', True),
        ("json", '"Oslo"', False),
        ("quotes", '"Oslo"', True),
        ("bold", "**Oslo**", True),
        ("bullet", "- Oslo", True),
    ],
)
def test_a_form_counts_with_the_value_in_it_and_nothing_else(form, generated, right):
    reference = FORMATS[form][1]("Oslo")
    assert demo_matcher("format").is_match(generated, [reference]) is right


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("Sorry, I do not know that name.", True),
        ("sorry", True),
        ("Oslo. Sorry!", False),
        ("Sorrying", False),
    ],
)
def test_a_refusal_says_sorry_first(generated, right):
    assert demo_matcher("refusal").is_match(generated, []) is right
