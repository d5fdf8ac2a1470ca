"""The storage of a sweep's trials: a file, or a database that many machines share."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowlit.errors import Interrupted, ShadowlitError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

log = logging.getLogger(__name__)

FILE = "study.journal"
_TIMEOUT_S = 10
_TRIES = 4


def open_storage(where: str | None, folder: Path) -> BaseStorage:
    """Open Optuna's storage.

    Args:
        where: None for a journal in the sweep's folder; the path of another journal (``*.journal``); or the address of
            a database, ``postgresql://user:password@host/name`` or ``sqlite:///file``.
        folder: Folder of the sweep; made if there is none.

    Raises:
        ShadowlitError: It can't be reached, or its driver is not installed. A password is not shown.
    """
    # Every process warns that journals are experimental.
    warnings.filterwarnings("ignore", module="shadowlit.studies.sweep.*", message=".*experimental.*")
    if where is None or where.endswith(".journal"):
        return _journal(folder / FILE if where is None else Path(where))
    if "://" not in where:
        raise ShadowlitError(
            f"storage is {where!r}; expected a file that ends in .journal, or the address of a database, e.g. "
            "postgresql://user:password@host/name."
        )
    return _database(where)


def _journal(file: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import get_lock_file

    class Whole(JournalFileBackend):
        """Optuna's journal, which an entry that was cut short would make unreadable as soon as another follows it."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            """Append entries; a signal in Optuna's lock, which replaces it by an error, is raised as a signal."""
            try:
                self._append(logs)
            except (RuntimeError, OSError) as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, Interrupted):
                    cause = cause.__context__
                raise (cause or error) from None

        def _append(self, logs: list[dict[str, Any]]) -> None:
            """Append entries in place of what a writer has left that was killed or had no room."""
            lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs).encode()
            with get_lock_file(self._lock), file.open("r+b") as journal:
                if (size := journal.seek(0, os.SEEK_END)) and (journal.seek(size - 1), journal.read())[1] != b"\n":
                    journal.seek(0)
                    size = journal.truncate(sum(len(line) for line in journal if line.endswith(b"\n")))
                journal.seek(size)
                journal.write(lines)
                journal.flush()
                os.fsync(journal.fileno())

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Whole(str(file)))
    except (OSError, ValueError, KeyError) as error:
        raise ShadowlitError(
            f"the storage {file} can't be read or written ({error}). Give a file that can, or move this one away."
        ) from error


def _database(address: str) -> BaseStorage:
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        url = make_url(address)
    except (ArgumentError, ValueError) as error:  # ValueError: of a port that is not a number
        raise ShadowlitError(
            "storage is not an address of a database; expected e.g. postgresql://user:password@host/name."
        ) from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    options = {"pool_pre_ping": True}
    if url.drivername.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": _TIMEOUT_S}  # type: ignore[assignment]
    shown = url.render_as_string(hide_password=True)
    for attempt in range(_TRIES):
        try:
            return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
        except ImportError as error:
            raise ShadowlitError(
                f"the storage {shown} needs a driver that is not installed ({error}). For PostgreSQL: "
                "pip install 'shadowlit[postgres]'."
            ) from None
        except SQLAlchemyError as error:
            # Two processes that create the tables of an empty database at the same time can collide once.
            if attempt < _TRIES - 1 and _is_about_tables(error):
                time.sleep(0.5 * (attempt + 1))
                continue
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise ShadowlitError(
                f"the storage {shown} can't be reached ({reason}). Check the address, the name of the database and "
                "that it is running, or leave storage out to use a file."
            ) from None
    raise AssertionError("the last attempt returns or raises")


def _is_about_tables(error: Exception) -> bool:
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    found = isinstance(error, IntegrityError | ProgrammingError)
    return found or (isinstance(error, OperationalError) and "already exists" in str(error))
