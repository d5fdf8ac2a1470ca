"""The table of commands, and the entry point that picks one."""

from __future__ import annotations

import difflib
import errno
import sys

LIGHTNING = "shadowlit.lightning_cli"
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
# What each command does, and its module: typed functions, or the LightningCLI for the subcommands of fit.
COMMANDS = {
    "demo": (
        "run the demonstration on the pair that comes with the package, in one to three minutes",
        "shadowlit.demo.__main__",
    ),
    "init": ("write a configuration for a pair, with the batch size that fits", "shadowlit.cli.init"),
    "fit": ("train the Base, validate the grafted Instruct as it trains, and export it", LIGHTNING),
    "validate": ("score the tuned Base, the grafted Instruct and the untouched pair on the validation sets", LIGHTNING),
    "test": ("score the same models on the test sets", LIGHTNING),
    "predict": ("generate answers to prompts with the grafted Instruct", LIGHTNING),
    "plan": ("check a training and estimate its memory, disk and time before it begins", LIGHTNING),
    "preview": ("print samples token by token, with the supervised tokens highlighted", LIGHTNING),
    "compare": ("train the arms of a pair on the same data, and report what the data support", "shadowlit.cli.compare"),
    "sweep": ("vary any key of fit over a grid or by search, on one machine or many", "shadowlit.cli.sweep"),
    "graft": ("graft the update of a Base tuned elsewhere, from folder to folder", "shadowlit.cli.graft"),
    "export": ("write the grafted Instruct from a checkpoint of fit, without training", "shadowlit.cli.export"),
    "evaluate": ("run benchmarks on models after training", "shadowlit.cli.evaluate"),
    "delta": ("store, show, combine, compress and apply updates", "shadowlit.cli.delta"),
    "similarity": ("measure how similar two models are, and what that means for a graft", "shadowlit.cli.similarity"),
    "pairs": ("list known pairs of Base and Instruct, and check any pair", "shadowlit.cli.pairs"),
}


def main(args: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    Errors caused by the user's input are printed without a traceback.

    Args:
        args: The command and its arguments; by default those of the command line.
    """
    given, args = args, sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        from shadowlit.version import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"error: there is no command '{args[0]}'.{hint}\n\n{_overview()}", file=sys.stderr)
        return 2
    # Imported late: the overview and its errors need none of the seconds that torch takes.
    from shadowlit.errors import ShadowlitError
    from shadowlit.quiet import quieten
    from shadowlit.text import fitted

    quieten()
    _, module = COMMANDS[args[0]]
    try:
        if args[0] == "demo":
            from shadowlit.demo.__main__ import main as demonstrate

            demonstrate(args[1:])
            return 0
        if module != LIGHTNING:
            from shadowlit.cli.functions import run_function

            run_function(args[0], module, args[1:])
            return 0
        from shadowlit.lightning_cli import main as run

        run(given)  # None: Lightning reads the command line itself, and its launcher starts the other ranks with it
    except ShadowlitError as error:
        print(fitted(f"error: {error}", sys.stderr), file=sys.stderr)
        return error.status
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f"{error.filename or 'a file'} can't be written"
        print(f"error: {where} ({error.strerror}). Free disk space, and start the same command again.", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items())
    return (
        "shadowlit: adapt an Instruct language model through its Base\n\n"
        f"usage: shadowlit <command> [--config FILE] [--key=value ...]\n\n{lines}\n\n"
        "shadowlit <command> --help lists every key; --print_config shows the configuration that would run."
    )
