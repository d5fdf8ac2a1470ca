"""Hooks of the documentation site: the README as its first page, files outside ``docs/``, generated references.

A link that leaves ``docs/`` works in the repository; here its target becomes a page or file below ``repository/``, and
what that links to as well.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))|(src=\")([^\"#]+)()")
_CODE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


@cache
def commands() -> dict[str, str]:
    """Return the pages of the commands; importing the parsers takes seconds."""
    from dev.command_reference import pages

    return pages()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the commands in the navigation."""
    names = [{name: f"reference/commands/{name}.md"} for name in commands()]
    config.nav = _replaced(config.nav, names)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the commands, the README, and every file of the repository that pages link to."""
    for name, text in commands().items():
        files.append(File.generated(config, f"reference/commands/{name}.md", content=text))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    found = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    found |= {ROOT / uri.removeprefix("repository/") for uri in _uris(config.nav) if uri.startswith("repository/")}
    waiting, seen = list(found), set(found)
    while waiting:
        path = waiting.pop()
        if (uri := source_uri(path)).startswith("repository/"):
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            new = {target for target in links(path) if target.is_file()} - seen
            seen |= new
            waiting += new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where the site has their targets."""
    path = repository_path(page.file.src_uri)
    return markdown if path is None else relinked(markdown, path)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Read the reStructuredText of docstrings that Markdown leaves as it is."""
    return re.sub(r":(?:class|func|meth|data|attr):(?=<code>)", "", html.replace("Example::</p>", "Example:</p>"))


def repository_path(uri: str) -> Path | None:
    """Return the file of the repository that a page is made of; None for a generated one."""
    if uri.startswith("reference/commands/"):
        return None
    if uri == "index.md":
        return ROOT / "README.md"
    return ROOT / uri.removeprefix("repository/") if uri.startswith("repository/") else ROOT / "docs" / uri


def source_uri(path: Path) -> str:
    """Return where the site has a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def relinked(markdown: str, path: Path) -> str:
    """Return a file's text with its links between files rewritten for the site."""
    here = os.path.dirname(source_uri(path))

    def link(match: re.Match[str]) -> str:
        before, target, after = match.groups()[:3] if match[1] else match.groups()[3:]
        if "://" in target or target.startswith(("mailto:", "#")):
            return match[0]
        full = Path(os.path.normpath(path.parent / target))
        if not full.is_file() or ROOT not in full.parents:
            return match[0]  # to a page that is generated, or nowhere: the build says so
        return f"{before}{os.path.relpath(source_uri(full), here or '.')}{after}"

    return LINK.sub(link, markdown)


def links(path: Path) -> set[Path]:
    """Return the files that a Markdown file links to, whether they exist or not."""
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    targets = (match[2] or match[5] for match in LINK.finditer(text))
    local = (target for target in targets if "://" not in target and not target.startswith(("mailto:", "#")))
    return {Path(os.path.normpath(path.parent / target)) for target in local}


def _replaced(nav: Any, names: list[dict[str, str]]) -> Any:
    if isinstance(nav, list):
        return [_replaced(each, names) for each in nav]
    if isinstance(nav, dict):
        return {title: names if value == "COMMANDS" else _replaced(value, names) for title, value in nav.items()}
    return nav


def _uris(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    each = nav.values() if isinstance(nav, dict) else nav
    return [uri for part in each for uri in _uris(part)]
