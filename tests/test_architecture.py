"""Imports run downwards: from a package to those on the floors below it, never up and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. Modules and packages on one floor don't import each other.
FLOORS = [
    {"masking", "text"},
    {"allocator", "errors", "files", "kernels", "lazy", "progress", "quiet", "status", "version"},
    {"distributed", "plotting", "plugins", "limits", "signals"},
    {"parser"},
    {"arguments"},
    {"checkpoint"},
    {"pair"},
    {"data"},
    {"grafting"},
    {"delta"},
    {"training"},
    {"evaluation", "harness"},
    {"callbacks"},
    {"analysis", "planning"},
    {"runs", "run_parser"},
    {"lightning_cli"},
    {"studies", "demo"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((root / "shadowlit").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(source: str, known: frozenset[str]) -> list[tuple[str, int]]:
    """The modules of the package that a source imports, with the line: at the top, lazily, or for types alone."""
    return [found for node in ast.walk(ast.parse(source)) for found in _imported(node, known)]


def _imported(node: ast.AST, known: frozenset[str]) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide where they lead"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name in known or node.module in known:
                yield (name if name in known else str(node.module)), node.lineno
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "shadowlit":
        if f"shadowlit.{node.attr}" not in known:  # a public name, which the package imports from the floor it is on
            yield "shadowlit", node.lineno
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        # A module's name in a string: for import_module or __import__, in a class path or a table of commands.
        parts = re.split(r"[.:]", node.value)
        names = (".".join(parts[:end]) for end in range(len(parts), 1, -1))
        yield from ((name, node.lineno) for name in islice((name for name in names if name in known), 1))


def computed(source: str) -> list[int]:
    """Lines that import a module whose name isn't written out: no test can tell where they lead."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if ast.unparse(call.func).rpartition(".")[2] in ("import_module", "__import__", "resolve_name")
        and not all(isinstance(arg, ast.Constant) for arg in [*call.args, *(k.value for k in call.keywords)])
    ]


def package_of(module: str) -> str:
    """The part of a module's name that has a floor."""
    return module.split(".")[1] if "." in module else "__init__"


def upward(sources: dict[str, str]) -> list[str]:
    """Imports that run up, or between two packages of one floor."""
    found = []
    for module, source in sources.items():
        for target, line in imports(source, frozenset(sources)):
            here, there = package_of(module), package_of(target)
            if here != there and FLOOR_OF[there] >= FLOOR_OF[here]:
                found.append(f"{module}:{line} imports {target}")
    return found


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Groups of modules each of which imports, directly or not, all others of its group (Tarjan)."""
    edges = {
        module: {t for t, _ in imports(source, frozenset(sources)) if t != module} for module, source in sources.items()
    }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules(ROOT).items()}


def test_every_package_has_a_floor(sources):
    assert {package_of(module) for module in sources} == FLOOR_OF.keys()


def test_imports_run_downwards(sources):
    assert upward(sources) == []


def test_only_these_modules_import_names_that_are_computed(sources):
    """Their names are seen elsewhere (the imports for type checkers, the table of commands) or are a user's."""
    found = {module for module, source in sources.items() if computed(source)}
    assert found == {"shadowlit.lazy", "shadowlit.cli.functions", "shadowlit.plugins"}


@pytest.mark.parametrize("call", [
    "importlib.import_module(f'shadowlit.{name}.module')", "import_module(name=path)", "__import__('.'.join(parts))",
    "pkgutil.resolve_name(MODULES[name])",
])  # fmt: skip
def test_a_computed_name_is_found(call):
    assert computed(f"def late(name):\n    return {call}") == [2]
    assert computed("import_module('shadowlit.training')") == []


def test_no_circles_between_modules(sources):
    assert circles(sources) == []


@pytest.mark.parametrize(
    "line",
    [
        "from shadowlit.training.module import ShadowModule",
        "import shadowlit.training.module",
        "def late():\n    from shadowlit.training import module",
        "if TYPE_CHECKING:\n    from shadowlit.training.module import ShadowModule",
        "importlib.import_module('shadowlit.training.module')",
        "import_module(name='shadowlit.training.module')",
        "__import__('shadowlit.training.module')",
        "MODULE = 'shadowlit.training.module:ShadowModule'",
    ],
)
def test_an_arrow_that_runs_up_is_found(sources, line):
    """Also one that is lazy, one for types alone, and one of a whole module."""
    changed = {**sources, "shadowlit.grafting.arithmetic": sources["shadowlit.grafting.arithmetic"] + "\n" + line}
    (found,) = upward(changed)
    assert found.startswith("shadowlit.grafting.arithmetic:") and "shadowlit.training" in found
    assert any("shadowlit.grafting.arithmetic" in circle for circle in circles(changed))


def test_a_public_name_of_the_package_is_an_arrow_that_runs_up(sources):
    line = "import shadowlit.errors\nshadowlit.errors.DataError, shadowlit.GraftCallback"
    assert upward({**sources, "shadowlit.plugins": line}) == ["shadowlit.plugins:2 imports shadowlit"]


@pytest.mark.parametrize("name", ["f'shadowlit.training.{name}'", "'shadowlit.training.' + name"])
def test_a_package_is_enough_for_an_arrow_that_runs_up(sources, name):
    changed = {**sources, "shadowlit.grafting.arithmetic": f"MODULE = {name}"}
    assert upward(changed) == ["shadowlit.grafting.arithmetic:1 imports shadowlit.training"]
