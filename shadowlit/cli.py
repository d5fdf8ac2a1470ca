"""The LightningCLI: ``fit``, ``validate``, ``test`` and ``predict`` from one configuration."""

from __future__ import annotations

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from shadowlit.callbacks.export import ExportCallback
from shadowlit.callbacks.graft import GraftCallback
from shadowlit.data.module import ShadowData
from shadowlit.pair import ModelPair
from shadowlit.training.module import ShadowModule


class ShadowCLI(LightningCLI):
    """Parses a run's configuration; the pair is given once and reaches the module and the data alike."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the pair, the graft and the export, and the defaults that Lightning's own would spoil."""
        parser.add_class_arguments(ModelPair, "pair")
        parser.add_lightning_class_args(GraftCallback, "graft")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.link_arguments("pair", "model.pair", apply_on="instantiate")
        parser.link_arguments("pair", "data.pair", apply_on="instantiate")
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


def main(args: ArgsType = None) -> ShadowCLI:
    """Run one of LightningCLI's subcommands."""
    return ShadowCLI(
        ShadowModule,
        ShadowData,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfigCallback,
        parser_kwargs={"default_env": False},
        args=args,
    )
