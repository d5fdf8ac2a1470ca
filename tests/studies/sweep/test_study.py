"""The trials of a sweep in their storage: each once, whoever plans, claims, dies or joins in."""

import os
import time
import uuid
from collections import Counter

import pytest

from shadowlit.errors import Interrupted, ShadowlitError
from shadowlit.studies.sweep import study as module
from shadowlit.studies.sweep.storage import open_storage
from shadowlit.studies.sweep.study import SweepStudy, state_of, stored_definition
from tests.distributed import Forked
from tests.studies.sweep.test_definition import define

DONE = {"metrics": {"val/grafted/loss": 1.5}, "step": 4, "wall_s": 1.0}


@pytest.fixture(params=["file", "sqlite", "postgres"])
def where(request, tmp_path):
    """An address of each kind; a database is told apart by the name of the sweep."""
    if request.param == "file":
        return str(tmp_path / "x.journal")
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'x.db'}"
    return request.getfixturevalue("database")


@pytest.fixture
def name():
    return f"s{uuid.uuid4().hex[:8]}"


def opened(where, tmp_path, **options):
    return SweepStudy(define(**options), open_storage(where, tmp_path))


def claims(study):
    found = []
    while (claim := study.claim()) is not None:
        found.append(claim)
    return found


def test_each_trial_is_claimed_once_though_two_plan_it(where, tmp_path, name):
    """Both plan before either claims, as when the same command starts on two machines."""
    one, two = (opened(where, tmp_path, name=name, seeds=[0, 1]) for _ in range(2))
    one.fill()
    for key in two.definition.planned():  # what fill would do had it not seen the other's
        two._enqueue(key)
    taken = []
    while (claim := (one if len(taken) % 2 else two).claim()) is not None:
        taken.append(claim.key)
    assert Counter(taken) == Counter(one.definition.planned())
    assert len(one.trials) == 8


def test_results_are_kept_and_finished_trials_stay(where, tmp_path, name):
    study = opened(where, tmp_path, name=name)
    study.fill()
    first, second, third, fourth = claims(study)
    assert study.finish(first, DONE) == "complete"
    assert study.finish(second, {**DONE, "metrics": {"val/grafted/loss": float("nan")}}) == "diverged"
    study.fail(third, "out of memory")
    assert study.report(fourth, 1, 2.5)
    assert study.finish(fourth, DONE, pruned=True) == "pruned"
    again = opened(where, tmp_path, name=name)
    again.fill()
    assert [claim.key for claim in claims(again)] == [third.key]  # only what failed
    by_name = {trial.user_attrs["name"]: trial for trial in again.trials}
    kept = by_name[again.definition.name_of(first.key)]
    assert kept.value == 1.5 and kept.user_attrs["metrics"] == DONE["metrics"] and kept.user_attrs["step"] == 4
    assert kept.params == {"model.lr": 1e-3, "model.adapter.r": 1.0}
    states = Counter(map(state_of, again.trials))
    assert states == {"complete": 1, "diverged": 1, "pruned": 1, "running": 1}


def test_values_and_seeds_may_be_added(where, tmp_path, name):
    study = opened(where, tmp_path, name=name)
    study.fill()
    for claim in claims(study):
        study.finish(claim, DONE)
    more = opened(
        where, tmp_path, name=name, grid={"model.lr": [1e-3, 2e-3, 9e-3], "model.adapter.r": [1, 4]}, seeds=[0, 1]
    )
    more.fill()
    assert len(claims(more)) == 3 * 2 * 2 - 4


def test_what_is_left_out_later_is_neither_run_nor_shown(where, tmp_path, name):
    """Planned with two arms and four settings, then narrowed: the rest waits for whoever wants it."""
    wide = opened(where, tmp_path, name=name, arms=["B2I", "I2I"])
    wide.fill()
    wide.finish(wide.claim(), DONE)
    narrow = opened(where, tmp_path, name=name, grid={"model.lr": [2e-3], "model.adapter.r": [1, 4]})
    narrow.fill()
    assert [claim.key for claim in claims(narrow)] == narrow.definition.planned()
    assert len(narrow.trials) == 2
    assert len(claims(wide)) == 8 - 1 - 2


