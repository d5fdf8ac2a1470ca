"""Packages that export names without importing the modules that define them (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Let a package export what its ``__init__.py`` imports under ``TYPE_CHECKING``, each name when it is first used.

    Type checkers follow the imports, ``dir()`` and tab completion list the names, and importing the package stays
    cheap. The imports are read from the source of the package's ``__init__.py``, so that no name is listed twice.

    Example::

        if TYPE_CHECKING:
            from shadowlit.delta.delta import Delta as Delta

        __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
    """
    namespace = vars(sys.modules[package])
    blocks = [node for node in ast.parse(Path(file).read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(import_module(modules[name]), name)
        return namespace[name]

    return get, lambda: sorted({*modules, *(name for name in namespace if name.startswith("__"))}), sorted(modules)
