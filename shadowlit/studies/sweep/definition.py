"""The definition of a sweep: grid, variants and ranges, the settings and trials that follow, and their names."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from shadowlit.errors import ShadowlitError
from shadowlit.masking import masked
from shadowlit.studies.arms import TUNED, subject_of, without_subject
from shadowlit.studies.trials.recipe import Recipe

MEAN = "mean"
_OWN_KEYS = ("model.seed", "data.seed", "seed_everything", "graft.scales", "evaluation.scales")
_LONGEST_NAME = 120
# Of the keys of data, those that change the training alone, and not what models are measured with.
_TRAINING = ("train", "batch_size", "packing", "pack_length", "group_by_length", "limit_train_samples", "shuffle",
             "drop_last", "num_workers")  # fmt: skip
_TRAINING_KEYS = {f"data.{key}" for key in _TRAINING}


@dataclass(frozen=True)
class Axis:
    """Something that is varied: one key, or several keys that vary together under a name.

    It has either levels, by label the values of the keys that it sets, or a range: ``low``, ``high``, ``log``,
    ``integer``.
    """

    name: str
    levels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    range: Mapping[str, Any] | None = None

    @property
    def keys(self) -> set[str]:
        """The configuration keys that it changes."""
        return {self.name} if self.range is not None else {key for level in self.levels.values() for key in level}

    @property
    def is_numeric(self) -> bool:
        """Whether all its values are numbers."""
        values = [level.get(self.name) for level in self.levels.values()]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    def parameter(self, label: str | float) -> Any:
        """Return the label as Optuna stores it: a number if all labels are numbers."""
        return float(self.levels[str(label)][self.name]) if self.levels and self.is_numeric else label

    def overrides(self, label: str | float) -> Mapping[str, Any]:
        """Return the keys that a label, or a number from the range, sets."""
        return {self.name: label} if self.range is not None else self.levels[str(label)]


@dataclass(frozen=True)
class TrialKey:
    """One trial: a label or number for every axis, the model that is trained (``B`` or ``I``), and a seed."""

    setting: tuple[tuple[str, str | float], ...]
    source: str
    seed: int


@dataclass(frozen=True)
class Definition:
    """A sweep, as its file defines it.

    The attributes are the keys of the file, which ``shadowlit sweep run --help`` describes.
    """

    name: str
    fit: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drop: Sequence[Mapping[str, Any]] = ()
    arms: Sequence[str] = ("B2I",)
    seeds: Sequence[int] = (0,)
    scales: Sequence[float] = (1.0,)
    task_scales: Sequence[float] = ()
    metric: str | Sequence[str] = "loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: str = "grid"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None
    pruner: str = "none"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    show: Sequence[str] = ()
    max_trials: int = 1000

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ShadowlitError(f"the sweep {self.study!r} can't run: " + "; ".join(problems))

    @property
    def study(self) -> str:
        """The name of its study in the storage, and of its folder: ``rank-demo_lora``."""
        return f"{self.name}-{Path(self.fit).stem}"

    @cached_property
    def axes(self) -> list[Axis]:
        """Everything that is varied, in the file's order: grid, variants, ranges."""
        grid = [
            Axis(key, {_label(value): {key: value} for value in _as_list(values)}) for key, values in self.grid.items()
        ]
        variants = [
            Axis(name, {str(label): dict(keys) for label, keys in v.items()}) for name, v in self.variants.items()
        ]
        return grid + variants + [Axis(key, range=dict(limits)) for key, limits in self.ranges.items()]

    @cached_property
    def sources(self) -> list[str]:
        """The models that are trained for the arms: ``B``, ``I`` or both."""
        return [source for source in "BI" if any(arm[0] == source for arm in self.arms)]

    @property
    def draws(self) -> bool:
        """Whether settings are drawn; otherwise all of them are run."""
        return self.sampler != "grid"

    @cached_property
    def num_planned(self) -> int:
        """The largest possible number of trials, before any combination is dropped."""
        settings = self.trials or 1 if self.draws else math.prod(len(axis.levels) for axis in self.axes)
        return settings * len(self.sources) * len(self.seeds)

    def planned(self) -> list[TrialKey]:
        """Return all trials of a grid, seed by seed; empty for a sweep that draws its settings."""
        if self.draws:
            return []
        settings = [
            tuple(zip((axis.name for axis in self.axes), labels, strict=True))
            for labels in itertools.product(*(axis.levels for axis in self.axes))
        ]
        kept = [setting for setting in settings if not self.is_dropped(dict(setting))]
        return [TrialKey(setting, source, seed) for seed in self.seeds for setting in kept for source in self.sources]

    def is_dropped(self, setting: Mapping[str, str | float]) -> bool:
        """Return whether a setting is one of the combinations to leave out."""
        return any(
            all(
                str(setting.get(axis)) in {_label(value) for value in _as_list(values)} for axis, values in each.items()
            )
            for each in self.drop
        )

    def wants(self, key: TrialKey) -> bool:
        """Return whether a trial still belongs to the sweep, from which values, seeds or arms may have been removed."""
        return key in self._planned if not self.draws else key.source in self.sources and key.seed in self.seeds

    @cached_property
    def _planned(self) -> set[TrialKey]:
        return set(self.planned())

    def siblings(self, key: TrialKey) -> list[TrialKey]:
        """Return the trials of a drawn setting: one for each model that is trained and each seed."""
        return [TrialKey(key.setting, source, seed) for seed in self.seeds for source in self.sources]

    def name_of(self, key: TrialKey) -> str:
        """Return the name of a trial's folder, from what is changed: the same trial always has the same one."""
        parts = [f"{short}={value:g}" if isinstance(value, float) else f"{short}={value}"
                 for short, (_, value) in zip(self.short_names, key.setting, strict=True)]  # fmt: skip
        # Only trainings of the Instruct are marked: those of the Base keep their names when an arm is added.
        text = "_".join([*(["train=I"] if key.source == "I" else []), *parts, f"seed={key.seed}"])
        plain = re.sub(r"[^\w.+=-]+", "-", text, flags=re.ASCII)
        if plain == text and len(text) <= _LONGEST_NAME:
            return text
        exact = json.dumps(asdict(key), sort_keys=True)
        return f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"

    @cached_property
    def short_names(self) -> list[str]:
        """The shortest suffix of each axis's name that distinguishes it from the others."""
        words = [axis.name.split(".") for axis in self.axes]
        lengths = [
            next(n for n in range(1, len(own) + 1) if n == len(own) or [w[-n:] for w in words].count(own[-n:]) == 1)
            for own in words
        ]
        return [".".join(own[-length:]) for own, length in zip(words, lengths, strict=True)]

    def overrides_of(self, key: TrialKey) -> dict[str, Any]:
        """Return the keys that distinguish this trial from the others, with their values."""
        axes = {axis.name: axis for axis in self.axes}
        return {name: value for axis, label in key.setting for name, value in axes[axis].overrides(label).items()}

    def arguments(self, key: TrialKey, folder: Path, more: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Return the command line of a trial after ``shadowlit``."""
        changed = {**self.overrides_of(key), **(more or {})}
        # What is the same for all trials is measured once, in a job of its own.
        once = {} if self.measures_each else {"graft.baselines": False, "evaluation.baselines": False}
        # One that diverges is a result of the sweep.
        own = {
            "export.enabled": False,
            "graft.fit_scales": None,
            "model.on_nan": "warn",
            **once,
            **self.overrides,
            **changed,
        }
        recipe = self._recipe(changed)
        return ("fit", *recipe.arguments(key.source, key.seed, folder, {**own, **self.overrides, **changed}))

    @property
    def measures_each(self) -> bool:
        """Whether every trial has to measure Base and Instruct, because what they are measured with varies."""
        keys = {key for axis in self.axes for key in axis.keys}
        return any(key.partition(".")[0] in ("pair", "data", "evaluation") for key in keys - _TRAINING_KEYS)

    def identity(self) -> dict[str, Any]:
        """Return everything that must not change within a sweep; values, seeds and arms may be added."""
        swept = any(key.startswith("pair") for axis in self.axes for key in axis.keys)
        return {
            **self.recipe.identity(),
            "axes": [axis.name for axis in self.axes],
            "metric": self.metrics,
            "direction": self.direction,
            "draws": self.draws,
            "pair": None if swept else self.recipe.fingerprints(),
        }

    def to_json(self) -> str:
        """Return the definition as JSON, to be written: secrets are masked."""
        return json.dumps(masked(asdict(self)), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Definition:
        """Return the definition from :meth:`to_json`."""
        return cls(**json.loads(text))

    @property
    def metrics(self) -> list[str]:
        """The metrics that are averaged; usually one."""
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def judged(self) -> str:
        """The name, in tables, of the value that trials are judged by: ``loss`` for ``val/grafted/loss``."""
        return without_subject(self.metrics[0]) if len(self.metrics) == 1 else MEAN

    @property
    def judged_by(self) -> str:
        """The metrics that a trial is judged by, within a sentence."""
        listed = ", ".join(f"`{metric}`" for metric in self.metrics)
        return listed if len(self.metrics) == 1 else f"`{MEAN}`, the mean of {listed},"

    def judge(self, logged: Mapping[str, float | None], source: str) -> float:
        """Return the value of a trial, from the metrics that it logged; NaN if one of them is NaN.

        Raises:
            KeyError: One of them was not logged.
        """
        arm = next(arm for arm in self.arms if arm[0] == source)
        who = subject_of(arm, self.scales[0], self.scales)
        found = [logged[metric if metric.startswith("val/") else f"val/{who}/{metric}"] for metric in self.metrics]
        return sum(math.nan if value is None else value for value in found) / len(found)

    def is_distributed(self) -> bool:
        """Return whether Lightning may start more processes than one for a trial."""
        swept = {key for axis in self.axes for key in axis.keys}
        return self.recipe.is_distributed() or bool(swept & {"trainer.devices", "trainer.accelerator"})

    @cached_property
    def recipe(self) -> Recipe:
        """What all trials share."""
        return self._recipe({})

    def _recipe(self, overrides: Mapping[str, Any]) -> Recipe:
        own = {**self.overrides, **overrides}
        return Recipe(Path(self.fit), own, tuple(self.scales), tuple(self.task_scales))

    def _problems(self) -> Iterator[str]:
        yield from self._problems_of_axes()
        if not re.fullmatch(r"[\w.-]+", self.name):
            yield f"name is {self.name!r}, expected letters, digits, '.', '_' and '-'"
        for arm in self.arms:
            if arm not in TUNED:
                yield f"arms names {arm!r}, expected some of {', '.join(TUNED)}"
        if not self.metrics:
            yield "metric is empty, expected the name of a metric, e.g. loss"
        if not self.arms:
            yield f"arms is empty, expected some of {', '.join(TUNED)}"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds is {list(self.seeds)}, expected at least one and each once, e.g. [0, 1, 2]"
        if not self.scales or len(set(self.scales)) < len(self.scales):
            yield f"scales is {list(self.scales)}, expected at least one and each once, e.g. [1.0, 0.5]"
        if not set(self.task_scales) <= set(self.scales[1:]):
            yield (
                f"task_scales is {list(self.task_scales)}, expected some of scales {list(self.scales)} beyond the "
                "first, which the evaluators measure anyway"
            )
        if self.draws and not self.trials:
            yield f"sampler is {self.sampler} but trials is not set; set how many settings it draws, e.g. trials: 20"
        if not self.draws and self.ranges:
            yield f"ranges ({', '.join(self.ranges)}) are not a grid; set sampler: random or tpe, or list the values"
        if not self.draws and self.trials is not None:
            yield "trials is set, but a grid runs all of its combinations; set sampler: random or tpe, or leave it out"
        if self.num_planned > self.max_trials:
            yield (
                f"{self.num_planned:,} trials are more than max_trials={self.max_trials:,}; take fewer values or "
                "seeds, draw with sampler: random and trials, or raise max_trials"
            )

    def _problems_of_axes(self) -> Iterator[str]:
        if not self.axes:
            yield "nothing is varied; set grid, variants or ranges, e.g. grid: {model.lr: [1e-4, 3e-4]}"
        for key, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                yield f"grid.{key} is {values!r}, expected a list with at least one value"
            elif len({_label(value) for value in values}) < len(values):
                yield f"grid.{key} has a value twice: {values}"
        for name, labels in self.variants.items():
            if not labels:
                yield f"variants.{name} is empty, expected labels, each with the keys that it sets"
        for key, between in self.ranges.items():
            yield from _problems_of_range(key, between)
        seen: dict[str, str] = {}
        for axis in self.axes:
            for key in sorted(axis.keys):
                if key in seen:
                    yield f"{key} is varied twice, by {seen[key]} and by {axis.name}; vary it once"
                seen[key] = axis.name
                if key in _OWN_KEYS:
                    own = "seeds" if "seed" in key else "scales"
                    yield f"{key} can't be varied as a key; set {own}, which every trial is measured with"
                if key in self.overrides:
                    yield f"{key} is in overrides and varied by {axis.name}; leave it out of overrides"
        axes = {axis.name: axis for axis in self.axes}
        for each in self.drop:
            for name, values in each.items():
                wanted = {_label(value) for value in _as_list(values)}
                if name not in axes:
                    yield f"drop names {name!r}, expected some of {', '.join(axes)}"
                elif axes[name].range is None and not wanted <= axes[name].levels.keys():
                    yield f"drop names {name}={values}, expected some of {', '.join(axes[name].levels)}"
        whole = self.axes and all(axis.levels for axis in self.axes) and self.seeds and self.sources
        if whole and not self.draws and self.num_planned <= self.max_trials and not self.planned():
            yield "drop leaves no trial; drop fewer combinations"


def _problems_of_range(key: str, limits: Mapping[str, Any]) -> Iterator[str]:
    known = {"low", "high", "log", "integer"}
    low, high = limits.get("low"), limits.get("high")
    numbers = [each for each in (low, high) if isinstance(each, int | float) and not isinstance(each, bool)]
    if set(limits) - known or len(numbers) < 2 or not numbers[0] < numbers[1]:
        yield f"ranges.{key} is {dict(limits)}, expected low < high, and log and integer where they are true"
    elif limits.get("log") and numbers[0] <= 0:
        yield f"ranges.{key} is logarithmic from {low}, expected a positive low"


def _label(value: Any) -> str:
    """The label of a value: numbers without an exponent's zeros, everything else as JSON writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]