def test_another_sweep_of_the_same_name_is_refused(where, tmp_path, name):
    opened(where, tmp_path, name=name)
    with pytest.raises(ShadowlitError, match=rf"another sweep named '{name}-demo_lora'; different: "):
        opened(where, tmp_path, name=name, overrides={"trainer.max_epochs": 3})
    with pytest.raises(ShadowlitError, match="different: axes "):
        opened(where, tmp_path, name=name, grid={"model.lr": [1e-3]})
    stored = stored_definition(open_storage(where, tmp_path), f"{name}-demo_lora")
    assert stored.identity() == define(name=name).identity() and stored.planned() == define(name=name).planned()
    with pytest.raises(ShadowlitError, match="has no sweep 'other'"):
        stored_definition(open_storage(where, tmp_path), "other")


def _claim_and_die(where, folder, name):
    study = SweepStudy(define(name=name), open_storage(where, folder))
    study.fill()
    study.claim()
    os._exit(9)


def test_what_a_killed_worker_began_is_taken_up(where, tmp_path, name):
    assert Forked(_claim_and_die, where, tmp_path, name, out=tmp_path / "log.txt").wait(60) == 9
    study = opened(where, tmp_path, name=name)
    taken = [claim.key for claim in claims(study)]
    assert Counter(taken) == Counter(study.definition.planned())  # the dead one's too, and each once
    assert len(study.trials) == 4


def test_a_worker_of_another_machine_is_given_time(where, tmp_path, name, monkeypatch):
    """Its process can't be looked at: signs of life tell, by our own clock."""
    monkeypatch.setattr(module, "_host", lambda: "elsewhere")
    far = opened(where, tmp_path, name=name, grid={"model.lr": [1e-3]})
    far.fill()
    claim = far.claim()
    monkeypatch.undo()
    near = opened(where, tmp_path, name=name, grid={"model.lr": [1e-3]})
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    assert near.claim() is None
    now += module.GRACE_S - 1
    assert near.claim() is None and far.beat(claim)
    now += 2  # but it has shown life meanwhile
    assert near.claim() is None
    now += module.GRACE_S + 1
    taken = near.claim()
    assert taken is not None and taken.key == claim.key
    now += module.BEAT_S
    assert not far.beat(claim)  # it comes back, and learns that it is too late
    far.fail(claim, "interrupted")
    assert near.finish(taken, DONE) == "complete" and [state_of(trial) for trial in near.trials] == ["complete"]


