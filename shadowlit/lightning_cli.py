"""The LightningCLI: ``fit``, ``validate``, ``test``, ``predict``, ``preview`` and ``plan`` from one configuration."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from shadowlit.allocator import return_freed_memory
from shadowlit.callbacks.checkpoint import CheckpointCallback
from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.folder import run_folder
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.predictions import PredictionWriter
from shadowlit.callbacks.scores import score_table
from shadowlit.callbacks.stopping import leave, take_over
from shadowlit.callbacks.throughput import ThroughputCallback
from shadowlit.callbacks.variants import losses_line
from shadowlit.checkpoint.saved import read_rest
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview
from shadowlit.data.protocol import RunData
from shadowlit.errors import Interrupted, ShadowlitError, as_usage
from shadowlit.evaluation.evaluator import Evaluator
from shadowlit.files import require_writable
from shadowlit.pair.pair import ModelPair
from shadowlit.planning.plan import Plan, parse_bytes
from shadowlit.plugins import WITHOUT_SUPER, import_object, path_of, reason
from shadowlit.progress import make_console
from shadowlit.quiet import quieten
from shadowlit.run_parser import (
    ShadowParser,
    adapt_subcommands,
    classes_of,
    given_class,
    import_model_class,
    require_own,
    require_secrets,
    whole_numbers_first,
)
from shadowlit.runs import Run, RunOptions, SaveConfig
from shadowlit.signals import StopSignals, end_with_parent
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import samples_of

_SMALL_BYTES = 2**26  # weights of a model for which memory doesn't matter


class ShadowTrainer(Trainer):
    """Lightning's Trainer with a command that shows the data it would train on, and boundaries at which it stops."""

    def _run_stage(self) -> Any:
        result = super()._run_stage()
        leave(self)
        return result

    @property
    def log_dir(self) -> str:
        """The run's own folder, which Lightning's own is not with every logger."""
        return str(run_folder(self))

    def preview(
        self, model: LightningModule, datamodule: ShadowData, split: str = "train", num_samples: int = 3
    ) -> None:
        """Print samples token by token, supervised tokens in colour, and report what was truncated or dropped.

        Args:
            model: Not used.
            datamodule: The data.
            split: train, or the name of a validation or test set.
            num_samples: Number of samples to print.
        """
        preview(datamodule, split, num_samples)

    def plan(
        self, model: LightningModule, datamodule: ShadowData, memory: str | None = None, measure_steps: int = 3
    ) -> None:
        """Check pair, data and devices of a training, and print the memory, the disk and the time that it needs.

        Args:
            model: The module; no weights are loaded.
            datamodule: The data.
            memory: Memory of a device, e.g. 24GiB; null for that of this machine's.
            measure_steps: Number of steps that are trained to measure the time, if pair and device are here; 0 for
                none.
        """
        raise NotImplementedError  # ShadowCLI has what it takes


