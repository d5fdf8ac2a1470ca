"""Which trainings a comparison needs: two serve four arms, by learning rate and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from shadowlit.errors import DataError
from shadowlit.studies.comparison.records import TUNED


@dataclass(frozen=True)
class Training:
    """One training: of the Base (``B``) or of the Instruct (``I``), at one rate, with one seed.

    Attributes:
        source: The model that is trained; the delta is its.
        lr: Peak learning rate.
        seed: Of everything: data order, adapter, dropout.
    """

    source: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.source}_lr{self.lr:g}_seed{self.seed}"

    @property
    def tuned_arm(self) -> str:
        """The arm that the trained model itself is."""
        return f"{self.source}2{self.source}"

    @property
    def grafted_arm(self) -> str:
        """The arm of its update on the other model."""
        return f"{self.source}2{'I' if self.source == 'B' else 'B'}"


def plan(arms: Sequence[str], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[Training]:
    """The trainings that ``arms`` need: each source at all rates of its arms, with all seeds.

    Ordered by seed, then rate, so that a comparison that is cut short has whole seeds.

    Args:
        arms: Some of ``B2I``, ``I2I``, ``B2B``, ``I2B``.
        rates: Learning rates of each arm. An arm without an entry has the rates of the other arm of its source.
        seeds: At least one.

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
    """The learning rates of each compared arm, in ascending order.

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


@dataclass(frozen=True)
class Recipe:
    """What all trainings of a comparison share: a configuration of ``fit``, and what is changed in it.

    Attributes:
        config: The configuration's file.
        overrides: Dotted keys and values.
        scales: Strengths of the graft that are measured; the first is the main one.
        task_scales: Those of them that the evaluators measure too.
    """

    config: Path
    overrides: Mapping[str, Any]
    scales: tuple[float, ...] = (1.0,)
    task_scales: tuple[float, ...] = ()

    def get(self, key: str) -> Any:
        """The value of a dotted key, as overridden or in the file; None where neither has it."""
        if key in self.overrides:
            return self.overrides[key]
        value: Any = self.content()
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def content(self) -> Mapping[str, Any]:
        """What the file says.

        Raises:
            DataError: There is no such file, or it is no YAML mapping.
        """
        return self._content

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        try:
            found = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DataError(f"{self.config} can't be read ({error}). Give a configuration of fit.") from error
        if not isinstance(found, Mapping):
            raise DataError(f"{self.config} holds no keys. Give a configuration of fit.")
        return found

    def fit_arguments(self, training: Training, folder: Path) -> list[str]:
        """The command line of ``fit`` after the word itself; everything is written into ``folder``."""
        own = {
            "model.lr": training.lr,
            "graft.baselines": False,
            "evaluation.baselines": False,
            "export.parts": ["delta"],
            "export.folder": str(folder),
        }
        return self.arguments(training.source, training.seed, folder, {**self.overrides, **own})

    def arguments(self, source: str, seed: int, folder: Path, values: Mapping[str, Any]) -> list[str]:
        """The command line of any ``fit`` on this recipe's file, after the word itself.

        Args:
            source: ``B``, the Base is trained, or ``I``, the Instruct, whose update is grafted onto the Base.
            seed: Of everything.
            folder: Gets everything that is written.
            values: All that is changed in the file, by dotted key.
        """
        exchanged = self._exchanged() if source == "I" else {}
        seeds = {"seed_everything": seed, "model.seed": seed, "data.seed": seed}
        return self._arguments(folder, {**values, **exchanged, **seeds})

    def untouched_arguments(self, folder: Path) -> list[str]:
        """The command line of ``validate`` that measures the untouched models."""
        own = {"graft.baselines": True, "evaluation.baselines": True, "export.enabled": False}
        return self._arguments(folder, {**self.overrides, **own})

    def pair(self) -> dict[str, Any]:
        """The section ``pair``, by the names of its keys."""
        names = ("base", "instruct", "base_revision", "instruct_revision", "trust_remote_code", "template_owner")
        return {name: value for name in names if (value := self.get(f"pair.{name}")) is not None}

    def is_distributed(self) -> bool:
        """Whether Lightning would start more processes than one."""
        devices, accelerator = self.get("trainer.devices"), self.get("trainer.accelerator")
        return not (devices in (1, "1") or (accelerator == "cpu" and devices in (None, "auto")))

    def _exchanged(self) -> dict[str, Any]:
        """The Instruct is trained, and its update grafted onto the Base; the template stays whose it was."""
        pair = self.pair()
        owner = pair.get("template_owner", "instruct")
        return {
            "pair.base": pair.get("instruct"),
            "pair.instruct": pair.get("base"),
            "pair.base_revision": pair.get("instruct_revision"),
            "pair.instruct_revision": pair.get("base_revision"),
            "pair.template_owner": "base" if owner == "instruct" else "instruct",
            "evaluation.reference": "base",
        }

    def _arguments(self, folder: Path, values: Mapping[str, Any]) -> list[str]:
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": ""},
        }
        fixed = {
            "trainer.logger": logger,
            "trainer.default_root_dir": str(folder),
            "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False,
            "graft.scales": list(self.scales),
            "evaluation.scales": list(self.task_scales),
            "evaluation.folder": str(folder / "evaluation"),
        }
        merged = {**values, **fixed}
        return ["--config", str(self.config), *(f"--{key}={_as_text(value)}" for key, value in merged.items())]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
