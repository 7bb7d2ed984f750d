"""Everything that hospitals send, read off the line: a TLS proxy with the centre's own key writes down each request."""

import asyncio
import contextlib
import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import h11
from flwr.app import Message
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import Message as Protobuf
from google.protobuf.unknown_fields import UnknownFieldSet

CALLS: dict[str, Callable[[], Protobuf]] = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "get-fab": GetFabRequest,
    "get-run": run_pb2.GetRunRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "push-object": message_pb2.PushObjectRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
}
"""What a hospital asks of the centre, with the type of its body."""


@dataclass(frozen=True)
class Request:
    """One HTTP request of a hospital."""

    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Sent:
    """What the bodies of all requests hold.

    Attributes:
        messages: replies, put together from the objects that were sent for them.
        errors: texts of replies that are errors.
        num_unused: objects that belong to none of the messages.
    """

    messages: list[Message]
    errors: list[str]
    num_unused: int


@dataclass
class Wiretap:
    """Stands between hospitals and the centre.

    Args:
        centre: its address.
        listen: with the centre's key and certificate.
        trust: the centre's authority.
    """

    centre: tuple[str, int]
    listen: ssl.SSLContext
    trust: ssl.SSLContext
    port: int = 0
    _heard: list[bytearray] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> "Wiretap":
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(listening)))
        self._thread.start()
        assert listening.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, listening: threading.Event) -> None:
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._carry_both, "127.0.0.1", 0, ssl=self.listen)
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        await self._done.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            inward, outward = await asyncio.open_connection(*self.centre, ssl=self.trust)
            self._heard.append(heard := bytearray())
            await asyncio.gather(_carry(reader, outward, heard), _carry(inward, writer, None))
        writer.close()

    def requests(self) -> Iterator[Request]:
        """All requests so far that were sent to their end, in the order of their connections."""
        for heard in self._heard:
            yield from _parse(bytes(heard))


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, heard: bytearray | None) -> None:
    try:
        while data := await source.read(65536):
            if heard is not None:
                heard += data
            target.write(data)
            await target.drain()
    finally:
        target.close()


def _parse(stream: bytes) -> Iterator[Request]:
    """The requests of one connection."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(stream)
    while isinstance(head := connection.next_event(), h11.Request):
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
        if not isinstance(event, h11.EndOfMessage):
            return
        yield Request(head.target.decode(), {name.decode(): value.decode() for name, value in head.headers}, body)
        connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()


def read(requests: Iterator[Request]) -> Sent:
    """Understand every request, or fail: an unknown call, field or object is something nobody has looked at."""
    messages: list[message_pb2.Message] = []
    trees: dict[str, Any] = {}
    objects: dict[str, bytes] = {}
    for request in requests:
        if request.target == "/health":
            assert request.body == b""
            continue
        body: Any = CALLS[request.target.removeprefix("/v1/fleet/")]()
        body.ParseFromString(request.body)
        assert len(UnknownFieldSet(body)) == 0
        if isinstance(body, fleet_pb2.PushMessagesRequest):
            messages += body.messages_list
            trees |= {tree.object_id: tree for tree in body.message_object_trees}
        if isinstance(body, message_pb2.PushObjectRequest):
            assert hashlib.sha256(body.object_content).hexdigest() == body.object_id
            objects[body.object_id] = body.object_content
    used = {one.object_id for tree in trees.values() for one in iterate_object_tree(tree)}
    found: list[Message] = []
    for message in messages:
        # Its content travels as objects.
        assert message.content.ByteSize() == 0
        inflated = inflate_object_from_contents(message.metadata.message_id, objects, keep_object_contents=True)
        assert isinstance(inflated, Message)
        found.append(inflated)
    return Sent(
        messages=[message for message in found if not message.has_error()],
        errors=[message.error.reason or "" for message in found if message.has_error()],
        num_unused=len(set(objects) - used),
    )