class ShadowCLI(LightningCLI):
    """Parses a run's configuration; the pair is given once and passed to both the module and the data."""

    def __init__(self, model_class: Any, data_class: Any, *, args: ArgsType = None, **options: Any) -> None:
        self._words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        self._first_argument = self._words[0] if self._words else None
        self._refused = ""  # why the trainer that is planned for can't be created here
        super().__init__(model_class, data_class, args=args, **options)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer, the model and the data, and the model's class."""
        super().add_core_arguments_to_parser(parser)
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                action._typehint = whole_numbers_first(action._typehint)
                if action.dest.startswith("data."):  # a file of rows isn't the configuration of a source
                    action._enable_path = False  # type: ignore[attr-defined]
        parser.add_argument(
            "--model.class_path",
            type=str,
            default=argparse.SUPPRESS,
            help="Import path of a subclass of ShadowModule, whose arguments are then keys of model. "
            "(default: shadowlit.training.module.ShadowModule)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and set the model's class aside, which is no argument of the class itself."""
        try:
            super().parse_arguments(parser, args)
        except Interrupted:
            raise
        except SystemExit as stop:
            with as_usage():
                require_own(stop)
            raise
        config = self.config[self.config["subcommand"]]
        require_secrets(config.as_dict())
        strategy = config["trainer"]["strategy"]
        if isinstance(strategy, str) and strategy not in ShadowParser.known["trainer.strategy"].names():
            self._subcommand_parsers[self.config["subcommand"]].error(
                f'Parser key "trainer.strategy": Got value: {strategy}'
            )
        path = config["model"].pop("class_path", None)
        if path is not None and import_model_class(path) is not self.model_class:
            raise ShadowlitError(
                f"model.class_path is {path!r}, which was found too late. Give it on the command line, or in a file "
                "that is given by --config."
            )
        self.save_config_kwargs = {**self.save_config_kwargs, "class_path": path}

    def _set_seed(self) -> None:
        """Seed everything, the model and the data too, whose own seeds would leave a run the same."""
        super()._set_seed()
        config = self.config[self.config["subcommand"]]
        for part in ("model", "data"):
            if config[part].get("seed") == 0:
                config[part]["seed"] = int(config["seed_everything"] or 0)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the pair, the graft, the evaluation and the export, and the defaults that Lightning's own would spoil."""
        if missing := {"model.pair", "model.objective"} - {action.dest for action in parser._actions}:
            with as_usage():
                raise ShadowlitError(
                    f"model.class_path is {path_of(self.model_class)}, whose __init__ doesn't take "
                    f"{', '.join(sorted(missing))}. Pass *args and **kwargs on to super().__init__()."
                )
        parser.add_class_arguments(RunOptions, "run")
        (resume,) = (action for action in parser._actions if action.dest == "run.resume")
        resume.option_strings = [*resume.option_strings, "--resume"]
        parser._option_string_actions["--resume"] = resume
        parser.add_class_arguments(ModelPair, "pair")
        parser.add_lightning_class_args(GraftCallback, "graft")
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(CheckpointCallback, "checkpoint")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(ThroughputCallback, "throughput")
        parser.link_arguments("pair", "model.pair", apply_on="instantiate")
        parser.link_arguments("pair", "data.pair", apply_on="instantiate")
        parser.link_arguments("model.objective", "data.samples", samples_of, apply_on="instantiate")
        parser.set_defaults(
            {
                # Our loaders shard without duplicates; Lightning's sampler shuffles unasked and pads.
                "trainer.use_distributed_sampler": False,
                # Under inference mode FSDP2 leaves tensors behind that training can't write to.
                "trainer.inference_mode": False,
                "trainer.gradient_clip_val": 1.0,
                "trainer.enable_model_summary": False,  # one row for the whole model
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, ``preview`` and ``plan``."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in ("preview", "plan")}}

    def _parse_ckpt_path(self) -> None:
        """Let no hyperparameters in a checkpoint override the configuration, which Lightning reads here."""

    def instantiate_classes(self) -> None:
        """Create the trainer, the model and the data; what is wrong with a setting is an error of usage."""
        with as_usage():
            try:
                super().instantiate_classes()
            except Interrupted:
                raise
            except (Exception, SystemExit) as error:
                if isinstance(error, MisconfigurationException | ValueError | ModuleNotFoundError):
                    self._raise_of_trainer(error)
                self._raise_named(error)
            if "callback_metrics" not in vars(self.model):
                raise ShadowlitError(f"model.class_path is {path_of(self.model)}, but {WITHOUT_SUPER}.")
            self._check_checkpoint()

    def before_instantiate_classes(self) -> None:
        """Find the run that the command works on; end if it must not be continued, or is complete."""
        config = self.config[self.subcommand]
        file = next(iter(config.get("config") or ()), "shadowlit")
        options = {} if config["trainer"]["fast_dev_run"] else config["run"].as_dict()
        with as_usage():
            self.run = Run(RunOptions(**options), str(self.subcommand), Path(str(file)).stem)
            self.save_config_kwargs["run"] = self.run
            if self.run.folder is not None or config.get("ckpt_path"):
                saved = SaveConfig(self._parser(self.subcommand), config, **self.save_config_kwargs)
                self.run.require_continuable(saved.text)

    def _check_checkpoint(self) -> None:
        """Verify what is loaded before anything is; of several processes each looks at names and sizes alone."""
        options = self.config_init[self.subcommand]
        dirpath = next((c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if dirpath and self.run.fits and self.run.folder:
            raise ShadowlitError(
                f"dirpath of ModelCheckpoint is {dirpath}, but a run with a name (or of a SLURM job) resumes from its "
                f"own folder, {self.run.folder}/checkpoints. Leave dirpath out, and choose the folder by run.root."
            )
        path = self.run.find_checkpoint(options.get("ckpt_path"), contents=self.trainer.world_size == 1)
        options["ckpt_path"] = path and str(path)
        if path is not None and "hyper_parameters" in read_rest(path):
            rank_zero_warn(f"{path} holds hyper_parameters, which are not used: the configuration decides.")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; what Lightning itself refuses is an error of a line that names the key."""
        if subcommand == "plan":
            self._plan()
            return
        with contextlib.ExitStack() as stack:
            if subcommand != "preview":
                with as_usage():
                    self._require_writable()
                    stack.enter_context(self.run.held())
            try:
                super()._run_subcommand(subcommand)
            except (MisconfigurationException, ValueError) as error:
                self._raise_of_trainer(error)
                raise
            self._print_scores()

    def _print_scores(self) -> None:
        """Print the table of a validate or test, in which Lightning would list every metric with all its digits."""
        graft = next((c for c in self.trainer.callbacks if isinstance(c, GraftCallback)), None)  # type: ignore[attr-defined]
        if self.subcommand in ("validate", "test") and graft is not None and self.trainer.is_global_zero:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            console, stage = make_console(), graft.record.stage
            console.print(score_table(metrics, graft.record.errors, stage=stage))
            if line := losses_line(graft.subjects, metrics, stage):
                console.print(line)

    def _plan(self) -> None:
        options, classes, words = self.config["plan"], self.config_init["plan"], self._words[1:]
        limit = None if options["memory"] is None else parse_bytes(options["memory"])
        for name in ("memory", "measure_steps"):  # unknown to fit
            places = [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"]
            for i in reversed(places):
                del words[i : i + 1 + ("=" not in words[i])]
        trainer = {**options["trainer"].as_dict(), "default_root_dir": options["run"]["root"]}
        self.planned = Plan(self.model, self.datamodule, classes["graft"], classes["export"], trainer)
        self.planned.print(limit, options["measure_steps"], words, self._refused)

    def _require_writable(self) -> None:
        """Try the folders that the run and the loggers write to, before models are loaded."""
        folders = {"run.root": self.run.options.root}
        folders |= {f"save_dir of {path_of(each)}": each.save_dir for each in self.trainer.loggers[1:] if each.save_dir}
        for key, folder in folders.items():
            try:
                if "://" not in folder:  # of another file system
                    require_writable(Path(folder))
            except OSError as error:
                raise ShadowlitError(
                    f"{key} is {folder!r}, which can't be written ({error}). Set it to a folder that can."
                ) from error

    def _raise_of_trainer(self, error: BaseException) -> None:
        """Raise a ShadowlitError if the error is one by which Lightning's own code refuses a setting of the trainer."""
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ShadowlitError) or not last.f_globals["__name__"].startswith("lightning."):
            return
        options, message = self.config[self.subcommand]["trainer"], " ".join(str(error).split())
        if options["overfit_batches"]:  # which sets all three
            message = re.sub(r"\blimit_(train|val|test)_batches", "overfit_batches", message)
        message = message.replace("Timer(duration", "Timer(max_time")
        keys = [word for word in re.findall(r"\w+", message) if word in options][:1] or ["accelerator", "devices"]
        hint = "" if len(keys) == 1 else " Set what this machine has, e.g. trainer.accelerator=cpu."
        named = ", ".join(f"trainer.{key} is {options[key]}" for key in keys)
        raise ShadowlitError(f"{named}: {message}{hint}") from error

    def _raise_named(self, error: BaseException) -> NoReturn:
        """Raise the error, with the key of the class whose ``__init__`` raised it, if there is one."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if error.__cause__ is not None and frames[-1].f_globals["__name__"].startswith("jsonargparse"):
            # An error about a linked value, or about a union, which holds one for each of its types: the class that is
            # given is of one of them, whose error comes from elsewhere.
            causes = frames[-1].f_locals.get("exceptions", [])
            self._raise_named(next((each for each in causes if _is_of_class(each)), error.__cause__))
        kinds = {type(frame.f_locals.get("self")) for frame in frames if frame.f_code.co_name == "__init__"}
        named: dict[str, Any] = {}
        for key, path in classes_of(self.config[self.subcommand]):
            with contextlib.suppress(ShadowlitError):  # a class within a class, for example
                named[key] = import_object(path, key, "a class")
        if self.model_class is not ShadowModule and not isinstance(error, ShadowlitError):
            named["model.class_path"] = self.model_class
        if keys := [key for key, kind in named.items() if kind in kinds]:
            key, kind = " or ".join(keys), named[keys[0]]
            if isinstance(error, ShadowlitError):
                raise ShadowlitError(f"{key}: {error}") from error
            raise ShadowlitError(
                f"{key} is {path_of(kind)}, which can't be created ({reason(kind, error)}). Correct its __init__, or "
                "its options."
            ) from error
        raise error

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the subcommand that the arguments begin with, or else all: building the four others takes 0.2 s."""
        known, asked = self.subcommands(), self._first_argument
        if asked in known:
            self.subcommands = lambda: {asked: known[asked]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)
        adapt_subcommands(self._subcommand_parsers)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As configured; a preview and a plan need none of the devices that a configuration asks for."""
        here: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        if self.subcommand == "preview":
            return ShadowTrainer(**here)
        options = self._get(self.config_init, "trainer")
        loggers = False if options["barebones"] else self.run.loggers(options["logger"])
        try:
            trainer = super().instantiate_trainer(logger=loggers, **kwargs)
        except (MisconfigurationException, ValueError) as error:
            if self.subcommand != "plan":
                raise
            self._refused = str(error).strip().partition("\n")[0]
            return ShadowTrainer(**here)
        take_over(trainer)
        base = Path(str(self.config[self.subcommand]["pair"]["base"]))
        # Of a small model, the time that it costs is a quarter, and the memory doesn't matter.
        is_small = base.is_dir() and sum(f.stat().st_size for f in base.glob("*.safetensors")) < _SMALL_BYTES
        if trainer.strategy.root_device.type == "cpu" and not is_small:
            return_freed_memory()
        return trainer


def _is_of_class(error: BaseException) -> bool:
    """Whether an error comes from a class that jsonargparse has created, rather than from jsonargparse itself."""
    *_, (last, _) = traceback.walk_tb((error.__cause__ or error).__traceback__)
    return not last.f_globals["__name__"].startswith("jsonargparse")


def main(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    """Run one of the subcommands.

    Args:
        args: Arguments; None for those of the command line.
        callbacks: Callbacks that are added to the configured ones.

    Raises:
        Interrupted: With the exit status 128 + signal after SIGINT, SIGTERM or SIGUSR1; see docs/reference/stopping.md.
    """
    quieten()
    signals = StopSignals()
    with signals.caught():
        signals.is_part = end_with_parent()
        return _of(ShadowCLI, args, callbacks)


def check(args: list[str]) -> None:
    """Parse a command line as :func:`main` would, and run nothing.

    Raises:
        ShadowlitError: The parser's message: a key that doesn't exist, a value of the wrong type.
    """
    with _raising():
        _of(_Parsing, args)


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """Raise the parser's message instead of ending the process with it."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), warnings.catch_warnings(action="ignore"):
            yield
    except Interrupted:
        raise
    except SystemExit:
        raise ShadowlitError(" ".join(shown.getvalue().partition("error: ")[2].split())) from None


@dataclass(frozen=True)
class Measured:
    """What a fit would measure.

    Attributes:
        sets: Names of the validation sets.
        metrics: Names of the metrics that each of them is scored with.
        evaluators: The evaluators by name.
    """

    sets: list[str]
    metrics: set[str]
    evaluators: dict[str, Evaluator]


def check_measured(args: list[str]) -> Measured:
    """Parse a command line of ``fit``, and read its data and the rows of its evaluators as the fit would.

    Raises:
        ShadowlitError: As :func:`check`, or all problems with the data, or with the evaluators.
    """
    quieten()
    level = logging.root.manager.disable
    logging.disable(logging.INFO)  # every training reports its data by itself
    try:
        with _raising():
            return _of(_Reading, args).measured  # type: ignore[attr-defined]
    finally:
        logging.disable(level)


class _Parsing(ShadowCLI):
    def _set_seed(self) -> None:
        """Leave the caller's random numbers alone."""

    def before_instantiate_classes(self) -> None:
        """Look at no folder."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class _Reading(_Parsing):
    """Creates everything but the trainer, and reads the data and the evaluators' rows."""

    measured: Measured

    def instantiate_classes(self) -> None:
        with as_usage():
            try:
                found = self.parser.instantiate_classes(self.config)[self.subcommand]
            except Interrupted:
                raise
            except (Exception, SystemExit) as error:
                self._raise_named(error)
            module, data, evaluation = found["model"], found["data"], found["evaluation"]
            data.setup("fit")
            evaluation.read(module, RunData(data), found["graft"])
            self.measured = Measured(list(data.validation_names), module.score_names(), evaluation.evaluators)


def _of(cli: type[ShadowCLI], args: ArgsType, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    path = given_class(args)
    with as_usage():
        model_class = ShadowModule if path is None else import_model_class(path)
    return cli(
        model_class,
        ShadowData,
        save_config_callback=SaveConfig,
        parser_class=ShadowParser,
        parser_kwargs={"prog": "shadowlit"},
        trainer_class=ShadowTrainer,
        trainer_defaults={"callbacks": list(callbacks)},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )
