import csv
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.embedded.combined import combine, write_combined
from shadowlit.errors import DataError
from shadowlit.studies.comparison.report import render, sentence, write
from shadowlit.studies.comparison.scoring import Measure, samples_of_sets
from shadowlit.studies.comparison.selection import halves_of
from shadowlit.studies.comparison.summary import OVER_INSTRUCT, Comparison, Description, barrier, summarise
from shadowlit.studies.rows import LR, Row, to_csv
from shadowlit.studies.statistics import Interval
from tests.studies.comparison.synthetic import records, trained

SECTIONS = [
    "What the data say",
    "Each arm at its chosen rate",
    "Paired differences",
    "All rates",
    "What is learned and what is kept",
    "What might predict the gain",
    "The line to the graft",
    "Cost",
    "To be kept in mind",
    "Missing",
]
PLOTS = {f"{stem}.{ending}" for stem in ("trade", "table", "predicting") for ending in ("png", "pdf")}
FILES = {"REPORT.md", "table.csv", *PLOTS}
_, REPORTED = halves_of([Row("Base", samples={"new": dict.fromkeys(range(80), 0.0)})], "new")
WHAT = Description("Bare answers", "configs/x.yaml", "python -m shadowlit compare x")
GAIN, KEEP = ["new"], ["old", "format"]


def told_of(found, gain=GAIN, keep=KEEP):
    return summarise(found, WHAT, gain=gain, keep=keep)


def scores_of(report):
    """Everything on the reported half, by arm, rate and scale."""
    return {
        (s.arm, s.lr, s.scale): {name: mean for name, mean in s.metrics.items() if name.startswith("reported/")}
        for s in report.grid
    }


