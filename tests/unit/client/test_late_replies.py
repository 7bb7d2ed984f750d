"""A reply that became ready after the SuperNode had stopped waiting is sent; one that never gets whole is not."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from icmoe_client import late_replies
from icmoe_client.late_replies import notice_late_replies, send_whole_replies

Pull = Callable[..., int | None]


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> NodeState:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()


def store(state: NodeState, message: Message, name: str) -> None:
    message.metadata.__dict__["_message_id"] = name
    state.store_message(message)


def test_without_a_reply_nothing_changes(state: NodeState) -> None:
    answers: list[int | None] = [7, None]
    pull = notice_late_replies(lambda **arguments: answers.pop(0))
    assert pull(state=state, other=1) == 7
    assert pull(state=state) is None
    store(state, Message(RecordDict(), dst_node_id=1, message_type="train"), "asked")
    assert notice_late_replies(lambda **arguments: None)(state=state) is None


def test_a_waiting_reply_is_noticed_and_left_where_it_is(state: NodeState) -> None:
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = "asked"
    store(state, Message(RecordDict(), reply_to=asked), "reply")
    pull: Any = notice_late_replies(lambda **arguments: None)
    assert pull(state=state) is not None
    assert [found.metadata.message_id for found in state.get_messages_legacy(is_reply=True)] == ["reply"]
    assert pull(state=state) is None


@pytest.fixture
def torn(state: NodeState) -> Message:
    """A reply that a ClientApp has announced; its pieces are not there."""
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    store(state, asked, "asked")
    state.get_messages_legacy(is_reply=False)
    state.record_message_processing_start("asked")
    announced = Message(RecordDict({"about": ConfigRecord({"site": "a"})}), reply_to=asked)
    store(state, announced, announced.object_id)
    return announced


@pytest.mark.parametrize("comes", [True, False])
def test_a_reply_is_announced_when_whole_and_otherwise_an_error_for_which_the_centre_asks_again(
    state: NodeState, torn: Message, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own sending, with a ClientApp that dies right after it has announced its reply, or is only slow."""
    monkeypatch.setattr(late_replies, "PATIENCE", 30.0 if comes else 0.2)
    objects = state.object_store
    pieces = objects.preregister(1, get_object_tree(torn))
    announced: list[Message] = []
    pushed: list[str] = []

    def send(message: Message, *_: object) -> tuple[set[str], str]:
        announced.append(message)
        return set(pieces) if message is torn else set(), "session"

    def hand_over() -> None:
        time.sleep(0.3)
        for name, piece in get_all_nested_objects(torn).items():
            objects.put(name, piece.deflate())

    push: Any = send_whole_replies(start_client_internal._push_messages)
    arguments: dict[str, Any] = {"state": state, "object_store": objects, "send": send}
    arguments["push_object"] = lambda *told: pushed.append(told[2])
    client_app = threading.Thread(target=hand_over if comes else lambda: None)
    client_app.start()
    push(**arguments)
    client_app.join()
    if comes:
        assert announced == [torn]
        assert set(pushed) == set(pieces)
        return
    assert announced == []
    push(**arguments)
    assert [(message.error.code, message.metadata.reply_to_message_id) for message in announced] == [(8, "asked")]
