import math
from dataclasses import replace

import pytest

from shadowlit.errors import DataError
from shadowlit.studies.comparison.scoring import Measure, Scoring, read_measures, samples_of_sets, scores_of
from shadowlit.studies.comparison.selection import (
    choose_rate,
    choose_rate_and_scale,
    halves_of,
    scored,
    standings,
)
from shadowlit.studies.rows import Row
from tests.studies.comparison.synthetic import trained

SELECTION = {0, 4, 6, 7, 9}  # of ten rows


def record(lr: float, selection: float, *, seed: int = 0, scale: float = 1.0, reported: float = 0.0):
    rows = {i: selection if i in SELECTION else reported for i in range(10)}
    return trained("B2I", lr, seed, scale, samples={"new": rows})


def choose(records, arm, evaluators, by=choose_rate):
    scoring = Scoring(tuple(evaluators), halves={name: halves_of(records, name) for name in evaluators})
    return by(standings(scored(records, scoring)), arm)


def score(standing):
    return standing["selection/mean"].mean


def test_directions_of_metrics():
    assert read_measures("score", ["val/grafted/loss", "report/perplexity", "a/sequence_accuracy", "margin:lower"]) == {
        "loss": Measure(False, "nats"), "report/perplexity": Measure(False, "number"),
        "a/sequence_accuracy": Measure(True, "share"), "margin": Measure(False, "number"),
    }  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [
    ("margin", "isn't known whether higher is better. Write margin:higher or margin:lower"),
    ("loss:down", "'loss:down'; expected loss:higher or loss:lower"),
    ("a/agreement", "--score names a/agreement, which measures how much of the Instruct is forgotten"),
    ("forgetting/kl:lower", "measures how much of the Instruct is forgotten"),
])  # fmt: skip
def test_metrics_that_can_not_score(given, message):
    with pytest.raises(DataError, match=message):
        read_measures("score", [given])


def test_rows_of_a_set_give_its_metrics():
    sets = {"report": [[1.0, 2.0, 2.0, 0.5, 1.0], [6.0, 4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]]}
    names = ["report/loss", "report/accuracy", "report/sequence_accuracy", "report/perplexity", "other/loss"]
    names += ["report/first_token_loss"]
    found = samples_of_sets(sets, names)
    assert found == {
        "report/loss": {0: 0.5, 1: 1.5}, "report/accuracy": {0: 1.0, 1: 0.25}, "report/num_tokens": {0: 2.0, 1: 4.0},
        "report/sequence_accuracy": {0: 1.0, 1: 0.0}, "report/first_token_loss": {0: 0.5, 1: 1.5},
        "report/num_answers": {0: 1.0, 1: 2.0},
    }  # fmt: skip
    metrics = {"report/loss": 7 / 6, "report/accuracy": 0.5, "report/sequence_accuracy": 0.5}
    metrics["report/first_token_loss"] = 3.5 / 3
    row = trained("B2I", 1e-3, 0, metrics=metrics, samples=found)
    scoring = Scoring(metrics=dict.fromkeys(names, Measure()))
    scores, weights = scoring.rows(row, "report/loss", 2)
    assert (scores @ weights) / weights.sum() == pytest.approx(7 / 6)
    assert scoring.rows(row, "report/first_token_loss", 2)[1].tolist() == [1.0, 2.0]
    assert scoring.rows(row, "report/sequence_accuracy", 2)[1].tolist() == [1.0, 1.0]
    assert scoring.rows(row, "report/perplexity", 0) is None and scoring.rows(row, "report/loss", 3) is None


def test_rows_are_halved_by_a_hash_of_their_index():
    assert halves_of([Row("Base", samples={"new": {9: 1.0, 2: 0.0, 0: 0.0, 5: 1.0}})], "new") == ([2, 9], [0, 5])
    records = [Row("Base", samples={"new": {0: 1.0, 4: 0.0}}), Row("Instruct", samples={"new": {2: 1.0}})]
    assert halves_of(records, "new") == ([2, 4], [0])
    assert halves_of(records, "old") == ([], [])


@pytest.mark.parametrize("kinds", range(2, 7))
def test_kinds_of_questions_that_take_turns_are_in_both_halves(kinds):
    """The new facts of the embedded pair go round four attributes: every other row would leave two for each half."""
    halves = halves_of([Row("Base", samples={"new": dict.fromkeys(range(60), 0.0)})], "new")
    assert sorted([*halves[0], *halves[1]]) == list(range(60)) and len(halves[0]) == 30
    for half in halves:
        assert all(len([i for i in half if i % kinds == kind]) >= 30 / kinds / 2 for kind in range(kinds))


