"""What a sweep's table says: main effects by hand, the best first, the same after writing and reading."""

import math
from pathlib import Path

import numpy as np
import pytest

from shadowlit.errors import ShadowlitError
from shadowlit.studies.rows import to_csv
from shadowlit.studies.sweep import report
from shadowlit.studies.sweep.plots import draw_interaction, main_effects, trial_curves
from shadowlit.studies.sweep.report import write_report
from shadowlit.studies.sweep.scheduler import keep_definition
from shadowlit.studies.sweep.storage import open_storage
from shadowlit.studies.sweep.study import SweepStudy
from shadowlit.studies.sweep.table import Level, Table, build_table, read_curves, read_table, write_curves
from tests.studies.sweep.test_definition import define

ROOT = Path(__file__).parents[3]
LR, RANK = "model.lr", "model.adapter.r"


def filled(tmp_path, value, **options):
    """A study whose trials are all finished with ``value(lr, rank, seed, scale)`` as the grafted model's loss."""
    study = SweepStudy(define(**options), open_storage(None, tmp_path))
    study.fill()
    while (claim := study.claim()) is not None:
        lr, rank = (float(label) for _, label in claim.key.setting)
        scales = study.definition.scales
        names = ["val/grafted/loss", *(f"val/grafted@{scale:g}/loss" for scale in scales[1:])]
        metrics = {name: value(lr, rank, claim.key.seed, scale) for name, scale in zip(names, scales, strict=True)}
        metrics |= {"val/tuned/loss": value(lr, rank, claim.key.seed, 0) + 10, "val/grafted/x/score": 0.5}
        study.report(claim, 5, 9.0)
        study.report(claim, 10, 8.0)
        study.finish(claim, {"metrics": metrics, "step": 10, "wall_s": 2.0, "peak_memory_bytes": 1e9})
    study.keep_untouched({"val/instruct/loss": 7.0, "val/base/loss": 8.0, "val/instruct/x/score": 0.25})
    return study


def test_a_main_effect_by_hand(tmp_path):
    """Loss = 1000 lr + rank + 0.1 seed: the mean over ranks 1 and 4 is 2.5, over rates 0.001 and 0.002 it is 1.5."""
    table = build_table(filled(tmp_path, lambda lr, rank, seed, scale: 1000 * lr + rank + 0.1 * seed, seeds=[0, 1, 2]))
    rates = table.effects(LR, "loss", "B2I")
    assert [(level.value, level.num_seeds, level.num_settings) for level in rates] == [("0.001", 3, 2), ("0.002", 3, 2)]
    assert [level.mean for level in rates] == pytest.approx([1 + 2.5 + 0.1, 2 + 2.5 + 0.1])
    # Over the seeds 0, 1, 2 the standard deviation is 0.1, and Student's t with 2 degrees of freedom 4.302653.
    assert [level.high - level.mean for level in rates] == pytest.approx([4.302652729911275 * 0.1 / math.sqrt(3)] * 2)
    assert [level.mean for level in table.effects(RANK, "loss", "B2I")] == pytest.approx([1.6 + 1, 1.6 + 4])


def test_no_level_gains_from_easier_company(tmp_path):
    """Rank 4 is worse by 100, and was not measured at the higher rate: it counts at neither."""
    table = build_table(
        filled(tmp_path, lambda lr, rank, seed, scale: 1000 * lr + (100 if rank == 4 else 0),
               drop=[{LR: 2e-3, RANK: 4}])
    )  # fmt: skip
    levels = table.effects(LR, "loss", "B2I")
    assert [(level.mean, level.num_settings) for level in levels] == [(1.0, 1), (2.0, 1)]
    assert all(math.isnan(level.low) for level in levels)  # a single seed says nothing of others


