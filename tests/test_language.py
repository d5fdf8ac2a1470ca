"""Words of the project's earlier dialect, for which the field has a standard name, don't come back.

Scanned are documents without their code, comments and texts of configurations, and all texts of the package:
docstrings, help and messages.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What is found, and what a native engineer writes.
INSTEAD = {
    r"told": "reported, logged, distinguished",
    r"goes on|going on|go on": "resumes, continues",
    r"anew": "again",
    r"beside": "next to, in addition to",
    r"(everything|what|all) that learns|what learns": "the trainable parameters",
    r"carr(y|ies|ied) (a |the )?loss|tokens? with loss": "supervised token",
    r"past the logits": "without materialising the full logits",
    r"so many-th": "every n-th",
    r"to benchmarks": "run benchmarks",
    r"or not at all": "written atomically",
    r"exchanged?": "swap",
    r"strengths?": "scale",
    r"can't be had|cannot be had": "is unavailable",
    r"stands? (in|after|before|between|twice)": "is loaded, follows, is",
    r"bare answers?|answers bare": "answers without the chat style",
    r"all but": "all except",
    r"what of the update|what of it": "the fraction of the update",
    r"let an update go": "discard the update",
    r"how large in the middle": "median",
    r"ways? through": "implementation",
    r"as said|(is|are|was|were) said": "is reported",
    r"without a word": "silently",
    r"unasked": "automatically",
    r"looked at": "checked, examined, compared",
    r"mend(s|ed|ing)?": "correct, fix",
    r"(?<!here )(is|was) no (checkpoint|file|folder|function|matrix|object|subclass|table|tensor)": "is not a",
}
DIALECT = re.compile(rf"\b(?:{'|'.join(f'(?P<w{i}>{word})' for i, word in enumerate(INSTEAD))})\b", re.IGNORECASE)


def prose_of(path):
    """The texts of a file with the numbers of their lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from ((node.lineno + i, line) for i, line in enumerate(node.value.splitlines()))
        return
    if path.suffix == ".md":  # keep the numbers of the lines
        text = re.sub(r"^( *)```.*?^\1```", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`\n]*`", "", text)
    yield from enumerate(text.splitlines(), 1)


def dialect_in(paths):
    """Where a word of the dialect stands: file, line, the word and what to write."""
    return [
        f"{path.name}:{number}: '{found[0]}': {list(INSTEAD.values())[int(str(found.lastgroup)[1:])]}"
        for path in paths
        for number, line in prose_of(path)
        for found in DIALECT.finditer(line)
    ]


@pytest.mark.parametrize("folder, pattern", [
    ("shadowlit", "*.py"), ("shadowlit", "*.yaml"), ("docs", "*.md"), (".", "*.md"), ("configs", "*.yaml"),
    ("experiments", "*.yaml"), ("experiments", "README.md"), ("benchmarks", "*.md"),
])  # fmt: skip
def test_the_dialect_does_not_come_back(folder, pattern):
    paths = sorted((ROOT / folder).glob(pattern) if folder == "." else (ROOT / folder).rglob(pattern))
    paths = [path for path in paths if path.name != "CHANGELOG.md"]  # which is history
    assert paths and dialect_in(paths) == []


def test_it_is_found_in_every_kind_of_text(tmp_path):
    for name, text, number in (
        ("a.md", "Fine.\n```\nbeside\n```\n`beside` The run goes on.\n", 5),
        ("a.yaml", "lr: 1\nscale: 1  # its strength\n", 2),
        ("a.py", 'beside = 1  # a name\nerror = f"{beside} was told"\n', 2),
    ):
        (tmp_path / name).write_text(text)
        (found,) = dialect_in([tmp_path / name])
        assert found.startswith(f"{name}:{number}: ")
