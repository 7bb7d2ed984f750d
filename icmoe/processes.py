"""Child processes that must not outlive us: started, watched, logged, ended."""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_LOG_BYTES, NUM_OLD_LOGS = 10_000_000, 5
PATIENCE = 20.0
"""Seconds a process has for ending in order."""
_PR_SET_PDEATHSIG = 1


class Child:
    """A process with its own log, in a process group of its own, killed by the kernel when we die.

    Must be started from the main thread: the kernel ties the child's life to the thread that started it.

    Args:
        name: for people and for the log's name.
        command: program and arguments.
        environment: of the process, whole.
        log: file its output goes to; rotated.
        on_line: called with each line, from another thread.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = name
        self._on_line = on_line
        self.last_lines: deque[str] = deque(maxlen=30)
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True, name=f"log of {name}")
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs."""
        return self._process.poll()

    @property
    def seconds_alive(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; the exit code, or ``None`` if it still runs."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(2.0)
        return code

    def end(self, *, patience: float = PATIENCE) -> None:
        """Ask it to end, then kill it and what it started."""
        if self.exit_code is None:
            self._process.terminate()
            self.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(5.0)

    def _read(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=NUM_OLD_LOGS, encoding="utf-8")
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                text = line.rstrip("\n")
                self.last_lines.append(text)
                # A full disk must not stop the reading: the process would block on its output.
                handler.emit(logging.makeLogRecord({"msg": text}))
                self._on_line(text)
        handler.close()


@contextlib.contextmanager
def told_to_end(end: Callable[[], None]) -> Iterator[None]:
    """Call ``end`` on SIGTERM and on Ctrl-C; the loop inside finishes in order."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: end()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
