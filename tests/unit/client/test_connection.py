"""Real TLS on loopback: each way in which a centre cannot be reached or trusted has its own sentence."""

import datetime as dt
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icmoe.errors import ConfigError, ConnectError, TlsError
from icmoe_client import connection_errors
from icmoe_client.connection import Connection, fetch_chain, trust

DAY = dt.timedelta(days=1)


def go(host: str, port: int, ca: Path | None) -> Connection:
    """Everything up to TLS."""
    with Connection(host, port) as connection:
        connection.look_up()
        connection.connect()
        connection.secure(trust(ca))
        connection.ask_health()
        return connection


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_reaches_a_good_server(host: str, authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1", "localhost"))
    with Connection(host, port) as connection:
        assert connection.look_up()
        connection.connect()
        assert connection.secure(trust(authority.file)).version() == "TLSv1.3"
        health = connection.ask_health()
    assert health.status == 200
    assert health.ahead is not None
    assert abs(health.ahead) < 2


def test_refused(authority: Any) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectError, match=r"Nobody listens at 127\.0\.0\.1:\d+\.\nAsk the centre"):
            go("127.0.0.1", bound.getsockname()[1], authority.file)


def test_unknown_name(authority: Any) -> None:
    with pytest.raises(ConnectError, match=r"(?s)no-such-centre\.invalid cannot be looked up.*Check 'server'"):
        go("no-such-centre.invalid", 443, authority.file)


def test_wrong_authority(authority: Any, make_authority: Callable[[str], Any], serve: Callable[..., int]) -> None:
    port = serve(make_authority("Firewall Inspection").issue("127.0.0.1"))
    with pytest.raises(TlsError, match=r"(?s)unknown authority: CN=Firewall Inspection\.\nDo not go on"):
        go("127.0.0.1", port, authority.file)


def test_same_name_other_authority(
    authority: Any, make_authority: Callable[[str], Any], serve: Callable[..., int], tmp_path: Path
) -> None:
    """An impostor copies the name, not the key."""
    authority.folder.rename(tmp_path / "real")
    impostor = make_authority("centre")
    with pytest.raises(TlsError, match="unknown authority"):
        go("127.0.0.1", serve(impostor.issue("127.0.0.1")), tmp_path / "real" / "ca.crt")


def test_expired(authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1", since=-9 * DAY, until=-DAY))
    day = f"{dt.datetime.now(dt.UTC) - DAY:%Y-%m-%d}"
    with pytest.raises(TlsError, match=rf"has expired on {day} .*\n.*this machine's clock.*--renew"):
        go("127.0.0.1", port, authority.file)


def test_not_yet_valid(authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1", since=DAY))
    with pytest.raises(TlsError, match=r"(?s)not yet valid before 20.*clock"):
        go("127.0.0.1", port, authority.file)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_wrong_name(host: str, authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("fl.example.org", "192.0.2.7"))
    with pytest.raises(TlsError, match=rf"not for {host} but for fl\.example\.org, 192\.0\.2\.7\.\nWrite one of"):
        go(host, port, authority.file)


def test_plain_text_server(authority: Any, serve: Callable[..., int]) -> None:
    with pytest.raises(TlsError, match=r"plain text instead of TLS\.\n.*Never go on without TLS"):
        go("127.0.0.1", serve(None), authority.file)


RawServer = Callable[[Callable[[socket.socket], object]], int]


def test_connection_closed(authority: Any, raw_server: RawServer) -> None:
    port = raw_server(lambda accepted: None)
    with pytest.raises(ConnectError, match="closed the connection when TLS began"):
        go("127.0.0.1", port, authority.file)


def test_closed_after_reading(authority: Any, raw_server: RawServer) -> None:
    port = raw_server(lambda accepted: accepted.recv(65536))
    with pytest.raises(ConnectError, match="closed the connection when TLS began"):
        go("127.0.0.1", port, authority.file)


def test_silent_server(authority: Any, raw_server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icmoe_client.connection.TIMEOUT", 0.3)
    done = threading.Event()
    port = raw_server(lambda accepted: done.wait(5))
    try:
        with pytest.raises(ConnectError, match="accepts the connection but says nothing"):
            go("127.0.0.1", port, authority.file)
    finally:
        done.set()


def test_not_http(authority: Any, raw_server: RawServer) -> None:
    context = authority.issue("127.0.0.1")

    def answer(accepted: socket.socket) -> None:
        with context.wrap_socket(accepted, server_side=True) as secured:
            secured.recv(65536)
            secured.sendall(b"220 mail.example.org ESMTP\r\n")

    with pytest.raises(ConnectError, match="speaks TLS but gives no HTTP answer"):
        go("127.0.0.1", raw_server(answer), authority.file)


@pytest.mark.parametrize("seconds", [-600, 600])
def test_clock_of_the_centre(seconds: int, authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1"), clock=dt.timedelta(seconds=seconds))
    with Connection("127.0.0.1", port) as connection:
        connection.connect()
        connection.secure(trust(authority.file))
        assert connection.ask_health().ahead == pytest.approx(-seconds, abs=2)


def test_no_date(authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1"), clock=None, status=503)
    with Connection("127.0.0.1", port) as connection:
        connection.connect()
        connection.secure(trust(authority.file))
        health = connection.ask_health()
    assert (health.status, health.ahead) == (503, None)


def test_trust_needs_a_certificate(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.crt"
    with pytest.raises(ConfigError, match=r"cannot be read as a certificate \(No such file"):
        trust(wrong)
    wrong.write_text("hello")
    with pytest.raises(ConfigError, match=r"cannot be read as a certificate.*\n.*site init"):
        trust(wrong)


@pytest.mark.parametrize("with_chain", [True, False])
def test_fetch_chain(with_chain: bool, authority: Any, serve: Callable[..., int]) -> None:
    port = serve(authority.issue("127.0.0.1", with_chain=with_chain))
    chain = fetch_chain("127.0.0.1", port)
    assert len(chain) == 1 + with_chain
    assert (ssl.PEM_cert_to_DER_cert(authority.file.read_text()) in chain) is with_chain


def test_packets_that_are_dropped() -> None:
    error = connection_errors.explain_connect(TimeoutError(), "fl.example.org", 443, proxy=None)
    assert "does not answer within 10 s.\nAs a rule a firewall" in str(error)
