"""A run of the command line: its folder, the checkpoint that it resumes from, and what must not change when it does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.metrics_file import MetricsFile
from shadowlit.checkpoint.saved import find_whole, newest_whole, read_rest, step_of
from shadowlit.delta.configured import config_above, read_config
from shadowlit.distributed import of_all_ranks
from shadowlit.errors import ShadowlitError
from shadowlit.files import replace_text, require_writable, unused
from shadowlit.masking import is_secret, masked

CONFIG = "config.yaml"
COMPLETE = "complete.json"
_PATIENCE_S = 10.0  # data workers of a killed process hold its lock for a moment
# What may change when a run resumes, since it trains on the same data in the same way.
_HARMLESS = (
    "run", "config", "ckpt_path", "weights_only", "checkpoint", "export", "predictions", "throughput", "data.test",
    "graft.validate", "evaluation.subjects", "evaluation.last_only", "evaluation.only", "data.predict",
    "data.num_workers", "data.prefetch", "data.cache", "trainer.logger", "trainer.max_time", "trainer.profiler",
    "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.default_root_dir",
)  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept, and whether the same command continues it.

    Args:
        name: Name of the run, whose folder is ``<root>/<name>``. The same command with the same name continues it. null
            for a new folder ``<root>/<name of the configuration file>/version_<n>`` at every start.
        root: Folder of all runs.
        resume: Treatment of the name of an earlier run by ``fit``: auto resumes it from its newest complete checkpoint,
            never is an error, and must is an error where there is nothing to resume.
        allow_changes: Whether to resume a run whose configuration has changed. The changes are listed.
    """

    name: str | None = None
    root: str = "runs"
    resume: Literal["auto", "never", "must"] = "auto"
    allow_changes: bool = False