def section(text: str, title: str) -> str:
    return re.split(r"^#+ ", text.split(f" {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def report():
    return told_of(records())


def test_a_report_has_all_files_and_sections(tmp_path):
    path = write(summarise(records(), WHAT, gain=GAIN, keep=KEEP), tmp_path / "new/report")
    assert path.name == "REPORT.md" and {file.name for file in path.parent.iterdir()} == FILES
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.M) == SECTIONS
    for plot in re.findall(r"\]\((.*?\.png)\)", text):
        with Image.open(path.parent / plot) as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 10
    assert "nan" not in text.lower().replace("finance", "")


def test_the_table_is_of_the_reported_half_at_the_chosen_rate(report):
    found = [r for r in records() if (r.arm, r.lr, r.scale) == ("B2I", 1e-3, 1.0)]
    by_seed = [100 * sum(r.samples["new"][i] for i in REPORTED) / 40 for r in found]
    mean, error = sum(by_seed) / 3, np.std(by_seed, ddof=1) / math.sqrt(3)
    cells = row(section(render(report), "Each arm at its chosen rate"), "B2I")
    assert cells[1:3] == ["1e-3", f"{mean:.1f} ± {error:.1f}"]


def test_nothing_that_is_reported_depends_on_the_selection_half_but_the_choice(report):
    """All selection rows are made right everywhere: the differences at equal rates stay as they were."""
    changed = [
        replace(
            r, samples={n: {i: s if i in REPORTED else 1.0 for i, s in rows.items()} for n, rows in r.samples.items()}
        )
        for r in records()
    ]
    again = told_of(changed)
    assert scores_of(again) == scores_of(report)
    assert again.choices["B2I"].best.lr == 1e-4  # all equal: the lowest


def test_nothing_that_is_chosen_depends_on_the_reported_half(report):
    def turned(rows):
        return {i: 1.0 - score if i in REPORTED else score for i, score in rows.items()}

    changed = [replace(r, samples={name: turned(rows) for name, rows in r.samples.items()}) for r in records()]
    again = told_of(changed)
    assert {arm: choice.best.lr for arm, choice in again.choices.items()} == {
        arm: choice.best.lr for arm, choice in report.choices.items()
    }
    assert [s["selection/mean"] for s in again.grid] == [s["selection/mean"] for s in report.grid]
    assert again.best_scales["B2I"].lr == report.best_scales["B2I"].lr
    assert again.table[3]["reported/mean"] != report.table[3]["reported/mean"]


def test_a_difference_is_paired_by_row_and_seed():
    """Two arms that differ on one row of twenty in every seed, however unlike the rows and seeds are."""
    hard = [0.0, 0.0, 1.0, 1.0, 0.0] * 8
    found = [Row("Instruct", samples={"new": dict(enumerate(hard))})]
    wrong, right = (next(i for i in halves_of(found, "new")[1] if hard[i] == score) for score in (0.0, 1.0))
    for seed in range(3):
        base = {i: max(0.0, score - 0.1 * seed) for i, score in enumerate(hard)}
        better = base | {i: min(1.0, base[i] + 1.0) for i in (wrong, right)}
        found += [trained("I2I", 1e-4, seed, samples={"new": base})]
        found += [trained("B2I", 1e-4, seed, samples={"new": better})]
    (comparison, *_) = told_of(found, keep=[]).comparisons
    assert comparison.intervals["mean"].difference == pytest.approx(np.mean([1.0, 1.1, 1.2]) / 20)
    assert comparison.intervals["mean"].num_rows == 20 and comparison.intervals["mean"].num_seeds == 3


@pytest.mark.parametrize(
    ("a", "b", "interval", "told"),
    [
        (
            "B2I", "I2I", Interval(0.031, 0.010, 0.052, 3, 250),
            "B2I is better than I2I on the mean of new and old by 3.1 points (95 % CI 1.0 to 5.2, 3 seeds, 250 rows).",
        ),
        (
            "B2I", "I2I", Interval(-0.031, -0.052, -0.010, 3, 250),
            "I2I is better than B2I on the mean of new and old by 3.1 points (95 % CI 1.0 to 5.2, 3 seeds, 250 rows).",
        ),
        (
            "B2I", "I2I", Interval(-0.004, -0.018, 0.010, 2, 250),
            "No difference between B2I and I2I could be shown on the mean of new and old: −0.4 points (95 % CI −1.8 to "
            "1.0, 2 of 3 seeds, 250 rows).",
        ),
        (
            "B2I", "Instruct", Interval(-0.2, -0.3, -0.1, 1, 1),
            "The untouched Instruct is better than B2I on the mean of new and old by 20.0 points (95 % CI 10.0 to "
            "30.0, 1 of 3 seeds, 1 row). With one seed, this says nothing of other trainings.",
        ),
        (
            "B2I", "Instruct", Interval(0.0, 0.0, 0.0, 3, 9),
            "No difference between B2I and the untouched Instruct could be shown on the mean of new and old: "
            "0.0 points (no interval: no spread between seeds or rows, 3 seeds, 9 rows).",
        ),
        (
            "B2I", "I2I", Interval(0.1, math.nan, math.nan, 1, 0),
            "No difference between B2I and I2I could be shown on the mean of new and old: +10.0 points (no interval: "
            "nothing is known of rows, 1 of 3 seeds). With one seed, this says nothing of other trainings.",
        ),
        (
            "B2I", "I2I", Interval(1.0, 0.4, 1.0, 3, 4, exact=True),
            "B2I is better than I2I on the mean of new and old by 100.0 points (exact 95 % CI 40.0 to 100.0, 3 seeds, "
            "4 rows).",
        ),
    ],
)  # fmt: skip
def test_sentences_claim_what_the_interval_holds(a, b, interval, told):
    comparison = Comparison(a, b, {"mean": interval}, 3)
    assert sentence(comparison, interval, ["new", "old"]) == told


LOSS = Measure(higher=False, unit="nats")


def by_loss(lr, choice, report, seed=0, arm="B2I", tokens=(1, 3), scale=1.0):
    """A training that logged two losses; those of the rows of the set "report" are around the logged one."""
    spread = 0.25 * lr * 1e3 * (1 + seed)
    losses = [report - spread * tokens[1], report + spread * tokens[0]] * 5
    rows = [[loss * n, n, n, loss, 1] for loss, n in zip(losses, list(tokens) * 5, strict=True)]
    metrics = {"choice/loss": choice, "report/loss": report, "loss": (choice + report) / 2, "forgetting/kl": 0.1}
    samples = samples_of_sets({"report": rows}, ["report/loss"])
    if arm == "Instruct":
        return Row(arm, metrics=metrics, samples=samples)
    return trained(arm, lr, seed, scale, metrics=metrics, samples=samples)


def losses_of_two_arms(**options):
    found = [by_loss(0, 4.0, 4.5, arm="Instruct", **options)]
    for seed in (0, 1, 2):
        found += [by_loss(1e-4, 2.0 + seed / 10, 3.0, seed, **options)]
        found += [by_loss(1e-3, 2.5, 1.0 + seed / 10, seed, **options)]
        found += [by_loss(1e-4, 3.0, 2.5, seed, arm="I2I", **options)]
    return found


def test_a_loss_on_one_set_chooses_the_rate_and_on_another_is_reported():
    found = losses_of_two_arms()
    report = summarise(found, WHAT, score={"report/loss": LOSS}, choose={"choice/loss": LOSS}, arms=["B2I", "I2I"])
    assert report.choices["B2I"].best.lr == 1e-4  # though the other rate is better on the reported rows
    first, second, _ = report.comparisons
    interval = first.intervals["mean"]
    assert (interval.difference, interval.num_rows, interval.num_seeds) == (pytest.approx(0.5), 10, 3)
    assert interval.low < 0.5 < interval.high
    assert sentence(second, second.intervals["mean"], ["report/loss"], LOSS).startswith(
        "B2I is better than the untouched Instruct on report/loss by 1.5000 nats (95 % CI "
    )
    assert report.predictions[0].metrics[OVER_INSTRUCT] == pytest.approx(1.5)  # above 0 is better
    text = render(report)
    assert "one with the lowest choice/loss, over seeds" in text and "report/loss (lower is better)" in text
    assert row(section(text, "Each arm at its chosen rate"), "B2I")[1:3] == ["1e-4", "3.0000 ± 0.0000"]
    assert "share rows" not in text and "chosen on other rows" in section(text, "To be kept in mind")
    assert "of all rows: only choice/loss chooses." in text
    assert row(section(text, "All rates"), "B2I")[:4] == ["B2I", "1e-4", "2.1000 ± 0.0577", "3.0000 ± 0.0000"]


@pytest.mark.parametrize("metric", ["loss", "report/loss"])
def test_a_choice_on_the_reported_rows_is_told(metric):
    report = summarise(losses_of_two_arms(), WHAT, score={metric: LOSS}, arms=["B2I", "I2I"])
    assert report.choices["B2I"].best.lr == 1e-3
    text = render(report)
    assert f"The choice and {metric} share rows: the reported scores flatter the arms." in text
    assert "give a second validation set" in section(text, "To be kept in mind")


def test_a_choice_by_all_rows_of_an_evaluator_that_is_reported_is_told():
    found = [replace(r, metrics={**r.metrics, "new/score": 0.5}) for r in records()]
    text = render(summarise(found, WHAT, gain=["new"], choose={"new/score": Measure()}))
    assert "The choice and new share rows: the reported scores flatter the arms." in text


def test_without_rows_the_interval_is_over_seeds():
    found = [replace(r, samples={}) for r in losses_of_two_arms()]
    found = [replace(r, metrics={**r.metrics, "report/loss": r.metrics["choice/loss"]}) for r in found]
    (comparison, *_) = summarise(found, WHAT, score={"report/loss": LOSS}, arms=["B2I", "I2I"]).comparisons
    interval = comparison.intervals["mean"]
    # differences -1.0, -0.9, -0.8: s = 0.1, t(0.975, 2) = 4.303
    assert (interval.difference, interval.num_rows) == (pytest.approx(-0.9), 0)
    assert interval.high + 0.9 == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert "3 seeds)." in sentence(comparison, interval, ["report/loss"], LOSS)


def test_rows_that_a_metric_is_not_made_of_are_not_used():
    """As of a metric of one's own with the name of another."""
    found = [
        replace(r, metrics={**r.metrics, "report/loss": r.metrics["report/loss"] + 1}) for r in losses_of_two_arms()
    ]
    (comparison, *_) = summarise(found, WHAT, score={"report/loss": LOSS}, arms=["B2I", "I2I"]).comparisons
    assert comparison.intervals["mean"].num_rows == 0


def test_metrics_of_several_units_are_not_averaged(tmp_path):
    found = [
        replace(r, metrics={**r.metrics, "report/sequence_accuracy": r.metrics["report/loss"] / 10}, samples={})
        for r in losses_of_two_arms()
    ]
    scores = {"report/sequence_accuracy": Measure(), "report/loss": LOSS}
    report = summarise(found, WHAT, score=scores, choose={"choice/loss": LOSS}, arms=["B2I", "I2I"])
    text = write(report, tmp_path).read_text()
    cells = row(section(text, "Each arm at its chosen rate"), "B2I")
    assert cells[2:] == ["30.0 ± 0.0", "3.0000 ± 0.0000", "30.0 ± 0.0"]
    assert "| mean of report/sequence_accuracy |" in text
    assert "  - report/loss: " in section(text, "What the data say")


def test_the_agreement_with_the_instruct_chooses_no_rate():
    """It is highest where least was learned."""
    found = []
    for r in records():
        agreement = {0: 1.0, 1: 1.0} if r.lr == 1e-4 else {0: 0.0, 1: 0.0}
        metrics = {**r.metrics, "forgetting/agreement": agreement[0]}
        found.append(replace(r, metrics=metrics, samples={**r.samples, "forgetting": agreement}))
    report = told_of(found, keep=["forgetting"])
    assert {arm: choice.best.lr for arm, choice in report.choices.items()} == dict.fromkeys(report.choices, 1e-3)
    standing = next(s for s in report.table if s.arm == "B2I")
    assert standing["reported/mean"].mean == standing["reported/new/score"].mean
    assert standing["reported/keep"].mean == 0
    assert "forgetting measures the agreement" in section(render(report), "To be kept in mind")
    own = [replace(r, metrics={k: v for k, v in r.metrics.items() if "agreement" not in k}) for r in found]
    report = summarise(own, WHAT, gain=GAIN, keep=["forgetting"], agreements=["forgetting"])  # of a class of one's own
    assert {arm: choice.best.lr for arm, choice in report.choices.items()} == dict.fromkeys(report.choices, 1e-3)


def test_an_arm_that_was_not_asked_for_is_nowhere():
    text = render(summarise(records(), WHAT, gain=GAIN, keep=KEEP, arms=["I2I"]))
    tables = [line for line in text.splitlines() if line.startswith(("|", "- "))]
    assert not [line for line in tables if "B2" in line or "I2B" in line]
    assert "I2I − Instruct" in text and section(text, "Missing").strip() == "Nothing."


def test_a_plot_without_two_points_is_neither_drawn_nor_linked(tmp_path):
    found = [r for r in records() if r.arm == "B2I" and r.seed == 0 and r.lr == 1e-3 and r.scale == 1.0]
    found = [replace(r, facts={}, line={}, metrics={"loss": 1.0}) for r in found]
    write(told_of(records()), tmp_path)
    text = write(told_of(found), tmp_path).read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"REPORT.md", "table.csv"} and "](" not in text


