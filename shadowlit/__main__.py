"""``python -m shadowlit <command>``."""

from __future__ import annotations

import difflib
import sys

COMMANDS = {
    "fit": "train the Base, watch the grafted Instruct, export it",
    "validate": "score the tuned Base, the grafted Instruct and the untouched pair on the validation sets",
    "test": "the same on the test sets",
    "predict": "let the grafted Instruct answer prompts",
    "preview": "print samples token by token, with what carries loss in colour",
    "compare": "train the arms of a pair side by side, and report what the data support",
    "sweep": "vary any key of fit over a grid or by search, on one machine or many",
    "graft": "graft what a Base has learned elsewhere, from folder to folder",
    "evaluate": "put models to benchmarks, after training",
    "delta": "store, show, combine, compress and apply the update itself",
    "similarity": "how alike two models are, and what that means for a graft",
    "pairs": "known pairs of Base and Instruct, and the check of any pair",
}

# Commands that are typed functions, and where.
_FUNCTIONS = {
    "compare": "shadowlit.comparison.commands",
    "sweep": "shadowlit.sweep.commands",
    "graft": "shadowlit.commands",
    "evaluate": "shadowlit.evaluation.commands",
    "delta": "shadowlit.delta_commands",
    "similarity": "shadowlit.analysis.commands",
    "pairs": "shadowlit.pairs_commands",
}


def main(args: list[str] | None = None) -> int:
    """Run a command; return the exit status.

    An error that the user's input caused is told in its own words, without a traceback.
    """
    given, args = args, sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if args[0] == "--version":
        from shadowlit import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"error: there is no command '{args[0]}'.{hint}\n\n{_overview()}", file=sys.stderr)
        return 2
    # Imported late: the overview and its errors need none of the seconds that torch takes.
    from shadowlit.errors import ShadowlitError

    try:
        if args[0] in _FUNCTIONS:
            from shadowlit.functions import run_function

            run_function(args[0], _FUNCTIONS[args[0]], args[1:])
            return 0
        from shadowlit.cli import main as run

        run(given)  # None: Lightning takes the command line itself, and its launcher starts other ranks with it
    except ShadowlitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "shadowlit: adapt an Instruct language model through its Base\n\n"
        f"usage: python -m shadowlit <command> [--config FILE] [--key=value ...]\n\n{lines}\n\n"
        "python -m shadowlit <command> --help lists every key; --print_config shows the configuration that would run."
    )


if __name__ == "__main__":
    sys.exit(main())