def test_settings_are_drawn_as_often_as_wanted_by_all_workers_together(where, tmp_path, name):
    options = {
        "name": name, "grid": {}, "sampler": "random", "sampler_options": {"seed": 0}, "trials": 3, "seeds": [0, 1],
        "ranges": {"model.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                   "model.adapter.r": {"low": 1, "high": 64, "integer": True}},
    }  # fmt: skip
    one, two = (opened(where, tmp_path, **options) for _ in range(2))
    taken, turns = [], [one, two]
    while (claim := turns[0].claim() or turns[1].claim()) is not None:
        taken.append(claim.key)
        turns[0].finish(claim, DONE) if claim.trial.study is turns[0]._study else turns[1].finish(claim, DONE)
        turns.reverse()
    assert len(taken) == len(set(taken)) == 6
    assert Counter(key.seed for key in taken) == {0: 3, 1: 3}
    for key in taken:
        drawn = dict(key.setting)
        assert 1e-4 <= drawn["model.lr"] <= 1e-2 and drawn["model.adapter.r"] in range(1, 65)


def test_drawing_ends_when_nothing_new_is_left(tmp_path):
    study = opened(None, tmp_path, grid={"model.adapter.r": [1, 2]}, sampler="random", trials=10)
    assert sorted(dict(claim.key.setting)["model.adapter.r"] for claim in claims(study)) == ["1", "2"]


def test_tpe_learns_from_what_was_finished(tmp_path):
    """A loss with its minimum at a rate of 1e-3: later draws lie nearer than the random first ones."""
    import math

    study = opened(
        None, tmp_path, grid={}, sampler="tpe", trials=30, sampler_options={"seed": 1, "n_startup_trials": 10},
        ranges={"model.lr": {"low": 1e-6, "high": 1.0, "log": True}},
    )  # fmt: skip
    distances = []
    while (claim := study.claim()) is not None:
        away = abs(math.log10(dict(claim.key.setting)["model.lr"]) + 3)
        distances.append(away)
        study.finish(claim, {"metrics": {"val/grafted/loss": away}})
    assert len(distances) == 30
    assert sum(distances[20:]) < 0.7 * sum(distances[:10])


def test_a_pruner_ends_what_is_worse_than_the_others(tmp_path):
    study = opened(None, tmp_path, pruner="median", pruner_options={"n_startup_trials": 2})
    study.fill()
    one, two, three, four = claims(study)
    for claim, value in ((one, 1.0), (two, 2.0)):
        assert study.report(claim, 10, value)
        study.finish(claim, DONE)
    assert study.report(three, 10, 1.2)
    assert not study.report(four, 10, 3.0)


def test_a_metric_that_is_not_logged_names_what_is(tmp_path):
    study = opened(None, tmp_path, metric="new/scroe")
    study.fill()
    with pytest.raises(ShadowlitError, match=r"val/grafted/new/scroe was not logged. Logged were val/grafted/loss"):
        study.finish(study.claim(), DONE)


@pytest.mark.parametrize(("options", "message"), [
    ({"sampler": "tpe", "trials": 3, "sampler_options": {"sed": 1}}, "sampler_options is .*TPESampler doesn't take"),
    ({"pruner": "median", "pruner_options": {"warmup": 1}}, "pruner_options is .*MedianPruner doesn't take"),
    ({"pruner": "threshold"}, "pruner_options is .*ThresholdPruner doesn't take"),
])  # fmt: skip
def test_options_of_sampler_and_pruner_are_checked(tmp_path, options, message):
    with pytest.raises(ShadowlitError, match=message):
        opened(None, tmp_path, **options)


@pytest.mark.parametrize(("address", "message"), [
    ("postgresql://me:secret@127.0.0.1:1/x", r"storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/x can't be reached"),
    ("here.txt", r"storage is 'here.txt'; expected a file that ends in .journal, or the address of a database"),
    ("mysql://host/x", "needs a driver that is not installed"),
    ("nonsense://x", "."),
    ("/proc/none/x.journal", "can't be read or written"),
])  # fmt: skip
def test_a_storage_that_cannot_be_reached(tmp_path, address, message):
    with pytest.raises(ShadowlitError, match=message) as caught:
        open_storage(address, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_journal_that_is_none(tmp_path):
    (tmp_path / "x.journal").write_text("these are not trials\nat all\n")
    with pytest.raises(ShadowlitError, match=r"x\.journal can't be read or written"):
        opened(str(tmp_path / "x.journal"), tmp_path)


@pytest.mark.parametrize("call", ["symlink", "rename", "unlink"])
def test_a_signal_in_the_lock_of_the_journal_is_a_signal(tmp_path, monkeypatch, call):
    """Optuna would give a lock back that it doesn't have, yet or any more, and raise an error of that instead."""
    storage, real = open_storage(None, tmp_path), getattr(os, call)

    def stopped(*args):
        if call != "symlink":
            real(*args)
        patched.setattr(os, call, real)
        raise Interrupted(143)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, stopped)
        with pytest.raises(Interrupted):
            storage.create_new_study([], "sweep")
    assert not list(tmp_path.glob("*.lock*"))
    assert storage.create_new_study([], "another") == (call != "symlink")