def test_rows_that_are_all_alike_have_an_exact_interval():
    found = [Row("Instruct", samples={"new": dict.fromkeys(range(20), 0.0)})]
    found += [trained("B2I", 1e-4, seed, samples={"new": dict.fromkeys(range(20), 1.0)}) for seed in range(3)]
    found += [trained("I2I", 1e-4, seed, samples={"new": dict.fromkeys(range(20), 1.0)}) for seed in range(3)]
    equal, better, _ = (each.intervals["mean"] for each in told_of(found, keep=[]).comparisons)
    # Clopper and Pearson of 0 of 10 and of 10 of 10 rows
    assert (equal.low, equal.high) == (pytest.approx(-0.30850, abs=1e-5), pytest.approx(0.30850, abs=1e-5))
    assert (better.low, better.high) == (pytest.approx(0.69150, abs=1e-5), 1.0)
    assert (equal.sign, better.sign, equal.exact, better.exact) == (0, 1, True, True)


def test_rows_whose_differences_cancel_over_seeds_have_no_interval():
    """Not that of the first row, by which one arm would be better without any difference."""
    right, left = {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}  # 0 and 2 are reported
    found = [Row("Instruct", samples={"new": right})]
    found += [trained("B2I", 1e-4, 0, samples={"new": right}), trained("B2I", 1e-4, 1, samples={"new": left})]
    found += [trained("I2I", 1e-4, 0, samples={"new": left}), trained("I2I", 1e-4, 1, samples={"new": right})]
    interval = told_of(found, keep=[]).comparisons[0].intervals["mean"]
    assert (interval.difference, interval.sign, interval.exact, interval.is_degenerate) == (0, 0, False, True)