class Run:
    """The run that a command works on.

    A ``fit`` with a name works in the run's folder; ``validate``, ``test`` and ``predict`` with the same name in a new
    folder below it, ``<command>/version_<n>``. A job of SLURM has its number as the name, and so is resumed when it is
    requeued.

    Args:
        options: The options.
        command: The subcommand.
        config: Name of the configuration, for the folders of runs without a name.

    Attributes:
        folder: The folder of the run with this name; None for a run without a name.
        metrics: The logger of its ``metrics.csv``.
        start: The checkpoint that it resumes from, once it is found.
    """

    def __init__(self, options: RunOptions, command: str, config: str) -> None:
        if "://" in options.root:
            raise ShadowlitError(
                f"run.root is {options.root!r}; expected a folder of a mounted file system, e.g. runs."
            )
        self.options, self.fits = options, command == "fit"
        name = options.name or (_job_name(config) if self.fits else None)
        if options.name == "" or (name is None and options.resume == "must"):
            raise ShadowlitError(
                f"run.name is {options.name!r}, and run.resume {options.resume}; expected the name of the run, e.g. "
                f"run.name={config}_1. Without one (null), every start has a new folder, and nothing to resume."
            )
        self.folder = Path(options.root, name) if name else None
        if self.folder is not None and Path(options.root).resolve().is_relative_to(self.folder.resolve()):
            raise ShadowlitError(
                f"run.name is {name!r}, whose folder {self.folder} holds run.root; expected a name, e.g. {config}_1."
            )
        place = config if name is None else name if self.fits else f"{name}/{command}"
        self.metrics = MetricsFile(options.root, place, is_new=not (name and self.fits))
        self.metrics.is_named = self.fits and options.name is not None
        self.start: Path | None = None
        self._seen: object = None
        self._saved: Any = None  # this command's configuration

    def loggers(self, configured: Any) -> list[Logger]:
        """Return the run's own logger, and after it those of ``trainer.logger``, except for one that writes the same
        file.
        """
        own = self.folder and self.folder.resolve()
        found = configured if isinstance(configured, list) else [configured]
        others = [each for each in found if isinstance(each, Logger)]
        return [
            self.metrics,
            *(e for e in others if not (isinstance(e, CSVLogger) and Path(e.log_dir).resolve() == own)),
        ]

    def require_continuable(self, saved: str) -> None:
        """Raise if a run of this name can't be continued with a configuration, given as it is saved.

        Raises:
            ShadowlitError: Continuing it is not allowed, or the configuration has changed.
            SystemExit: The run is complete; the status is 0.
        """
        self._saved = yaml.safe_load(saved)
        if self.folder is None or not self.fits:
            return
        try:
            require_writable(self.folder)
        except OSError as error:
            raise ShadowlitError(
                f"run.name is {self.options.name!r}, but {self.folder} can't be written ({error.strerror}). Give "
                "another run.name or run.root."
            ) from error
        if not (self.folder / CONFIG).is_file():
            return
        if self.options.resume == "never":
            raise ShadowlitError(f"run.resume is never, but {self.folder} holds a run. Give another run.name.")
        old, new = read_config(self.folder), self._saved
        changed = _changes(old, new)
        if changed and not self.options.allow_changes:
            raise ShadowlitError(
                f"the configuration of {self.folder} has changed: {changed}. Undo the changes, give another run.name, "
                "or set run.allow_changes=true."
            )
        if changed:
            rank_zero_warn(f"{self.folder} continues with another configuration: {changed}.")
        elif (complete := self.folder / COMPLETE).is_file():
            step, export = _completed(complete)
            if export is None or export.is_dir():
                if exports := _changes(*({"of": {"export": each.get("export")}} for each in (old, new))):
                    raise ShadowlitError(
                        f"{self.folder} is complete, and nothing is trained, but the export has changed: "
                        f"{exports.replace('of.', '')}. Write another export with 'shadowlit export --ckpt "
                        f"{self.folder / 'checkpoints'}/…', or undo the changes."
                    )
                rank_zero_info(
                    f"{self.folder} is complete (step {step}), and nothing is done. Its export: {export}. To "
                    "train on, give another run.name, and one of its checkpoints as ckpt_path."
                )
                raise SystemExit(0)

    def find_checkpoint(self, given: str | None, contents: bool) -> Path | None:
        """Return the checkpoint that the command loads, verified; None if there is none and none is needed.

        Args:
            given: ``ckpt_path``: a path, last or best.
            contents: Whether to verify all bytes, and not only names and sizes.

        Raises:
            ShadowlitError: There is none, it is damaged and there is no other, or ``fit`` would resume this run from
                one that is not its newest.
        """
        special = given in ("last", "best")
        if special and self.folder is None:
            raise ShadowlitError(
                f"ckpt_path is {given}, but the run has no name, so it is unknown of which run. Give run.name, or the "
                "path of a checkpoint."
            )
        if self.folder is None or not (self.fits or special):
            return self._begin_from(given, contents)
        self._seen = self._state()
        own = newest_whole(self.folder / "checkpoints", resumes=self.fits, contents=contents)
        if own is None and (special or self.options.resume == "must"):
            raise ShadowlitError(
                f"{self.folder} has no checkpoint to {'resume from' if self.fits else 'load'}. Check run.root and "
                "run.name, or give the path of a checkpoint as ckpt_path."
            )
        if own is None:
            return self._begin_from(given, contents)
        if self.fits and not (self.folder / CONFIG).is_file() and not self.options.allow_changes:
            raise ShadowlitError(
                f"{self.folder} holds checkpoints, but no {CONFIG}, so it is unknown whether the configuration has "
                "changed. Restore that file, give another run.name, or set run.allow_changes=true."
            )
        best = _best(own) if given == "best" else None
        if not self.fits:
            return find_whole(best, resumes=False, contents=contents) if best else own
        older = best or (None if given is None or special else Path(given))
        is_own = older and self.folder.resolve() in older.resolve().parents  # or what it began from, if it still exists
        if older and is_own and step_of(find_whole(older, resumes=True, contents=contents)) < step_of(own):
            raise ShadowlitError(
                f"ckpt_path is {older}, but the newest checkpoint of the run is {own}. Leave ckpt_path out, or give "
                "another run.name and this path."
            )
        self.start, self.metrics.step = own, step_of(own)
        rank_zero_info(f"{self.folder} resumes from step {self.metrics.step}: {own}")
        return own

    def _begin_from(self, given: str | None, contents: bool) -> Path | None:
        """Return a given checkpoint, verified; list what this run changes in the configuration it was trained with."""
        if given is None:
            return None
        path = find_whole(given, resumes=self.fits, contents=contents)
        _, old = config_above(path.absolute())
        if self.fits and old and (changed := _changes(old, self._saved)):
            rank_zero_warn(f"{path} was trained with another configuration: {changed}.")
        return path

    def _state(self) -> tuple[bool, int]:
        """What another process that trains the run changes: whether it is complete, and its checkpoints.

        The latter is when their folder was last changed.
        """
        assert self.folder is not None
        folder = self.folder / "checkpoints"
        return (self.folder / COMPLETE).is_file(), folder.stat().st_mtime_ns if folder.is_dir() else 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder of a run with a name, for one command at a time, and prepare it for training.

        Raises:
            ShadowlitError: Another command holds it.
        """
        if self.folder is None or not self.fits or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self.metrics.leave()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".run.lock")
        with suppress(OSError, NotImplementedError):  # of a file system without locks
            try:
                lock.acquire(timeout=_PATIENCE_S)
            except Timeout:
                raise ShadowlitError(
                    f"another process is training {self.folder}. Wait until it has ended, or give another run.name."
                ) from None
        if self._seen not in (None, self._state()):
            lock.release()
            raise ShadowlitError(
                f"another process has trained {self.folder} since this one looked for its newest checkpoint. Start the "
                "same command again."
            )
        if (self.folder / CONFIG).is_file():
            with suppress(FileNotFoundError):  # of fewer steps, or one that was interrupted and isn't verified
                (self.folder / "export").rename(unused(self.folder / "export"))
        try:
            yield
        finally:
            lock.release()


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder, and marks the run as complete when it has trained and exported.

    Secrets are masked, in what the export repeats of it too. An earlier configuration that differs is kept as
    ``config-v<n>.yaml``.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        class_path: str | None = None,
        run: Run | None = None,
        **kwargs: Any,
    ) -> None:
        config = _without_secrets(config)
        if class_path is not None:
            config["model.class_path"] = class_path
        super().__init__(parser, config, **kwargs)
        self.run = run

    @property
    def text(self) -> str:
        """What is saved."""
        return self.parser.dump(self.config, skip_unset=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, once."""
        starts = of_all_ranks([str(self.run and self.run.start)])
        if len({*starts}) > 1:
            raise ShadowlitError(
                f"the processes would start from different checkpoints: {', '.join(starts)}. The run's folder must be "
                "on a disk that all of them share; set run.root to one."
            )
        file = run_folder(trainer) / CONFIG
        if trainer.is_global_zero and not self.already_saved:
            text = self.text
            if file.is_file() and file.read_text(encoding="utf-8") != text:
                file.rename(unused(file))
            replace_text(file, text)
            (file.parent / COMPLETE).unlink(missing_ok=True)
        self.already_saved = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Let rows have the right step: Lightning's count is one too high after some checkpoints at an epoch's end."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write a step's row before its checkpoint: Lightning logs it after that, when the run may have been killed."""
        loggers, connector = trainer.loggers, trainer._logger_connector
        counted = trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step  # and the row is written
        in_step = trainer.training and isinstance(connector._first_loop_iter, bool)
        if in_step and not counted and loggers and isinstance(loggers[0], MetricsFile):
            trainer.loggers = loggers[:1]
            connector.update_train_step_metrics()
            trainer.loggers = loggers

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as complete, unless its time was up."""
        folder = run_folder(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        left = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
        if trainer.is_global_zero and trainer.global_step and all(seconds is None or seconds > 0 for seconds in left):
            exports = [each.folder for each in callbacks if isinstance(each, ExportCallback) and each.enabled]
            export = exports and (os.path.abspath(exports[0]) if exports[0] else "export")
            replace_text(folder / COMPLETE, json.dumps({"step": trainer.global_step, "export": export or None}))


def _completed(file: Path) -> tuple[int, Path | None]:
    """The last step of a complete run, and the folder of its export."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return int(found["step"]), found["export"] and file.parent / found["export"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShadowlitError(
            f"{file} is damaged ({type(error).__name__}: {error}). Remove it; the same command then resumes the run "
            "from its newest checkpoint."
        ) from error


def _job_name(config: str) -> str | None:
    """The name of a job of SLURM, or of a further step of one; None outside of a job."""
    if not SLURMEnvironment.detect():
        return None
    job, step = os.environ.get("SLURM_JOB_ID", "unknown"), os.environ.get("SLURM_STEP_ID", "0")
    return f"{config}/job_{job}" + (f"_{step}" if step != "0" else "")


def _best(newest: Path) -> Path:
    """The best checkpoint, as the newest one remembers it."""
    for state in read_rest(newest).get("callbacks", {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_path"):
            return newest.parent / os.path.relpath(state["best_model_path"], state["dirpath"])
    raise ShadowlitError(
        f"ckpt_path is best, but no ModelCheckpoint of {newest.parent.parent} monitors a metric. Give last, or a path."
    )


def _without_secrets(value: Any, secret: bool = False) -> Any:
    """A copy of a parsed configuration in which secrets are masked."""
    if isinstance(value, Namespace):
        parts = {name: _without_secrets(each, secret or is_secret(name)) for name, each in vars(value).items()}
        return Namespace(**parts)
    if isinstance(value, list):
        return masked([_without_secrets(each, secret) for each in value], secret)
    return masked(value, secret)


def _changes(old: Any, new: Any) -> str:
    """What differs between two configurations, key by key; empty if nothing that matters does."""
    before, after = dict(_leaves(masked(old))), dict(_leaves(new))
    keys = [key for key in {**before, **after} if _differ(before.get(key), after.get(key))]
    matters = [key for key in keys if not f"{key}.".startswith(tuple(f"{each}." for each in _HARMLESS))]
    return "; ".join(f"{key} {_shown(before.get(key))} → {_shown(after.get(key))}" for key in matters)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values differ, such as ``1``, a number of batches, and ``1.0``, all of them."""
    return one != other or type(one) is not type(other)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a configuration, and their values."""
    parts: Any = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        parts = enumerate(value)
    if not parts:
        yield key, value
    for name, each in parts:
        yield from _leaves(each, f"{key}.{name}" if key else str(name))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
