"""A uvicorn server that holds against slow and many connections; what it serves is not its business."""

import asyncio
import resource
import signal
import socket
import ssl
from asyncio import sslproto
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import Server, ServerState

from icmoe.errors import ConfigError
from icmoe_server.gateway_limits import Connections, Listener, RefusalLog

MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_PER_ADDRESS = 256  # a hospital needs about four; behind one address there may be many hospitals
WANTED_FILES = 4096
FILES_FOR_OTHERS = 256  # towards the SuperLink, certificates, logs
BACKLOG = 1024

# Flower gives up a connection after 30 s and tries again; cut by us before that, it would read the end of the
# handshake as a bad certificate, and the site would stop.
HANDSHAKE_SECONDS = 40.0
TLS_CLOSE_SECONDS = 2.0
HEADER_SECONDS = 20.0
LINGER_SECONDS = 2.0
IDLE_SECONDS = 60  # SuperNodes call every 3 s
STOP_SECONDS = 5
MAX_HEADER_BYTES = 16 * 1024
TLS_BUFFER_BYTES = 64 * 1024


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the two time limits that it lacks.

    Args:
        config: uvicorn's.
        server_state: uvicorn's.
        refusals: told of each connection cut here.
        header_seconds: from the connection, or the first byte of a later request, to the end of the headers.
        linger_seconds: how long the rest of a body is still read after its request was refused. Without it the
            answer is lost, as closing on unread data resets the connection.
    """

    def __init__(
        self,
        *,
        config: Config,
        server_state: ServerState,
        refusals: RefusalLog,
        header_seconds: float,
        linger_seconds: float,
    ) -> None:
        super().__init__(config, server_state, {})
        self._refusals = refusals
        self._header_seconds = header_seconds
        self._linger_seconds = linger_seconds
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start the clock of the first headers."""
        super().connection_made(transport)
        self._start_limit(self._header_seconds, self._headers_late)

    def data_received(self, data: bytes) -> None:
        """Read on; the clock runs while headers are incomplete, and while a refused body still comes."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._start_limit(self._header_seconds, self._headers_late)
        elif self.conn.our_state is not h11.DONE:
            self._stop_limit()

    def on_response_complete(self) -> None:
        """Give a body that nobody wants a moment to end."""
        super().on_response_complete()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self._start_limit(self._linger_seconds, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_limit()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP/1.1, with a line in the log."""
        self._refusals.refused(self.client, "-", b"-", "not a valid HTTP/1.1 request, or headers beyond the limit")
        super().send_400_response(msg)

    def _start_limit(self, seconds: float, expired: Callable[[], None]) -> None:
        if self._limit is None and not self.transport.is_closing():
            self._limit = self.loop.call_later(seconds, expired)

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _headers_late(self) -> None:
        self._refusals.refused(self.client, "-", b"-", f"no complete headers after {self._header_seconds:g} s")
        self._close()

    def _close(self) -> None:
        self._limit = None
        self.transport.close()


class GatewayServer(Server):
    """A uvicorn server on one counted socket.

    Args:
        app: the ASGI application.
        listener: bound, not yet listening.
        tls: the server's side of TLS.
        refusals: told of each connection that is cut for slowness.
    """

    def __init__(self, app: Any, *, listener: Listener, tls: ssl.SSLContext, refusals: RefusalLog) -> None:
        super().__init__(
            Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=STOP_SECONDS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self._listener = listener
        self._tls = tls
        self._refusals = refusals

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Not uvicorn's own way, as that knows no limit for the TLS handshake."""
        await self.lifespan.startup()
        # asyncio sets 256 KiB aside for each TLS connection and never gives them back: 290 KB of memory for each idle
        # one, 90 KB with this.
        sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
        server = await asyncio.get_running_loop().create_server(
            self._protocol,
            sock=self._listener,
            ssl=self._tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=TLS_CLOSE_SECONDS,
        )
        self.servers = [server]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and SIGINT, with exit code 0: uvicorn would raise the signal once more against itself."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _protocol(self) -> LimitedProtocol:
        return LimitedProtocol(
            config=self.config,
            server_state=self.server_state,
            refusals=self._refusals,
            header_seconds=HEADER_SECONDS,
            linger_seconds=LINGER_SECONDS,
        )


def listen(bind: str) -> Listener:
    """Bind a counted socket.

    Args:
        bind: ``host:port``, an IPv6 host in brackets; port 0 takes a free one.

    Raises:
        ConfigError: if that is no address, or somebody else listens there.
    """
    host, _, port = bind.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"bind is {bind!r}; it must be host:port, such as 0.0.0.0:8443 or [::]:8443")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"bind is {bind!r}, but {host} is no address of this machine: {error}") from None
    listener = Listener(family, kind)
    listener.connections = Connections(total=_connections_allowed(), per_address=MAX_CONNECTIONS_PER_ADDRESS)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {bind}: {error.strerror}; end what listens there or change bind") from None
    return listener


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or later with the gateway's certificate.

    Raises:
        ConfigError: if certificate or key cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"certificate {certificate} and key {key} cannot be used: {error}; both must be PEM and belong together"
        ) from None
    return context


def _connections_allowed() -> int:
    """Raise the soft limit of open files, and say how many connections fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - FILES_FOR_OTHERS))
