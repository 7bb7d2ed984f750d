"""The way to the centre through a proxy: a tiny one that only knows CONNECT."""

import base64
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from icmoe.errors import ConnectError, NetworkError
from icmoe_client.connection import Connection, trust

RawServer = Callable[[Callable[[socket.socket], object]], int]


@dataclass
class Proxy:
    """A proxy that leads every CONNECT to one port of loopback, or answers with a refusal."""

    target: int
    refusal: str = ""
    requests: list[str] = field(default_factory=list)

    def treat(self, accepted: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += accepted.recv(1)
        self.requests.append(head.decode())
        if self.refusal:
            accepted.sendall(f"HTTP/1.1 {self.refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        with socket.create_connection(("127.0.0.1", self.target)) as onward:
            accepted.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pour, args=(onward, accepted))
            back.start()
            _pour(accepted, onward)
            back.join()


def _pour(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            sink.sendall(content)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_goes_through_the_proxy(
    variable: str,
    authority: Any,
    serve: Callable[..., int],
    raw_server: RawServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name of the centre exists nowhere: only the proxy knows the way."""
    proxy = Proxy(serve(authority.issue("centre.invalid")))
    monkeypatch.setenv(variable, f"http://me:s%40crown@127.0.0.1:{raw_server(proxy.treat)}")
    with Connection("centre.invalid", 8443) as connection:
        assert connection.look_up() == ["127.0.0.1"]
        connection.connect()
        connection.secure(trust(authority.file))
        assert connection.ask_health().status == 200
    assert proxy.requests[0].startswith("CONNECT centre.invalid:8443 HTTP/1.")
    assert f"Basic {base64.b64encode(b'me:s@crown').decode()}" in proxy.requests[0]


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ("407 Proxy Authentication Required", r"wants a login\.\nGive it as HTTPS_PROXY=http://user:password@127"),
        ("403 Forbidden", r"does not let us through to centre\.invalid:8443 .*403 Forbidden.*\n.*allow CONNECT"),
    ],
)
def test_proxy_refuses(
    refusal: str, sentence: str, authority: Any, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{raw_server(Proxy(0, refusal).treat)}")
    with pytest.raises(NetworkError, match=sentence):
        Connection("centre.invalid", 8443).connect()


def test_proxy_is_away(authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(ConnectError, match=r"The proxy 127.* does not answer.*\nCorrect HTTPS_PROXY"):
            Connection("centre.invalid", 8443).connect()


@pytest.mark.parametrize("text", ["https://proxy:3128", "socks5://proxy:1080", "http://", "http://proxy:x"])
def test_proxy_of_another_kind(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", text)
    with pytest.raises(NetworkError, match=r"names a proxy that cannot be used.*\nWrite it as http://"):
        Connection("centre.invalid", 8443)


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("example.org", "fl.example.org", True),
        ("*", "fl.example.org", True),
        ("other.org", "fl.example.org", False),
        ("", "fl.example.org", False),
        ("", "localhost", True),
        ("", "127.0.0.1", True),
    ],
)
def test_no_proxy(no_proxy: str, host: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.net:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    connection = Connection(host, 8443)
    assert connection.first_hop == ((host, 8443) if direct else ("proxy.example.net", 3128))
