"""What keeps the gateway open to the sites while somebody else wastes its connections, its memory or its log.

Nothing here knows a path or a header; see :mod:`icmoe_server.gateway` for what may pass.
"""

import asyncio
import logging
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

MAX_LOGGED_PATH = 200
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

Peer = tuple[str, int]


@dataclass
class Connection:
    """An open connection: ``busy`` while a request is in progress, ``proven`` once Flower accepted one of its calls."""

    socket: socket.socket
    since: float = field(default_factory=time.monotonic)
    busy: bool = False
    proven: bool = False
    evicted: bool = False

    def evict(self) -> None:
        """End the connection from below; asyncio then sees its end and cleans up."""
        self.evicted = True
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side was faster


class Connections:
    """All open connections, counted from the accept on, so before TLS.

    A full house never shuts its door: a new connection takes the place of the oldest one that has not yet made an
    accepted call. So a flood crowds out itself, and the hospitals keep theirs, also behind the same address.

    Args:
        total: how many connections may be open, at least 1.
        per_address: how many of them one address may hold, at least 1.
    """

    def __init__(self, *, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._open: dict[str, dict[Peer, Connection]] = defaultdict(dict)

    def __len__(self) -> int:
        return sum(not each.evicted for peers in self._open.values() for each in peers.values())

    def admit(self, peer: Peer, sock: socket.socket) -> bool:
        """Count a new connection in; False if every place is held by an accepted call in progress."""
        full = self._full(peer[0])
        if full is not None:
            victim = min(full, key=lambda each: (each.proven, each.busy, each.since))
            if victim.proven and victim.busy:
                return False
            victim.evict()
        self._open[peer[0]][peer] = Connection(sock)
        return True

    def forget(self, peer: Peer, sock: socket.socket) -> None:
        """Count a closed connection out."""
        peers = self._open.get(peer[0], {})
        if peer in peers and peers[peer].socket is sock:
            del peers[peer]
        if not peers:
            self._open.pop(peer[0], None)

    @contextmanager
    def request(self, peer: Peer) -> Iterator[None]:
        """Mark a connection busy for the time of a request."""
        self._set(peer, busy=True)
        try:
            yield
        finally:
            self._set(peer, busy=False)

    def prove(self, peer: Peer) -> None:
        """Remember that Flower accepted a call of this connection."""
        self._set(peer, proven=True)

    def _set(self, peer: Peer, **marks: bool) -> None:
        connection = self._open.get(peer[0], {}).get(peer)
        if connection is not None:  # else closed meanwhile
            for name, value in marks.items():
                setattr(connection, name, value)

    def _full(self, address: str) -> list[Connection] | None:
        held = {name: [each for each in peers.values() if not each.evicted] for name, peers in self._open.items()}
        if len(held.get(address, ())) >= self._per_address:
            return held[address]
        if sum(map(len, held.values())) >= self._total:
            return max(held.values(), key=len)
        return None


class CountedSocket(socket.socket):
    """A connection that tells when it is closed, whoever closes it."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        """Close, and report it once."""
        super().close()
        report, self.on_close = self.on_close, None
        if report is not None:
            report()


class Listener(socket.socket):
    """A listening socket that asks :class:`Connections` before it hands a connection out."""

    connections: Connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Give the next admitted connection; refused ones are reset, which a site takes for a reason to try again."""
        while True:
            descriptor, address = self._accept()  # type: ignore[attr-defined]  # as socket.accept itself does
            sock = CountedSocket(self.family, self.type, self.proto, fileno=descriptor)
            peer = (str(address[0]), int(address[1]))
            if self.connections.admit(peer, sock):
                sock.on_close = lambda peer=peer, sock=sock: self.connections.forget(peer, sock)
                return sock, address
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.close()


class BodyBudget:
    """Memory for request bodies. A body's whole size is set aside before its first byte is read, so none gets stuck.

    Args:
        total: bytes for all bodies at once.
        per_address: bytes of them for one address; the rest stays free for the others.
    """

    def __init__(self, *, total: int, per_address: int) -> None:
        self._free = total
        self._per_address = per_address
        self._held: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, address: str, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes (at most ``per_address``), waiting for them without a limit."""
        async with self._changed:
            await self._changed.wait_for(lambda: size <= self._free and self._held[address] + size <= self._per_address)
            self._free -= size
            self._held[address] += size
        try:
            yield
        finally:
            self._free += size
            self._held[address] -= size
            if not self._held[address]:
                del self._held[address]
            async with self._changed:
                self._changed.notify_all()


class RefusalLog:
    """One line for each refused request, but no more lines than a person reads.

    Args:
        logger: where the lines go.
        lines: how many lines in one window; the others are counted and told in the next line after it.
        window: seconds.
    """

    def __init__(self, logger: logging.Logger, *, lines: int, window: float) -> None:
        self._logger = logger
        self._lines = lines
        self._window = window
        self._since = float("-inf")
        self._written = 0
        self._hidden = 0

    def refused(self, peer: Peer | None, method: str, path: bytes, reason: str) -> None:
        """Write who asked for what, and why it was refused. The path is escaped and cut."""
        now = time.monotonic()
        if now - self._since >= self._window:
            if self._hidden:
                self._logger.warning("%d more refused requests are not shown", self._hidden)
            self._since, self._written, self._hidden = now, 0, 0
        if self._written >= self._lines:
            self._hidden += 1
            return
        self._written += 1
        shown = path.decode("latin-1").encode("unicode_escape").decode("ascii")[:MAX_LOGGED_PATH]
        self._logger.warning("refused %s %s %s: %s", peer[0] if peer else "?", method[:20], shown, reason)
