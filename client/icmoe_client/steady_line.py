"""Flower's SuperNode on a line that breaks: nothing that was under way is lost.

Flower sends a call again when it failed, but flwr 1.41 loses a site or its round in four places:

- An error whose text holds "ssl" counts as a bad certificate and ends the call for good. A connection that ends during
  the TLS handshake or in the middle of an upload reads "EOF occurred in violation of protocol (_ssl.c:...)".
- A tensor that arrived while its receipt was lost is sent again, refused as not expected, and the reply is dropped.
- A message that was handed out while the line broke counts as delivered and is never handed out again.
- When the loop that asks for messages ended for good, the process stays, deaf and for ever.

``run_supernode`` is started in place of ``flower-supernode`` and mends these four, and what ``late_replies`` names. It
also keeps to itself how long each training took, which Flower would tell the centre. All else is Flower's own.
"""

import contextlib
import logging
import ssl
import sys
from collections.abc import Iterator
from typing import Any

import flwr.supernode.fleet_http_connection as fleet_connection
import flwr.supernode.start_client_internal as supernode
import httpx
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from icmoe.errors import ConfigError
from icmoe.flower_engine import check_flower
from icmoe_client.late_replies import notice_late_replies, send_whole_replies

_LINE_ERRORS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError, TimeoutError)
_NOTHING_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
logger = logging.getLogger(__name__)


def run_supernode() -> None:
    """Run ``flower-supernode`` with the arguments of this process; ``sys.argv[1]`` is the name it goes by.

    Raises:
        ConfigError: if this flwr is not the one that is mended here.
    """
    check_flower()
    line = {"FleetHttpClient": SteadyClient, "make_simple_http_retry_invoker": make_steady_invoker}
    loop = {"_pull_and_store_message": notice_late_replies, "_push_messages": send_whole_replies}
    for module, names in ((fleet_connection, line), (supernode, loop)):
        for name in names:
            if not hasattr(module, name):
                raise ConfigError(f"this flwr has no {name}: the mends of icmoe_client do not fit it")
    vars(fleet_connection).update(line)
    vars(supernode).update({name: mend(getattr(supernode, name)) for name, mend in loop.items()})
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
    """Flower's client of the Fleet API, aware of answers that were lost on their way.

    What a call did at the centre is unknown after an error of the transport or of the gateway.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._activation: ActivateNodeRequest | None = None
        self._pull_is_uncertain = False
        # Session and id of objects that may have arrived.
        self._uncertain: set[tuple[str, str]] = set()

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
        """Come online."""
        self._activation = request
        return super().ActivateNode(request)

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

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:
        """Announce replies, without the exact time that each took: it tells of the data."""
        request.clientapp_runtime_list[:] = [0.0] * len(request.clientapp_runtime_list)
        return super().PushMessages(request)

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
                self._leave_and_return(request.node.node_id)
            self._pull_is_uncertain = False
        return response

    def _leave_and_return(self, node_id: int) -> None:
        """Connect anew: the centre's roll-call notices, gives up what it believes to be with us, and asks again."""
        if self._activation is None:
            return
        logger.warning("the line broke while the centre may have asked something; connecting anew")
        with _refusal_is_fine():
            self.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        with _refusal_is_fine():
            self.ActivateNode(self._activation)


@contextlib.contextmanager
def _refusal_is_fine() -> Iterator[None]:
    """The centre says no where we are so already, as the answer to an earlier try was lost; a failure says nothing."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error:
            raise
