"""The LightningCLI: ``fit``, ``validate``, ``test``, ``predict`` and ``preview`` from one configuration."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NoReturn, Union, get_args, get_origin

import torch
import torchmetrics
import yaml
from jsonargparse import Namespace
from jsonargparse import Path as ConfigPath
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, strategies
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import lr_scheduler

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.folder import run_folder, unused
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.predictions import PredictionWriter
from shadowlit.callbacks.stopping import leave, take_over
from shadowlit.callbacks.throughput import ThroughputCallback
from shadowlit.checkpoint.saved import find_whole, read_rest
from shadowlit.data.custom_formats import format_names
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview
from shadowlit.delta.registry import transform_names
from shadowlit.errors import Interrupted, ShadowlitError, as_usage, first_line
from shadowlit.evaluation import forgetting, generated, multiple_choice
from shadowlit.evaluation.evaluator import Evaluator
from shadowlit.files import require_writable
from shadowlit.limits import load_yaml
from shadowlit.masking import MASK, is_secret, masked, masks_in
from shadowlit.pair.pair import ModelPair
from shadowlit.parser import Known, ShortErrors
from shadowlit.planning.plan import Plan, parse_bytes
from shadowlit.plugins import WITHOUT_SUPER, import_object, path_of, reason
from shadowlit.signals import StopSignals, end_with_parent
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import OBJECTIVES, Objective, samples_of
from shadowlit.training.optimizer import OptimizerChoice
from shadowlit.training.schedules import ScheduleName

# jsonargparse spells out every default of LoraConfig, of which peft then says that it ignores one.
warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")


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


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder, which is the logger's: without a logger nothing is saved.

    Secrets are masked, in what the export repeats of it too.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, class_path: str | None = None, **kwargs: Any
    ) -> None:
        config = _without_secrets(config)
        if class_path is not None:
            config["model.class_path"] = class_path
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it; next to that of an earlier run where a logger such as WandbLogger lets two share a folder."""
        if trainer.loggers:
            if not isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
                self.config_filename = unused(run_folder(trainer) / "config.yaml").name
            super().setup(trainer, pl_module, stage)


def _without_secrets(value: Any, secret: bool = False) -> Any:
    """A copy of a parsed configuration in which secrets are masked."""
    if isinstance(value, Namespace):
        parts = {name: _without_secrets(each, secret or is_secret(name)) for name, each in vars(value).items()}
        return Namespace(**parts)
    if isinstance(value, list):
        return [_without_secrets(each, secret) for each in value]
    return masked(value, secret)


def _require_secrets(config: Any) -> None:
    """Raise if a configuration is one that was written, in which secrets are masked."""
    if masks := masks_in(config):
        with as_usage():
            raise ShadowlitError(
                f"{', '.join(masks)} is {MASK}, which is written instead of a secret; expected the secret. Give it on "
                "the command line, or leave the key out if the service reads an environment variable."
            )


def _classes(base: type, *modules: ModuleType, names: Sequence[str] = (), what: str = "a class") -> Known:
    """One of the names, or a class derived from ``base``, of which the modules offer some."""

    def known() -> list[str]:
        found = ((module, name, value) for module in modules for name, value in sorted(vars(module).items()))
        classes = ((m, name, value) for m, name, value in found if isinstance(value, type) and issubclass(value, base))
        own = (f"{m.__name__}.{name}" for m, name, value in classes if value is not base and not isabstract(value))
        return [*names, *own]

    path = f"{base.__module__}.{base.__qualname__}"
    return Known(
        f"{'a name, or ' if names else ''}{what} derived from {path}, by class_path and init_args", known, base
    )


class ShadowParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with short errors."""

    known: ClassVar = {
        "model.objective": _classes(Objective, names=OBJECTIVES),
        "model.metrics": _classes(torchmetrics.Metric, torchmetrics, what="names, and for each a class"),
        "model.optimizer": _classes(torch.optim.Optimizer, torch.optim, names=get_args(get_args(OptimizerChoice)[0])),
        "model.lr_scheduler": _classes(lr_scheduler.LRScheduler, lr_scheduler, names=get_args(ScheduleName)),
        "evaluation.evaluators": _classes(
            Evaluator, forgetting, generated, multiple_choice, what="names, and for each a class"
        ),
        "graft.transforms": Known(
            'a list of names with their parameters, e.g. [{"name": "dare", "density": 0.2}]', transform_names
        ),
        "data.format": Known("a name, or the import path of a function that turns a row into messages", format_names),
        "trainer.strategy": _classes(
            strategies.Strategy, strategies, names=["auto", *strategies.StrategyRegistry.available_strategies()]
        ),
        "trainer.callbacks": _classes(Callback, callbacks, what="a list of classes"),
    }


class ShadowCLI(LightningCLI):
    """Parses a run's configuration; the pair is given once and passed to both the module and the data."""

    def __init__(self, model_class: Any, data_class: Any, *, args: ArgsType = None, **options: Any) -> None:
        self._words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        self._first_argument = self._words[0] if self._words else None
        self._refused: list[str] = []  # why the trainer that is planned for can't be created here
        super().__init__(model_class, data_class, args=args, **options)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer, the model and the data, and the model's class."""
        super().add_core_arguments_to_parser(parser)
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                action._typehint = _whole_numbers_first(action._typehint)
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
                _require_own(stop)
            raise
        config = self.config[self.config["subcommand"]]
        _require_secrets(config.as_dict())
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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the pair, the graft, the evaluation and the export, and the defaults that Lightning's own would spoil."""
        if missing := {"model.pair", "model.objective"} - {action.dest for action in parser._actions}:
            with as_usage():
                raise ShadowlitError(
                    f"model.class_path is {path_of(self.model_class)}, whose __init__ doesn't take "
                    f"{', '.join(sorted(missing))}. Pass *args and **kwargs on to super().__init__()."
                )
        parser.add_class_arguments(ModelPair, "pair")
        parser.add_lightning_class_args(GraftCallback, "graft")
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(ThroughputCallback, "throughput")
        parser.link_arguments("pair", "model.pair", apply_on="instantiate")
        parser.link_arguments("pair", "data.pair", apply_on="instantiate")
        parser.link_arguments("model.objective", "data.samples", samples_of, apply_on="instantiate")
        parser.set_defaults(
            {
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": "shadowlit"},
                },
                # Our loaders shard without duplicates; Lightning's sampler shuffles unasked and pads.
                "trainer.use_distributed_sampler": False,
                # Under inference mode FSDP2 leaves tensors behind that training can't write to.
                "trainer.inference_mode": False,
                "trainer.gradient_clip_val": 1.0,
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
                if isinstance(error, MisconfigurationException | ValueError):
                    self._raise_of_trainer(error)
                self._raise_named(error)
            if "callback_metrics" not in vars(self.model):
                raise ShadowlitError(f"model.class_path is {path_of(self.model)}, but {WITHOUT_SUPER}.")
            self._check_checkpoint()

    def _check_checkpoint(self) -> None:
        """Verify ``ckpt_path`` before anything is loaded; of several processes each looks at names and sizes alone."""
        options = self.config_init[self.subcommand]
        path = options.get("ckpt_path")
        if path is None or path in ("best", "last", "hpc"):
            return
        resumes, alone = self.subcommand == "fit", self.trainer.world_size == 1
        path = find_whole(path, resumes=resumes, contents=alone)
        options["ckpt_path"] = str(path)
        if "hyper_parameters" in read_rest(path):
            rank_zero_warn(f"{path} holds hyper_parameters, which are not used: the configuration decides.")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; what Lightning itself refuses is an error of a line that names the key."""
        if subcommand == "plan":
            self._plan()
            return
        if subcommand != "preview":
            with as_usage():
                self._require_writable()
        try:
            super()._run_subcommand(subcommand)
        except (MisconfigurationException, ValueError) as error:
            self._raise_of_trainer(error)
            raise

    def _plan(self) -> None:
        options, classes, words = self.config["plan"], self.config_init["plan"], self._words[1:]
        limit = None if options["memory"] is None else parse_bytes(options["memory"])
        for name in ("memory", "measure_steps"):  # unknown to fit
            places = [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"]
            for i in reversed(places):
                del words[i : i + 1 + ("=" not in words[i])]
        trainer = options["trainer"].as_dict()
        self.planned = Plan(self.model, self.datamodule, classes["graft"], classes["export"], trainer)
        self.planned.print(limit, options["measure_steps"], words, self._refused)

    def _require_writable(self) -> None:
        """Try the folders that loggers and checkpoints are written to, before models are loaded."""
        loggers = [logger.save_dir for logger in self.trainer.loggers if logger.save_dir]
        key = "trainer.logger's save_dir" if loggers else "trainer.default_root_dir"
        for folder in loggers or [self.trainer.default_root_dir]:
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
        keys = [word for word in re.findall(r"\w+", message) if word in options][:1] or ["accelerator", "devices"]
        hint = "" if len(keys) == 1 else " Set what this machine has, e.g. trainer.accelerator=cpu."
        named = ", ".join(f"trainer.{key} is {options[key]}" for key in keys)
        raise ShadowlitError(f"{named}: {message}{hint}") from error

    def _raise_named(self, error: BaseException) -> NoReturn:
        """Raise the error, with the key of the class whose ``__init__`` raised it, if there is one."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if error.__cause__ is not None and frames[-1].f_globals["__name__"].startswith("jsonargparse"):
            self._raise_named(error.__cause__)  # of an error about a union of types, or about a linked value
        kinds = {type(frame.f_locals.get("self")) for frame in frames if frame.f_code.co_name == "__init__"}
        named: dict[str, Any] = {}
        for key, path in _classes_of(self.config[self.subcommand]):
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As configured; a preview and a plan need none of the devices that a configuration asks for."""
        here = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        if self.subcommand == "preview":
            return ShadowTrainer(**here)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            if self.subcommand != "plan":
                raise
            self._refused = [f"note: the trainer can't be created on this machine ({first_line(error)})"]
            return ShadowTrainer(**here)
        take_over(trainer)
        return trainer


def _whole_numbers_first(kind: Any) -> Any:
    """A union in which int comes before float, so that 1 is not read as 1.0: one batch, not all of them.

    Python takes unions of the same types in another order for equal and may return one that it has made before.
    """
    if get_origin(kind) is not Union or not {int, float} <= {*get_args(kind)}:
        return kind
    return Union[tuple([int, *(each for each in get_args(kind) if each is not int)])]  # noqa: UP007 - computed


def _require_own(stop: SystemExit) -> None:
    """Raise a ShadowlitError if it is not the parser that ends the command, but a module that it has imported."""
    frames = [frame for frame, _ in traceback.walk_tb(stop.__traceback__)]
    modules = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    keys = [frame.f_locals["self"].dest for frame in frames if frame.f_code.co_name == "_check_type"]
    if modules and keys:
        raise ShadowlitError(
            f"{keys[0]} names a class of {modules[-1]}, which ends the program when it is imported "
            f"({first_line(stop)}). Remove the call, or put it under if __name__ == '__main__'."
        ) from stop


def _classes_of(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys of a configuration that hold a class and its options, and the import path of each."""
    if isinstance(config, Mapping | Namespace):
        if "class_path" in config:
            yield key, config["class_path"]
        for name in vars(config) if isinstance(config, Namespace) else config:
            yield from _classes_of(config[name], f"{key}.{name}" if key else name)
    for i, value in enumerate(config if isinstance(config, list) else ()):
        yield from _classes_of(value, f"{key}[{i}]")


def import_model_class(path: str) -> type[ShadowModule]:
    """Import the class that ``model.class_path`` names.

    Raises:
        ShadowlitError: There is none, or it is no subclass of ShadowModule.
    """
    base = "a subclass of shadowlit.training.module.ShadowModule"
    found = import_object(path, "model.class_path", f"the import path of {base}")
    if not (isinstance(found, type) and issubclass(found, ShadowModule)):
        raise ShadowlitError(f"model.class_path is {path!r}, which is {found!r}; expected the import path of {base}.")
    return found


def _given_class(args: ArgsType) -> str | None:
    """``model.class_path``, wherever it is given; it must be known before the parser is built."""
    if args is not None and not isinstance(args, list):
        return _class_in(args)
    arguments = sys.argv[1:] if args is None else args
    found = None
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        value = value if equals else after
        if name == "--model.class_path":
            found = value
        elif name in ("-c", "--config"):
            with contextlib.suppress(OSError, TypeError, yaml.YAMLError):  # the parser reports them
                text = ConfigPath(value, mode="fsr").get_content()
                config = load_yaml(text, value)
                _require_secrets(config)  # before jsonargparse, to which it is a broken alias of YAML
                found = _class_in(config) or found
    return found


def _class_in(config: Any) -> str | None:
    keys = ("model", *(f"{name}.model" for name in ShadowCLI.subcommands()))
    return next((path for key, path in _classes_of(config) if key in keys), None)


def main(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    """Run one of the subcommands.

    Args:
        args: Arguments; None for those of the command line.
        callbacks: Callbacks that are added to the configured ones.

    Raises:
        Interrupted: With the exit status 128 + signal after SIGINT, SIGTERM or SIGUSR1; see docs/stopping.md.
    """
    signals = StopSignals()
    with signals.caught():
        signals.is_part = end_with_parent()
        return _of(ShadowCLI, args, callbacks)


def check(args: list[str]) -> None:
    """Parse a command line as :func:`main` would, and run nothing.

    Raises:
        ShadowlitError: The parser's message: a key that doesn't exist, a value of the wrong type.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), warnings.catch_warnings(action="ignore"):
            _of(_Parsing, args)
    except Interrupted:
        raise
    except SystemExit:
        raise ShadowlitError(" ".join(shown.getvalue().partition("error: ")[2].split())) from None


class _Parsing(ShadowCLI):
    def _set_seed(self) -> None:
        """Leave the caller's random numbers alone."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _of(cli: type[ShadowCLI], args: ArgsType, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    path = _given_class(args)
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