def test_the_best_mean_over_seeds_is_chosen():
    records = [record(1e-4, 0.2), record(1e-4, 0.9, seed=1), record(1e-3, 0.5), record(1e-3, 0.5, seed=1)]
    choice = choose(records, "B2I", ["new"])
    assert (choice.best.lr, score(choice.best), choice.best.num_seeds) == (1e-4, pytest.approx(0.55), 2)
    assert [candidate.lr for candidate in choice.candidates] == [1e-4, 1e-3]


def test_evaluators_weigh_alike_whatever_their_rows():
    few = {"old": {0: 1.0, 1: 1.0}}
    records = [record(1e-4, 0.4), record(1e-3, 0.3)]
    records = [replace(r, samples=r.samples | (few if r.lr == 1e-3 else {"old": {0: 0.0, 1: 0.0}})) for r in records]
    assert choose(records, "B2I", ["new"]).best.lr == 1e-4
    choice = choose(records, "B2I", ["new", "old"])
    assert choice.best.lr == 1e-3 and score(choice.best) == pytest.approx((0.3 + 1.0) / 2)


@pytest.mark.parametrize("reported", [0.0, 1.0, math.nan])
def test_the_reported_half_has_no_say(reported):
    records = [record(1e-4, 0.6, reported=0.1), record(1e-3, 0.5, reported=reported)]
    choice = choose(records, "B2I", ["new"])
    assert choice.best.lr == 1e-4 and score(choice.best) == pytest.approx(0.6)
    again = choose([record(1e-4, 0.6), record(1e-3, 0.5)], "B2I", ["new"])
    assert [(c.lr, score(c)) for c in choice.candidates] == [(c.lr, score(c)) for c in again.candidates]
    assert choice.edge == again.edge


def test_of_equal_rates_the_lowest_is_taken():
    thirds = {0: 0.1, 2: 0.2, 4: 0.3}  # a sum that depends on the order
    records = [
        trained("B2I", lr, 0, 1.0, samples={"new": scores | {1: 0.0, 3: 0.0}})
        for lr, scores in ((1e-3, thirds), (1e-4, {0: 0.3, 2: 0.2, 4: 0.1}))
    ]
    assert choose(records, "B2I", ["new"]).best.lr == 1e-4


def test_a_mean_over_fewer_seeds_does_not_win():
    records = [record(1e-4, 0.5), record(1e-4, 0.5, seed=1), record(1e-3, 0.9), record(1e-3, math.nan, seed=1)]
    choice = choose(records, "B2I", ["new"])
    assert choice.best.lr == 1e-4
    assert choice.candidates[1]["selection/mean"].count == 1 and score(choice.candidates[1]) == pytest.approx(0.9)


def test_a_record_without_all_rows_has_no_score():
    whole, part = record(1e-4, 0.5), trained("B2I", 1e-3, 0, 1.0, samples={"new": {0: 1.0, 1: 1.0}})
    choice = choose([whole, part], "B2I", ["new"])
    assert choice.best.lr == 1e-4 and math.isnan(score(choice.candidates[1]))
    assert scores_of(part, "new", [0, 2]) is None and scores_of(part, "new", []) is None


def test_an_arm_without_scores_has_no_rate():
    assert choose([record(1e-4, 0.5)], "I2I", ["new"]) is None
    assert choose([record(1e-4, math.nan)], "B2I", ["new"]) is None


@pytest.mark.parametrize(
    ("scores", "edge"),
    [
        ((0.9, 0.5, 0.1), "smallest"),
        ((0.1, 0.5, 0.9), "largest"),
        ((0.1, 0.9, 0.5), None),
        ((0.9, 0.9, 0.5), None),  # the lower of two equal ones, one of which lies inside
        ((0.9,), None),
    ],
)
def test_a_best_rate_at_the_edge_is_told(scores, edge):
    records = [record(10.0 ** (i - 5), score) for i, score in enumerate(scores)]
    choice = choose(records, "B2I", ["new"])
    assert choice.edge == edge
    told = {
        "largest": "B2I: the best rate is the largest tried: the arm may be undertuned.",
        "smallest": "B2I: the best rate is the smallest tried: the arm may be better at smaller ones.",
        None: "" if len(scores) > 1 else "B2I was tried at one rate only: it may be far from its best.",
    }
    assert choice.note == told[edge]


def test_the_scale_is_chosen_only_where_it_is_asked_for():
    records = [record(1e-4, 0.5), record(1e-4, 0.9, scale=0.5), record(1e-3, 0.6), record(1e-3, 0.9, scale=1.25)]
    assert choose(records, "B2I", ["new"]).best.lr == 1e-3
    best = choose(records, "B2I", ["new"], choose_rate_and_scale).best
    assert (best.lr, best.scale) == (1e-4, 0.5)