def test_the_scale_is_an_axis_too(tmp_path):
    study = filled(tmp_path, lambda lr, rank, seed, scale: rank + scale, scales=[1.0, 0.5, 2.0])
    table = build_table(study)
    assert table.axes == [LR, RANK, "scale"]
    assert [(level.value, level.mean) for level in table.effects("scale", "loss", "B2I")] == [
        (0.5, 3.0), (1.0, 3.5), (2.0, 4.5)
    ]  # fmt: skip
    assert [level.mean for level in table.effects(LR, "loss", "B2I")] == [3.5, 3.5]  # at the first scale
    assert [level.mean for level in table.effects(LR, "loss", "B2I", scale=2.0)] == [4.5, 4.5]


def test_the_best_comes_first_but_not_with_fewer_seeds(tmp_path):
    study = filled(tmp_path, lambda lr, rank, seed, scale: 1000 * lr + rank + seed, seeds=[0, 1])
    best, *others = build_table(study).standings("B2I")
    assert best.setting == {LR: "0.001", RANK: "1"} and best.num_seeds == 2
    assert best.metrics["loss"].mean == 2.5 and best.metrics["loss"].standard_error == pytest.approx(0.5)
    assert others[-1].metrics["loss"].mean == 6.5
    rows = build_table(study).rows
    lucky = [row for row in rows if not (row.setting == {LR: "0.001", RANK: "1"} and row.seed == 1)]
    assert Table(lucky, study.definition).standings("B2I")[0].num_seeds == 2
    wanted = define(seeds=[0, 1], direction="maximize")
    assert Table(rows, wanted).standings("B2I")[0].metrics["loss"].mean == 6.5


def test_arms_are_told_apart(tmp_path):
    table = build_table(filled(tmp_path, lambda lr, rank, seed, scale: rank, arms=["B2I", "I2I", "B2B"]))
    assert [level.mean for level in table.effects(RANK, "loss", "B2I")] == [1, 4]
    for arm in ("B2B", "I2I"):
        assert [level.mean for level in table.effects(RANK, "loss", arm)] == [11, 14]
    assert table.untouched("Instruct", "loss") == 7.0 and table.untouched("Base", "loss") == 8.0
    assert math.isnan(table.untouched("Base", "x/score"))


def test_the_mean_of_several_metrics(tmp_path):
    table = build_table(filled(tmp_path, lambda lr, rank, seed, scale: rank, metric=["loss", "x/score"]))
    assert table.shown() == ["mean", "loss", "x/score"]
    assert [level.mean for level in table.effects(RANK, "mean", "B2I")] == [0.75, 2.25]
    assert table.untouched("Instruct", "mean") == (7.0 + 0.25) / 2


def test_written_and_read_it_is_the_same(tmp_path):
    study = filled(tmp_path, lambda lr, rank, seed, scale: math.nan if rank == 4 else lr / 3, scales=[1.0, 0.5])
    table = build_table(study)
    keep_definition(tmp_path, study.definition)
    (tmp_path / "table.csv").write_text(to_csv(table.rows, [LR, RANK]))
    write_curves(study, tmp_path)
    again = read_table(tmp_path)
    assert len(again.rows) == len(table.rows)
    for old, new in zip(table.rows, again.rows, strict=True):
        finite = {name: value for name, value in old.metrics.items() if math.isfinite(value)}
        assert (old.trial, old.state, old.arm, old.scale, old.seed, dict(old.setting), finite, dict(old.cost)) == (
            new.trial, new.state, new.arm, new.scale, new.seed, dict(new.setting), dict(new.metrics), dict(new.cost)
        )  # fmt: skip
    assert {row.state for row in again.rows} == {"complete", "diverged"}
    assert read_curves(tmp_path)["lr=0.001_r=1_seed=0"] == [(5, 9.0), (10, 8.0)]
    with pytest.raises(ShadowlitError, match=r"there is no .*sweep\.json.*sweep report writes it"):
        read_table(tmp_path / "none")
    with pytest.raises(ShadowlitError, match=r"there is no .*curves\.csv"):
        read_curves(tmp_path / "none")


