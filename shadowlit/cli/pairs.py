"""``shadowlit pairs``: list known pairs and check any pair; the docstrings are the help.

Listing and showing import no torch.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from shadowlit.errors import PairError, counted
from shadowlit.pair.registry import KnownPair, find_pair, load_registry
from shadowlit.progress import make_console

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def list_pairs() -> None:
    """List the known pairs: names, hub ids, the model whose chat template is used, and peculiarities."""
    registry = load_registry()
    table = Table(title=f"{len(registry)} known pairs", title_justify="left")
    for column in ("name", "Base", "Instruct", "template", "peculiarities"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    family = ""
    for pair in registry.values():
        if family and pair.family != family:
            table.add_section()
        family = pair.family
        table.add_row(pair.name, pair.base, pair.instruct, _template(pair), ", ".join(pair.peculiarities))
    console = make_console()
    console.print(table)
    console.print("'shadowlit pairs show NAME' explains a pair, 'pairs check NAME' checks it.", style="dim")


def show(name: str) -> None:
    """Print everything that is known about a pair, and the lines for a configuration.

    Args:
        name: Name of a known pair, e.g. qwen3-4b-2507.
    """
    pair = find_pair(name)
    console = make_console()
    console.print(pair.name, style="bold")
    facts = {
        "Base": pair.base,
        "Instruct": pair.instruct,
        "template": _template(pair),
        "licence": f"{pair.licence or 'not known'}{' (gated: accept it on the hub first)' if pair.gated else ''}",
        "σ": f"{pair.sigma} (published)" if pair.sigma else "not known: 'shadowlit similarity' computes it",
        **pair.peculiarities,
    }
    if pair.official:
        facts["official list"] = f"names {pair.official[0]} and {pair.official[1]}, which is not this pair"
    if pair.note:
        facts["note"] = pair.note
    table = Table.grid(padding=(0, 2))
    for key, fact in facts.items():
        table.add_row(Text(key, style="dim"), Text(fact))
    console.print(table)
    lines = [f"  {key}: {getattr(pair, key)}" for key in ("base", "instruct", "base_revision", "instruct_revision")]
    console.print("\n".join(["", "pair:", *(line for line in lines if not line.endswith(" None"))]))


def check(
    pair: list[str],
    select: str | list[str] = "linear",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> None:
    """Check whether a Base and an Instruct fit together, as 'fit' does before it trains.

    Folders are read in full. For hub ids only configs, tokenizers and safetensors headers are downloaded, a few MB;
    checks that need the weights are skipped, with a note. The exit status is 1 if there are errors.

    Args:
        pair: Name of a known pair, or two folders or hub ids: Base, Instruct.
        select: Tensors that will be grafted: linear, all, or regular expressions for tensor names.
        trust_remote_code: Run Python code that comes with the models. Dangerous: only for authors you trust.
        chat_template: Path of a Jinja file that replaces the Instruct's chat template, as data.chat_template does.
    """
    # Imported late: list and show need no torch.
    from shadowlit.data.rendering import load_template
    from shadowlit.pair.check import check_pair
    from shadowlit.pair.pair import ModelPair

    if len(pair) == 1:
        models = find_pair(pair[0]).pair(trust_remote_code)
    elif len(pair) == 2:
        models = ModelPair(pair[0], pair[1], trust_remote_code=trust_remote_code)
    else:
        raise PairError(
            f"found {counted(len(pair), 'model')}; expected the name of a known pair, or Base and Instruct."
        )
    template = None if chat_template is None else load_template(chat_template)
    console = make_console()
    for who, source, revision in (
        ("Base", models.base, models.base_revision),
        ("Instruct", models.instruct, models.instruct_revision),
    ):
        console.print(f"{who:<8}  {source}{f' at {revision}' if revision else ''}")
    problems = check_pair(models, select, download=False, chat_template=template)
    for problem in problems:
        severity = Text(f"{problem.severity:<8}", style=_STYLES[problem.severity])
        console.print(severity.append(f"  {problem}", style="default"))
    counts = [sum(problem.severity == severity for problem in problems) for severity in _STYLES]
    found = ", ".join(counted(n, severity) for n, severity in zip(counts, _STYLES, strict=True))
    if counts[0]:
        raise PairError(f"{found}: a graft of {select!r} is not possible until the errors are fixed.")
    console.print(f"{found}: a graft of {select!r} is possible.")


def _template(pair: KnownPair) -> str:
    """The model whose chat template is used, and whether the Base has one too."""
    other = {True: " (the Base has one too)", False: " (the Base has none)", None: ""}[pair.base_template]
    return f"{pair.template_owner.capitalize()}'s{other}"


DEFAULT = "list"
COMMANDS = {"list": list_pairs, "show": show, "check": check}
