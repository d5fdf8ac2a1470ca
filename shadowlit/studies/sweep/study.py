"""The trials of a sweep in Optuna's storage: each runs once, even if workers are killed."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from shadowlit.errors import ShadowlitError
from shadowlit.studies.sweep.definition import Axis, Definition, TrialKey
from shadowlit.studies.trials.folder import changes

log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would report every trial a second time

GRACE_S = 120.0
"""A trial whose worker, on another machine, has sent no heartbeat for so long is taken over by another worker."""
BEAT_S = 20.0
"""Interval between two heartbeats."""
_DRAWS_PER_SETTING = 20


@dataclass
class Claim:
    """A trial that this worker runs, the time of its last heartbeat (monotonic clock), and its last reported step."""

    key: TrialKey
    trial: optuna.Trial
    beats: int = 0
    beaten: float = field(default_factory=time.monotonic)
    reported: int = -1


class SweepStudy:
    """The trials of a sweep in its storage, for one worker among any number.

    Every trial has a key: setting, trained model, seed. The storage hands out one trial at a time, atomically. If
    several workers have planned the sweep at the same time and a key is in it more than once, only the trial with the
    lowest number is run, and the others are marked as void.

    Raises:
        ShadowlitError: The storage has another sweep of this name, or the sampler or pruner doesn't know its options.
    """

    def __init__(self, definition: Definition, storage: BaseStorage) -> None:
        self.definition = definition
        self.storage = storage
        pid = os.getpid()
        self._me = {"host": _host(), "pid": pid, "started": _started(pid), "token": uuid.uuid4().hex}
        self._seen: dict[int, tuple[Any, float]] = {}  # of others' trials: the last heartbeat, and when we saw it
        self._study = self._open()

    @property
    def trials(self) -> list[FrozenTrial]:
        """The trials that count: the last one of each key, unless it is void, orphaned or no longer wanted."""
        counted = [
            trial
            for trial in self._all()
            if not {"void", "orphaned"} & trial.user_attrs.keys()
            and ((key := _key_of(trial)) is None or self.definition.wants(key))
        ]
        return list({_key_of(trial) or trial.number: trial for trial in counted}.values())

    @property
    def untouched(self) -> dict[str, float] | None:
        """The metrics of the untouched models; None until a worker has measured them."""
        return self._study.user_attrs.get("untouched")

    def keep_untouched(self, metrics: Mapping[str, float]) -> None:
        """Store the metrics of the untouched models."""
        self._study.set_user_attr("untouched", _finite(metrics))

    def fill(self) -> None:
        """Enqueue every trial that is neither done nor waiting: new, failed and interrupted ones."""
        trials = self._all()
        alive = {_key_of(trial) for trial in trials if self._is_alive(trial)}
        drawn = [key for trial in trials if "void" not in trial.user_attrs and (key := _key_of(trial))]
        wanted = self.definition.planned() or [each for key in drawn for each in self.definition.siblings(key)]
        for key in dict.fromkeys(wanted):
            if key not in alive:
                self._enqueue(key)

    def claim(self) -> Claim | None:
        """Claim the next trial for this worker; None if no trial is waiting."""
        self._take_up()
        for waiting in self._all(TrialState.WAITING):
            # What this worker's definition leaves out waits for a worker whose definition has it.
            key = _key_of(waiting)
            if key is None or not self.definition.wants(key):
                continue
            with suppress(UpdateFinishedTrialError):  # named first: a worker that is killed after it took the trial
                self.storage.set_trial_user_attr(waiting._trial_id, "worker", self._me)
            if not self._pop(waiting):
                continue
            if self._is_double(waiting.number, key):
                self._give_up(waiting, "void", "planned twice")
                continue
            self.storage.set_trial_user_attr(waiting._trial_id, "worker", self._me)
            return Claim(key, optuna.Trial(self._study, waiting._trial_id))
        return self._draw() if self.definition.draws else None

    def beat(self, claim: Claim) -> bool:
        """Send a heartbeat if one is due; False if another worker has taken over the trial."""
        if time.monotonic() - claim.beaten < BEAT_S:
            return True
        claim.beats, claim.beaten = claim.beats + 1, time.monotonic()
        try:
            claim.trial.set_user_attr("beats", claim.beats)
        except UpdateFinishedTrialError:
            return False
        return True

    def report(self, claim: Claim, step: int, value: float) -> bool:
        """Store the metric of a validation; return whether the trial should continue."""
        if step <= claim.reported or not math.isfinite(value):
            return True
        claim.reported = step
        claim.trial.report(value, step)
        return not claim.trial.should_prune()

    def finish(self, claim: Claim, result: Mapping[str, Any], pruned: bool = False) -> str:
        """Store the result of a trial: its ``metrics`` by name, ``step``, and what it cost.

        Returns:
            Its state: complete, pruned, or diverged if its metric is not finite.

        Raises:
            ShadowlitError: It has no such metric.
        """
        metrics = result["metrics"]
        try:
            value = self.definition.judge(metrics, claim.key.source)
        except KeyError as error:
            known = ", ".join(sorted(metric for metric in metrics if metric.startswith("val/")))
            raise ShadowlitError(
                f"metric is {self.definition.metric!r}, but {error.args[0]} was not logged. Logged were {known}."
            ) from None
        for what, found in {**result, "metrics": _finite(metrics)}.items():
            claim.trial.set_user_attr(what, found)
        if pruned:
            self._study.tell(claim.trial, state=TrialState.PRUNED)
            return "pruned"
        if not math.isfinite(value):  # a valid result, but the sampler needs finite values
            claim.trial.set_user_attr("diverged", True)
            self._study.tell(claim.trial, state=TrialState.FAIL)
            return "diverged"
        self._study.tell(claim.trial, value)
        return "complete"

    def fail(self, claim: Claim, reason: str) -> None:
        """Mark a trial as failed or interrupted; the next start of the same command runs it again."""
        try:
            claim.trial.set_user_attr("reason", reason)
            self._study.tell(claim.trial, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError) as error:
            log.warning("%s was taken over by another worker: %s", self.definition.name_of(claim.key), error)

    def _open(self) -> optuna.Study:
        identity = self.definition.identity()
        options: dict[str, Any] = {
            "study_name": self.definition.study,
            "storage": self.storage,
            "sampler": _sampler(self.definition),
            "pruner": _pruner(self.definition),
        }
        try:
            study = optuna.create_study(direction=self.definition.direction, **options)
            study.set_user_attr("identity", identity)
            study.set_user_attr("definition", self.definition.to_json())
            return study
        except DuplicatedStudyError:
            study = optuna.load_study(**options)
        changed = changes(self._identity_of(study), identity)
        if changed:
            raise ShadowlitError(
                f"the storage holds another sweep named {self.definition.study!r}; different: {changed}. Give "
                "this one another name, or remove that one; values, seeds and arms may be added, nothing else may "
                "change."
            )
        study.set_user_attr("definition", self.definition.to_json())
        return study

    @staticmethod
    def _identity_of(study: optuna.Study) -> dict[str, Any]:
        """The identity, which the study's creator writes right afterwards; waiting a moment spares a lock."""
        for _ in range(50):
            if "identity" in study.user_attrs:
                return study.user_attrs["identity"]
            time.sleep(0.1)
        return {}

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _is_alive(self, trial: FrozenTrial) -> bool:
        """Whether a trial is done, waits or runs."""
        return trial.state != TrialState.FAIL or "diverged" in trial.user_attrs

    def _enqueue(self, key: TrialKey) -> None:
        axes = {axis.name: axis for axis in self.definition.axes}
        params = {name: axes[name].parameter(label) for name, label in key.setting}
        distributions = {name: _distribution(axes[name], self.definition.draws) for name in params}
        if len(self.definition.sources) > 1:
            params["train"], distributions["train"] = key.source, CategoricalDistribution(["B", "I"])
        waiting = create_trial(
            state=TrialState.WAITING,
            params=params,
            distributions=distributions,
            user_attrs=self._attributes(key),
        )
        self._study.add_trial(waiting)

    def _attributes(self, key: TrialKey) -> dict[str, Any]:
        """What a trial stores of its key; the key itself last, since only a trial with one is complete."""
        stored = {"setting": dict(key.setting), "source": key.source, "seed": key.seed}
        return {"name": self.definition.name_of(key), "seed": key.seed, "key": stored}

    def _pop(self, trial: FrozenTrial) -> bool:
        try:
            return self.storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _is_double(self, number: int, key: TrialKey) -> bool:
        return any(t.number < number and _key_of(t) == key and self._is_alive(t) for t in self._all())

    def _give_up(self, trial: FrozenTrial, word: str, why: str) -> None:
        self.storage.set_trial_user_attr(trial._trial_id, word, why)
        self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def _take_up(self) -> None:
        """Enqueue the trials of killed workers again."""
        for trial in self._all(TrialState.RUNNING):
            worker = trial.user_attrs.get("worker")
            if worker == self._me or not self._is_orphan(trial, worker):
                continue
            try:
                self._give_up(trial, "orphaned", "its worker was killed")
            except UpdateFinishedTrialError:  # it did end, or another worker took it over
                continue
            if (key := _key_of(trial)) and self.definition.wants(key):
                log.warning("%s is taken over from a worker that was killed", trial.user_attrs["name"])
                self._enqueue(key)

    def _is_orphan(self, trial: FrozenTrial, worker: Mapping[str, Any] | None) -> bool:
        if worker and worker["host"] == self._me["host"]:
            return not _is_running(worker)
        sign = (worker, trial.user_attrs.get("beats"))
        if trial._trial_id not in self._seen or self._seen[trial._trial_id][0] != sign:
            self._seen[trial._trial_id] = (sign, time.monotonic())  # by our clock: machines' clocks differ
        return time.monotonic() - self._seen[trial._trial_id][1] > GRACE_S

    def _draw(self) -> Claim | None:
        """Draw a new setting and return its first trial; the others of that setting wait for the next free worker."""
        wanted = self.definition.trials or 0
        for _ in range(_DRAWS_PER_SETTING * wanted):  # few values and many trials: nothing new may be left
            if len(self._firsts()) >= wanted:
                return None
            trial = self._study.ask()
            self.storage.set_trial_user_attr(trial._trial_id, "worker", self._me)
            setting = tuple(
                (axis.name, trial._suggest(axis.name, _distribution(axis, draws=True))) for axis in self.definition.axes
            )
            key = TrialKey(setting, self.definition.sources[0], self.definition.seeds[0])
            for name, value in self._attributes(key).items():
                trial.set_user_attr(name, value)
            why = self._objection(trial.number, key)
            if not why:
                for sibling in self.definition.siblings(key)[1:]:
                    self._enqueue(sibling)
                return Claim(key, trial)
            trial.set_user_attr("void", why)
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def _objection(self, number: int, key: TrialKey) -> str:
        """The reason why a drawn setting must not run; empty if there is none."""
        if self.definition.is_dropped(dict(key.setting)):
            return "dropped"
        if self._is_double(number, key):
            return "drawn before"
        # Several workers may draw the last one at the same time.
        return "" if number in sorted(t.number for t in self._firsts())[: self.definition.trials] else "one too many"

    def _firsts(self) -> list[FrozenTrial]:
        """The first trial of each drawn setting, including failed ones: the next start runs those again."""
        own = (self.definition.sources[0], self.definition.seeds[0])
        return [trial for trial in self.trials if (key := _key_of(trial)) and (key.source, key.seed) == own]


