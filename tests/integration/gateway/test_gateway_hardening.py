"""The gateway under slow, many and broken peers, without its SuperLink, and at its end."""

import asyncio
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Send

from icmoe.errors import ConfigError
from icmoe_server.gateway import run_gateway

GET_RUN = "/v1/fleet/get-run"
HEAD = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def idle() -> Iterator[Any]:
    """Open connections that stay open until the test ends."""
    with ExitStack() as stack:
        yield lambda connect, number: [stack.enter_context(connect()) for _ in range(number)]


def seconds_until_closed(sock: socket.socket) -> float:
    start = time.monotonic()
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - start


def drip(sock: socket.socket, content: bytes, *, deadline: float) -> None:
    """Send byte by byte until the other side has enough; fail if it has not by ``deadline`` seconds."""
    start = time.monotonic()
    for byte in content:
        assert time.monotonic() - start < deadline
        try:
            sock.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("all of it was taken")


# Slow peers


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fl", HEAD + b"X-Half: "])
def test_slow_headers_are_cut(start: Any, sent: bytes) -> None:
    gateway = start("HEADER_SECONDS=0.6")
    with gateway.connect() as sock:
        sock.sendall(sent)
        assert 0.3 < seconds_until_closed(sock) < 5
    assert "no complete headers after 0.6 s" in gateway.log.read_text()


def test_headers_that_drip_are_cut_all_the_same(start: Any) -> None:
    gateway = start("HEADER_SECONDS=0.6")
    with gateway.connect() as sock:
        drip(sock, HEAD * 1000, deadline=8)


def test_slow_headers_of_a_later_request_are_cut(start: Any) -> None:
    gateway = start("HEADER_SECONDS=0.6")
    with gateway.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        assert gateway.read_answer(sock).startswith(b"HTTP/1.1 200 ")
        time.sleep(1)  # an idle connection is not a slow one
        sock.sendall(b"POST /v1/fl")
        assert 0.3 < seconds_until_closed(sock) < 5


def test_idle_connections_are_closed_after_their_time(start: Any) -> None:
    gateway = start("IDLE_SECONDS=1")
    with gateway.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        assert gateway.read_answer(sock).startswith(b"HTTP/1.1 200 ")
        assert 0.5 < seconds_until_closed(sock) < 6


def test_a_handshake_that_does_not_come_is_cut(start: Any) -> None:
    gateway = start("HANDSHAKE_SECONDS=0.6")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as sock:
        assert 0.3 < seconds_until_closed(sock) < 5


@pytest.mark.parametrize(
    ("limits", "pause", "reason"),
    [
        ("GAP_SECONDS=0.5", 20, b"the body stopped coming"),
        ("BODY_SECONDS=0.7", 0.1, b"the body came too slowly"),
        ("REQUEST_SECONDS=0.7", 0.1, b"the request took too long"),
    ],
)
def test_slow_bodies_end_with_an_answer_after_which_sites_try_again(
    start: Any, upstream: Any, limits: str, pause: float, reason: bytes
) -> None:
    gateway = start(limits)
    with gateway.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        stopped = threading.Event()

        def drip() -> None:
            while not stopped.is_set():
                try:
                    sock.sendall(b"x")
                except OSError:
                    return
                stopped.wait(pause)

        thread = threading.Thread(target=drip)
        thread.start()
        answer = sock.recv(65536)
        answer += sock.recv(65536) if reason not in answer else b""
        stopped.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert reason in answer
    assert upstream.arrivals == []


def test_a_refused_body_is_not_read_for_ever(start: Any) -> None:
    gateway = start("LINGER_SECONDS=0.5")
    with gateway.connect() as sock:
        sock.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
        drip(sock, bytes(100_000), deadline=8)


# Many peers


def test_500_idle_connections_do_not_stop_a_site(start: Any, idle: Any) -> None:
    gateway = start()
    with gateway.client() as site:
        assert site.post(GET_RUN, content=b"1").status_code == 200
        idle(lambda: socket.create_connection(("127.0.0.1", gateway.port), timeout=20), 250)
        idle(gateway.connect, 250)
        assert site.post(GET_RUN, content=b"1").status_code == 200
    with gateway.client() as newcomer:
        begin = time.monotonic()
        assert newcomer.post(GET_RUN, content=b"1").status_code == 200
        assert time.monotonic() - begin < 5


def test_a_site_keeps_its_connection_while_its_own_address_floods(start: Any, idle: Any) -> None:
    gateway = start("MAX_CONNECTIONS_PER_ADDRESS=5")
    with gateway.connect() as site:
        for _ in range(3):
            site.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            assert gateway.read_answer(site).startswith(b"HTTP/1.1 200 ")
            flood = idle(gateway.connect, 10)
        assert seconds_until_closed(flood[0]) < 1


def test_slow_bodies_of_one_address_hold_no_more_than_their_share_of_memory(start: Any, upstream: Any) -> None:
    gateway = start("BODY_MEMORY_PER_ADDRESS=2000 WAIT_SECONDS=0.5")
    with gateway.connect() as slow, gateway.client() as site:
        slow.sendall(HEAD + b"Content-Length: 1500\r\n\r\nx")
        time.sleep(0.3)
        assert site.post(GET_RUN, content=bytes(500)).status_code == 200
        answer = site.post(GET_RUN, content=bytes(501))
        assert (answer.status_code, answer.text) == (503, "too many requests at once; try again\n")
        slow.sendall(bytes(1499))
        assert gateway.read_answer(slow).startswith(b"HTTP/1.1 200 ")
        assert site.post(GET_RUN, content=bytes(501)).status_code == 200


