"""``shadowlit similarity``; the docstring is the help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shadowlit.analysis.similarity import Group, Report, Similarity
from shadowlit.analysis.similarity import similarity as compare_models
from shadowlit.checkpoint.folder import require_replaceable
from shadowlit.checkpoint.headers import some_of
from shadowlit.errors import ShadowlitError, counted
from shadowlit.files import replace_text
from shadowlit.progress import make_console, make_table
from shadowlit.text import number

_TITLES = {
    "sigma": "σ", "cosine": "cosine", "relative_norm": "rel. norm", "sign_agreement": "same sign",
    "norm_ratio": "norms b/a", "effective_rank": "eff. rank",
}  # fmt: skip
_IMAGES = (".png", ".pdf", ".svg")
_MAX_ROWS = 48  # of the table by layer
_BAR = 8  # characters


def similarity(
    models: list[str], out: str | None = None, heat_map: str | None = None, effective_rank: bool = False
) -> None:
    """Measure how similar models of one architecture are, and report what that means for a graft.

    Only a few rows of each tensor are in memory at a time.

    Args:
        models: Folders or hub ids. BASE INSTRUCT gives σ = Σ|a - b| / (Σ|a| + Σ|b|) as in Shadow-FT (arXiv 2505.12716),
            cosine and relative norm. BASE TUNED INSTRUCT compares each with the first, and the offsets from it with
            each other: the angle between the update and the offset of the Instruct. DELTA_B DELTA_I, the updates
            learned from the Base and from the Instruct, stored with 'shadowlit delta make', gives their
            cosine, the first number to look at before a graft.
        out: File for all numbers: .json or .csv.
        heat_map: Image file for a heat map of σ, or of the cosine of updates, by layer and kind of tensor: .png, .pdf
            or .svg.
        effective_rank: Also compute how many directions the offset from the first model uses in each matrix (Roy and
            Vetterli 2007). Takes minutes to hours, and the memory of the largest matrix in float32.
    """
    _require_ending("out", out, (".json", ".csv"))
    _require_ending("heat_map", heat_map, _IMAGES)
    for name, target in (("out", out), ("heat_map", heat_map)):
        if target is not None:
            require_replaceable(Path(target), name, models)
    report = compare_models(*models, effective_rank=effective_rank, progress=True)
    _print(report, make_console())
    if out is not None:
        with _writing(out):
            replace_text(Path(out), report.to_json() if out.endswith(".json") else report.to_csv())
    if heat_map is not None:
        # late: matplotlib takes longer than a small comparison
        from shadowlit.analysis.heat_map import of_similarity
        from shadowlit.plotting import draw_heat_maps, save_image

        with _writing(heat_map):
            save_image(draw_heat_maps([of_similarity(each) for each in report.similarities]), Path(heat_map), dpi=200)


@contextmanager
def _writing(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShadowlitError(f"{target} can't be written: {error}. Choose another place.") from error


def _print(report: Report, console: Console) -> None:
    """Print tables and verdicts."""
    for letter, model in report.models.items():
        console.print(f"{letter} = {model}")
    for _, members in groupby(report.similarities, key=lambda similarity: similarity.of):
        family = list(members)
        console.print(_by_group("component", family, [similarity.by_component() for similarity in family]))
        console.print(_by_group("kind", family, [similarity.by_kind() for similarity in family]))
        if family[0].by_layer():
            console.print(_by_group("layer", family, [_runs(similarity.by_layer()) for similarity in family]))
        for found in family:
            if experts := found.by_expert():
                console.print(_by_expert(found, experts))
        console.print(_model_level(family))
    for letter, names in report.left_out.items():
        console.print(f"not compared, because not all models have it as a weight: {some_of(names)} of {letter}")
    for found in report.similarities:
        before = f"{found.title}: " if found.of == "weights" and len(report.models) > 2 else ""
        console.print(before + found.verdict)


def _by_group(by: str, family: Sequence[Similarity], groups: Sequence[Sequence[Group]]) -> Table:
    """One row per kind or layer: all measures of a single pair, or the first measure of several pairs."""
    measure = family[0].measures[0]
    single = len(family) == 1
    headings = [_TITLES[measure], "least", "most"] if single else [similarity.title for similarity in family]
    if single:
        headings += [_TITLES[name] for name in family[0].measures[1:]]
    table = _table(f"{'mean σ' if measure == 'sigma' else _TITLES[measure]} by {by}", by, *headings)
    bar = single and by == "layer"
    if bar:
        table.add_column("")
    top = max((abs(g.measure(measure)) for found in groups for g in found if not math.isnan(g.measure(measure))),
              default=0.0)  # fmt: skip
    for row in zip(*groups, strict=True):
        cells = [_number(group.measure(measure)) for group in row]
        if single:
            cells += _range(row[0], measure)
            cells += [_number(row[0].measure(name)) for name in family[0].measures[1:]]
        if bar:
            cells += [_bar(row[0].measure(measure), top)]
        table.add_row(str(row[0].key), *cells)
    return table


def _by_expert(similarity: Similarity, experts: Mapping[int, Sequence[Group]]) -> Table:
    """One row per layer: the first measure over all of its experts, and its least and greatest expert."""
    measure = similarity.measures[0]
    title = f"{'mean σ' if measure == 'sigma' else _TITLES[measure]} of experts, {similarity.title}"
    table = _table(title, "layer", "experts", "all", "least", "expert", "most", "expert")
    for layer, groups in experts.items():
        together = Group(layer, tuple(tensor for group in groups for tensor in group.tensors))
        defined = [group for group in groups if not math.isnan(group.measure(measure))]
        ends = [end(defined, key=lambda group: group.measure(measure)) for end in (min, max)] if defined else []
        cells = [cell for group in ends for cell in (_number(group.measure(measure)), str(group.key))]
        table.add_row(str(layer), str(len(groups)), _number(together.measure(measure)), *(cells or ["–"] * 4))
    return table


def _model_level(family: Sequence[Similarity]) -> Table:
    """One row per pair. σ is the paper's mean over the tensors in decoder layers; the rest is over the matrices."""
    weights = family[0].of == "weights"
    titles = [_TITLES[name] for name in family[0].measures]
    if weights:
        titles[:1] = ["σ (paper)", "σ of matrices"]
    count = len(family[0].total.tensors)
    matrices = "1 matrix" if count == 1 else f"{count:,} matrices"
    over = f"over the {matrices}" if count < len(family[0].tensors) else f"over {counted(count, 'tensor')}, all of them"
    table = _table(f"whole model, {over}{', but the paper’s σ' if weights else ''}", "pair", *titles)
    for similarity in family:
        values = [similarity.total.measure(name) for name in similarity.measures]
        if weights:
            values[:1] = [similarity.sigma, similarity.sigma_of_matrices]
        table.add_row(similarity.title, *map(_number, values))
    return table


def _table(title: str, *headings: str) -> Table:
    return make_table(
        *headings, title=f"\n{title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )


def _runs(layers: Sequence[Group]) -> list[Group]:
    """Layers, or groups of successive layers where there are more than the table has rows."""
    step = max(1, -(-len(layers) // _MAX_ROWS))
    runs = [layers[i : i + step] for i in range(0, len(layers), step)]
    return [
        Group(
            run[0].key if len(run) == 1 else f"{run[0].key}–{run[-1].key}",
            tuple(tensor for group in run for tensor in group.tensors),
        )
        for run in runs
    ]


def _range(group: Group, measure: str) -> list[str]:
    values = [value for t in group.tensors if not math.isnan(value := getattr(t.sums, measure))]
    return [_number(min(values, default=math.nan)), _number(max(values, default=math.nan))]


def _bar(value: float, top: float) -> str:
    return "" if math.isnan(value) or not top else "█" * round(_BAR * abs(value) / top)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else number(value)


def _require_ending(name: str, path: str | None, endings: Sequence[str]) -> None:
    if path is not None and Path(path).suffix not in endings:
        raise ShadowlitError(f"{name} is {path!r}; expected a name ending in {', '.join(endings)}.")