def _sampler(definition: Definition) -> Any:
    names = {"grid": "RandomSampler", "random": "RandomSampler", "tpe": "TPESampler"}
    # Running trials count as poor, so that trials that run at the same time try different settings.
    own = {"constant_liar": True} if definition.sampler == "tpe" else {}
    options = {"seed": None, **own, **definition.sampler_options}
    return _made(getattr(optuna.samplers, names[definition.sampler]), options, "sampler_options")


def _pruner(definition: Definition) -> Any:
    words = definition.pruner.split("_")
    name = "NopPruner" if definition.pruner == "none" else "".join(map(str.capitalize, words)) + "Pruner"
    return _made(getattr(optuna.pruners, name), dict(definition.pruner_options), "pruner_options")


def _made(kind: Any, options: Mapping[str, Any], key: str) -> Any:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        given = {name: value for name, value in options.items() if value is not None}
        raise ShadowlitError(
            f"{key} is {given}, which optuna's {kind.__name__} doesn't take ({error}). See its arguments in optuna's "
            "reference."
        ) from None


def _distribution(axis: Axis, draws: bool) -> BaseDistribution:
    if axis.range is None and axis.is_numeric and not draws:  # values may be added later, which categories may not
        values = [axis.parameter(label) for label in axis.levels]
        return FloatDistribution(min(values), max(values))
    if axis.range is None:
        return CategoricalDistribution(list(axis.levels))
    kind = IntDistribution if axis.range.get("integer") else FloatDistribution
    return kind(axis.range["low"], axis.range["high"], log=bool(axis.range.get("log")))


