"""Flower's SuperNode on a line that breaks: nothing that was under way is lost.

Flower sends a call again when it failed, but flwr 1.41 loses a site or its round in five places:

- An error whose text holds "ssl" counts as a bad certificate and ends the call for good. A connection that ends during
  the TLS handshake or in the middle of an upload reads "EOF occurred in violation of protocol (_ssl.c:...)".
- A tensor that arrived while its receipt was lost is sent again, refused as not expected, and the reply is dropped.
- A message that was handed out while the line broke counts as delivered and is never handed out again.
- A message of a process that was killed counts as lost only if the centre looks while the site is offline. Flower
  forgets a dead session after 60 s, and a new one that comes in that very second leaves nothing to see.
- When the loop that asks for messages ended for good, the process stays, deaf and for ever.

``run_supernode`` is started in place of ``flower-supernode`` and mends these five. All else is Flower's own.
"""

import contextlib
import logging
import os
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import flwr.supernode.fleet_http_connection as fleet_connection
import flwr.supernode.start_client_internal as supernode
import httpx
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from icmoe.errors import ConfigError
from icmoe.flower_engine import check_flower
from icmoe_client.late_replies import give_up_torn_replies, notice_late_replies

AWAY_SECONDS = 10.0
"""How long a site that may have missed a message is offline, so that the centre notices and asks it again."""

_LINE_ERRORS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError, TimeoutError)
_NOTHING_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
logger = logging.getLogger(__name__)


def run_supernode() -> None:
    """Run ``flower-supernode`` with the arguments of this process; ``sys.argv[1]`` is the name it goes by.

    Raises:
        ConfigError: if this flwr is not the one that is mended here.
    """
    check_flower()
    mended = {"FleetHttpClient": SteadyClient, "make_simple_http_retry_invoker": make_steady_invoker}
    for name in mended:
        if not hasattr(fleet_connection, name):
            raise ConfigError(f"this flwr has no {name}: the mends of icmoe_client.steady_line do not fit it")
    vars(fleet_connection).update(mended)
    vars(supernode)["_pull_and_store_message"] = notice_late_replies(supernode._pull_and_store_message)
    vars(supernode)["_push_messages"] = give_up_torn_replies(supernode._push_messages)
    sys.argv = sys.argv[1:]
    flower_supernode()
    # It returns only when its loop has ended by itself; its own HTTP server would keep the process.
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The connection to the centre ended for good.")


def make_steady_invoker() -> RetryInvoker:
    """Flower's own way of trying again, which also tries again after a line broke within TLS."""
    invoker = make_simple_http_retry_invoker()
    gives_up = invoker.should_giveup

    def gives_up_for_good(error: Exception) -> bool:
        return not is_broken_line(error) and gives_up is not None and gives_up(error)

    invoker.should_giveup = gives_up_for_good
    return invoker


def is_broken_line(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a connection that ended or hung; a bad certificate is not."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, _LINE_ERRORS):
            return True
        found = found.__cause__ or found.__context__  # httpcore raises "from None"
    return False


class SteadyClient(FleetHttpClient):
    """Flower's client of the Fleet API, aware of answers that were lost on their way, and of an end without goodbye.

    What a call did at the centre is unknown after an error of the transport or of the gateway. While online there is a
    file ``FLWR_HOME/online``: found at the start, it is left from a process that was killed or had lost the centre.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._online = Path(os.environ["FLWR_HOME"]) / "online"
        self._activation: ActivateNodeRequest | None = None
        self._pull_is_uncertain = False
        self._is_away = False
        # Session and id of objects that may have arrived.
        self._uncertain: set[tuple[str, str]] = set()

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
        """Come online; after an end without goodbye leave once more, so that the centre asks again."""
        self._activation = request
        response = super().ActivateNode(request)
        if self._online.exists():
            self._leave_and_return(
                response.node_id, "the last connection ended without a goodbye and may have taken a message"
            )
        self._online.parent.mkdir(parents=True, exist_ok=True)
        self._online.touch()
        return response

    def DeactivateNode(self, request: DeactivateNodeRequest) -> DeactivateNodeResponse:
        """Go offline."""
        response = super().DeactivateNode(request)
        self._online.unlink(missing_ok=True)
        return response

    def SendNodeHeartbeat(self, request: SendNodeHeartbeatRequest) -> SendNodeHeartbeatResponse:
        """Say that we are here, unless we mean to be away: it would bring us back."""
        return SendNodeHeartbeatResponse(success=True) if self._is_away else super().SendNodeHeartbeat(request)

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        """Send an object; one that had arrived already counts as sent."""
        key = (request.session_id, request.object_id)
        try:
            response = super().PushObject(request)
        except httpx.HTTPError:
            self._uncertain.add(key)
            raise
        if not response.stored and key in self._uncertain:
            logger.warning("an object had arrived already, only its receipt was lost")
            response.stored = True
        return response

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:
        """Ask for a message. Where an answer was lost and none comes now, let the centre ask again."""
        try:
            response = super().PullMessages(request)
        except _NOTHING_SENT:
            raise
        except httpx.HTTPError:
            self._pull_is_uncertain = True
            raise
        if self._pull_is_uncertain:
            if not response.messages_list:
                self._leave_and_return(request.node.node_id, "the line broke while the centre may have asked something")
            self._pull_is_uncertain = False
        return response

    def _leave_and_return(self, node_id: int, reason: str) -> None:
        """Go offline for a moment: the centre then gives up what it believes to be with us, and asks again."""
        if self._activation is None:
            return
        logger.warning("%s; offline for %.0f s", reason, AWAY_SECONDS)
        self._is_away = True
        try:
            # Refused if we are so already, as the answer to an earlier try was lost.
            with contextlib.suppress(httpx.HTTPStatusError):
                super().DeactivateNode(DeactivateNodeRequest(node_id=node_id))
            time.sleep(AWAY_SECONDS)
            with contextlib.suppress(httpx.HTTPStatusError):
                super().ActivateNode(self._activation)
        finally:
            self._is_away = False