def test_rates_and_seeds_without_any_finished_training_are_missing():
    kept = [r for r in records(seeds=(0, 1)) if (r.arm, r.lr) != ("I2I", 1e-3)]
    given = {"arms": ["B2I", "I2I"], "rates": dict.fromkeys(("B2I", "I2I"), (1e-4, 1e-3)), "seeds": (0, 1, 2)}
    report = summarise(kept, WHAT, gain=GAIN, keep=KEEP, **given)
    text = render(report)
    assert "- I2I at 0.001: no finished training of seed 0, 1, 2" in section(text, "Missing")
    assert "- B2I at 0.0001: no finished training of seed 2" in section(text, "Missing")
    assert "(2 of 3)" in row(section(text, "Each arm at its chosen rate"), "B2I")[2]
    assert "2 of 3 seeds" in section(text, "What the data say") and "There are 2 seeds" in text


def test_an_arm_without_a_finished_training_is_missing_everywhere():
    text = render(told_of([r for r in records() if r.arm != "I2I"]))
    assert row(section(text, "Each arm at its chosen rate"), "I2I") == ["I2I", "–"] + ["missing"] * 4
    assert row(section(text, "Paired differences"), "B2I − I2I")[1:] == ["–"] * 6
    assert row(section(text, "All rates"), "I2I")[-1] == "no training"
    assert "B2I and I2I can't be compared: no finished measurement of I2I." in text
    assert "- I2I: no finished training at scale 1" in section(text, "Missing")


