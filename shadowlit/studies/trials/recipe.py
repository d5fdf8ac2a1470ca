"""A configuration of ``fit``, and the command lines of trainings that share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from shadowlit.errors import DataError
from shadowlit.limits import load_yaml
from shadowlit.masking import masked
from shadowlit.studies.arms import UNTOUCHED
from shadowlit.studies.rows import UNTOUCHED_TRIAL
from shadowlit.studies.trials.process import Job

WITHOUT_VARIANTS: Mapping[str, Any] = {"graft.variants": None, "evaluation.variants": None}
"""Overrides of a training whose variants of the graft nobody reads."""


@dataclass(frozen=True)
class Recipe:
    """The configuration of ``fit`` that all trainings of a study share, and the changes made to it by dotted key.

    All ``scales`` λ of the graft are measured, the first being the main one; evaluators measure ``task_scales`` too.
    """

    config: Path
    overrides: Mapping[str, Any]
    scales: tuple[float, ...] = (1.0,)
    task_scales: tuple[float, ...] = ()

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, as overridden or in the file; None where neither has it."""
        if key in self.overrides:
            return self.overrides[key]
        value: Any = self.content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The configuration in the file, without overrides.

        Raises:
            DataError: There is no such file, or it is not a YAML mapping.
        """
        try:
            found = load_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        except (OSError, yaml.YAMLError) as error:
            raise DataError(f"{self.config} can't be read ({error}). Give a configuration of fit.") from error
        if not isinstance(found, Mapping):
            raise DataError(f"{self.config} holds no keys. Give a configuration of fit.")
        return found

    def arguments(self, source: str, seed: int, folder: Path, values: Mapping[str, Any]) -> list[str]:
        """Return the command line of ``fit`` with this configuration and what is changed in it, after the word itself.

        The model that is trained is ``B``, the Base, or ``I``, the Instruct, whose update is grafted onto the Base.

        Raises:
            DataError: The Instruct would start from an update of the Base, or be trained with the Base as an anchor.
        """
        start = values.get("model.start_from", self.get("model.start_from"))
        if source == "I" and start is not None:
            raise DataError(
                f"model.start_from is {start!r}, an update of the Base, from which the Instruct can't be trained. "
                "Leave out the arms I2I and I2B, or set model.start_from to null."
            )
        anchors = values.get("model.anchors", self.get("model.anchors"))
        if source == "I" and anchors is not None:
            raise DataError(
                f"model.anchors is {anchors!r}, with which a training of the Instruct would be one of both models too, "
                "and no arm to compare with. Leave out the arms I2I and I2B, which another comparison can train, or "
                "set model.anchors to null."
            )
        swapped = self._swapped() if source == "I" else {}
        seeds = {"seed_everything": seed, "model.seed": seed, "data.seed": seed}
        return self._arguments(folder, {**values, **swapped, **seeds})

    def untouched_job(self, folder: Path, evaluators: Sequence[str] | None = None) -> Job:
        """Return the job that measures the untouched models once for all trainings of the study in a folder, by some
        of the evaluators; None for all.
        """
        own = {"graft.baselines": True, "evaluation.baselines": True, "export.enabled": False, **WITHOUT_VARIANTS}
        arguments = self._arguments(folder / UNTOUCHED_TRIAL, {**self.overrides, **own, **self.chosen(evaluators)})
        measures = tuple(f"val/{who.lower()}/{name}/" for who in UNTOUCHED for name in evaluators or ())
        return Job(UNTOUCHED_TRIAL, ("validate", *arguments), measures)

    def chosen(self, evaluators: Sequence[str] | None) -> dict[str, Any]:
        """Return the key by which only these evaluators run; nothing if all of the configuration's do."""
        every = self.get("evaluation.evaluators") or ()
        return {} if evaluators is None or set(every) <= {*evaluators} else {"evaluation.only": sorted(evaluators)}

    def identity(self) -> dict[str, Any]:
        """Return everything but the pair that must not change within a study; it is written, so secrets are masked."""
        found = {
            "config": hashlib.sha256(self.config.read_bytes()).hexdigest(),
            "content": masked(self.content),
            "overrides": masked(self.overrides),
            "scales": list(self.scales),
            "task_scales": list(self.task_scales),
        }
        return json.loads(json.dumps(found, default=str))

    def fingerprints(self) -> Mapping[str, Any]:
        """Return the fingerprints of the two models of the pair."""
        from shadowlit.pair.pair import ModelPair

        return ModelPair(**self.pair()).fingerprints()

    def pair(self) -> dict[str, Any]:
        """Return the keys of the section ``pair`` that are set."""
        names = ("base", "instruct", "base_revision", "instruct_revision", "trust_remote_code", "template_owner")
        return {name: value for name in names if (value := self.get(f"pair.{name}")) is not None}

    def monitored(self) -> set[str]:
        """Return the metrics that callbacks and schedules of the configuration monitor."""

        def found(value: Any) -> Iterator[str]:
            if isinstance(value, Mapping):
                yield from (
                    each for key, each in value.items() if str(key).endswith("monitor") and isinstance(each, str)
                )
                yield from (name for each in value.values() for name in found(each))
            for each in value if isinstance(value, list | tuple) else ():
                yield from found(each)

        kept = {key: self.content[key] for key in self.content if key not in self.overrides}
        for key in ("trainer.callbacks", "model.lr_scheduler"):  # what overrides replace is not there
            section, name = key.split(".")
            if key in self.overrides and isinstance(kept.get(section), Mapping):
                kept[section] = {part: value for part, value in kept[section].items() if part != name}
        return {*found(kept), *found(self.overrides)}

    def is_distributed(self) -> bool:
        """Return whether Lightning would start more processes than one."""
        devices, accelerator = self.get("trainer.devices"), self.get("trainer.accelerator")
        return not (devices in (1, "1") or (accelerator == "cpu" and devices in (None, "auto")))

    def _swapped(self) -> dict[str, Any]:
        """The keys that train the Instruct and graft its update onto the Base; the chat template stays the same."""
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
        fixed = {
            "run.root": str(folder.parent),
            "run.name": folder.name,
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
