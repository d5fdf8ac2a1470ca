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
        state: For each name the ``signature`` of data and settings, and the metrics by the subject's name. Checkpoints
            hold it as it is.
    """

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Any]] = {}

    def known(self, name: str, signature: str) -> dict[Subject, Metrics]:
        """The metrics of both models; empty where they have not been measured with this signature."""
        entry = self.state.get(name, {})
        return {subject: entry[subject.name] for subject in UNTOUCHED} if entry.get("signature") == signature else {}

    def measure(
        self,
        signatures: Mapping[str, str],
        measure: Callable[[Subject, list[str]], Mapping[str, Metrics]],
        again: bool = False,
    ) -> None:
        """Measure what is not known yet.

        Args:
            signatures: Signatures of data and settings, by name.
            measure: Function from an untouched model and names to the metrics by name. It is called once per model.
            again: Measure what is known, too.
        """
        names = [name for name, signature in signatures.items() if again or not self.known(name, signature)]
        found = {subject.name: measure(subject, names) for subject in UNTOUCHED} if names else {}
        for name in names:
            self.state[name] = {"signature": signatures[name], **{who: metrics[name] for who, metrics in found.items()}}


class DataSignature:
    """Tells the data of one validation from those of another, with the same result on all ranks.

    Data are hashed only where they are other objects, or other numbers of batches, than at the last call.
    """

    def __init__(self) -> None:
        self._sets: list[Any] = []
        self._limits: list[float] = []
        self._signature = ""

    def of(self, loaders: Sequence[Any], limits: Sequence[float]) -> str:
        """The signature of the first ``limits`` batches of each loader."""
        sets = [loader.dataset for loader in loaders]
        if list(map(id, sets)) != list(map(id, self._sets)) or self._limits != list(limits):
            self._sets, self._limits, self._signature = sets, list(limits), _hash(sets, limits)
        return self._signature


def settings_of(objects: Iterable[Any]) -> str:
    """Describe objects by their classes and plain public attributes, so that other settings differ."""
    return repr(
        [
            (type(one).__qualname__, [(k, v) for k, v in sorted(vars(one).items()) if _is_setting(k, v)])
            for one in objects
        ]
    )


def _is_setting(name: str, value: Any) -> bool:
    plain = isinstance(value, bool | int | float | str | tuple | list | None)
    return plain and not name.startswith("_") and name not in _STATE


def _hash(sets: Sequence[Any], limits: Sequence[float]) -> str:
    digest = hashlib.sha256()
    for samples, limit in zip(sets, limits, strict=True):
        content = samples.hashes().tobytes() if hasattr(samples, "hashes") else b""
        digest.update(f"{limit} {len(samples)} ".encode() + content)
    return digest.hexdigest()
