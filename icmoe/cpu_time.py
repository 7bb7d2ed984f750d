"""CPU seconds of this process and everything it started, Ray's workers included."""

import threading
import time
from types import TracebackType
from typing import Self

import psutil

INTERVAL = 2.0


class CpuMeter:
    """Sum user and system time over all descendants, dead ones too.

    Ray's processes are not waited for by us, so that ``getrusage`` misses them; this samples every 2 s and keeps each
    process's last figure. What a process does in its last two seconds may be missed.
    """

    def __init__(self) -> None:
        self._start = _own_seconds()
        self._children: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self) -> float:
        """CPU seconds since the start."""
        self._sample()
        return _own_seconds() - self._start + sum(self._children.values())

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                self._children[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue


def _own_seconds() -> float:
    return time.process_time()
