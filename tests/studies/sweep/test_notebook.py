import json
import math

import pytest

from shadowlit.studies.rows import Row, to_csv
from shadowlit.studies.sweep.definition import Definition
from shadowlit.studies.sweep.notebook import best, effects, progress, settings
from shadowlit.studies.sweep.plots import draw_interaction
from shadowlit.studies.sweep.table import Table, read_table

RATES, RANKS, SEEDS = (1e-3, 2e-3), (4, 16), (0, 1, 2)


def loss(arm, rate, rank, seed, scale):
    """Rank 16 is better by 0.5, the higher rate by 0.2, but not with rank 4; seeds differ by 0.01."""
    own = 2.0 - 0.5 * (rank == 16) - 0.2 * (rate == 2e-3) * (rank == 16) + 0.01 * seed
    return own + 0.1 * (arm == "I2I") + 0.3 * (scale == 0.5)


def definition(**changed):
    given = {
        "name": "small", "fit": "configs/demo_lora.yaml", "arms": ["B2I", "I2I"], "seeds": SEEDS, "scales": [1.0, 0.5],
        "grid": {"model.lr": list(RATES), "model.adapter.r": list(RANKS)},
    }  # fmt: skip
    return Definition(**{**given, **changed})


def small_sweep(folder):
    """A sweep's folder as its report leaves it, of 24 trials, one of them failed."""
    rows = [Row("Instruct", metrics={"loss": 3.0})]
    for rate in RATES:
        for rank in RANKS:
            for seed in SEEDS:
                for arm in ("B2I", "I2I"):
                    state = "failed" if (arm, rate, rank, seed) == ("I2I", 1e-3, 4, 2) else "complete"
                    for scale in (1.0, 0.5) if arm == "B2I" else (None,):
                        setting = {"model.lr": f"{rate:g}", "model.adapter.r": str(rank)}
                        found = {} if state == "failed" else {"loss": loss(arm, rate, rank, seed, scale)}
                        name = f"train={arm[0]}_lr={rate:g}_r={rank}_seed={seed}"
                        rows.append(Row(arm, scale, setting, seed, name, state, metrics=found, cost={"wall_s": 4.0}))
    told = definition()
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"identity": {}, "definition": json.loads(told.to_json())}))
    (folder / "table.csv").write_text(to_csv(rows, ["model.lr", "model.adapter.r"]))
    lines = [f"train=B_lr={rate:g}_r={rank}_seed=0,{step},{2 - step / 40}\n" for rate in RATES for rank in RANKS
             for step in (10, 20)]  # fmt: skip
    (folder / "curves.csv").write_text("trial,step,value\n" + "".join(lines))
    return folder


@pytest.fixture
def table(tmp_path):
    return read_table(small_sweep(tmp_path / "sweep"))


def test_progress(table):
    told = dict((name, value) for name, value in progress(table).rows if name.startswith("trials"))
    assert told == {"trials complete": 23, "trials failed": 1}
    varied = [value for name, value in progress(table).rows if name == "varied"]
    assert varied == ["model.lr: 0.001, 0.002", "model.adapter.r: 4, 16", "scale: 1, 0.5"]


def test_best(table):
    """1.3, 1.31, 1.32: mean 1.31, standard error 0.01 / √3."""
    rows = {row[0]: row[1:] for row in best(table).rows}
    assert rows["Instruct"] == ("untouched", None, 3.0)
    assert rows["B2I"] == ("lr=0.002, r=16, λ=1", 3, "1.31 ± 0.0058")
    assert rows["I2I"] == ("lr=0.002, r=16", 3, "1.41 ± 0.0058")


def test_settings(table):
    found = settings(table, "B2I", most=3)
    assert found.caption == "B2I, 8 settings" and len(found.rows) == 3
    assert [row[0] for row in found.rows[:2]] == ["lr=0.002, r=16, λ=1", "lr=0.001, r=16, λ=1"]


def test_effects(table):
    """The rank's effect over both rates: 2.01 for 4, (1.51 + 1.31) / 2 for 16; t for three seeds is 4.303."""
    found = {row[:3]: row[3:] for row in effects(table).rows}
    mean, low, high, seeds, num_settings = found["r", "B2I", "16"]
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((1.41, 1.41 - half, 1.41 + half), rel=1e-5)
    assert (seeds, num_settings) == (3, 2)
    assert found["r", "B2I", "4"][0] == pytest.approx(2.01)


def test_interaction(table):
    """The two axes with the most levels by default; the scale has as many here, and comes last."""
    figure = draw_interaction(table, "model.lr", "model.adapter.r")
    values = figure.axes[0].images[0].get_array()
    both_scales = [[2.01 + 0.15, 2.01 + 0.15], [1.51 + 0.15, 1.31 + 0.15]]
    assert values.tolist() in ([pytest.approx(row) for row in both_scales],
                               [pytest.approx(row) for row in [[2.01, 2.01], [1.51, 1.31]]])  # fmt: skip
    assert draw_interaction(table).axes[0].images


def test_one_axis_has_no_interaction(tmp_path):
    told = definition(grid={"model.lr": [1e-3]}, scales=[1.0])
    figure = draw_interaction(Table([], told))
    assert "nothing to draw" in figure.axes[0].get_title() and not figure.axes[0].images
