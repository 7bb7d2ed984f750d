"""A centre and three hospitals in network namespaces of their own, on lines as slow and unsteady as a test wants them.

The kernel limits the rate (``tc tbf``) and a small TCP relay, between each hospital and the centre, adds the delay and
the cuts, as there is no netem everywhere. Every packet that leaves a namespace is seen and noted.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import pytest

RATE = "4mbit"
ONE_WAY = 0.05
"""Seconds from a hospital to the centre and from the centre to a hospital."""
PORT = 8443
SERVER_NAME = "fl.icmoe.test"
NAMED_SITE = "c"
"""The hospital whose site file has a name for the centre; the others have an address."""
CONFIG = """\
task: {name: discs, classes: {disc: 1}}
model: {backbone: lite_medsam, width: 32, residual_rank: 8}
train: {local_epochs: 1, batch_size: 2, basic_every: 2}
federation: {num_rounds: 2, sites: [a, b, c], round_deadline: 600}
"""
BODY_BYTES = 4096
"""A request with more than this carries a tensor; all others are about 1 kB."""
MESSAGE_BYTES = 1000
"""The answer that hands out a message is the first with more than this; one that says there is none has less."""
ETHERNET, ALL_PROTOCOLS, SOL_PACKET, PACKET_STATISTICS = 14, 3, 263, 6


class Packet(NamedTuple):
    """What is noted of a packet: ``syn`` opens a TCP connection; the port is that of the receiver."""

    kind: Literal["syn", "tcp", "udp", "other"]
    to: str
    port: int


class Watch:
    """Every packet that comes out of a namespace, counted.

    Args:
        interface: our end of its cable.
    """

    def __init__(self, interface: str) -> None:
        self.packets: Counter[Packet] = Counter()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 2**20)
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.2)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def num_missed(self) -> int:
        """Packets that came faster than they were read."""
        statistics = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        return int(struct.unpack("II", statistics)[1])

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()

    def _watch(self) -> None:
        while not self._done.is_set():
            try:
                frame, (_, _, direction, *_) = self._socket.recvfrom(100)
            except TimeoutError:
                continue
            if direction != socket.PACKET_OUTGOING and (packet := read_packet(frame)) is not None:
                self.packets[packet] += 1


def read_packet(frame: bytes) -> Packet | None:
    """An Ethernet frame's packet; ``None`` for ARP, which stays on the cable."""
    (kind,) = struct.unpack("!H", frame[12:14])
    if kind == 0x0806:
        return None
    if kind != 0x0800:
        return Packet("other", f"ethertype {kind:#06x}", 0)
    header = frame[ETHERNET:]
    protocol, to = header[9], socket.inet_ntoa(header[16:20])
    inner = header[(header[0] & 0x0F) * 4 :]
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return Packet("other", to, protocol)
    (port,) = struct.unpack("!H", inner[2:4])
    if protocol == socket.IPPROTO_UDP:
        return Packet("udp", to, port)
    return Packet("syn" if inner[13] & 0x12 == 0x02 else "tcp", to, port)


@dataclass(frozen=True)
class Cut:
    """A break of a line.

    Attributes:
        when: ``body``: in the middle of a tensor that goes up. ``answer``: the tensor has arrived, its receipt is on
            the way down. ``instruction``: the centre's message is on the way down.
        seconds: how long there is no line.
        after: bytes of tensors that go up before a cut of kind ``body``.
        shut: new connections are refused meanwhile; else they are accepted and closed at once.
    """

    when: Literal["body", "answer", "instruction"]
    seconds: float
    after: int = 0
    shut: bool = True


