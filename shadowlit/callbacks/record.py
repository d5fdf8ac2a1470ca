"""ValidationRecord: what one validation measures; callbacks read it and add to it."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from shadowlit.errors import GraftError
from shadowlit.grafting.subject import TUNED, Subject
from shadowlit.training.module import ShadowModule


@dataclass
class RunTotals:
    """What the validations of one fit share.

    Attributes:
        started: Time at which the fit started, by time.perf_counter; None outside of a fit.
        seconds: Seconds by part.
        names: Names of all metrics that were added so far.
        warned: Warnings that were given.
    """

    started: float | None = None
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    names: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)


class AddedMetrics(dict[str, float]):
    """The metrics of a validation: none is added twice, and none when they are ``closed``.

    Attributes:
        callback: The callback that adds metrics, if it is known; it may replace its own, as a repeated ``on_subject``
            does.
    """

    def __init__(self, *metrics: Mapping[str, float], closed: bool = False) -> None:
        super().__init__(*metrics)
        self.callback: object = None
        self._by: dict[str, object] = {}
        self._closed = closed

    def __setitem__(self, name: str, value: float) -> None:
        if self._closed:
            raise _too_late(name)
        if name in self and (self.callback is None or self._by[name] is not self.callback):
            raise GraftError(
                f"{name} was added to a ValidationRecord before {_title(self.callback)} adds it, by "
                f"{_title(self._by[name])}, and one value would replace the other. Rename one of the two, or remove a "
                "callback that is listed twice."
            )
        self._by[name] = self.callback
        super().__setitem__(name, value)

    def __ior__(self, other: Any) -> AddedMetrics:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # copies are made item by item

    setdefault, update = MutableMapping.setdefault, MutableMapping.update


@dataclass
class ValidationRecord:
    """One validation or test. :class:`GraftCallback` creates it when the validation starts; other callbacks add to it.

    Attributes:
        stage: ``val`` or ``test``, the prefix of its metrics.
        run: Totals of the fit that it belongs to.
        subjects: Subjects measured so far, in this order.
        metrics: Metrics by name. Callbacks add theirs in ``on_subject`` or ``on_validation_epoch_end``; the module logs
            them with its scores. To add a name twice is an error. From ``on_validation_end`` on it holds every metric
            that Lightning shows to callbacks, except for those that only an earlier validation measured, and adding to
            it is an error.
        step: Optimizer step at which it was closed; None before.
        errors: Standard errors of gains, by what is compared: ``loss``, ``<set>/loss``, ``<evaluator>/score``.
        seconds: Seconds by part, for example ``graft`` or ``evaluation/arithmetic``.
        rows: The numbers of each row, by subject and validation set, ``[N, 5]``; see
            :meth:`ShadowModule.sample_scores`. Of the untouched models in the validation that measures them.
    """

    stage: str = "val"
    run: RunTotals = field(default_factory=RunTotals)
    subjects: list[Subject] = field(default_factory=list)
    metrics: AddedMetrics = field(default_factory=AddedMetrics)
    step: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _nested_s: float = 0.0

    @contextmanager
    def added_by(self, callback: object) -> Iterator[None]:
        """Let the metrics that are added in the context be those of a callback."""
        before, self.metrics.callback = self.metrics.callback, callback
        try:
            yield
        finally:
            self.metrics.callback = before

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time in the context for ``part``, and not for a part whose context is around it."""
        start, nested = time.perf_counter(), self._nested_s
        self._nested_s = 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] += spent - self._nested_s
            self.run.seconds[_whole(part)] += spent - self._nested_s
            self._nested_s = nested + spent

    def spent(self, part: str) -> float:
        """Return the seconds spent on a part and on the parts within it, as ``evaluation/arithmetic`` is one of
        ``evaluation``.
        """
        return sum(seconds for name, seconds in self.seconds.items() if part in (name, _whole(name)))

    def add_cost(self, part: str) -> None:
        """Add ``<part>/seconds``, and in a fit ``<part>/time_share``, the part's share of the fit's time so far."""
        self.metrics[f"{part}/seconds"] = self.spent(part)
        if self.run.started is not None and self.stage == "val":
            self.metrics[f"{part}/time_share"] = self.run.seconds[part] / (time.perf_counter() - self.run.started)

    def close(self, trainer: Trainer) -> None:
        """Replace the metrics by all that Lightning logged, except for what only an earlier validation measured.

        Raises:
            GraftError: A metric was added after the module had logged them.
        """
        if late := self.metrics.keys() - trainer.callback_metrics.keys():
            raise _too_late(", ".join(sorted(late)))
        self.step = trainer.global_step
        self.run.names |= self.metrics.keys()
        outdated = self.run.names - self.metrics.keys()
        logged = trainer.callback_metrics.items()
        found = {name: value.item() for name, value in logged if name not in outdated}
        self.metrics = AddedMetrics(found, closed=True)


def _too_late(names: str) -> GraftError:
    return GraftError(
        f"{names} was added to a ValidationRecord after its metrics had been logged. Add metrics in on_subject or "
        "on_validation_epoch_end (on_test_epoch_end) of a callback, at any place in trainer.callbacks; a ShadowModule "
        "that overrides on_validation_epoch_end must call super()."
    )


def record_of(trainer: Trainer) -> ValidationRecord | None:
    """Return the record of the running validation, or else of the last one; None where no callback keeps one."""
    records = (getattr(callback, "record", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return next((record for record in records if isinstance(record, ValidationRecord)), None)


@runtime_checkable
class MeasuresSubjects(Protocol):
    """A callback with a measurement of its own, which :class:`GraftCallback` calls on every subject.

    Example::

        class WeightNorm(Callback):
            def on_subject(self, trainer, module, subject, record):
                with record.timed("weight_norm"):
                    squares = sum(p.double().square().sum() for p in module.parameters())
                record.metrics[f"{record.stage}/{subject.name}/weight_norm"] = squares.item() ** 0.5
    """

    def on_subject(self, trainer: Trainer, module: ShadowModule, subject: Subject, record: ValidationRecord) -> None:
        """Measure ``module``, which holds the weights of ``subject``, and add the metrics to ``record``, to be logged.

        Called after the validation's plain pass on all ranks: for every graft, then the tuned model, then the untouched
        ones if they are measured; not in the sanity check. The module is in evaluation mode and must be left so; random
        generators are restored. The call is repeated if a checkpoint was saved meanwhile, since the trained weights
        were swapped in for it; the second call's results must replace the first one's.
        """


def require_subject(module: ShadowModule, callbacks: Iterable[Callback]) -> None:
    """Raise where a step of the module or a callback's ``on_subject`` does not take the subject."""
    for step in (module.validation_step, module.test_step):
        _require_arguments(
            step,
            "does not take the subject whose weights it scores; expected (batch, batch_idx, dataloader_idx=0, "
            "subject=TUNED). Add the argument, with TUNED from shadowlit.grafting.subject, and pass it on to super().",
        )
        given = inspect.signature(step).parameters.get("subject")
        if given is not None and given.default != TUNED:
            raise GraftError(
                f"{type(module).__name__}.{step.__name__} has the argument {given}; expected subject=TUNED, since "
                "Lightning calls it without a subject to score the tuned model. Import TUNED from "
                "shadowlit.grafting.subject."
            )
    for callback in callbacks:
        if isinstance(callback, MeasuresSubjects):
            _require_arguments(
                callback.on_subject,
                "can't be called for a subject; expected (trainer, module, subject, record). Give it these arguments.",
            )


def _require_arguments(method: Callable[..., Any], problem: str) -> None:
    """Raise unless a method takes four arguments by position."""
    try:
        inspect.signature(method).bind(None, 0, 0, TUNED)
    except TypeError as error:
        owner = type(getattr(method, "__self__", method)).__name__
        raise GraftError(f"{owner}.{method.__name__}{inspect.signature(method)} {problem}") from error


def _title(callback: object) -> str:
    return "a callback" if callback is None else type(callback).__name__


def _whole(part: str) -> str:
    return part.partition("/")[0]