def _key_of(trial: FrozenTrial) -> TrialKey | None:
    """The key of a trial; None if it was drawn by a worker that was killed before it could store the key."""
    found = trial.user_attrs.get("key")
    return TrialKey(tuple(found["setting"].items()), found["source"], found["seed"]) if found else None


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can hold them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _host() -> str:
    """A machine, or a container on it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """The start time of a process, as the system writes it: process numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_running(worker: Mapping[str, Any]) -> bool:
    if Path("/proc").is_dir():
        return worker["started"] is not None and _started(worker["pid"]) == worker["started"]
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial: waiting, running, complete, pruned, diverged or failed."""
    if trial.state == TrialState.FAIL:
        return "diverged" if "diverged" in trial.user_attrs else "failed"
    return trial.state.name.lower()


def stored_definition(storage: BaseStorage, name: str | None) -> Definition:
    """Return the definition of a sweep that a storage holds.

    Raises:
        ShadowlitError: It holds none of this name, or several and no name is given.
    """
    found = {study.study_name: study for study in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    ours = [each for each, study in found.items() if "definition" in study.user_attrs]
    wanted = name if name is not None else ours[0] if len(ours) == 1 else None
    if wanted not in ours:
        raise ShadowlitError(
            f"the storage has no sweep {name!r}; it has {', '.join(map(repr, ours)) or 'none'}. Give one of them as "
            "name."
        )
    return Definition.from_json(found[wanted].user_attrs["definition"])
