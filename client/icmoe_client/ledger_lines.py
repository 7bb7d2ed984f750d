"""The file below the privacy ledger: lines that can only be added, each chained to the one before by its sha256.

One sqlite file. Triggers forbid changes, the chain shows them, and the table's own counter shows a cut tail. None of
this stops somebody who rewrites the whole file or puts an old copy back: for that the centre countersigns the epsilon.
"""

import hashlib
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icmoe.errors import PrivacyError

START = "0" * 64
"""What the first line is chained to."""
_APPLICATION = 0x1C40E1ED
_PATIENCE = 60.0
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
CREATE TABLE lines (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    content TEXT NOT NULL,
    sha256 TEXT NOT NULL
);
CREATE TRIGGER no_update BEFORE UPDATE ON lines BEGIN SELECT RAISE(ABORT, 'lines are only added'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON lines BEGIN SELECT RAISE(ABORT, 'lines are only added'); END;
"""
_REASONS = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "it may not be written to",
    "SQLITE_PERM": "it may not be written to",
    "SQLITE_CANTOPEN": "its file or folder cannot be opened",
    "SQLITE_BUSY": "another program holds it",
}
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A line as stored.

    Attributes:
        number: from 1, without a gap.
        content: what it says.
        sha256: of the one before and this content.
    """

    number: int
    content: Mapping[str, Any]
    sha256: str


def make_file(path: Path) -> None:
    """Make an empty file of lines, complete or not at all; leave one that is there alone.

    An empty file in its place is therefore always a damaged one, never a new one.

    Raises:
        PrivacyError: if it cannot be made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with _explained(path, "made"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with closing(sqlite3.connect(temporary)) as connection:
                connection.executescript(_SCHEMA)
            path.hardlink_to(temporary)
        except FileExistsError:
            logger.info("another process made the ledger at the same moment")
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Read one state of the file; what others write meanwhile is not seen.

    Raises:
        PrivacyError: if it cannot be read, or its lines are damaged.
    """
    with _explained(path, "read"), closing(_connect(path)) as connection:
        connection.execute("BEGIN")
        yield connection


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """Be the only writer while the block lasts. At its end all that was added is on the disk; after an error, nothing.

    Raises:
        PrivacyError: if it cannot be written.
    """
    with _explained(path, "written"), closing(_connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def read_lines(connection: sqlite3.Connection) -> tuple[Line, ...]:
    """All lines, in order.

    Raises:
        PrivacyError: if any was changed, removed, added or moved by other hands.
    """
    _check_shape(connection)
    lines: list[Line] = []
    head = START
    for number, content, digest in connection.execute("SELECT number, content, sha256 FROM lines ORDER BY number"):
        if number != len(lines) + 1:
            raise _damaged(f"line {len(lines) + 1} is missing")
        if not isinstance(content, str) or digest != _chained(head, content):
            raise _damaged(f"line {number} is not the one that was written")
        head = digest
        lines.append(Line(number, json.loads(content), digest))
    counted = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'lines'").fetchone()
    if (counted[0] if counted else 0) != len(lines):
        raise _damaged(f"lines after line {len(lines)} are missing")
    return tuple(lines)


def add_line(connection: sqlite3.Connection, lines: tuple[Line, ...], content: Mapping[str, Any]) -> tuple[Line, ...]:
    """Add a line to those that ``read_lines`` gave inside the same ``writing`` block."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = _chained(lines[-1].sha256 if lines else START, text)
    number = len(lines) + 1
    connection.execute("INSERT INTO lines (number, content, sha256) VALUES (?, ?, ?)", (number, text, digest))
    return (*lines, Line(number, json.loads(text), digest))


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: a ledger that vanished must not come back empty.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_PATIENCE, isolation_level=None
    )
    # EXTRA also syncs the folder once the journal is gone, else a power cut could take back a finished booking.
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


def _check_shape(connection: sqlite3.Connection) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    triggers = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").fetchone()[0]
    if application != _APPLICATION or triggers != 2:
        raise _damaged("its file is not as this program makes it")
    found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise _damaged("its file is broken")


def _chained(head: str, content: str) -> str:
    return hashlib.sha256(f"{head}\n{content}".encode()).hexdigest()


def _damaged(what: str) -> PrivacyError:
    return PrivacyError(
        f"the site's privacy ledger is damaged: {what}. Nothing was booked and nothing trained. Put back the latest "
        "backup, then confirm the epsilon that was reached with 'icmoe-fl privacy confirm'."
    )


@contextmanager
def _explained(path: Path, verb: str) -> Iterator[None]:
    """Turn what sqlite and the system say into words; these may go to the centre, so the path goes to the log only."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        logger.error("ledger %s: %s (%s)", path, error, name)
        if name.startswith(_DAMAGED) or isinstance(error, sqlite3.IntegrityError):
            raise _damaged("its file is broken") from error
        why = next((text for start, text in _REASONS.items() if name.startswith(start)), "the disk reports an error")
        raise _unusable(verb, why) from error
    except UnicodeDecodeError as error:
        # Of sqlite's own messages: they quote the file.
        logger.error("ledger %s: %s", path, error)
        raise _damaged("its file is broken") from error
    except OSError as error:
        logger.error("ledger %s: %s", path, error)
        raise _unusable(verb, error.strerror or "the system reports an error") from error


def _unusable(verb: str, why: str) -> PrivacyError:
    return PrivacyError(
        f"the site's privacy ledger cannot be {verb}: {why}. Nothing was booked and nothing trained. The site's log "
        "names the file; repair that and try again."
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
