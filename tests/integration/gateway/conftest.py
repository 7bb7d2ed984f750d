"""The gateway as a process of its own, in front of a TLS upstream that writes down what arrives."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from icmoe_server.pki import make_ca, make_server_certificate

# Runs the real program, with limits that a test can wait for.
PROGRAM = """
import sys
from icmoe_server import gateway, gateway_app, gateway_server
for assignment in sys.argv[1].split():
    name, value = assignment.split("=")
    modules = [each for each in (gateway, gateway_app, gateway_server) if hasattr(each, name)]
    assert modules, name
    for module in modules:
        setattr(module, name, type(getattr(module, name))(value))
sys.exit(gateway.main(sys.argv[2:]))
"""


@dataclass
class Arrival:
    method: str
    path: str
    query: bytes
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Upstream:
    """Answers every path it is asked, so that only the gateway can refuse."""

    arrivals: list[Arrival] = field(default_factory=list)
    answer: Callable[[Send], Any] | None = None
    port: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        if scope["path"] != "/health":
            self.arrivals.append(Arrival(scope["method"], scope["path"], scope["query_string"], headers, body))
        if self.answer is not None:
            await self.answer(send)
            return
        reply = [(b"content-type", b"application/protobuf"), (b"flwr-note", b"kept"), (b"set-cookie", b"dropped")]
        await send({"type": "http.response.start", "status": 200, "headers": [*reply, (b"server", b"dropped")]})
        await send({"type": "http.response.body", "body": b"echo:" + body[:100]})


class UpstreamServer(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Reset what is open: the gateway keeps its connections, and the loop must not end around them."""
        for connection in list(self.server_state.connections):
            assert connection.transport is not None
            connection.transport.abort()
        await asyncio.sleep(0.05)
        await super().shutdown(sockets)


@contextmanager
def serve(upstream: Upstream, pki: Path) -> Iterator[None]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", upstream.port))
        upstream.port = listener.getsockname()[1]
        config = uvicorn.Config(
            upstream,
            lifespan="off",
            http="h11",
            ws="none",
            loop="asyncio",
            log_config=None,
            ssl_certfile=pki / "server.crt",
            ssl_keyfile=pki / "server.key",
            timeout_graceful_shutdown=1,
        )
        server = UpstreamServer(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(20)


@dataclass
class Process:
    popen: subprocess.Popen[str]
    log: Path
    port: int
    tls: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.tls, trust_env=False, timeout=30, **options)

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=90)
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1")

    def raw(self, request: bytes) -> bytes:
        """Send bytes as they are, and read until the gateway closes."""
        with self.connect() as sock:
            sock.sendall(request)
            return self.read_to_end(sock)

    @staticmethod
    def read_to_end(sock: ssl.SSLSocket) -> bytes:
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer

    @staticmethod
    def read_answer(sock: ssl.SSLSocket) -> bytes:
        """Read one whole answer of an upstream, which comes in chunks."""
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            piece = sock.recv(65536)
            assert piece, answer
            answer += piece
        return answer

    @staticmethod
    def plain(line: str) -> bytes:
        """A request without a body, sent exactly as spelled."""
        return f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_ca(folder)
    make_server_certificate(folder, names=["fl.example.org"])
    return folder


@contextmanager
def gateway_process(pki: Path, log: Path, upstream_port: int, limits: str = "") -> Iterator[Process]:
    arguments = ["--upstream", f"https://127.0.0.1:{upstream_port}", "--upstream-ca", str(pki / "ca.crt")]
    arguments += ["--bind", "127.0.0.1:0"]
    arguments += ["--certificate", str(pki / "server.crt"), "--key", str(pki / "server.key")]
    # A proxy of the environment must not be asked for the way to loopback.
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    with log.open("w") as file:
        command = [sys.executable, "-c", PROGRAM, limits, *arguments]
        popen = subprocess.Popen(command, stderr=file, stdout=file, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while " port " not in log.read_text():
            assert popen.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        port = int(log.read_text().split(" port ")[1].split()[0])
        yield Process(popen, log, port, ssl.create_default_context(cafile=pki / "ca.crt"))
    finally:
        popen.kill()
        popen.wait(10)


@pytest.fixture(scope="module")
def shared_upstream(pki: Path) -> Iterator[Upstream]:
    upstream = Upstream()
    with serve(upstream, pki):
        yield upstream


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Upstream:
    shared_upstream.arrivals.clear()
    shared_upstream.answer = None
    return shared_upstream


@pytest.fixture(scope="module")
def gateway(pki: Path, shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with gateway_process(pki, tmp_path_factory.mktemp("gateway") / "log", shared_upstream.port) as process:
        yield process


@pytest.fixture
def serving(pki: Path) -> Callable[[int], AbstractContextManager[None]]:
    """Serve an upstream on a given port for a while."""
    return lambda port: serve(Upstream(port=port), pki)


@pytest.fixture
def foreign_upstream(tmp_path: Path) -> Iterator[Upstream]:
    """An upstream with a certificate of somebody else."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    make_ca(folder)
    make_server_certificate(folder, names=[])
    upstream = Upstream()
    with serve(upstream, folder):
        yield upstream


Start = Callable[..., Process]


@pytest.fixture
def start(pki: Path, upstream: Upstream, tmp_path: Path) -> Iterator[Start]:
    """Start a gateway with limits of its own, such as ``start("HEADER_SECONDS=0.5")``."""
    with ExitStack() as stack:

        def begin(limits: str = "", *, port: int | None = None) -> Process:
            return stack.enter_context(gateway_process(pki, tmp_path / "log", port or upstream.port, limits))

        yield begin
