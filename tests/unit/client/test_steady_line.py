"""What flwr 1.41 loses on a line that breaks, and that ours does not. Each break is one of a real connection."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import Message, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import Message as Protobuf

from icmoe_client.steady_line import SteadyClient, is_broken_line, make_steady_invoker

NODE = Node(node_id=7)


class Centre:
    """Answers calls from a script; ``None`` does the work and loses the answer."""

    def __init__(self, script: dict[str, list[Protobuf | None]]) -> None:
        self.script = script
        self.calls: list[str] = []
        self.bodies: list[bytes] = []

    @contextmanager
    def client(self, kind: type[FleetHttpClient]) -> Iterator[FleetHttpClient]:
        centre = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                centre.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                call = self.path.rsplit("/", 1)[1]
                centre.calls.append(call)
                answer = centre.script[call].pop(0)
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                body = answer.SerializeToString()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            address = f"127.0.0.1:{server.server_address[1]}"
            with closing(kind.from_server_address(address, True, None, interceptors=[])) as client:
                yield client
            server.shutdown()
            thread.join()


@pytest.fixture
def closing_port() -> Iterator[int]:
    """A port that accepts and closes at once, as a balancer does whose server is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                with connection:
                    # Closed with bytes unread it would be a reset, which Flower knows to try again.
                    connection.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def failure(call: Callable[[], object]) -> httpx.HTTPError:
    with pytest.raises(httpx.HTTPError) as caught:
        call()
    return caught.value


def test_a_connection_that_ends_in_the_handshake_is_tried_again(closing_port: int) -> None:
    error = failure(lambda: httpx.get(f"https://127.0.0.1:{closing_port}", verify=ssl.create_default_context()))
    flower, ours = make_simple_http_retry_invoker().should_giveup, make_steady_invoker().should_giveup
    assert flower is not None
    assert ours is not None
    assert is_broken_line(error)
    assert flower(error), "flwr tries again by itself now: that mend can go"
    assert not ours(error)


def test_a_server_without_tls_and_an_unknown_authority_still_end_it() -> None:
    ours = make_steady_invoker().should_giveup
    assert ours is not None
    plain = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    unknown = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    for cause in (plain, unknown):
        error = httpx.ConnectError(str(cause))
        error.__cause__ = cause
        assert not is_broken_line(error)
        assert ours(error)


def test_an_object_whose_receipt_was_lost_counts_as_sent() -> None:
    # As the SuperLink does: the object is stored, the answer lost, and the second try refused as not expected.
    centre = Centre({"push-object": [None, PushObjectResponse(stored=False)]})
    request = PushObjectRequest(node=NODE, session_id="s", object_id="o", object_content=b"x")
    with centre.client(SteadyClient) as client:
        failure(lambda: client.PushObject(request))
        assert client.PushObject(request).stored


def test_an_object_that_was_never_sent_before_is_still_refused() -> None:
    centre = Centre({"push-object": [None, PushObjectResponse(stored=False)]})
    with centre.client(SteadyClient) as client:
        failure(lambda: client.PushObject(PushObjectRequest(session_id="s", object_id="o")))
        assert not client.PushObject(PushObjectRequest(session_id="s", object_id="other")).stored


def test_a_message_that_may_be_lost_makes_the_site_connect_anew() -> None:
    centre = Centre(
        {
            "activate-node": [ActivateNodeResponse(node_id=7), ActivateNodeResponse(node_id=7)],
            "pull-messages": [None, PullMessagesResponse(), PullMessagesResponse()],
            "deactivate-node": [DeactivateNodeResponse()],
        }
    )
    with centre.client(SteadyClient) as client:
        client.ActivateNode(ActivateNodeRequest(public_key=b"k"))
        failure(lambda: client.PullMessages(PullMessagesRequest(node=NODE)))
        client.PullMessages(PullMessagesRequest(node=NODE))
        client.PullMessages(PullMessagesRequest(node=NODE))
    assert centre.calls == [
        *("activate-node", "pull-messages", "pull-messages", "deactivate-node", "activate-node", "pull-messages")
    ]


def test_a_message_that_comes_after_all_is_simply_taken() -> None:
    found = PullMessagesResponse(messages_list=[Message()])
    centre = Centre({"pull-messages": [None, found, PullMessagesResponse()]})
    with centre.client(SteadyClient) as client:
        failure(lambda: client.PullMessages(PullMessagesRequest(node=NODE)))
        assert len(client.PullMessages(PullMessagesRequest(node=NODE)).messages_list) == 1
        client.PullMessages(PullMessagesRequest(node=NODE))
    assert centre.calls == ["pull-messages"] * 3


def test_no_time_of_training_leaves() -> None:
    centre = Centre({"push-messages": [PushMessagesResponse()]})
    request = PushMessagesRequest(clientapp_runtime_list=[12.5])
    with centre.client(SteadyClient) as client:
        client.PushMessages(request)
    assert PushMessagesRequest.FromString(centre.bodies[0]).clientapp_runtime_list == [0.0]
