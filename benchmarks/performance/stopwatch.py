"""Wall and CPU seconds of a piece of work, and a process of its own for what must not inherit anything.

On a shared machine wall seconds mean little alone: CPU seconds stand beside them, and what is compared is measured in
one run.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
T = TypeVar("T")
Figures = dict[str, Any]
"""What a part measured, in a form that JSON can hold."""


@dataclass(frozen=True)
class Cost:
    """Seconds of wall time, and of CPU time over all threads."""

    wall: float
    cpu: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall - other.wall, self.cpu - other.cpu)

    def per(self, count: int) -> "Cost":
        """Share of one among ``count``."""
        return Cost(self.wall / count, self.cpu / count)

    def figures(self) -> Figures:
        """For the results file."""
        return asdict(self)


def now() -> Cost:
    """Clocks of this process; the difference of two is a cost."""
    return Cost(time.perf_counter(), time.process_time())


def now_with_children() -> Cost:
    """The same with the CPU seconds of all living descendants."""
    cpu = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        cpu += times.user + times.system
    return Cost(time.perf_counter(), cpu)


def timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[Cost, T]:
    """Cost and result of a call."""
    start = now()
    result = work(*args, **kwargs)
    return now() - start, result


def middle(costs: Sequence[Cost]) -> Cost:
    """Median of wall and of CPU seconds."""
    return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


def in_fresh_process(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module's function in a new Python process, which ends with it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()
