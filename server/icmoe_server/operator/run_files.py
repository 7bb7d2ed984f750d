"""What a run directory says about the run: ``status.json``, ``rounds.jsonl``, ``stop``.

The ServerApp, another process, replaces the first two at any time and removes the third. A file that is not there or
is cut off has nothing new to say: the last good content stands.
"""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from icmoe.checkpoint import write_text

Record = dict[str, Any]
STATUS, ROUNDS, STOP = "status.json", "rounds.jsonl", "stop"
AFTER_ROUND, NOW = "after_round", "now"

logger = logging.getLogger(__name__)


class RunFiles:
    """Files of one run; safe to read from many threads.

    Args:
        run_dir: of the run; may not exist yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, ...]] = {}
        self._status: Record = {}
        self._rounds: tuple[Record, ...] = ()

    def status(self) -> Record:
        """Last status; empty before the first."""
        with self._lock:
            text = self._changed(STATUS)
            if text is not None:
                self._status = _record(text) or self._status
            return self._status

    def rounds(self) -> tuple[Record, ...]:
        """Lines written so far; one that is cut off is left out until it is whole."""
        with self._lock:
            text = self._changed(ROUNDS)
            if text is not None:
                records = (_record(line) for line in text.splitlines())
                self._rounds = tuple(record for record in records if record is not None)
            return self._rounds

    def stop_asked(self) -> str:
        """``after_round`` or ``now`` while the run has not obeyed yet, else empty."""
        try:
            asked = (self.run_dir / STOP).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        return asked if asked in (AFTER_ROUND, NOW) else ""

    def ask_stop(self, when: str) -> str:
        """Ask the run to stop. ``now``, once asked, stands.

        Returns:
            What is asked for from here on.

        Raises:
            OSError: if it cannot be written.
        """
        if self.stop_asked() != NOW:
            write_text(self.run_dir / STOP, when)
            return when
        return NOW

    def _changed(self, name: str) -> str | None:
        """Content of a file that was replaced since the last look, else ``None``."""
        path = self.run_dir / name
        try:
            with path.open("rb") as file:
                # Of the open file: the name may belong to a newer one by now.
                about = os.fstat(file.fileno())
                signature = (about.st_ino, about.st_mtime_ns, about.st_size)
                if self._seen.get(name) == signature:
                    return None
                text = file.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read %s: %s", path, error)
            return None
        self._seen[name] = signature
        return text


def _record(text: str) -> Record | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
