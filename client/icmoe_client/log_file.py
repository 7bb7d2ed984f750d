"""A file of lines that are on disk when they are said to be, whatever dies when. It knows nothing of what they mean."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icmoe.errors import RunError
from icmoe.locks import hold

PATIENCE = 30.0
"""Seconds for another process of the site that writes."""


class LogFile:
    """Whole lines, and at its end perhaps the part of one that a killed process left.

    Args:
        path: of the file; only its owner may read it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def last_line(self, *, at_most: int) -> bytes | None:
        """The last whole line without its newline; ``None`` if there is none in the last ``at_most`` bytes."""
        lines = self._read(at_most).split(b"\n")[:-1]
        return lines[-1] if lines else None

    def torn_line(self, *, at_most: int) -> bytes:
        """What follows the last newline, empty in a whole file; of a longer one only the last ``at_most`` bytes."""
        return self._read(at_most).split(b"\n")[-1]

    def lines(self) -> list[bytes]:
        """All lines, the torn one included."""
        return self._read(None).split(b"\n")

    def append(self, line: str) -> None:
        """Add a line; it is on disk when this returns.

        Raises:
            RunError: if it cannot be written.
        """
        is_new = not self._path.exists()
        try:
            with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
                file.write(line.encode("ascii") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                self._sync_folder()
        except OSError as error:
            raise self._unusable("write", error) from error

    def replace_torn_line(self, line: str) -> None:
        """Put a whole line in the place of the torn one, in one step: a kill leaves the old file or the new one.

        Raises:
            RunError: if it cannot be written.
        """
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        kept = self._read(None)
        try:
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(kept[: kept.rfind(b"\n") + 1] + line.encode("ascii") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            self._sync_folder()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unusable("write", error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one process that writes while the block lasts.

        Raises:
            ConfigError: if another one holds it for too long.
        """
        busy = f"another process of this site holds {self._path.name}; end it, then try again"
        with hold(self._path.with_name(f".{self._path.name}.lock"), otherwise=busy, patience=PATIENCE):
            yield

    def _read(self, at_most: int | None) -> bytes:
        """The whole file, or its last bytes; nothing of a file that is not there."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0 if at_most is None else max(0, size - at_most))
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._unusable("read", error) from error

    def _sync_folder(self) -> None:
        """Make a new name in the folder outlive a power cut."""
        handle = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _unusable(self, verb: str, error: OSError) -> RunError:
        return RunError(
            f"cannot {verb} {self._path}: {error.strerror}. Nothing was sent; free some space, or see who may use it."
        )
