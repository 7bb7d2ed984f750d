"""Everything that hospitals send, read off the line: a TLS proxy with the centre's own key writes down each request."""

import asyncio
import contextlib
import hashlib
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import h11
from flwr.app import Message
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import Message as Protobuf

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
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass
class Sent:
    """What the bodies of all requests hold.

    Attributes:
        messages: replies and errors by id, put together from the objects that were sent for them.
        num_unread: objects that belong to none of the messages.
        runtimes: seconds that replies claim to have taken.
    """

    messages: dict[str, Message]
    num_unread: int
    runtimes: set[float]


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

    def __post_init__(self) -> None:
        self._heard: list[bytearray] = []
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(listening)))
        self._thread.start()
        assert listening.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self, listening: threading.Event) -> None:
        server = await asyncio.start_server(self._carry_both, "127.0.0.1", 0, ssl=self.listen)
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        await self._done.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._heard.append(heard := bytearray())
        try:
            inward, outward = await asyncio.open_connection(*self.centre, ssl=self.trust)
        except OSError:
            # The centre is not up. What is said to it now has left the hospital all the same.
            with contextlib.suppress(TimeoutError, OSError):
                while data := await asyncio.wait_for(reader.read(65536), timeout=1.0):
                    heard += data
        else:
            with contextlib.suppress(OSError):
                await asyncio.gather(_carry(reader, outward, heard), _carry(inward, writer, None))
        writer.close()

    def requests(self) -> Iterator[Request]:
        """All requests so far, in the order of their connections."""
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
    """The requests of one connection, each whole and nothing between them."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(stream)
    while isinstance(head := connection.next_event(), h11.Request):
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        headers = tuple((name.decode(), value.decode()) for name, value in head.headers)
        yield Request(head.target.decode(), headers, body)
        connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()
    assert connection.trailing_data[0] == b""


def read(requests: Iterable[Request]) -> Sent:
    """Understand every request, or fail: an unknown call, field or object is something nobody has looked at."""
    # By id: a call that is tried again counts once.
    announced: dict[str, message_pb2.Message] = {}
    objects: dict[str, bytes] = {}
    runtimes: set[float] = set()
    for request in requests:
        if request.target == "/health":
            assert request.body == b""
            continue
        body: Any = CALLS[request.target.removeprefix("/v1/fleet/")]()
        body.ParseFromString(request.body)
        known = type(body)()
        known.CopyFrom(body)
        known.DiscardUnknownFields()
        assert known.ByteSize() == len(request.body)
        if isinstance(body, fleet_pb2.PushMessagesRequest):
            announced |= {message.metadata.message_id: message for message in body.messages_list}
            runtimes |= set(body.clientapp_runtime_list)
        if isinstance(body, message_pb2.PushObjectRequest):
            assert hashlib.sha256(body.object_content).hexdigest() == body.object_id
            objects[body.object_id] = body.object_content
    seen: dict[str, InflatableObject] = {}
    found: dict[str, Message] = {}
    for name, message in announced.items():
        # Its content travels as objects.
        assert message.content.ByteSize() == 0
        inflated = inflate_object_from_contents(name, objects, keep_object_contents=True, objects=seen)
        assert isinstance(inflated, Message)
        found[name] = inflated
        check_metadata(message.metadata)
        check_metadata(inflated.metadata)
    return Sent(found, len(set(objects) - set(seen)), runtimes)


def check_metadata(metadata: Any) -> None:
    """Ids and times are Flower's; the two texts that an app could choose are not used."""
    assert metadata.group_id == ""
    assert metadata.message_type in ("query", "train", "evaluate")
