"""What the notebooks make for themselves is made once, and taken for nothing when the user gives folders."""

from pathlib import Path

import pytest

from shadowlit.demo import BASE, INSTRUCT, runs
from shadowlit.demo.runs import fit, given_or_made, run_or_made


@pytest.fixture
def fits(monkeypatch):
    """Command lines that would have been run."""
    import shadowlit.lightning_cli

    made = []
    monkeypatch.setattr(shadowlit.lightning_cli, "main", lambda arguments: made.append(arguments))
    return made


def test_made_once(tmp_path, fits):
    first = given_or_made(None, None, None, None, None, None, None, tmp_path)
    assert len(fits) == len(first.updates) == 6
    assert given_or_made(None, None, None, None, None, None, None, tmp_path) == first and len(fits) == 6
    assert set(first.sides) <= first.updates.keys() and first.cut in first.updates
    assert all(source in first.updates.values() for source in (*first.runs.values(), first.scored))
    (exchanged,) = [arguments for arguments in fits if f"--pair.base={INSTRUCT}" in arguments]
    assert f"--pair.instruct={BASE}" in exchanged
    assert all(Path(source).is_relative_to(tmp_path / "embedded_for_notebooks") for source in first.updates.values())


def test_an_interrupted_one_is_made_anew(tmp_path, monkeypatch):
    import shadowlit.lightning_cli

    def interrupted(arguments):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.yaml").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shadowlit.lightning_cli, "main", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", {})
    monkeypatch.setattr(shadowlit.lightning_cli, "main", lambda _: None)
    fit(tmp_path / "run", {})
    assert [path.name for path in (tmp_path / "run").iterdir()] == [runs._DONE]


def test_what_is_given_is_taken(tmp_path, fits):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/checkpoints/last.ckpt").touch()
    updates = {"a": str(tmp_path / "a"), "b": "some/delta"}
    found = given_or_made("base", "instruct", updates, None, None, None, None, tmp_path)
    assert (found.base, found.instruct, found.updates) == ("base", "instruct", updates)
    assert found.runs == {"a": str(tmp_path / "a")}  # what has checkpoints
    assert (found.sides, found.cut, found.scored) == (("a", "b"), "a", None)
    chosen = given_or_made("base", "instruct", updates, {}, ("b", "a"), "b", "run", tmp_path)
    assert (chosen.runs, chosen.sides, chosen.cut, chosen.scored) == ({}, ("b", "a"), "b", "run")
    assert run_or_made("x", tmp_path) == "x" and not fits
