"""The pages of the commands: every key with its type, default and meaning, read from the parsers that users meet.

``make docs`` generates them (``dev/docs_site.py``), so that no key can be missing or out of date.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, capture_parser

from shadowlit.cli.functions import run_function
from shadowlit.cli.main import COMMANDS, LIGHTNING
from shadowlit.lightning_cli import main as lightning
from shadowlit.parser import readable_types

SECTIONS = {
    "": "General",
    "pair": "The pair: `pair`",
    "model": "Training: `model`",
    "data": "Data: `data`",
    "graft": "The graft: `graft`",
    "evaluation": "Evaluators: `evaluation`",
    "export": "The export: `export`",
    "checkpoint": "Checkpoints: `checkpoint`",
    "predictions": "Predictions: `predictions`",
    "run": "The run: `run`",
    "throughput": "Speed: `throughput`",
    "trainer": "Lightning's Trainer: `trainer`",
}


def pages() -> dict[str, str]:
    """Return the Markdown of one page for each command, by the command's name."""
    demo = (
        "Trains on the pair that comes with the package, prints the scores of the four models, and exports the result "
        "into `runs/` of the working folder. It takes all keys of [fit](fit.md) as overrides, and `--config` for a "
        "configuration other than its own.\n"
    )
    fit = _keys(_lightning_parser("fit"))
    found = {}
    for name, (summary, module) in COMMANDS.items():
        head = f"# {name}\n\n`shadowlit {name}`: {summary}.\n\n"
        if name == "demo":
            body = demo
        elif name == "fit":
            body = _by_section(fit)
        elif module == LIGHTNING:
            keys = _keys(_lightning_parser(name))
            own = {key: text for key, text in keys.items() if fit.get(key) != text}
            lost = ", ".join(f"`{key}`" for key in fit if key not in keys)
            body = f"Takes all keys of [fit](fit.md){f' except {lost}' if lost else ''}"
            body += ", and these:\n\n" + "\n".join(own.values()) if own else ".\n"
        else:
            body = _function(name, module)
        found[name] = head + body
    return found


def _lightning_parser(name: str) -> ArgumentParser:
    return _subcommands(capture_parser(lightning, [name]))[name]


def _subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    actions = (action for action in parser._actions if hasattr(action, "_name_parser_map"))
    return next((dict(action._name_parser_map) for action in actions), {})


def _function(name: str, module: str) -> str:
    parser = capture_parser(run_function, name, module, [])
    parts = []
    for title, each in (_subcommands(parser) or {"": parser}).items():
        about = (each.description or "").strip()
        heading = f"## {name} {title}\n\n" if title else ""
        parts.append(f"{heading}{_markdown(about)}\n\n" + "\n".join(_keys(each).values()))
    return "\n".join(parts)


def _by_section(keys: dict[str, str]) -> str:
    by_section: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for key, text in keys.items():
        section = key.partition(".")[0] if "." in key else ""
        by_section.setdefault(section, []).append(text)
    text = "The keys of a configuration, and of the command line with `--` in front. A misspelt key is an error.\n\n"
    return text + "\n".join(
        f"## {SECTIONS.get(section, section)}\n\n" + "\n".join(texts) for section, texts in by_section.items() if texts
    )


def _keys(parser: ArgumentParser) -> dict[str, str]:
    """The description of each key, a definition list's entry."""
    required = set(getattr(parser, "required_args", ()))
    return {action.dest: _entry(action, action.required or action.dest in required) for action in _arguments(parser)}


def _arguments(parser: ArgumentParser) -> Iterator[Action]:
    for action in parser._actions:
        helps = action.dest.endswith(".help") or action.dest in ("help", "print_config", "config")
        if not helps and type(action).__name__ not in ("_ActionConfigLoad", "ActionLink", "_ActionSubCommands"):
            yield action


def _entry(action: Action, required: bool) -> str:
    kind: Any = getattr(action, "_typehint", None) or action.type or str
    types = readable_types(str(kind)).replace("typing.", "")
    default = action.default
    shown = "required" if required else "" if default == SUPPRESS else f"default `{_value(default)}`"
    about = _markdown(action.help or "") or "–"
    line = ", ".join(part for part in (f"`{types}`", shown) if part)
    return f'<a id="{action.dest}"></a>`{action.dest}`\n:   {line}  \n    {about}\n'


def _value(default: object) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]  # type: ignore[index]
    if isinstance(default, list | tuple):
        return f"[{', '.join(map(_value, default))}]"
    return str(default)


def _markdown(text: str) -> str:
    """Turn the reStructuredText of docstrings into one paragraph of Markdown."""
    text = re.sub(r"Default: ``[^`]*``\.?", "", text)
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = text.replace("``", "`").replace("%%", "%")
    return " ".join(text.split())
