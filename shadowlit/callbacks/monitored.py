"""Whether the metrics that callbacks and schedules monitor are logged, asked before the first step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from shadowlit.checkpoint.headers import some_of
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.subject import UNTOUCHED
from shadowlit.training.module import ShadowModule

_RATHER_LIKE = 0.85
_OTHERS = ("graft/gain", "graft/gain_unrounded", "graft/survival", "train/loss", "train/lr")


def require_monitored(trainer: Trainer, module: ShadowModule, evaluators: Iterable[str]) -> None:
    """Compare what is monitored with what the sanity check has logged; to be called at its end.

    It runs no evaluators and not the untouched models, whose metrics are known by the evaluators' names and by those of
    the grafted model. A subclass of ShadowModule, and callbacks from outside the package, may log others in a whole
    validation: with these a name that isn't found is only warned of. Names outside of ``val/`` are compared with those
    that are like them.

    Raises:
        ShadowlitError: A metric would not be found.
    """
    logged = set(trainer.callback_metrics)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    names = {f"val/{who.name}/{name.split('/', 2)[2]}" for name in logged for who in UNTOUCHED if _of_subject(name)}
    known = {*logged, *names, *_OTHERS}
    subjects = {name.split("/")[1] for name in known if _of_subject(name)}
    measured = tuple(f"val/{subject}/{evaluator}/" for subject in subjects for evaluator in evaluators)
    foreign = [type(each).__name__ for each in callbacks if not _is_known(each)]
    foreign += [] if type(module) is ShadowModule else [type(module).__name__]
    for owner, monitor in _monitors(trainer, callbacks):
        near = difflib.get_close_matches(monitor, sorted({*known, *measured}), n=1, cutoff=_RATHER_LIKE)
        is_found = monitor in known or monitor.startswith(measured)
        if not logged or is_found or not (near or monitor.startswith("val/")):
            continue
        hint = f"Did you mean {near[0]!r}?" if near else f"Logged are {some_of(sorted(logged), 12)}."
        message = f"{owner} monitors {monitor!r}, which is not logged. {hint}"
        if not foreign:
            raise ShadowlitError(message)
        rank_zero_warn(f"{message} This is an error at the first validation, unless {', '.join(foreign)} logs it.")


def _of_subject(name: str) -> bool:
    return name.startswith("val/") and name.count("/") >= 2


def _is_known(callback: Callback) -> bool:
    return type(callback).__module__.partition(".")[0] in ("shadowlit", "lightning")


def _monitors(trainer: Trainer, callbacks: Iterable[Callback]) -> Iterator[tuple[str, str]]:
    """Who monitors a metric that must be there, and its name."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and getattr(callback, "strict", True):
            yield type(callback).__name__, monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor is not None:
            yield "model.lr_scheduler", config.monitor
