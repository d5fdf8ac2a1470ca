"""Which trainings a comparison needs: two serve four arms, by learning rate and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowlit.errors import DataError
from shadowlit.studies.arms import TUNED, is_grafted, subject_of
from shadowlit.studies.rows import LR, Row
from shadowlit.studies.trials.process import Job
from shadowlit.studies.trials.recipe import WITHOUT_VARIANTS, Recipe


@dataclass(frozen=True)
class Training:
    """One training: of the Base (``B``) or of the Instruct (``I``), at one peak learning rate, with one seed."""

    source: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the training and of its folder."""
        return f"{self.source}_lr{self.lr:g}_seed{self.seed}"

    def row(self, arm: str, scale: float | None, **measured: Any) -> Row:
        """Return one of its arms as a row with what was measured; ``scale`` is the graft's λ, and None for the tuned
        arm.
        """
        return Row(arm, scale, {LR: self.lr}, self.seed, self.name, **measured)

    def job(
        self, recipe: Recipe, folder: Path, arms: Sequence[str] = TUNED, evaluators: Sequence[str] | None = None
    ) -> Job:
        """Return the job that runs it in a folder of its own in the comparison's ``folder``, and measures these of its
        arms by these evaluators, None for all.

        Evaluators run at the end, on the models of these arms alone, and grafts are validated for grafted arms alone,
        without variants, unless a callback monitors what would be left out.
        """
        home = folder / self.name
        kinds = {"grafted" if is_grafted(arm) else "tuned": arm for arm in arms if arm[0] == self.source}
        every, monitored = list(recipe.get("evaluation.evaluators") or ()), recipe.monitored()
        awaited = [name for name in every if any(f"/{name}/" in f"{metric}/" for metric in monitored)]
        monitors_evaluators = bool(awaited)
        evaluators = every if evaluators is None else [*evaluators, *(n for n in awaited if n not in evaluators)]
        own = {
            **recipe.chosen(evaluators),
            **({} if any("/grafted@" in metric for metric in monitored) else WITHOUT_VARIANTS),
            "graft.validate": "grafted" in kinds or any("graft" in metric for metric in monitored),
            "evaluation.subjects": ["tuned", "grafted"] if monitors_evaluators else sorted(kinds),
            "evaluation.last_only": not monitors_evaluators,
            "model.lr": self.lr,
            "graft.baselines": False,
            "evaluation.baselines": False,
            "export.parts": ["delta"],
            "export.subject": "grafted",
            "graft.fit_scales": None,
            "export.folder": str(home),
        }
        arguments = recipe.arguments(self.source, self.seed, home, {**recipe.overrides, **own})
        subjects = [name for arm in kinds.values() for name in self._subjects(arm, recipe, evaluators)]
        return Job(self.name, ("fit", *arguments), tuple(subjects))

    def _subjects(self, arm: str, recipe: Recipe, evaluators: Sequence[str]) -> Iterator[str]:
        """What the metrics of an arm's models begin with: of validation, and of evaluators."""
        yield f"val/{subject_of(arm, recipe.scales[0], recipe.scales)}/"
        yield from (f"val/{subject_of(arm, recipe.scales[0], recipe.scales)}/{name}/" for name in evaluators)


def plan(arms: Sequence[str], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Training]:
    """List the trainings that ``arms`` need: each source at all rates of its arms, with all seeds.

    They are ordered by seed, then rate, so that a comparison that is cut short has complete seeds. An arm without rates
    has those of the other arm of its source.

    Raises:
        DataError: An unknown arm, an arm without a positive rate, or no seed.
    """
    unknown = [arm for arm in (*arms, *rates) if arm not in TUNED]
    if unknown or not arms:
        raise DataError(
            f"arms are {', '.join(arms) or 'missing'}, rates are of {', '.join(rates)}; the arms are "
            f"{', '.join(TUNED)}, each named by the source of its delta and the target of the graft."
        )
    if not seeds:
        raise DataError("no seed is given; expected at least one, e.g. --seeds 0,1,2.")
    found = rates_of_arms(arms, rates)
    wanted: dict[Training, None] = {}
    for seed in seeds:
        for rate in sorted({rate for own in found.values() for rate in own}):
            for source in ("B", "I"):
                if any(rate in own for arm, own in found.items() if arm[0] == source):
                    wanted[Training(source, rate, seed)] = None
    return list(wanted)


def rates_of_arms(arms: Sequence[str], rates: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Return the learning rates of each compared arm, in ascending order.

    Raises:
        DataError: An arm has none, or one that isn't positive.
    """
    found = {}
    for arm in arms:
        own = rates.get(arm) or next((rates[other] for other in rates if other[0] == arm[0]), ())
        if not own or any(rate <= 0 for rate in own):
            raise DataError(
                f"the arm {arm} has the learning rates {list(own)}; expected positive ones, e.g. "
                '--rates \'{"B2I": [1e-4, 3e-4], "I2I": [3e-5, 1e-4]}\'.'
            )
        found[arm] = tuple(sorted(set(map(float, own))))
    return found
