"""What the configuration in a run's folder says of its update. It may be a stranger's: no code that it names is run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from shadowlit.errors import DataError, first_line
from shadowlit.limits import load_yaml
from shadowlit.pair.pair import ModelPair
from shadowlit.plugins import path_of

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration that ``fit`` leaves in a run's folder; empty if there is none.

    Raises:
        DataError: It isn't a YAML mapping.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    try:
        found = load_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not readable YAML ({str(error).splitlines()[0]}). Restore it.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds {type(found).__name__}, not the keys of a configuration. Restore it.")
    return found


def pair_of(config: Mapping[str, Any], folder: Path, trusted: bool = False) -> ModelPair:
    """Return the pair of a run, whose paths may be relative to the folder that it was started from; see
    :func:`located`.

    Code of its models runs only if the file is ``trusted``.

    Raises:
        DataError: The configuration names no pair.
    """
    section = config.get("pair") or {}
    if not section.get("base") or not section.get("instruct"):
        raise DataError(
            f"{folder} holds no config.yaml that names a pair. Expected the one that 'shadowlit fit' leaves "
            "there; for another run, give the base."
        )
    if section.get("trust_remote_code") and not trusted:
        log.warning(
            "%s sets pair.trust_remote_code, which counts only in a configuration that fit is given: no code of the "
            "models is run. If you trust the file, set trust_config to true, or give the pair in Python.",
            folder / "config.yaml",
        )
        section = {**section, "trust_remote_code": False}
    return ModelPair(**{**section, **{who: located(section[who], folder) for who in ("base", "instruct")}})


def require_known(names: Iterable[Any], known: Iterable[str], key: str, home: Path) -> None:
    """Raise if a run's configuration names a function by import path, which would be imported and called.

    Raises:
        DataError: It does.
    """
    if wrong := [name for name in names if "." in str(name) and name not in known]:
        raise DataError(
            f"{home / 'config.yaml'} has {key} {wrong[0]!r}, a function that would be imported and called; expected "
            f"one of {', '.join(known)}. If you trust the file, set trust_config to true."
        )


def located(source: str, folder: Path) -> str:
    """Return a path of a run's configuration, looked for from here and from every folder above the run's; else as it
    is.
    """
    above = [Path(), *folder.resolve().parents]
    return next((str(parent / source) for parent in above if (parent / source).exists()), source)


def config_above(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the nearest folder above a checkpoint with a ``config.yaml``, and that."""
    home = next((parent for parent in path.parents if (parent / "config.yaml").is_file()), path.parent)
    return home, read_config(home)


def adapter_of(config: Mapping[str, Any], home: Path) -> PeftConfig:
    """Return the settings of a run's adapter, from the configuration found in ``home``; a DataError if it has none."""
    section = (config.get("model") or {}).get("adapter")
    if not section:
        raise DataError(
            f"{home} holds no config.yaml with the settings of its adapter, on which the scale of its update "
            "depends. Give the adapter's settings."
        )
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # late: it takes seconds

    path, settings = str(section.get("class_path", "peft.LoraConfig")), section.get("init_args", section)
    classes = {f"peft.{each.__name__}": each for each in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    made = next((each for name, each in classes.items() if path in (name, path_of(each))), None)
    if made is None:  # importing any other would run its module
        raise DataError(
            f"{home / 'config.yaml'} has model.adapter.class_path {path!r}; expected a class of peft's settings, e.g. "
            "peft.LoraConfig, since no other is imported from a run's file. Correct it, or give the adapter's settings "
            "in Python: open_stage(stage, adapter=...)."
        )
    known = inspect.signature(made).parameters.keys() - {"runtime_config", "loftq_config"}
    try:
        return made(**{name: value for name, value in settings.items() if name in known and value is not None})
    except Exception as error:  # of peft's many classes: many types, one meaning
        raise DataError(f"{home / 'config.yaml'} has a model.adapter that fails ({first_line(error)}).") from error