def test_a_peer_that_leaves_in_the_middle_of_a_body_changes_nothing(gateway: Any, upstream: Any) -> None:
    for _ in range(20):
        with gateway.connect() as sock:
            sock.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(1000))
    with gateway.client() as client:
        assert client.post(GET_RUN, content=b"1").status_code == 200
    assert [each.body for each in upstream.arrivals] == [b"1"]
    assert "Traceback" not in gateway.log.read_text()


# TLS


def test_tls_1_1_and_plain_http_are_refused(gateway: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", gateway.port)) as sock,
        pytest.raises(ssl.SSLError, match=r"(?i)version|eof"),
    ):
        context.wrap_socket(sock)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{gateway.port}/health", trust_env=False)
    with gateway.client() as client:
        assert client.get("/health").status_code == 200


# The SuperLink


def test_without_superlink_sites_are_told_to_try_again(start: Any, serving: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        gateway = start("HEALTH_KEPT_SECONDS=0", port=port)
        with gateway.client() as client:
            answer = client.post(GET_RUN, content=b"1")
            assert (answer.status_code, answer.text) == (503, "the SuperLink is not reachable; try again\n")
            health = client.get("/health")
            assert (health.status_code, health.text) == (503, "the SuperLink is not reachable\n")
    with serving(port), gateway.client() as client:
        assert client.get("/health").status_code == 200
        assert client.post(GET_RUN, content=b"1").status_code == 200
    with gateway.client() as client:
        assert client.post(GET_RUN, content=b"1").status_code == 503


def test_a_superlink_with_a_foreign_certificate_gets_nothing(start: Any, foreign_upstream: Any) -> None:
    gateway = start(port=foreign_upstream.port)
    with gateway.client() as client:
        assert client.post(GET_RUN, content=b"1").status_code == 503
        assert client.get("/health").status_code == 503
    assert foreign_upstream.arrivals == []


def test_a_superlink_that_hangs_or_breaks_off_is_reported(start: Any, upstream: Any) -> None:
    gateway = start("UPSTREAM_SECONDS=0.5")

    async def hang(send: Send) -> None:
        await asyncio.sleep(2)

    async def break_off(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    with gateway.client() as client:
        upstream.answer = hang
        assert client.post(GET_RUN, content=b"1").status_code == 504
        upstream.answer = break_off
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            client.post(GET_RUN, content=b"1")
        upstream.answer = None
        assert client.post(GET_RUN, content=b"1").status_code == 200


# Its log and its end


def test_the_log_names_what_was_refused_and_nothing_else(start: Any) -> None:
    gateway = start("LOGGED_REFUSALS=3")
    with gateway.client() as client:
        client.post(GET_RUN, content=b"secret", headers={"flwr-public-key": "secret"})
        for number in range(10):
            client.post(f"/v1/control/{number}%0a{'x' * 500}", content=b"secret")
    lines = gateway.log.read_text().splitlines()
    assert [line.split(" ", 3)[3][:45] for line in lines[1:]] == [
        f"refused 127.0.0.1 POST /v1/control/{number}%0a{'x' * 7}"[:45] for number in range(3)
    ]
    assert all(len(line) < 300 for line in lines)
    assert "secret" not in gateway.log.read_text()


def test_sigterm_lets_a_request_finish_and_ends_with_0(start: Any, upstream: Any, idle: Any) -> None:
    gateway = start()
    idle(gateway.connect, 20)
    with gateway.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 4\r\n\r\nab")
        time.sleep(0.3)
        gateway.popen.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError, match=r"(?i)refused"):
            gateway.connect()
        sock.sendall(b"cd")
        assert gateway.read_answer(sock).startswith(b"HTTP/1.1 200 ")
    assert gateway.popen.wait(8) == 0
    assert "the gateway has ended" in gateway.log.read_text()
    assert "Traceback" not in gateway.log.read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"upstream": "http://127.0.0.1:1"}, "https://host:port and nothing more"),
        ({"upstream": "https://127.0.0.1:1/v1"}, "https://host:port and nothing more"),
        ({"upstream_ca": Path("none.crt")}, "cannot be used to check the SuperLink"),
        ({"bind": "8443"}, "must be host:port"),
        ({"bind": "127.0.0.1:99999"}, "must be host:port"),
        ({"bind": "256.0.0.1:0"}, "no address of this machine"),
        ({"bind": "192.0.2.1:0"}, "cannot listen on"),
        ({"certificate": Path("none.crt")}, "belong together"),
        ({"key": "ca.key"}, "belong together"),
    ],
)
def test_what_cannot_be_used_is_said(pki: Path, changes: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"upstream": "https://127.0.0.1:1", "upstream_ca": pki / "ca.crt"}
    arguments |= {"bind": "127.0.0.1:0", "certificate": pki / "server.crt", "key": pki / "server.key"}
    arguments |= {name: pki / value if name == "key" else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=sentence):
        run_gateway(**arguments)


def test_a_taken_port_ends_with_a_sentence_and_code_2(gateway: Any, pki: Path) -> None:
    command = [sys.executable, "-m", "icmoe_server.gateway", "--upstream", "https://127.0.0.1:1"]
    command += ["--upstream-ca", str(pki / "ca.crt"), "--bind", f"127.0.0.1:{gateway.port}"]
    command += ["--certificate", str(pki / "server.crt"), "--key", str(pki / "server.key")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_neither_torch_nor_flower_is_loaded() -> None:
    program = "import json, sys, icmoe_server.gateway; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    modules = set(json.loads(ended.stdout))
    assert "icmoe_server.gateway_app" in modules
    assert not modules & {"torch", "flwr", "ray", "numpy", "fastapi", "pydantic"}
