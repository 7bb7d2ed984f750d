"""Replies that Flower's SuperNode would keep to itself.

flwr 1.41 sends replies only right after it received a message: it waits for a reply, any reply, and looks for the next
message. Where two messages were under way, because the centre lost its ServerApp and asked again, the reply to the
second one stays in memory until the centre asks a third time, which it never does.
"""

from collections.abc import Callable
from typing import Any

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


def _has_reply(state: Any) -> bool:
    # Flower's own look at its messages marks them as taken.
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(not entry.is_retrieved and entry.message.metadata.reply_to_message_id for entry in entries)
