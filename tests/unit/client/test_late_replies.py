"""A reply that became ready after the SuperNode had stopped waiting is sent; one that never gets whole is not."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from icmoe_client import late_replies
from icmoe_client.late_replies import give_up_torn_replies, notice_late_replies

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


def test_a_reply_whose_pieces_never_come_is_given_up(state: NodeState, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own sending, with a ClientApp that died right after it had announced its reply."""
    monkeypatch.setattr(late_replies, "PATIENCE", 0.0)
    asked = Message(RecordDict(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = "asked"
    torn = Message(RecordDict({"about": ConfigRecord({"site": "a"})}), reply_to=asked)
    store(state, torn, torn.object_id)
    objects = ObjectStoreFactory().store()
    pieces = objects.preregister(1, get_object_tree(torn))
    sent: list[str] = []
    push: Any = give_up_torn_replies(start_client_internal._push_messages)
    push(
        state=state,
        object_store=objects,
        send=lambda *_: (set(pieces), "session"),
        push_object=lambda *arguments: sent.append(arguments[2]),
    )
    assert sent == []
    assert state.get_messages_legacy(is_reply=True) == []
    assert torn.object_id not in objects
