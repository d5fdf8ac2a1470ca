"""The LightningCLI: ``fit``, ``validate``, ``test``, ``predict`` and ``preview`` from one configuration."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, Path
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.predictions import PredictionWriter
from shadowlit.callbacks.throughput import ThroughputCallback
from shadowlit.data.formats import Samples
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview
from shadowlit.errors import ShadowlitError, first_line
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import OBJECTIVES, Objective

# jsonargparse spells out every default of LoraConfig, of which peft then says that it ignores one.
warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")


class ShadowTrainer(Trainer):
    """Lightning's Trainer with a command that shows the data it would train on."""

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


class ShadowProgressBar(RichProgressBar):
    """Lightning's progress bar; without ``/-2`` after the epoch where their number is not limited."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "   ")


class SaveConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder, which is the logger's: without a logger nothing is saved."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, class_path: str | None = None, **kwargs: Any
    ) -> None:
        config = config.clone()
        if class_path is not None:
            config["model.class_path"] = class_path
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class ShadowParser(LightningArgumentParser):
    """Lightning's parser, which names the known objectives where another is given."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message."""
        if "model.objective" in message:
            message += f"\nmodel.objective takes {', '.join(OBJECTIVES)}, or the import path of a class derived from "
            message += "shadowlit.training.objectives.Objective."
        super().error(message, ex)


class ShadowCLI(LightningCLI):
    """Parses a run's configuration; the pair is given once and passed to both the module and the data."""

    def __init__(self, model_class: Any, data_class: Any, *, args: ArgsType = None, **options: Any) -> None:
        words = sys.argv[1:] if args is None else args
        self._first_argument = words[0] if isinstance(words, list) and words else None
        super().__init__(model_class, data_class, args=args, **options)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the trainer, the model and the data, and the model's class."""
        super().add_core_arguments_to_parser(parser)
        parser.add_argument(
            "--model.class_path",
            type=str,
            default=argparse.SUPPRESS,
            help="Import path of a subclass of ShadowModule, whose arguments are then keys of model. "
            "(default: shadowlit.training.module.ShadowModule)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and set the model's class aside, which is no argument of the class itself."""
        super().parse_arguments(parser, args)
        path = self.config[self.config["subcommand"]]["model"].pop("class_path", None)
        if path is not None and import_model_class(path) is not self.model_class:
            raise ShadowlitError(
                f"model.class_path is {path!r}, which was found too late. Give it on the command line, or in a file "
                "that is given by --config."
            )
        self.save_config_kwargs = {**self.save_config_kwargs, "class_path": path}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the pair, the graft, the evaluation and the export, and the defaults that Lightning's own would spoil."""
        parser.add_class_arguments(ModelPair, "pair")
        parser.add_lightning_class_args(GraftCallback, "graft")
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(ThroughputCallback, "throughput")
        parser.link_arguments("pair", "model.pair", apply_on="instantiate")
        parser.link_arguments("pair", "data.pair", apply_on="instantiate")
        parser.link_arguments("model.objective", "data.samples", _samples_of, apply_on="instantiate")
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
        """Lightning's own, and ``preview``."""
        return {**LightningCLI.subcommands(), "preview": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the subcommand that the arguments begin with, or else all: each takes a third of a second to build."""
        known, asked = self.subcommands(), self._first_argument
        if asked in known:
            self.subcommands = lambda: {asked: known[asked]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As configured; a preview needs none of the devices that a configuration asks for."""
        if self.subcommand == "preview":
            return ShadowTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        trainer = self._get(self.config_init, "trainer")
        given = [*(trainer.get("callbacks") or []), *self.trainer_defaults["callbacks"]]
        if trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            self.trainer_defaults["callbacks"].append(ShadowProgressBar())
        return super().instantiate_trainer(**kwargs)


def _samples_of(objective: Objective | None) -> Samples:
    """Kind of samples that the objective learns from; without an objective it is supervised fine-tuning."""
    return "conversations" if objective is None else objective.samples


def import_model_class(path: str) -> type[ShadowModule]:
    """Import the class that ``model.class_path`` names.

    Raises:
        ShadowlitError: There is none, or it is no subclass of ShadowModule.
    """
    expected = "expected the import path of a subclass of shadowlit.training.module.ShadowModule"
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the code of others
        raise ShadowlitError(
            f"model.class_path is {path!r}, which can't be imported ({first_line(error)}); {expected}. Correct it, or "
            "put its package on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, ShadowModule)):
        raise ShadowlitError(f"model.class_path is {path!r}, which is {found!r}; {expected}.")
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
                text = Path(value, mode="fsr").get_content()
                found = _class_in(yaml.safe_load(text)) or found
    return found


def _class_in(config: Any) -> str | None:
    if not isinstance(config, Mapping | Namespace):
        return None
    model = config.get("model")
    if isinstance(model, Mapping | Namespace):
        return model.get("class_path")
    return next((path for name in ShadowCLI.subcommands() if (path := _class_in(config.get(name)))), None)


def main(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    """Run one of the subcommands.

    Args:
        args: Arguments; None for those of the command line.
        callbacks: Callbacks that are added to the configured ones.
    """
    return _of(ShadowCLI, args, callbacks)


def check(args: list[str]) -> None:
    """Parse a command line as :func:`main` would, and run nothing.

    Raises:
        ShadowlitError: The parser's message: a key that doesn't exist, a value of the wrong type.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), warnings.catch_warnings(action="ignore"):
            _of(_Parsing, args)
    except SystemExit:
        text = " ".join(line.strip() for line in told.getvalue().partition("error: ")[2].splitlines() if line.strip())
        raise ShadowlitError(text.partition(" tip: ")[0]) from None


class _Parsing(ShadowCLI):
    def _set_seed(self) -> None:
        """Leave the caller's random numbers alone."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _of(cli: type[ShadowCLI], args: ArgsType, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    path = _given_class(args)
    return cli(
        ShadowModule if path is None else import_model_class(path),
        ShadowData,
        save_config_callback=SaveConfig,
        parser_class=ShadowParser,
        trainer_class=ShadowTrainer,
        trainer_defaults={"callbacks": list(callbacks)},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )
