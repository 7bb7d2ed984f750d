"""What passes the gateway: exactly the 12 Fleet calls and ``/health``, compared as bytes before any decoding.

A call goes on as a constant of this file; nothing of the address that a peer sends reaches the SuperLink.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from icmoe_server.gateway_limits import BodyBudget, Connections, Peer, RefusalLog

FLEET_CALLS = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "register-node",
    "send-node-heartbeat",
    "unregister-node",
)
# What a peer sent, byte for byte and before any decoding, and what the SuperLink is asked.
FLEET_PATHS = {f"/v1/fleet/{call}".encode(): f"/v1/fleet/{call}" for call in FLEET_CALLS}
HEALTH_PATH = b"/health"

PASSED_HEADERS = frozenset({b"content-type", b"accept"})
PASSED_PREFIX = b"flwr-"

MAX_BODY_BYTES = 16 * 1024 * 1024  # Flower cuts arrays into objects of 5 MiB
BODY_MEMORY = 96 * 1024 * 1024
BODY_MEMORY_PER_ADDRESS = 64 * 1024 * 1024

# What is late is answered 503, not 408: SuperNodes try again after 502, 503 and 504 and end for good after others.
WAIT_SECONDS = 20.0  # for memory or a connection inward
GAP_SECONDS = 30.0  # between two pieces of a body: a cut cable of 20 s must not matter
BODY_SECONDS = 180.0  # 5 MiB at 230 kbit/s
REQUEST_SECONDS = 300.0
HEALTH_SECONDS = 3.0
HEALTH_KEPT_SECONDS = 1.0

TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes"

Header = tuple[bytes, bytes]


class RefusedError(Exception):
    """A request is answered here and not passed on."""

    def __init__(self, status: int, reason: str, *, allow: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.allow = allow


class Gateway:
    """The ASGI application: compares, limits, forwards.

    Args:
        upstream: client of the SuperLink; its base URL is the SuperLink's.
        connections: told which connections are busy and which made an accepted call.
        refusals: told of each refused request.
    """

    def __init__(self, upstream: httpx.AsyncClient, *, connections: Connections, refusals: RefusalLog) -> None:
        self._upstream = upstream
        self._connections = connections
        self._refusals = refusals
        self._bodies = BodyBudget(total=BODY_MEMORY, per_address=BODY_MEMORY_PER_ADDRESS)
        self._health_lock = asyncio.Lock()
        self._healthy_at: tuple[float, bool] = (float("-inf"), False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, within its time."""
        started = False

        async def note_and_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with self._connections.request(scope["client"]):
                async with _within(REQUEST_SECONDS, "the request took too long"):
                    await self._serve(scope, receive, note_and_send)
        except ClientDisconnect:
            return
        except RefusedError as refusal:
            self._refusals.refused(scope["client"], scope["method"], scope["raw_path"], refusal.reason)
            if not started:
                headers = {"allow": refusal.allow} if refusal.allow else None
                await PlainTextResponse(f"{refusal.reason}\n", refusal.status, headers)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"]
        if scope["query_string"] or (path != HEALTH_PATH and path not in FLEET_PATHS):
            raise RefusedError(404, "not found")
        allowed = "GET" if path == HEALTH_PATH else "POST"
        if scope["method"] != allowed:
            raise RefusedError(405, "method not allowed", allow=allowed)
        if path == HEALTH_PATH:
            await self._answer_health(scope, receive, send)
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer: Peer = scope["client"]
        size = _declared_size(scope)
        async with AsyncExitStack() as held:
            async with _within(WAIT_SECONDS, "too many requests at once; try again"):
                await held.enter_async_context(self._bodies.reserve(peer[0], size))
            body = await _read(receive)
            response = await self._ask(FLEET_PATHS[scope["raw_path"]], _passed(scope["headers"]), body)
            held.push_async_callback(response.aclose)
            if response.is_success:
                self._connections.prove(peer)
            await self._relay(response, send)

    async def _ask(self, path: str, headers: list[Header], body: bytes) -> httpx.Response:
        headers = [*headers, (b"accept-encoding", b"identity"), (b"user-agent", b"icmoe-gateway")]
        request = self._upstream.build_request("POST", path, content=body, headers=headers)
        try:
            return await self._upstream.send(request, stream=True)
        except httpx.TimeoutException:
            raise RefusedError(504, "the SuperLink did not answer in time; try again") from None
        except httpx.TransportError as error:
            raise RefusedError(503, "the SuperLink is not reachable; try again") from error

    async def _relay(self, response: httpx.Response, send: Send) -> None:
        # With its length, so that the site notices an answer that was cut short.
        headers = [each for each in response.headers.raw if each[0].lower() == b"content-length"]
        headers += _passed(response.headers.raw)
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError:
            raise RefusedError(503, "the SuperLink broke off its answer") from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._health_lock:
            asked_at, healthy = self._healthy_at
            if time.monotonic() - asked_at > HEALTH_KEPT_SECONDS:
                healthy = await self._superlink_is_healthy()
                self._healthy_at = (time.monotonic(), healthy)
        answer = PlainTextResponse("ok\n") if healthy else PlainTextResponse("the SuperLink is not reachable\n", 503)
        await answer(scope, receive, send)

    async def _superlink_is_healthy(self) -> bool:
        try:
            return (await self._upstream.get("/health", timeout=HEALTH_SECONDS)).is_success
        except httpx.TransportError:
            return False


def _declared_size(scope: Scope) -> int:
    """Bytes that the body will have at most; h11 has checked that a given length is a number and is kept."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            if int(value) > MAX_BODY_BYTES:
                raise RefusedError(413, TOO_LARGE)
            return int(value)
    chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return MAX_BODY_BYTES if chunked else 0


async def _read(receive: Receive) -> bytes:
    pieces, size, more = [], 0, True
    async with _within(BODY_SECONDS, "the body came too slowly; try again"):
        while more:
            async with _within(GAP_SECONDS, "the body stopped coming; try again"):
                message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece, more = message["body"], message["more_body"]
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise RefusedError(413, TOO_LARGE)
            pieces.append(piece)
    return b"".join(pieces)


def _passed(headers: Iterable[Header]) -> list[Header]:
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if name in PASSED_HEADERS or name.startswith(PASSED_PREFIX)]


@asynccontextmanager
async def _within(seconds: float, reason: str) -> AsyncIterator[None]:
    """Refuse with 503 what takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RefusedError(503, reason) from None
