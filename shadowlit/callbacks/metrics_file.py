"""MetricsFile: the ``metrics.csv`` in a run's folder, which every run of the command line writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from shadowlit.files import written_beside


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, except that a resumed run continues the file, which CSVLogger would delete.

    The trainer's first logger: Lightning derives from it where checkpoints are written to.

    Args:
        root: Folder of all runs.
        name: Path of the run in it.
        is_new: Whether the run's folder is a new one, ``<root>/<name>/version_<n>``, and not ``<root>/<name>``, in
            which the same command continues the run.

    Attributes:
        is_named: Whether the same command continues the run.
        step: Optimizer step that the run resumes from; the rows that were logged after it are dropped.
    """

    def __init__(self, root: str, name: str, is_new: bool) -> None:
        super().__init__(root, name, None if is_new else "")
        self.is_named, self.step = False, 0
        self._made: Path | None = None

    @property
    def version(self) -> int | str:
        """Number of a new folder, which is made when it is first asked for, so that no other process takes it."""
        if self._version is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            for number in count(int(self._get_next_version())):
                with suppress(FileExistsError):
                    self._made = Path(self.root_dir, f"version_{number}")
                    self._made.mkdir(parents=True)
                    self._version = number
                    break
        return super().version

    def leave(self) -> None:
        """Remove the new folder if it is still empty, as after an error in the data."""
        if self._made is not None:
            with suppress(OSError):
                self._made.rmdir()

    @property
    def experiment(self) -> Any:
        """The writer, on rank zero; on others something that does nothing."""
        if self._experiment is None:
            self._experiment = rank_zero_only(_Writer)(self.log_dir, self.step)
        return super().experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, step: int) -> None:
        self._step = step
        self._known: list[set[str]] = []  # names in the rows of the last step, which a resumed validation repeats
        self._last: int | None = step - 1  # of the rows
        super().__init__(log_dir)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Record a row, unless it is there already: of a resumed run, or since a checkpoint followed it."""
        if step != self._last:
            self._last, self._known = step, []
        if (names := {*metrics_dict, "step"}) not in self._known:
            self._known.append(names)
            super().log_metrics(metrics_dict, step)

    def _check_log_dir_exists(self) -> None:
        """Keep the rows up to the step that the run resumes from."""
        file = Path(self.metrics_file_path)
        names, rows = _read(file)
        rows = [row for row in rows if int(row["step"]) < self._step]
        self.metrics_keys = names if rows else []
        self._known = [{name for name in names if row[name]} for row in rows if int(row["step"]) == self._step - 1]
        file.unlink(missing_ok=True) if not rows else _write(file, names, rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        _write(file, fieldnames, _read(file)[1])


def _read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names and the complete rows of a file that may have been cut short, or not exist."""
    text = file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = [row for row in reader if (row.get("step") or "").isdigit()]
    return list(reader.fieldnames or ()), rows


def _write(file: Path, names: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    with written_beside(file) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
