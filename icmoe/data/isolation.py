"""Work on many files in processes of their own: one that dies or hangs costs its file, not the run."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from icmoe.errors import RunError

SECONDS_PER_ITEM = 600.0
MAX_LOST_IN_A_ROW = 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lost:
    """An item without a result, and why."""

    reason: str


@dataclass
class _Worker(Generic[Item]):
    process: BaseProcess
    connection: "Connection[Any, Any]"
    waiting: deque[tuple[int, Item]] = field(default_factory=deque)
    since: float = 0.0


def run_isolated(
    work: Callable[[Item], Result],
    chunks: Sequence[Sequence[tuple[int, Item]]],
    *,
    num_workers: int,
    seconds_per_item: float = SECONDS_PER_ITEM,
) -> Iterator[tuple[int, Result | Lost]]:
    """Apply a function to numbered items; results come as they are ready.

    A worker holds one chunk at a time and answers item by item, so that memory stays bounded and the item that ended a
    worker is known.

    Args:
        work: a function at the top of a module, or a partial of one.
        chunks: items that one process should see one after the other.
        num_workers: processes at most.
        seconds_per_item: after which an item counts as lost and its process is ended.

    Yields:
        The item's number with its result, or with ``Lost``.

    Raises:
        RunError: if twenty items in a row end their process, which means that processes cannot work here at all.
    """
    pending = deque(deque(chunk) for chunk in chunks if chunk)
    workers: list[_Worker[Item]] = []
    lost_in_a_row = 0
    try:
        while pending or any(worker.waiting for worker in workers):
            _give_work(workers, pending, work=work, num_workers=num_workers)
            for worker in _ready(workers, seconds_per_item):
                index, result = _receive(worker, seconds_per_item)
                worker.waiting.popleft()
                worker.since = time.monotonic()
                yield index, result
                lost_in_a_row = 0 if worker.process.is_alive() else lost_in_a_row + 1
                if lost_in_a_row > MAX_LOST_IN_A_ROW:
                    raise RunError(
                        f"{lost_in_a_row} files in a row ended the process that read them. Look for too little memory, "
                        "and take fewer --workers."
                    )
                if lost_in_a_row:
                    workers.remove(worker)
                    pending.extendleft([worker.waiting] if worker.waiting else [])
    finally:
        for worker in workers:
            _end(worker)


def _give_work(
    workers: list[_Worker[Item]],
    pending: deque[deque[tuple[int, Item]]],
    *,
    work: Callable[[Item], Any],
    num_workers: int,
) -> None:
    for worker in [*workers]:
        # Death between two chunks, such as by the system's memory limit, costs nothing.
        if not worker.waiting and not worker.process.is_alive():
            workers.remove(worker)
    while pending and len(workers) < num_workers and all(worker.waiting for worker in workers):
        workers.append(_start(work))
        _send(workers[-1], pending.popleft())
    for worker in workers:
        if pending and not worker.waiting:
            _send(worker, pending.popleft())


def _send(worker: _Worker[Item], chunk: deque[tuple[int, Item]]) -> None:
    worker.waiting = chunk
    worker.since = time.monotonic()
    # If it has died since, its first item is reported as lost.
    with suppress(OSError):
        worker.connection.send(list(chunk))


def _start(work: Callable[[Item], Any]) -> _Worker[Item]:
    # A server that has the readers loaded forks quickly, and has no threads that a fork could leave in a bad state.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["icmoe.data.check_opening"])
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work), daemon=True)  # type: ignore[attr-defined]
    process.start()
    there.close()
    return _Worker(process, here)


def _serve(connection: "Connection[Any, Any]", work: Callable[[Any], Any]) -> None:
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Codecs written in C complain there of files that are reported in our own words.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    with suppress(EOFError, OSError):
        while True:
            for index, item in connection.recv():
                try:
                    result = work(item)
                # A fault of ours with one file must not cost the others either.
                except Exception as error:
                    result = Lost(f"reading it failed with {type(error).__name__}: {error}")
                connection.send((index, result))


def _ready(workers: Sequence[_Worker[Item]], seconds_per_item: float) -> list[_Worker[Item]]:
    """Workers that answered, died or took too long."""
    busy = {worker.connection: worker for worker in workers if worker.waiting}
    oldest = min(worker.since for worker in busy.values())
    answered = wait(list(busy), timeout=max(0.0, oldest + seconds_per_item - time.monotonic()))
    if answered:
        return [worker for connection, worker in busy.items() if connection in answered]
    return [worker for worker in busy.values() if time.monotonic() - worker.since >= seconds_per_item]


def _receive(worker: _Worker[Item], seconds_per_item: float) -> tuple[int, Any]:
    index, _ = worker.waiting[0]
    if not worker.connection.poll():
        _end(worker)
        return index, Lost(f"reading it took more than {seconds_per_item:g} s and was stopped.")
    try:
        answer: tuple[int, Any] = worker.connection.recv()
    except (EOFError, OSError):
        _end(worker)
        return index, Lost(f"reading it ended the process (exit code {worker.process.exitcode}).")
    return answer


def _end(worker: _Worker[Any]) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()
