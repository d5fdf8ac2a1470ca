"""Files that are written atomically, whoever else writes or is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shadowlit.files import replace_text, require_writable, written_beside

WRITER = """
import sys
from pathlib import Path
from shadowlit.files import replace_text
for number in range(300):
    replace_text(Path(sys.argv[1]), sys.argv[2] * 50_000)
"""


def test_several_processes_write_one_file(tmp_path):
    """Each of them at once and without an error; whoever reads meanwhile finds all of what one of them wrote."""
    file = tmp_path / "made/x.txt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), letter], stderr=subprocess.PIPE)
               for letter in "abcd"]  # fmt: skip
    found = set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            found.add(file.read_text())
    assert [writer.communicate()[1].decode() for writer in writers] == [""] * 4
    assert found <= {letter * 50_000 for letter in "abcd"} and len(found) > 1
    assert [path.name for path in file.parent.iterdir()] == ["x.txt"]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Otherwise a power cut after the rename could leave an empty file; then its new name is flushed as well."""
    file, done = replace_text(tmp_path / "x.txt", "old"), []
    fsync, replace = os.fsync, Path.replace

    def note_flush(descriptor):
        done.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), file.read_text()))
        fsync(descriptor)

    def note_rename(path, target):
        done.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)
    replace_text(file, "new")
    (written, before), renamed, (folder, after) = done
    assert written.name.startswith("x.txt.") and (before, renamed, after) == ("old", "renamed", "new")
    assert folder == tmp_path


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "x.json").mkdir()
    (tmp_path / "x.json/kept").write_text("theirs")
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "x.json", "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["x.json", "kept"]


def test_after_an_error_the_old_file_stays(tmp_path):
    file = replace_text(tmp_path / "x.txt", "old")
    with pytest.raises(KeyError), written_beside(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_what_killed_writers_left_is_removed_in_time(tmp_path):
    """What is an hour old goes; younger ones may be of others at work, and other files are none of ours."""
    left = [tmp_path / name for name in ("x.txt.0a.partial", "x.txt.0b.partial", "y.txt.0a.partial", "x.txt.old")]
    for path in left:
        path.write_text("half")
    for path in (left[0], *left[2:]):
        os.utime(path, (time.time() - 4000,) * 2)
    replace_text(tmp_path / "x.txt", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.txt", "x.txt.0b.partial", "x.txt.old", "y.txt.0a.partial"
    ]  # fmt: skip


def test_the_name_may_have_signs_of_patterns(tmp_path):
    left = tmp_path / "a[1].txt.00.partial"
    left.write_text("half")
    os.utime(left, (0, 0))
    assert replace_text(tmp_path / "a[1].txt", "new").read_text() == "new"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a[1].txt"]


def test_whether_a_folder_can_be_written_is_tried_where_it_will_be_made(tmp_path):
    assert require_writable(tmp_path / "a/b") == tmp_path == require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        require_writable(tmp_path / "file/a/b")