def test_a_file_of_an_earlier_version_is_read():
    """The repository's own results: numbers as they stand in the file."""
    folder = ROOT / "experiments/results/rank"
    table = read_table(folder)
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(table.rows) == len(lines) - 1 and table.axes == ["model.lr", "rank"]
    assert table.untouched("Instruct", "loss") == 0.7830579280853271
    assert table.untouched("Base", "mean") == 0.25208333344198763
    assert {row.state for row in table.rows} == {"complete"} and all(row.samples == {} for row in table.rows)
    assert to_csv(table.rows, table.axes).splitlines() == lines


def test_the_report_of_a_sweep_that_has_just_begun(tmp_path):
    study = SweepStudy(define(), open_storage(None, tmp_path))
    study.fill()
    claim = study.claim()
    text = write_report(study, tmp_path).read_text()
    assert "4 trials: 1 running, 3 waiting" in text and "Nothing is finished yet." in text
    study.fail(claim, "out of memory")
    assert f"`{study.definition.name_of(claim.key)}`: out of memory" in write_report(study, tmp_path).read_text()


def test_the_report_says_what_was_measured(tmp_path):
    study = filled(
        tmp_path, lambda lr, rank, seed, scale: 1000 * lr + rank + 0.1 * seed, seeds=[0, 1, 2], show=["x/score"]
    )
    text = write_report(study, tmp_path).read_text()
    assert "| Instruct | untouched |  | 7 | 0.25 |" in text
    assert "| B2I | lr=0.001, r=1 | 3 | 2.1 ± 0.058 | 0.5 ± 0 |" in text
    assert "| B2I | 0.002 | 2 | 4.6 (4.352 to 4.848) | 0.5 (no spread between seeds) |" in text
    assert "which flatters the best" in text and "interaction_B2I.png" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {"main_effects.png", "interaction_B2I.png", "trials.png"}
    assert {file.stem for file in tmp_path.glob("*.pdf")} == {"main_effects", "interaction_B2I", "trials"}


def test_plots_draw_what_the_table_says(tmp_path):
    study = filled(tmp_path, lambda lr, rank, seed, scale: 1000 * lr + rank + 0.1 * seed, seeds=[0, 1, 2])
    table = build_table(study)
    left, right = main_effects(table).axes
    points = left.lines[0].get_xydata()
    assert points == pytest.approx(np.array([[0.001, 3.6], [0.002, 4.6]]))
    assert left.get_ylabel() == "loss (nats per token)" and right.get_xlabel() == "r"
    # The Instruct at 7 is near; the Base at 8 would be further away than the effect is large.
    labels = {line.get_label() for line in right.lines}
    assert "Instruct, untouched" in labels and "Base, untouched" in labels
    assert "Base, untouched" not in {line.get_label() for line in left.lines}
    heat = draw_interaction(table, LR, RANK).axes[0].images[0].get_array()
    assert np.asarray(heat) == pytest.approx(np.array([[2.1, 3.1], [5.1, 6.1]]))
    scaled = build_table(filled(tmp_path / "scaled", lambda lr, rank, seed, scale: rank + scale, scales=[1.0, 3.0]))
    heat = draw_interaction(scaled, LR, RANK).axes[0].images[0].get_array()
    assert np.asarray(heat) == pytest.approx(np.array([[2.0, 2.0], [5.0, 5.0]]))  # at the first scale alone
    heat = draw_interaction(scaled, "scale", RANK).axes[0].images[0].get_array()
    assert np.asarray(heat) == pytest.approx(np.array([[2.0, 4.0], [5.0, 7.0]]))
    curves = trial_curves({"lr=0.001_r=1_seed=0": [(1, 3.0), (2, 2.0)]}, table).axes[0]
    assert curves.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]


def test_an_interval_without_width_is_told():
    assert report._level(Level("a", 0.5, 0.5, 0.5, 3, 1)) == "0.5 (no spread between seeds)"
    assert report._level(Level("a", 0.5, 0.25, 0.75, 3, 1)) == "0.5 (0.25 to 0.75)"
    assert report._level(Level("a", 0.5, math.nan, math.nan, 1, 1)) == "0.5"
