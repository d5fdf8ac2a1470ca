"""Metrics of the untouched Base and Instruct, which no training changes: measured once per data and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shadowlit.grafting.subject import UNTOUCHED, Subject

Metrics = Mapping[str, float]

_STATE = ("training", "kl")  # attributes of metrics and objectives that change during a run


class UntouchedMetrics:
    """Remembers what was measured of the untouched models, by name, for as long as its signature stays the same.

    Attributes:
        state: The ``signature`` of data and settings by name, and the metrics by the subject's name. Checkpoints
            hold it as it is.
    """

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Any]] = {}

    def known(self, name: str, signature: str) -> dict[Subject, Metrics]:
        """Return the metrics of both models; empty where they have not been measured with this signature."""
        entry = self.state.get(name, {})
        return {subject: entry[subject.name] for subject in UNTOUCHED} if entry.get("signature") == signature else {}

    def measure(
        self,
        signatures: Mapping[str, str],
        measure: Callable[[Subject, list[str]], Mapping[str, Metrics]],
        again: bool = False,
    ) -> None:
        """Measure what is not known yet, or everything ``again``; ``measure`` is called once per model.

        ``signatures`` are those of data and settings by name; ``measure`` returns the metrics of a model by name.
        """
        names = [name for name, signature in signatures.items() if again or not self.known(name, signature)]
        found = {subject.name: measure(subject, names) for subject in UNTOUCHED} if names else {}
        for name in names:
            self.state[name] = {"signature": signatures[name], **{who: metrics[name] for who, metrics in found.items()}}


def data_signature(loaders: Sequence[Any], limits: Sequence[float]) -> str:
    """Tells the first ``limits`` batches of these loaders from other data, with the same result on all ranks."""
    digest = hashlib.sha256()
    for loader, limit in zip(loaders, limits, strict=True):
        samples = loader.dataset
        content = samples.hashes().tobytes() if hasattr(samples, "hashes") else b""
        digest.update(f"{limit} {len(samples)} ".encode() + content)
    return digest.hexdigest()


def settings_of(objects: Iterable[Any]) -> str:
    """Describe objects by their classes and plain public attributes, so that other settings differ."""

    def is_setting(name: str, value: Any) -> bool:
        plain = isinstance(value, bool | int | float | str | tuple | list | None)
        return plain and not name.startswith("_") and name not in _STATE

    settings = [(one, [item for item in sorted(vars(one).items()) if is_setting(*item)]) for one in objects]
    return repr([(type(one).__qualname__, items) for one, items in settings])
