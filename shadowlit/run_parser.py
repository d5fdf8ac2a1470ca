"""The parser of ``fit`` and the other subcommands: what its keys take, and the classes that a configuration names."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract
from types import ModuleType
from typing import Any, ClassVar, Union, get_args, get_origin

import torch
import torchmetrics
import yaml
from jsonargparse import Namespace
from jsonargparse import Path as ConfigPath
from lightning.pytorch import Callback, callbacks, strategies
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch.optim import lr_scheduler

from shadowlit.data.custom_formats import format_names
from shadowlit.delta.registry import transform_names
from shadowlit.errors import ShadowlitError, as_usage, first_line
from shadowlit.evaluation import forgetting, generated, multiple_choice
from shadowlit.evaluation.evaluator import Evaluator
from shadowlit.limits import load_yaml
from shadowlit.masking import MASK, masks_in
from shadowlit.parser import Known, ShortErrors
from shadowlit.plugins import import_object
from shadowlit.training.module import ShadowModule
from shadowlit.training.objectives import OBJECTIVES, Objective
from shadowlit.training.optimizer import OptimizerChoice
from shadowlit.training.schedules import ScheduleName


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


def adapt_subcommands(parsers: Mapping[str, LightningArgumentParser]) -> None:
    """Describe the keys for which Lightning's own text names what is refused here, and set defaults of our own."""
    texts = {
        "ckpt_path": "Checkpoint to resume from, or to measure: a file, or a folder of shards. For validate, test and "
        "predict of a run with a name also last or best.",
        "weights_only": "Checkpoints are always read as tensors and plain values; false is an error.",
        "seed_everything": "Seed of Python, NumPy and torch, and of the model and the data where theirs are 0; true "
        "draws one.",
    }
    for name, parser in parsers.items():
        for action in parser._actions:
            action.help = texts.get(action.dest, action.help)
        if name in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # of Lightning's table of all metrics


def require_secrets(config: Any) -> None:
    """Raise if a configuration is one that was written, in which secrets are masked."""
    if masks := masks_in(config):
        with as_usage():
            raise ShadowlitError(
                f"{', '.join(masks)} is {MASK}, which is written instead of a secret; expected the secret. Give it on "
                "the command line, or leave the key out if the service reads an environment variable."
            )


def whole_numbers_first(kind: Any) -> Any:
    """Return a union in which int comes before float, so that 1 is not read as 1.0: one batch, not all of them.

    Python takes unions of the same types in another order for equal and may return one that it has made before.
    """
    if get_origin(kind) is not Union or not {int, float} <= {*get_args(kind)}:
        return kind
    return Union[tuple([int, *(each for each in get_args(kind) if each is not int)])]  # noqa: UP007 - computed


def require_own(stop: SystemExit) -> None:
    """Raise a ShadowlitError if it is not the parser that ends the command, but a module that it has imported."""
    frames = [frame for frame, _ in traceback.walk_tb(stop.__traceback__)]
    modules = [frame.f_globals["__name__"] for frame in frames if frame.f_code.co_name == "<module>"]
    keys = [frame.f_locals["self"].dest for frame in frames if frame.f_code.co_name == "_check_type"]
    if modules and keys:
        raise ShadowlitError(
            f"{keys[0]} names a class of {modules[-1]}, which ends the program when it is imported "
            f"({first_line(stop)}). Remove the call, or put it under if __name__ == '__main__'."
        ) from stop


def classes_of(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys of a configuration that hold a class and its options, and the import path of each."""
    if isinstance(config, Mapping | Namespace):
        if "class_path" in config:
            yield key, config["class_path"]
        for name in vars(config) if isinstance(config, Namespace) else config:
            yield from classes_of(config[name], f"{key}.{name}" if key else name)
    for i, value in enumerate(config if isinstance(config, list) else ()):
        yield from classes_of(value, f"{key}[{i}]")


def import_model_class(path: str) -> type[ShadowModule]:
    """Import the class that ``model.class_path`` names.

    Raises:
        ShadowlitError: There is none, or it is not a subclass of ShadowModule.
    """
    base = "a subclass of shadowlit.training.module.ShadowModule"
    found = import_object(path, "model.class_path", f"the import path of {base}")
    if not (isinstance(found, type) and issubclass(found, ShadowModule)):
        raise ShadowlitError(f"model.class_path is {path!r}, which is {found!r}; expected the import path of {base}.")
    return found


def given_class(args: ArgsType) -> str | None:
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
                text = ConfigPath(value, mode="fsr").read_text()
                config = load_yaml(text, value)
                require_secrets(config)  # before jsonargparse, to which it is a broken alias of YAML
                found = _class_in(config) or found
    return found


def _class_in(config: Any) -> str | None:
    keys = ("model", *(f"{name}.model" for name in ("fit", "validate", "test", "predict", "preview")))
    return next((path for key, path in classes_of(config) if key in keys), None)