def test_a_missing_seed_is_told_and_the_arm_compared_on_the_others():
    found = [r for r in records() if (r.arm, r.seed) != ("I2I", 2)]
    report = told_of(found)
    text = render(report)
    assert re.fullmatch(r"[\d.]+ ± [\d.]+ \(2 of 3\)", row(section(text, "Each arm at its chosen rate"), "I2I")[2])
    assert report.comparisons[0].intervals["mean"].num_seeds == 2 and "2 of 3 seeds" in section(
        text, "What the data say"
    )
    assert "- I2I at 0.0001: no finished training of seed 2" in section(text, "Missing")


def test_a_score_that_is_nan_makes_its_evaluator_missing_not_smaller():
    found = records()
    spoilt = next(r for r in found if (r.arm, r.lr, r.seed, r.scale) == ("B2I", 1e-3, 1, 1.0))
    spoilt.samples["old"][REPORTED[0]] = math.nan
    report = told_of(found)
    standing = next(s for s in report.table if s.arm == "B2I")
    counts = [standing[f"reported/{what}"].count for what in ("old/score", "mean", "new/score")]
    assert counts == [2, 2, 3]
    assert report.comparisons[0].intervals["mean"].num_seeds == 2
    assert "- B2I at 0.001, seed 1: old has scores of 79 of 80 rows" in section(render(report), "Missing")
    (line,) = [
        line
        for line in csv.DictReader(to_csv(report.rows, [LR]).splitlines())
        if [line[k] for k in ("arm", LR, "seed", "scale")] == ["B2I", "0.001", "1", "1.0"]
    ]
    assert line["reported/old/score"] == "" and line["reported/new/score"] != ""


def test_arms_without_a_common_seed_are_not_compared():
    found = [r for r in records() if r.arm not in ("B2I", "I2I") or (r.arm == "B2I") == (r.seed == 0)]
    assert told_of(found).comparisons[0].reason == "they have no seed in common"


def test_an_evaluator_that_cannot_be_averaged_is_left_out_and_told():
    found = [replace(r, samples=r.samples | {"kl": {0: 3.5, 1: 0.1}, "one": {0: 1.0}}) for r in records()]
    report = told_of(found, keep=["old", "kl", "one", "loss"])
    assert report.scores == ("new", "old")
    text = section(render(report), "To be kept in mind")
    assert "kl is in no mean: its scores leave the range from 0 to 1." in text
    assert "one is in no mean: it has a single row" in text and "loss is in no mean: it has no scores of rows" in text
    with pytest.raises(DataError, match="no evaluator can compare the arms"):
        told_of(found, gain=["kl"], keep=[])


def test_edges_and_unequal_numbers_of_rates_are_told():
    found = [r for r in records() if (r.arm, r.lr) != ("I2B", 1e-3)]
    text = render(told_of(found))
    assert "B2I: the best rate is the largest tried: the arm may be undertuned." in section(text, "What the data say")
    mind = section(text, "To be kept in mind")
    assert "I2B was tried at one rate only" in mind and "(B2B 2, B2I 2, I2B 1, I2I 2)" in mind


def test_records_and_evaluators_are_not_counted_twice():
    with pytest.raises(DataError, match=r"two rows of B2B, rate 0.0001, seed 0, scale None"):
        told_of([*records(), next(r for r in records() if r.arm == "B2B")])
    with pytest.raises(DataError, match="'new' is named twice"):
        told_of(records(), keep=["new"])


def test_scores_of_the_csv_are_those_of_the_records(report):
    lines = list(csv.DictReader(to_csv(report.rows, [LR]).splitlines()))
    assert list(lines[0])[:6] == ["trial", "state", "arm", "scale", "seed", LR] and len(lines) == len(records())
    record = next(r for r in records() if (r.arm, r.lr, r.seed) == ("I2B", 1e-4, 2))
    (own,) = [line for line in lines if (line["arm"], line[LR], line["seed"]) == ("I2B", "0.0001", "2")]
    assert (own["trial"], own["state"], own["scale"]) == ("I_lr0.0001_seed2", "complete", "1.0")
    means = {
        half: {name: sum(record.samples[name][i] for i in indices) / 40 for name in record.samples}
        for half, indices in (("selection", set(range(80)) - set(REPORTED)), ("reported", REPORTED))
    }
    for half, scores in means.items():
        assert float(own[f"{half}/old/score"]) == pytest.approx(scores["old"])
        assert float(own[f"{half}/keep"]) == pytest.approx((scores["old"] + scores["format"]) / 2)
        assert float(own[f"{half}/mean"]) == pytest.approx(sum(scores.values()) / 3)
    assert (own["train_s"], own["loss"], own["sigma"], own["line/0.5"]) == ("12.0", "1.0", "0.02", "")
    (graft,) = [line for line in lines if (line["trial"], line["scale"]) == ("B_lr0.001_seed1", "1.0")]
    assert (graft["line/0"], graft["line/0.5"], graft["line/1"]) == ("2.5", "1.6", "1.1")


@pytest.mark.parametrize(
    ("line", "height"),
    [
        ({0.0: 1.0, 0.5: 1.7, 1.0: 1.2}, 0.5),
        ({0.0: 2.0, 0.5: 1.5, 1.0: 1.0}, 0.0),
        ({0.0: 1.0, 0.5: 0.5, 1.0: 1.0, 1.5: 9.0}, 0.0),  # beyond the graft is not on the way to it
        ({0.0: 1.0, 1.0: 1.0}, math.nan),
        ({0.5: 1.0, 0.75: 2.0, 1.0: 1.0}, math.nan),
        ({0.0: 1.0, 0.5: math.nan, 1.0: 1.0}, math.nan),
    ],
)
def test_a_barrier_is_what_rises_above_both_ends(line, height):
    assert barrier(line) == pytest.approx(height, nan_ok=True)


def test_the_gain_of_a_graft_is_told_beside_what_was_known(report):
    assert len(report.predictions) == 6
    first = report.predictions[0]
    own = next(r for r in records() if (r.arm, r.lr, r.seed, r.scale) == ("B2I", 1e-4, 0, 1.0))
    start = next(r for r in records() if r.arm == "Instruct")
    gains = [
        sum(own.samples[name][i] - start.samples[name][i] for i in REPORTED) / 40 for name in ("new", "old", "format")
    ]
    assert first.metrics[OVER_INSTRUCT] == pytest.approx(sum(gains) / 3)
    cells = row(section(render(report), "What might predict the gain"), "σ of the pair")
    assert cells[1:] == ["–", "6", "0.02 to 0.02", "the same in all runs"]


def test_untouched_models_alone_make_a_report(tmp_path):
    found = [r for r in records() if r.arm in ("Base", "Instruct")]
    text = write(summarise(found, WHAT, gain=GAIN, keep=KEEP), tmp_path).read_text()
    assert text.count("can't be compared") == 3 and "No graft of B2I at scale 1 is finished." in text


def test_several_settings_make_one_report(tmp_path):
    whole = told_of(records())
    without = told_of([r for r in records() if r.arm != "I2I"], keep=[])
    path = write_combined({"bare": whole, "house style": without}, Description("All"), tmp_path)
    text = path.read_text()
    overview = section(text, "Overview")
    assert row(overview, "house style")[6:8] == ["missing", "–"]
    assert row(overview, "bare")[4] == row(section(render(whole), "Each arm at its chosen rate"), "B2I")[-1]
    over_all = section(text, "Over all settings")
    assert "B2I is better than the untouched Instruct in 2 of 2 settings (bare, house style)" in over_all
    assert "Not comparable in 1 (house style)." in over_all
    assert "house%20style/trade.png" in text
    for name in ("bare", "house style"):
        assert {file.name for file in (tmp_path / name).iterdir()} == FILES
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["setting"] for line in lines] == ["bare"] * len(whole.rows) + ["house style"] * len(without.rows)
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "REPORT.md", "table.csv", "predicting.png", "predicting.pdf"
    }  # fmt: skip


def test_nothing_to_combine_is_refused():
    with pytest.raises(DataError, match="no reports"):
        combine({}, WHAT)
