"""What a user's text may cost: each of these would run for years or take all memory."""

import threading
import time

import pytest
import yaml
from peft import LoraConfig
from torch import nn

from shadowlit import limits
from shadowlit.cli.main import main
from shadowlit.errors import ShadowlitError
from shadowlit.evaluation.matching import Matcher
from shadowlit.grafting.disk import Scale
from shadowlit.grafting.selection import resolve
from shadowlit.limits import bounded_matching, load_yaml
from shadowlit.pair.weights import selects
from shadowlit.training.loading import _outside, _try_patterns

EVIL = "(a+)+$"
NAME = "a" * 60 + "b"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(NAME, nn.Linear(1, 1))


CASES = {
    "graft.select has": lambda: resolve(["linear", EVIL], [NAME], frozenset([NAME]), "x"),
    "graft.select is": lambda: selects(EVIL, [NAME]),
    "scale has": lambda: Scale.parse(f"1;{EVIL}=0.5").of(NAME),
    "model.train_towers has": lambda: _outside(Model(), [EVIL]),
    "model.adapter.target_modules has": lambda: _try_patterns(Model(), LoraConfig(target_modules=EVIL)),
    "model.adapter.exclude_modules has": lambda: _try_patterns(Model(), LoraConfig(exclude_modules=EVIL)),
    "model.adapter.rank_pattern has": lambda: _try_patterns(Model(), LoraConfig(rank_pattern={EVIL: 4})),
    "pattern is": lambda: Matcher("regex", pattern=EVIL).is_match(NAME, []),
    "extract is": lambda: Matcher("exact", extract=EVIL).is_match(NAME, ["x"]),
}


@pytest.mark.parametrize("what", CASES)
def test_a_regular_expression_that_would_never_end_is_an_error(monkeypatch, what):
    monkeypatch.setattr(limits, "TIME_LIMIT_S", 0.02)
    with pytest.raises(ShadowlitError, match=r"^" + what + r" '\(a\+\)\+\$', whose matching took more than 0.02 s"):
        CASES[what]()
    time.sleep(0.03)  # no timer is left


def test_other_threads_match_without_a_limit():
    """Only the main thread can be interrupted."""
    found = []

    def match():
        with bounded_matching("x"):
            found.append(1)

    thread = threading.Thread(target=match)
    thread.start()
    thread.join()
    assert found == [1]


BOMB = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20)
)


def test_aliases_are_counted_as_what_they_stand_for(monkeypatch):
    """By hand: the root, a with 1 + 3 values, b with 1 + 2 · 4."""
    text = "a: &a [1, 2, 3]\nb: [*a, *a]\n"
    monkeypatch.setattr(limits, "_MAX_VALUES", 14)
    assert load_yaml(text, "f") == {"a": [1, 2, 3], "b": [[1, 2, 3]] * 2}
    monkeypatch.setattr(limits, "_MAX_VALUES", 13)
    with pytest.raises(ShadowlitError, match=r"^f stands for 14 values, since its aliases .* expected at most 13\. Wr"):
        load_yaml(text, "f")


@pytest.mark.parametrize(("text", "number"), [(BOMB, r"\d{2},\d+(,\d{3}){5}"), ("a: &a [*a]", "infinitely many")])
@pytest.mark.parametrize("command", [["fit", "--config"], ["compare"], ["sweep", "run", "--config"]])
def test_an_alias_bomb_is_an_error_of_every_command(tmp_path, capsys, text, number, command):
    (tmp_path / "bomb.yaml").write_text(text)
    status = 0
    try:
        status = main([*command, str(tmp_path / "bomb.yaml")])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status in (1, 2) and len(error.splitlines()) <= 3
    assert "stands for" in error and "aliases" in error and "Write out what they stand for" in error


def test_a_broken_text_is_left_to_whoever_loads_it():
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: &a [*a\n*b", "f")


def test_the_limit_leaves_what_is_matched_in_time():
    with bounded_matching("x"):
        assert resolve("q_proj", ["a.q_proj.weight", "b"], frozenset(), "x") == {"a.q_proj.weight"}


@pytest.mark.parametrize(("text", "message"), [
    ("a: " + "[" * 3000 + "]" * 3000, "^f is nested too deeply"),
    ("a: " + "9" * 6000, "^f holds a number or date that can't"),
])  # fmt: skip
def test_what_yaml_cannot_read_is_an_error_of_a_line(text, message):
    with pytest.raises(ShadowlitError, match=message) as caught:
        load_yaml(text, "f")
    assert "\n" not in str(caught.value)
