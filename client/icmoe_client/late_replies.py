"""Replies that Flower's SuperNode would keep to itself, or wait for in vain.

flwr 1.41 sends replies only right after it received a message: it waits for a reply, any reply, and looks for the next
message. Where two messages were under way, because the centre lost its ServerApp and asked again, the reply to the
second one stays in memory until the centre asks a third time, which it never does.

A ClientApp hands a reply over piece by piece. Where it dies before the last one, the SuperNode waits for that for ever.
"""

import time
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

PATIENCE = 30.0
"""Seconds for the next piece of a reply, which a process of this machine holds in memory."""

_ANY_RUN = 0


def notice_late_replies(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Let the SuperNode's loop go on to sending whenever a reply is ready.

    Args:
        pull: Flower's ``_pull_and_store_message``: the run of the message that came, ``None`` if none did.

    Returns:
        The same, but never ``None`` while a reply waits to be sent.
    """

    def pull_or_notice(*, state: Any, **arguments: Any) -> int | None:
        run_id = pull(state=state, **arguments)
        return _ANY_RUN if run_id is None and _has_reply(state) else run_id

    return pull_or_notice


def send_whole_replies(push: Callable[..., None]) -> Callable[..., None]:
    """Let the SuperNode announce a reply to the centre only when all of it is here.

    Args:
        push: Flower's ``_push_messages``, which catches and notes what goes wrong with a reply.

    Returns:
        The same. Where a ClientApp died with its reply half handed over, the centre gets Flower's own error for that
        within ``PATIENCE`` seconds, and asks again.
    """

    def push_whole(*, state: Any, object_store: Any, send: Callable[..., Any], **arguments: Any) -> None:
        def send_whole(message: Message, tree: ObjectTree, duration: float) -> Any:
            if not _is_whole(object_store, tree):
                state.delete_messages(message_ids=[message.metadata.message_id])
                state._store_error_replies({message.metadata.run_id}, CLIENT_APP_CRASHED_ERROR)
                raise TimeoutError("its ClientApp died before it had handed over the whole reply")
            return send(message, tree, duration)

        push(state=state, object_store=object_store, send=send_whole, **arguments)

    return push_whole


def _is_whole(object_store: Any, tree: ObjectTree) -> bool:
    """Wait until every object of a reply has come; whether they did."""
    wanted = {node.object_id for node in iterate_object_tree(tree)}
    ends = time.monotonic() + PATIENCE
    while missing := {name for name in wanted if object_store.get(name) == b""}:
        if missing != wanted:
            wanted, ends = missing, time.monotonic() + PATIENCE
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


def _has_reply(state: Any) -> bool:
    # Flower's own look at its messages marks them as taken.
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(not entry.is_retrieved and entry.message.metadata.reply_to_message_id for entry in entries)
