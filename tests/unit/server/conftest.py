"""A federation without Ray and without torch: a grid that asks plain functions, on two small tensors."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from icmoe.checkpoint import Checkpoint, save_checkpoint
from icmoe.config import RunConfig
from icmoe.exchange import Instruction, SiteReport
from icmoe.flower import pack_report, pack_site_name, reply, unpack_instruction
from icmoe.types import Array

BACKBONE = "b" * 64
TENSORS: dict[str, Array] = {
    "experts.basic.0.up.weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "experts.adaptive.0.up.bias": np.array([-1.0, 0.5], np.float32),
    "router.gate.weight": np.array([0.25], np.float32),
}

Answer = Message | RecordDict | Exception | None


class FakeGrid(Grid):
    """Asks ``answer(site, instruction, arrays)``; what it gives becomes the reply, an exception an error, None silence.

    Replies come back in reverse order, as nobody promises another one.
    """

    def __init__(self, sites: Iterable[str], answer: Callable[[str, Instruction, dict[str, Array]], Answer]) -> None:
        self.site_of = {index * 11: site for index, site in enumerate(sites, start=1)}
        self.answer = answer
        self.asked: list[tuple[str, str, int]] = []
        self.replies: dict[str, Message] = {}
        self.offline: set[str] = set()
        self.num_connections: Counter[str] = Counter()
        self._ids = (f"message-{number}" for number in itertools.count())

    @property
    def nodes(self) -> dict[str, int]:
        return {site: node for node, site in self.site_of.items()}

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            answer = self._deliver(message)
            ids.append(message.metadata.message_id)
            if answer is not None:
                self.replies[message.metadata.message_id] = answer
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [self.replies.pop(message_id) for message_id in message_ids if message_id in self.replies]
        return list(reversed(ready))

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, site in self.site_of.items() if site not in self.offline]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=str(self.num_connections[self.site_of[node]]))
            for node in self.get_node_ids()
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message | None:
        message.metadata.__dict__["_message_id"] = next(self._ids)
        site = self.site_of[message.metadata.dst_node_id]
        if message.metadata.message_type == MessageType.QUERY:
            return reply(message, pack_site_name(site))
        instruction, arrays = unpack_instruction(message.content)
        assert (message.metadata.message_type == MessageType.TRAIN) == (instruction.job == "train")
        self.asked.append((site, instruction.job, instruction.server_round))
        answer = self.answer(site, instruction, arrays)
        if isinstance(answer, Exception):
            code = getattr(answer, "code", 100)
            failed = Message(Error(code=code, reason=str(answer)), reply_to=message)
            # As Flower does for a node that is gone: the error comes from the SuperLink.
            failed.metadata.__dict__["_src_node_id"] = 1
            return failed
        return reply(message, answer) if isinstance(answer, RecordDict) else answer


def report_of(site: str, instruction: Instruction, /, **changes: Any) -> SiteReport:
    """A good report; ``changes`` replace fields, and numbers by name."""
    numbers = {"num_examples": 4.0, "train_loss": 0.5, "dice": 0.75, "used": 4, "found": 4, "skipped": 0}
    numbers |= {"empty_masks": 0, "trainable_params": 7, "num_scored": 2}
    numbers |= changes.pop("numbers", {})
    fields: dict[str, Any] = {
        "site": site,
        "server_round": instruction.server_round,
        "config_digest": instruction.config_digest,
        "backbone_digest": BACKBONE,
        "numbers": numbers,
        "expert_shares": {"basic.0": 0.5, "adaptive.0": 0.5} if instruction.job == "train" else {},
        "dice_per_class": [0.75],
    }
    return SiteReport(**{**fields, **changes})


def moved(arrays: Mapping[str, Array], by: float) -> dict[str, Array]:
    return {name: (array + by).astype(np.float32) for name, array in arrays.items()}


def good(site: str, instruction: Instruction, arrays: dict[str, Array], /, **changes: Any) -> RecordDict:
    """What an honest site answers: it moves every tensor by a step of its own."""
    step = {"a": 0.1, "b": 0.2, "c": 0.6}.get(site, 0.3) / instruction.server_round if instruction.server_round else 0.0
    report = report_of(site, instruction, **changes)
    return pack_report(report, moved(arrays, step) if instruction.job == "train" else None)


@dataclass
class Centre:
    """A run directory and the means to fill it."""

    run_dir: Path
    sites: tuple[str, ...] = ("a", "b", "c")
    changes: dict[str, Any] = field(default_factory=dict)

    # the same for all tests, here so that they need no import of this file
    tensors = TENSORS
    backbone = BACKBONE
    good = staticmethod(good)
    report_of = staticmethod(report_of)
    moved = staticmethod(moved)

    def run(self) -> RunConfig:
        # Most tests are about sites that fail: the run goes on without them, and waits for nobody.
        lenient = {"quorum": 1, "on_missing": "continue", "round_deadline": 0.3}
        federation = {"num_rounds": 3, **lenient, **self.changes.get("federation", {})}
        content = {"task": {"name": "discs", "classes": {"disc": 1}}, **self.changes, "federation": federation}
        return RunConfig.model_validate(content)

    def start(self) -> Checkpoint:
        checkpoint = Checkpoint(0, self.run().digest(), BACKBONE, TENSORS, {})
        save_checkpoint(self.run_dir, checkpoint)
        return checkpoint

    def grid(self, answer: Callable[..., Answer] = good) -> FakeGrid:
        return FakeGrid(self.sites, answer)


@pytest.fixture(autouse=True)
def _inside_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can only be made where Flower has said which task this is."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return Centre(tmp_path / "run")
