"""Answers operators from the files of the run and the supervisor's list of processes."""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.messages import ChildInfo, round_message, status_message
from icmoe_server.operator.operator_pb2_grpc import OperatorServicer
from icmoe_server.operator.run_files import AFTER_ROUND, NOW, RunFiles

ENDED = frozenset({"finished", "stopped", "failed"})
"""States after which a run says no more."""
RUNNING = "running"
MAX_WATCHERS = 16
"""Each watcher keeps a thread of the server; more are refused, so that Status and Stop always find a free one."""

_WORDS = {pb.AFTER_ROUND: AFTER_ROUND, pb.NOW: NOW}
_VALUES = {word: value for value, word in _WORDS.items()}

logger = logging.getLogger(__name__)


class OperatorService(OperatorServicer):
    """Serves one run.

    Args:
        run_dir: of the run; may not exist yet.
        children: gives the processes of the centre as they are now; called from any thread, must not block.
        poll_seconds: how often watchers look at the files.
    """

    def __init__(
        self, run_dir: Path, children: Callable[[], Sequence[ChildInfo]], *, poll_seconds: float = 0.5
    ) -> None:
        self._files = RunFiles(run_dir)
        self._children = children
        self._poll_seconds = poll_seconds
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)

    def healthy(self) -> bool:
        """All processes of the centre run."""
        return all(child.state == RUNNING for child in self._children())

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.RunStatus:
        """How the run stands now."""
        return self._status()

    def WatchRounds(self, request: pb.WatchRoundsRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        """The rounds so far, the status, then both as they change, until the run ends or the caller leaves."""
        if not self._watchers.acquire(blocking=False):
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} operators watch already; close one of them first"
            )
        gone = threading.Event()
        try:
            if context.add_callback(gone.set):
                yield from self._events(gone)
        finally:
            self._watchers.release()

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.StopReply:
        """Ask the run to end."""
        status = self._status()
        if request.when not in _WORDS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "say when: AFTER_ROUND or NOW")
        if status.state in ENDED:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"the run {status.run} has ended already: {status.state}"
            )
        try:
            asked = self._files.ask_stop(_WORDS[request.when])
        except OSError as error:
            context.abort(grpc.StatusCode.INTERNAL, f"the centre cannot write the request down: {error}")
        logger.warning("an operator asked the run %s to stop: %s", status.run, asked)
        return pb.StopReply(when=_VALUES[asked], round=status.round)

    def _status(self) -> pb.RunStatus:
        files = self._files
        return status_message(files.run_dir.name, files.status(), self._children(), stop_asked=files.stop_asked())

    def _events(self, gone: threading.Event) -> Iterator[pb.Event]:
        sent: dict[tuple[Any, bool], str] = {}
        last: pb.RunStatus | None = None
        while not gone.is_set():
            # The status first: a run writes its last line before it says that it ended.
            status = self._status()
            for record in self._files.rounds():
                key, content = (record.get("round"), bool(record.get("evaluate_only"))), json.dumps(record)
                if sent.get(key) != content:
                    sent[key] = content
                    yield pb.Event(round=round_message(record))
            if status != last:
                last = status
                yield pb.Event(status=status)
            if status.state in ENDED:
                return
            gone.wait(self._poll_seconds)
