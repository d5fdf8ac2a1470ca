"""The documents, their blocks and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments/README.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, the file that its title names, and its lines."""

    language: str
    title: str
    text: str


def blocks(path: Path, *languages: str) -> list[Block]:
    """The blocks of a document in these languages."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    each = (Block(m[2], "".join(re.findall('title="(.+?)"', m[3])), textwrap.dedent(m[4])) for m in found)
    return [block for block in each if block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of shadowlit in a block, as words without ``shadowlit``, however they are launched."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        at = words.index("shadowlit") if "shadowlit" in words else -1
        if at == 0 or (at > 0 and words[at - 1] == "-m"):
            yield words[at + 1 :]


def name_of(path: Path) -> str:
    """A document's path in the repository."""
    return path.relative_to(ROOT).as_posix()