@dataclass(eq=False)
class Connection:
    """One connection of a hospital, with the sizes of its request and answer under way; the first is TLS's own."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    request: int = 0
    answer: int = 0
    num_answered: int = 0


@dataclass(eq=False)
class Line:
    """The way of one hospital to the centre: delays each direction, and breaks as planned."""

    address: str
    centre: str
    plan: deque[Cut] = field(default_factory=deque)
    done: list[tuple[float, Cut]] = field(default_factory=list)
    num_up: int = 0
    num_down: int = 0
    _body: int = 0
    _closed_until: float = 0.0
    _open: set[Connection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, PORT)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._drop_all()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._closed_until:
            writer.transport.abort()
            return
        await asyncio.sleep(2 * ONE_WAY)  # what opening a connection takes
        try:
            inner, outer = await asyncio.open_connection(self.centre, PORT)
        except OSError:
            writer.transport.abort()
            return
        connection = Connection((writer, outer))
        self._open.add(connection)
        await asyncio.gather(self._carry(connection, reader, outer, up=True), self._carry(connection, inner, writer))
        self._open.discard(connection)

    async def _carry(
        self, connection: Connection, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, up: bool = False
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(65536):
                if self._breaks(connection, len(data), up=up):
                    return
                loop.call_later(ONE_WAY, _write, target, data)
        except OSError:
            pass
        loop.call_later(ONE_WAY, target.close)

    def _breaks(self, connection: Connection, size: int, *, up: bool) -> bool:
        """Count a piece, and cut the line if the plan says so."""
        if up:
            self.num_up += size
            if connection.answer:
                connection.request = connection.answer = 0
                connection.num_answered += 1
            connection.request += size
            self._body += size if connection.request > BODY_BYTES else 0
        else:
            self.num_down += size
            connection.answer += size
        if not self.plan:
            return False
        cut = self.plan[0]
        is_due = {
            "body": up and connection.request > BODY_BYTES and self._body >= cut.after,
            "answer": not up and connection.request > BODY_BYTES and self._body >= cut.after,
            "instruction": not up and connection.num_answered > 0 and connection.answer > MESSAGE_BYTES,
        }[cut.when]
        if is_due:
            self.plan.popleft()
            self._cut(cut)
        return is_due

    def _cut(self, cut: Cut) -> None:
        self.done.append((time.time(), cut))
        self._body = 0
        self._closed_until = time.monotonic() + cut.seconds
        self._drop_all()
        if cut.shut and self._server is not None:
            self._server.close()
            loop = asyncio.get_running_loop()
            loop.call_later(cut.seconds, lambda: self._tasks.add(loop.create_task(self.listen())))

    def _drop_all(self) -> None:
        for connection in self._open:
            for writer in connection.writers:
                writer.transport.abort()
        self._open.clear()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


class NameServer(asyncio.DatagramProtocol):
    """Knows one name; notes every question.

    Args:
        name: of the centre.
        address: its address.
    """

    def __init__(self, name: str, address: str) -> None:
        self.questions: Counter[str] = Counter()
        self._name, self._address = name, address

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        labels, place = [], 12
        while length := data[place]:
            labels.append(data[place + 1 : place + 1 + length].decode("ascii", "replace"))
            place += 1 + length
        name, question = ".".join(labels), data[12 : place + 5]
        self.questions[name] += 1
        (kind,) = struct.unpack("!H", data[place + 1 : place + 3])
        known, is_address = name == self._name, kind == 1
        record = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(self._address)
        head = data[:2] + struct.pack("!HHHHH", 0x8580 if known else 0x8583, 1, int(known and is_address), 0, 0)
        self._transport.sendto(head + question + (record if known and is_address else b""), peer)


def command(*words: object) -> str:
    """Run a command of the system; a failure names it."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@dataclass(frozen=True)
class Place:
    """A network namespace with one cable to us.

    Attributes:
        name: of the namespace.
        ours: address of our end, its only way out and its name server.
        theirs: address of its own end.
        interface: our end of the cable.
    """

    name: str
    ours: str
    theirs: str
    interface: str

    @classmethod
    def make(cls, number: int, label: str, *, rate: str | None, cleanup: ExitStack) -> "Place":
        """Lay the cable. ``number`` is unique within the test run."""
        unique = os.getpid()
        network = f"198.18.{unique % 250}"
        place = cls(
            f"fl{unique}{label}", f"{network}.{4 * number + 1}", f"{network}.{4 * number + 2}", f"fl{unique}{label}"
        )
        command("ip", "netns", "add", place.name)
        cleanup.callback(command, "ip", "netns", "del", place.name)
        cable = ("ip", "link", "add", place.interface, "type", "veth", "peer", "name", "eth0", "netns", place.name)
        command(*cable)
        settings = Path("/etc/netns") / place.name
        settings.mkdir(parents=True)
        cleanup.callback(shutil.rmtree, settings)
        (settings / "resolv.conf").write_text(f"nameserver {place.ours}\noptions timeout:1 attempts:1\n")
        command("ip", "addr", "add", f"{place.ours}/30", "dev", place.interface)
        command("ip", "link", "set", place.interface, "up")
        place.run("sh", "-c", "[ ! -d /proc/sys/net/ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
        place.run("ip", "addr", "add", f"{place.theirs}/30", "dev", "eth0")
        place.run("ip", "link", "set", "lo", "up")
        place.run("ip", "link", "set", "eth0", "up")
        place.run("ip", "route", "add", "default", "via", place.ours)
        if rate is not None:
            limit = ("root", "tbf", "rate", rate, "burst", "16k", "latency", "400ms")
            command("tc", "qdisc", "add", "dev", place.interface, *limit)
            place.run("tc", "qdisc", "add", "dev", "eth0", *limit)
        return place

    def run(self, *words: object) -> str:
        """Run a command there."""
        return command("ip", "netns", "exec", self.name, *words)


@dataclass
class World:
    """The federation of the parent folder's fixture with every party in a namespace of its own."""

    federation: Any
    centre: Place
    sites: dict[str, Place]
    lines: dict[str, Line]
    watches: dict[str, Watch]
    names: NameServer
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    named_site: str = NAMED_SITE
    server_name: str = SERVER_NAME

    def start_centre(self) -> Path:
        return self._start(self.centre, "server", "start", "--dir", self.federation.centre, "--config", self.config)

    def start_site(self, site: str) -> Path:
        return self._start(self.sites[site], "client", "--site", site, "--config", self.site_file(site))

    def site_file(self, site: str) -> Path:
        return Path(self.federation.root / "sites" / f"{site}.yaml")

    def supernode_log(self, site: str) -> str:
        return Path(self.federation.root / "sites" / site / "state" / "logs" / "supernode.log").read_text()

    @property
    def config(self) -> Path:
        return Path(self.federation.config)

    def _start(self, place: Place, *arguments: object) -> Path:
        """Start ``icmoe-fl`` there; its output goes to the file that is returned."""
        log = Path(self.federation.root / f"{place.name}.log")
        words = ("ip", "netns", "exec", place.name, Path(sys.executable).with_name("icmoe-fl"), *arguments)
        with log.open("wb") as file:
            process = subprocess.Popen(
                list(map(str, words)),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.federation.environment(),
                start_new_session=True,
            )
        self.started.append(process)
        return log

    def run_python(self, place: Place, program: str) -> None:
        """Run a few lines there."""
        place.run(sys.executable, "-c", program)

    def end(self) -> None:
        """Kill what still runs, with all its children."""
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for one in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait(30)

    def move_apart(self) -> None:
        """Let the centre listen in its namespace, and each hospital call its own end of the line."""
        federation = self.federation
        names = [word for line in self.lines.values() for word in ("--san", line.address)]
        federation.run("server", "init", "--dir", federation.centre, "--renew", "--san", SERVER_NAME, *names)
        old = f"127.0.0.1:{federation.port}"
        settings = federation.centre / "centre.yaml"
        settings.write_text(settings.read_text().replace(f'bind: "{old}"', f'bind: "{self.centre.theirs}:{PORT}"'))
        for site, line in self.lines.items():
            server = SERVER_NAME if site == NAMED_SITE else line.address
            file = self.site_file(site)
            file.write_text(file.read_text().replace(old, f"{server}:{PORT}"))
        self.config.write_text(CONFIG)


@pytest.fixture(scope="module")
def world(federation: Any) -> Iterator[World]:
    """A federation on four cables; nothing runs yet. Skips where the kernel does not let us lay them."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root and the commands ip and tc (iproute2)")
    with ExitStack() as cleanup:
        try:
            centre = Place.make(0, "m", rate=None, cleanup=cleanup)
            places = {site: Place.make(n, site, rate=RATE, cleanup=cleanup) for n, site in enumerate("abc", 1)}
        except OSError as error:
            pytest.skip(f"this machine allows no network namespaces: {error}")
        lines = {site: Line(place.ours, centre.theirs) for site, place in places.items()}
        names = NameServer(SERVER_NAME, places[NAMED_SITE].ours)
        made = World(federation, centre, places, lines, {}, names)
        for name, place in {"centre": centre, **places}.items():
            made.watches[name] = Watch(place.interface)
            cleanup.callback(made.watches[name].close)
        cleanup.enter_context(_served(lines.values(), names, places[NAMED_SITE].ours))
        cleanup.callback(made.end)
        made.move_apart()
        yield made


@contextmanager
def _served(lines: Iterable[Line], names: NameServer, address: str) -> Iterator[None]:
    """Relay and answer names in a thread of our own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> asyncio.DatagramTransport:
        for line in lines:
            await line.listen()
        transport, _ = await loop.create_datagram_endpoint(lambda: names, local_addr=(address, 53))
        return transport

    async def end() -> None:
        transport.close()
        for line in lines:
            await line.close()

    transport = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def cut() -> type[Cut]:
    """The class of a break, for plans."""
    return Cut
