import math
import re

import matplotlib
import pytest
import torch

from shadowlit.analysis.delta_plots import (
    draw_costs,
    draw_evolution,
    draw_kinds,
    draw_matrices,
    draw_overlaps,
    draw_spectra,
)
from shadowlit.analysis.deltas import Matrix
from shadowlit.analysis.evolution import Evolution
from shadowlit.analysis.run import read_run
from shadowlit.analysis.run_plots import forgetting, four_curves, gains, score_curves, survival, training
from shadowlit.analysis.subspaces import Overlap, Spectrum
from shadowlit.analysis.tables import Markdown, Table
from shadowlit.analysis.truncation import Cost, Losses
from shadowlit.plotting import MARKERS, OKABE_ITO, SERIES, panels, save_figure, series_style, styled
from tests.analysis.test_run import a_run


@pytest.fixture
def run(tmp_path):
    return read_run(a_run(tmp_path / "run"))


def lines(axis):
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axis.get_lines()}


def told_in(figure):
    return " ".join(figure.axes[0].texts[0].get_text().split())


def test_saved_twice_alike(tmp_path):
    figure, (axis,) = panels(1, 1, 3.4, 2.0)
    axis.plot([0, 1], [0, 1])
    axis.set_xlabel("Δ (nats)")
    saved = save_figure(figure, tmp_path / "deep" / "p")
    pdf, png = ((tmp_path / "deep" / f"p.{ending}").read_bytes() for ending in ("pdf", "png"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert not list((tmp_path / "deep").glob("*.partial"))
    save_figure(figure, tmp_path / "again")
    assert (tmp_path / "again.pdf").read_bytes() == pdf and (tmp_path / "again.png").read_bytes() == png
    data, told = saved._repr_mimebundle_(include=None, exclude=None)
    assert data == {"image/png": png} and told == {"image/png": {"width": 408}}


def test_a_style_that_stays_inside():
    before = matplotlib.rcParams["font.size"]

    @styled
    def draw():
        assert matplotlib.rcParams["font.size"] == 8
        return panels(1, 1, 1, 1)[0]

    draw()
    assert matplotlib.rcParams["font.size"] == before


def test_lines_are_told_apart():
    styles = [tuple(series_style(i).values()) for i in range(len(SERIES) * len(MARKERS))]
    assert len(set(styles)) == len(styles)
    assert set(SERIES) <= set(OKABE_ITO.values()) and OKABE_ITO["yellow"] not in SERIES
    assert OKABE_ITO["black"] not in {series_style(i, black=False)["color"] for i in range(20)}


def test_four_curves_begin_at_the_untouched_models(run):
    axis = four_curves(run, ["loss"], [""]).axes[0]
    found = lines(axis)
    assert found["grafted Instruct"] == [(0, 2.0), (10, 1.5), (20, 1.2)]
    assert found["tuned Base"] == [(0, 3.0), (10, 1.0), (20, 0.9)]
    assert {y for _, y in found["Instruct, untouched"]} == {2.0} and axis.get_yscale() == "linear"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert "has not logged val/…/accuracy up to step 20" in told_in(four_curves(run, ["accuracy"], [""]))


def test_losses_that_lie_far_apart_are_logarithmic(tmp_path):
    rows = ["9,,0.5,0.99,10.0,0.1,30.0,0.2,0.4,0.3,0.75,0.5,0.01"]
    axis = four_curves(read_run(a_run(tmp_path / "far", rows)), ["loss"], [""]).axes[0]
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] < 0.1 and axis.get_ylim()[1] > 30


def test_gains(run):
    losses, by_score = gains(run).axes
    assert lines(losses)["all sets"] == [(0, 0.0), (10, 0.5), (20, pytest.approx(0.8))]
    assert lines(losses)["old"][2] == (20, pytest.approx(-0.2))
    assert lines(by_score)["task"][1:] == [(10, 0.25), (20, -0.25)]
    assert losses.get_ylabel() == "gain in loss (nats per token)"


def test_other_plots_of_a_run(run):
    assert next(iter(lines(survival(run).axes[0]).values())) == [(10, 0.99), (20, 0.98)]
    assert lines(forgetting(run).axes[0])["grafted Instruct"] == [(10, 0.01), (20, 0.02)]
    assert lines(score_curves(run).axes[0])["grafted Instruct"] == [(0, 0.5), (10, 0.75), (20, 0.25)]
    assert training(run).axes[0].get_ylabel() == "training loss (nats per token)"


def test_a_run_that_has_just_begun(tmp_path):
    run = read_run(a_run(tmp_path / "new", ["0,2.5" + "," * 11]))
    for draw in (gains, survival, forgetting, score_curves):
        assert re.search(r"has not logged .* up to step 1. If the run is still going, wait", told_in(draw(run)))
    assert len(training(run).axes[0].get_lines()) == 1


def test_matrices_share_their_colours_and_leave_the_diagonal_blank():
    values = torch.tensor([[1.0, 0.4], [0.4, 1.0]]), torch.tensor([[1.0, -0.8], [-0.8, 1.0]])
    figure = draw_matrices([Matrix(("a", "b"), value, "cosine", 0.0) for value in values], ["left", "right"])
    images = [axis.images[0] for axis in figure.axes[:2]]
    assert [image.get_clim() for image in images] == [pytest.approx((-0.8, 0.8))] * 2
    assert math.isnan(images[0].get_array().data[0, 0])
    assert [text.get_text() for text in figure.axes[1].texts] == ["-0.80", "-0.80"]
    conflict = draw_matrices([Matrix(("a", "b"), values[0], "share of opposite signs", 0.5, inverted=True)])
    assert conflict.axes[0].images[0].get_cmap().name == "RdBu_r"
    small = draw_matrices([Matrix(("a", "b"), torch.tensor([[1.0, -0.001], [-0.001, 1.0]]), "cosine", 0.0)])
    assert [text.get_text() for text in small.axes[0].texts] == ["0.00", "0.00"]


def test_overlaps_go_from_none_to_all():
    told = Overlap(Matrix(("a", "b"), torch.tensor([[1.0, 0.3], [0.3, 1.0]]), "overlap"), 0.05, "input")
    axis = draw_overlaps([told]).axes[0]
    assert axis.images[0].get_clim() == (0, 1) and axis.get_title() == "input side; 0.05 by chance"


def test_spectra_are_relative_to_the_largest():
    found = [Spectrum("n", 0, "q_proj", torch.tensor([4.0, 2.0, 0.0])), Spectrum("m", 0, "up_proj", torch.zeros(3))]
    first, second = draw_spectra({"u": found}).axes[:2]
    assert next(iter(lines(first).values())) == [
        (1, 1.0),
        (2, 0.5),
    ]  # a singular value of 0 has no place on a log scale
    assert (first.get_title(), second.get_title()) == ("q_proj", "up_proj") and len(second.get_lines()) == 0


def test_evolution_begins_at_nothing():
    told = Evolution((2, 4), (1.0, 2.0), (0.9, 1.0), (1.0, 1.2), (math.nan, 0.5), {"q_proj": (0.5, 1.0)})
    left, middle, right = draw_evolution({"run": told}).axes
    assert lines(left)["run"] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert next(iter(lines(middle).values())) == [(2, 0.9), (4, 1.0)] and right.get_xlabel() == "optimizer step t"
    assert "No run with checkpoints" in told_in(draw_evolution({})) == told_in(draw_kinds({}))
    assert lines(draw_kinds({"run": told}).axes[0])["q_proj"] == [(0, 0.0), (2, 0.5), (4, 1.0)]


def test_costs_with_and_without_losses():
    cost = Cost("rank", (1.0, 4.0), {"all": (0.5, 0.1), "q_proj": (0.4, 0.0)})
    share = Cost("density", (0.1, 1.0), {"all": (0.6, 0.0), "q_proj": (0.6, 0.0)})
    axis = draw_costs([cost]).axes[0]
    assert lines(axis)["all together"] == [(1.0, 0.5), (4.0, 0.1)] and axis.get_xlabel() == "rank kept"
    figure = draw_costs([cost, share], Losses(2.0, 1.0, {1.0: 1.5, 4.0: 1.1}, {0.1: 1.8, 1.0: 1.0}))
    assert lines(figure.axes[2])["cut update"] == [(1.0, 1.5), (4.0, 1.1)]
    assert lines(figure.axes[3])["cut update"] == [(0.1, 1.8), (1.0, 1.0)]


def test_tables():
    table = Table(("what", "a<b"), [("x", 0.123456), ("y", math.nan), ("<z>", None)], "told")
    assert str(table).splitlines() == [
        "told", "", "| what | a<b |", "|---|---|", "| x | 0.1235 |", "| y | – |", "| <z> | – |",
    ]  # fmt: skip
    assert "<td>&lt;z&gt;</td>" in table._repr_html_() and re.search("<caption>told</caption>", table._repr_html_())
    assert Markdown("*x*")._repr_markdown_() == "*x*"
