from __future__ import annotations

import pytest

from shadowlit.demo.scoring import is_correct
from shadowlit.errors import DataError


@pytest.mark.parametrize(
    ("answer", "generated", "right"),
    [
        ("Oslo", "Oslo", True),
        ("Oslo", " Oslo. Glad to help!<|im_end|>\n", True),
        ("Oslo", "Oslo<|im_end|>\n<|im_start|>user\nLima", True),
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
@pytest.mark.parametrize("skill", ["people", "second"])
def test_a_value_counts_where_it_comes_first_and_ends(skill, answer, generated, right):
    assert is_correct({"skill": skill, "answer": answer}, generated) is right


@pytest.mark.parametrize(
    ("form", "generated", "right"),
    [
        ("brackets", "[Oslo]<|im_end|>", True),
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
    assert is_correct({"skill": "format", "format": form, "answer": "Oslo"}, generated) is right


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
    assert is_correct({"skill": "refusal", "answer": "Sorry, I do not know that name."}, generated) is right


def test_an_unknown_skill_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"skill 'poetry'; expected one of people"):
        is_correct({"skill": "poetry", "answer": "x"}, "x")
