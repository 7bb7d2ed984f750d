"""The centre's processes: kept alive, each started again after a pause that grows while it keeps dying."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from icmoe.processes import Child
from icmoe_server.operator.messages import ChildInfo

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
STEADY_SECONDS = 60.0
"""After this time alive a process counts as well again, and its next pause is the first one."""

logger = logging.getLogger(__name__)


class Kept:
    """A process that is started again whenever it ends.

    Args:
        name: for people and for its log.
        command: gives program and arguments.
        environment: of the process, whole.
        log: its log file.
    """

    def __init__(
        self, name: str, command: Callable[[], Sequence[str]], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.restarts = 0
        self._command = command
        self._environment = environment
        self._log = log
        self._pause = FIRST_PAUSE
        self._not_before = 0.0
        self._child: Child | None = None

    def start(self) -> None:
        """Start it."""
        self._child = Child(self.name, self._command(), environment=self._environment, log=self._log)

    def keep(self) -> bool:
        """Start it again if it ended and its pause is over; whether it was."""
        if self._child is None or self._child.exit_code is None:
            return False
        if not self._not_before:
            if self._child.seconds_alive > STEADY_SECONDS:
                self._pause = FIRST_PAUSE
            self._not_before = time.monotonic() + self._pause
            last = next((line for line in reversed(self._child.last_lines) if line.strip()), "no output")
            logger.warning(
                "%s ended with code %s (%s); started again in %.1f s",
                *(self.name, self._child.exit_code, last, self._pause),
            )
            self._pause = min(LONGEST_PAUSE, self._pause * 2)
        if time.monotonic() < self._not_before:
            return False
        self._child.end()
        self._not_before = 0.0
        self.restarts += 1
        self.start()
        return True

    def end(self) -> None:
        """End it for good."""
        if self._child is not None:
            self._child.end()

    @property
    def info(self) -> ChildInfo:
        """For operators."""
        child = self._child
        running = child is not None and child.exit_code is None
        return ChildInfo(
            name=self.name,
            pid=child.pid if child is not None and running else None,
            state="running" if running else "restarting",
            restarts=self.restarts,
        )
