"""The documents cite tests, files and configurations that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_exists(path):
    text = path.read_text(encoding="utf-8")
    cited = set(re.findall(r"`(test_\w+)`", text))
    assert cited - TESTS == set()
    files = re.findall(r"`((?:configs|tests|shadowlit|docs)/[\w./-]*)`", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("docs/images/")]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert missing + [link for link in links if not (path.parent / link).exists()] == []


def test_every_test_is_cited_with_its_file():
    """In the footguns a file's name stands before its tests."""
    text = (ROOT / "docs/explanation/hazards.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:\w+/)?test_\w+\.py)`:((?: `test_\w+`,?)+)", text)
    assert len(found) > 20
    for file, names in found:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in source, f"{name} is not in {file}"
