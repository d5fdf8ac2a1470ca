"""The LightningCLI: ``fit``, ``validate``, ``test``, ``predict`` and ``preview`` from one configuration."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from shadowlit.callbacks.evaluation import EvaluationCallback
from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.callbacks.predictions import PredictionWriter
from shadowlit.callbacks.throughput import ThroughputCallback
from shadowlit.data.formats import Samples
from shadowlit.data.module import ShadowData
from shadowlit.data.preview import preview
from shadowlit.errors import ShadowlitError
from shadowlit.pair.pair import ModelPair
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import Objective

# jsonargparse spells out every default of LoraConfig, of which peft then says that it ignores one.
warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")


class ShadowTrainer(Trainer):
    """Lightning's Trainer, and a look at the data that it would train on."""

    def preview(
        self, model: LightningModule, datamodule: ShadowData, split: str = "train", num_samples: int = 3
    ) -> None:
        """Print samples token by token, with what carries loss in colour, and what was cut or dropped.

        Args:
            model: Not used.
            datamodule: The data.
            split: train, or the name of a validation or test set.
            num_samples: How many samples to print.
        """
        preview(datamodule, split, num_samples)


class ShadowCLI(LightningCLI):
    """Parses a run's configuration; the pair is given once and reaches the module and the data alike."""

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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As configured; a preview needs none of the devices that a configuration asks for."""
        if self.subcommand == "preview":
            return ShadowTrainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        return super().instantiate_trainer(**kwargs)


def _samples_of(objective: Objective | None) -> Samples:
    """What rows the objective learns from; without one it is supervised fine-tuning."""
    return "conversations" if objective is None else objective.samples


def main(args: ArgsType = None, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    """Run one of the subcommands.

    Args:
        args: By default the command line's.
        callbacks: Join those that are configured.
    """
    return _of(ShadowCLI, args, callbacks)


def check(args: list[str]) -> None:
    """Parse a command line as :func:`main` would, and run nothing.

    Raises:
        ShadowlitError: What the parser has to say: a key that doesn't exist, a value of the wrong type.
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
        """The caller's random numbers are none of ours."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def _of(cli: type[ShadowCLI], args: ArgsType, callbacks: Sequence[Callback] = ()) -> ShadowCLI:
    return cli(
        ShadowModule,
        ShadowData,
        trainer_class=ShadowTrainer,
        trainer_defaults={"callbacks": list(callbacks)},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )
