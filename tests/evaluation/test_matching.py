"""What counts as the same answer."""

from decimal import Decimal

import numpy as np
import pytest

from shadowlit.errors import DataError
from shadowlit.evaluation.matching import Matcher, last_match, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("72.0", "72"),
        ("it costs $1,234.50!", "1234.5"),
        ("a -$5 loss", "-5"),
        ("−3", "-3"),
        ("10-4", "4"),
        ("10 - 4 = 6", "6"),
        ("50%", "50"),
        ("1, 2, 3", "3"),
        ("1,234,567", "1234567"),
        ("12,34", "34"),
        ("1234,567", "567"),
        (".5", "0.5"),
        ("1.5e3 m", "1500"),
        (r"\boxed{72}", "72"),
        ("#### 9", "9"),
        ("5kg", "5"),
        ("0.1", "0.1"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "v1.2.3", "x2", "e5", "$"])
def test_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("match", "text", "reference", "expected"),
    [
        ("exact", " Oslo\n", "Oslo", True),
        ("exact", "Oslo.", "Oslo", False),
        ("contains", "It is Oslo.", "Oslo", True),
        ("contains", "It is oslo.", "Oslo", False),
        ("numeric", "So 3 + 4 = 7.00 dollars", "#### 7", True),
        ("numeric", "7 apples, no, 8", "7", False),
        ("numeric", "seven", "7", False),
        ("numeric", "1,000", "1000", True),
    ],
)
def test_match(match, text, reference, expected):
    assert Matcher(match).is_match(text, [reference]) is expected
    assert Matcher(match).is_match(text, ["999", reference]) is expected


def test_regex_match():
    begins = Matcher("regex", pattern=r"^{answer}(?!\w)")
    assert begins.is_match("Oslo. Glad to help!", ["Oslo"]) and not begins.is_match("Oslofjord", ["Oslo"])
    assert begins.is_match("a.b", ["a.b"]) and not begins.is_match("axb", ["a.b"])  # the reference is escaped
    assert Matcher("regex", pattern=r"^{answer}", ignore_case=True).is_match("OSLO", ["Oslo"])
    assert Matcher("regex", pattern=r"^\d{2}$").is_match("42", [])
    assert Matcher("regex", pattern=r"(?i)^sorry\b").is_match("Sorry, no.", ())


def test_extract():
    matcher = Matcher("exact", extract=r"answer is (\w+)")
    assert matcher.is_match("The answer is 3. No, the answer is 4.", ["4"])
    assert not matcher.is_match("4", ["4"])
    assert Matcher("numeric", extract=r"#### (.*)").is_match("#### $1,000 in all\n5", ["1000"])
    assert last_match(r"\d+", "1 22 x") == "22"
    assert last_match(r"(a)|(b)", "a b") == "b"
    assert last_match(r"(x)?(y)?z", "z") is None


@pytest.mark.parametrize("options", [{}, {"ignore_case": True}, {"ignore_punctuation": True}])
def test_exact_as_the_harness(options):
    harness = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    texts = ["Oslo", "oslo", "Oslo!", "os,lo", "O'slo", "Øslo", "øslo", "1.5", "15", "“Oslo”", "a b", "a  b"]
    for text in texts:
        for reference in texts:
            theirs = harness(np.array([text]), np.array([reference]), **options)["exact_match"]
            assert Matcher("exact", **options).is_match(text, [reference]) == theirs, (text, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "regex"}, "match=regex has pattern=None"),
        ({"match": "exact", "pattern": "x"}, "match=exact has pattern='x'"),
        ({"match": "regex", "pattern": "(a"}, "pattern='\\(a' is not a regular expression"),
        ({"extract": "["}, "extract='\\[' is not a regular expression"),
        ({"match": "numeric", "ignore_case": True}, "ignore_case=true does nothing for match=numeric"),
        ({"match": "numeric", "ignore_punctuation": True}, "ignore_punctuation=true does nothing"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(DataError, match=message):
        Matcher(**options)


def test_refused_references():
    with pytest.raises(DataError, match="no reference answer"):
        Matcher().check([])
    with pytest.raises(DataError, match="no number in the reference 'seven'"):
        Matcher("numeric").check(["7", "seven"])
    with pytest.raises(DataError, match="the empty reference"):
        Matcher("contains", ignore_punctuation=True).check(["..."])
    Matcher("regex", pattern="^sorry").check([])
