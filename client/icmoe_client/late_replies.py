"""Replies that Flower's SuperNode would keep to itself, or wait for in vain.

flwr 1.41 sends replies only right after it received a message: it waits for a reply, any reply, and looks for the next
message. Where two messages were under way, because the centre lost its ServerApp and asked again, the reply to the
second one stays in memory until the centre asks a third time, which it never does.

A ClientApp hands a reply over piece by piece. Where it dies before the last one, the SuperNode waits for that for ever.
"""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 120.0
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


def give_up_torn_replies(push: Callable[..., None]) -> Callable[..., None]:
    """Let the SuperNode go on after a ClientApp died with a reply half handed over; the centre then asks again.

    Args:
        push: Flower's ``_push_messages``, which catches and notes what goes wrong with a reply.

    Returns:
        The same, but it waits ``PATIENCE`` seconds for a piece and no longer.
    """

    def push_or_give_up(*, object_store: Any, **arguments: Any) -> None:
        push(object_store=_ImpatientStore(object_store), **arguments)

    return push_or_give_up


class _ImpatientStore:
    """Flower's object store while replies are sent, for which a piece that does not come is an error."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._missing_since: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, object_id: str) -> bytes | None:
        """Content of an object, empty as long as it has not come."""
        content: bytes | None = self._store.get(object_id)
        if content == b"":
            since = self._missing_since.setdefault(object_id, time.monotonic())
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError("the ClientApp died before it had handed over its whole reply")
        return content


def _has_reply(state: Any) -> bool:
    # Flower's own look at its messages marks them as taken.
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(not entry.is_retrieved and entry.message.metadata.reply_to_message_id for entry in entries)
