"""Real gRPC over a real Unix socket and over mutual TLS on loopback."""

import json
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from icmoe.errors import ConfigError, ConnectError, TlsError
from icmoe_server.operator.client import OperatorClient, TcpTarget
from icmoe_server.operator.messages import ChildInfo

from .conftest import Run, line, make_authority, make_centre, status

Serve = Callable[[Any, Run], grpc.Server]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def health_of(centre: Any, service: str) -> int:
    with grpc.insecure_channel(f"unix:{centre.socket}") as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)


def test_the_socket_answers_its_user_only_and_goes_away(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    run.say(status("training", 3, hospitalA="asked"))
    server = serve(centre, run)
    assert stat.S_IMODE(centre.socket.stat().st_mode) == 0o600
    with OperatorClient(centre.socket) as client:
        reply = client.status()
    assert (reply.run, reply.state, reply.round, reply.num_rounds) == ("cardiac", "training", 3, 10)
    assert [child.name for child in reply.children] == ["superlink", "gateway"]
    server.stop(None).wait()
    assert not centre.socket.exists()
    with OperatorClient(centre.socket) as client, pytest.raises(ConnectError, match="icmoe-fl server start"):
        client.status()


def test_a_socket_left_by_a_killed_centre_is_replaced(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    centre.socket.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(centre.socket))
    with OperatorClient(centre.socket) as client, pytest.raises(ConnectError, match="nobody answers"):
        client.status()
    serve(centre, run)
    with OperatorClient(centre.socket) as client:
        assert client.status().state == "starting"


def test_the_socket_of_a_living_centre_stays(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    serve(centre, run)
    with pytest.raises(ConnectError, match="another centre answers"):
        serve(centre, run)
    with OperatorClient(centre.socket) as client:
        assert client.status().run == "cardiac"


def test_a_file_in_the_way_and_a_long_path_are_explained(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    centre.socket.parent.mkdir()
    centre.socket.write_text("mine")
    with pytest.raises(ConnectError, match="is no socket"):
        serve(centre, run)
    assert centre.socket.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"operator\.socket"):
        serve(make_centre(tmp_path / ("long" * 30)), run)


def test_health_follows_the_processes(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    serve(centre, run)
    answer = health_pb2.HealthCheckResponse
    assert [health_of(centre, name) for name in ("", "icmoe.centre")] == [answer.SERVING, answer.SERVING]
    run.children[1] = ChildInfo("gateway", None, "restarting", 1)
    deadline = time.monotonic() + 10
    while health_of(centre, "icmoe.centre") != answer.NOT_SERVING:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as unknown:
        health_of(centre, "other")
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


def test_stop_ends_watchers(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    run.say(status("training", 1))
    server = serve(centre, run)
    with OperatorClient(centre.socket) as client:
        events = client.watch()
        assert next(events).status.state == "training"
        server.stop(None).wait()
        with pytest.raises(ConnectError):
            next(events)


@pytest.fixture
def tls(tmp_path: Path, run: Run, serve: Serve) -> tuple[Any, str]:
    address = f"localhost:{free_port()}"
    centre = make_centre(tmp_path / "centre", tcp=address.replace("localhost", "127.0.0.1"))
    serve(centre, run)
    return centre, address


def ask(address: str, ca: Path, cert: Path, key: Path) -> str:
    with OperatorClient(TcpTarget(address, ca, cert, key)) as client:
        return str(client.status().state)


def test_tcp_answers_a_certificate_of_the_centre(tls: tuple[Any, str]) -> None:
    centre, address = tls
    assert ask(address, centre.ca_cert, centre.operator_cert, centre.operator_key) == "starting"


def test_tcp_refuses_no_certificate(tls: tuple[Any, str]) -> None:
    centre, address = tls
    credentials = grpc.ssl_channel_credentials(centre.ca_cert.read_bytes())
    with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


@pytest.mark.parametrize("expired", [False, True])
def test_tcp_refuses_a_foreign_and_an_expired_certificate(tls: tuple[Any, str], tmp_path: Path, expired: bool) -> None:
    centre, address = tls
    issued = centre.authority.issue("operator", valid_days=0) if expired else make_authority().issue("operator")
    cert, key = tmp_path / "my.crt", tmp_path / "my.key"
    cert.write_bytes(issued[0])
    key.write_bytes(issued[1])
    with pytest.raises(TlsError, match="operator certificate of this centre"):
        ask(address, centre.ca_cert, cert, key)


def test_a_centre_we_do_not_know_is_refused(tls: tuple[Any, str], tmp_path: Path) -> None:
    centre, address = tls
    other = tmp_path / "other.crt"
    other.write_bytes(make_authority().pem())
    with pytest.raises(TlsError, match="not trusted"):
        ask(address, other, centre.operator_cert, centre.operator_key)


def test_wrong_addresses_and_files_are_explained(tls: tuple[Any, str], tmp_path: Path) -> None:
    centre, _ = tls
    with pytest.raises(ConnectError, match="nobody answers"):
        ask(f"127.0.0.1:{free_port()}", centre.ca_cert, centre.operator_cert, centre.operator_key)
    with pytest.raises(ConfigError, match="--cert"):
        ask("127.0.0.1:1", centre.ca_cert, tmp_path / "none.crt", centre.operator_key)
    with pytest.raises(TlsError, match="do not belong together"):
        ask(f"127.0.0.1:{free_port()}", centre.ca_cert, centre.operator_cert, centre.server_key)


def test_a_taken_port_is_explained(tmp_path: Path, run: Run, serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        centre = make_centre(tmp_path / "centre", tcp=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConnectError, match=r"operator\.tcp"):
            serve(centre, run)


def test_a_thread_of_the_server_is_free_for_others(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    run.say(status("training", 1))
    serve(centre, run)
    with OperatorClient(centre.socket) as client:
        watchers = [client.watch() for _ in range(16)]
        for watcher in watchers:
            next(watcher)
        with pytest.raises(Exception, match="close one of them"):
            next(client.watch())
        assert client.status().state == "training"
        watchers.pop().close()  # type: ignore[attr-defined]
        assert _within(5, lambda: next(client.watch()).status.state == "training")


def _within(seconds: float, check: Callable[[], bool]) -> bool:
    waiting = threading.Event()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return check()
        except Exception:
            waiting.wait(0.1)
    return check()


def test_lines_of_the_run_arrive(tmp_path: Path, run: Run, serve: Serve) -> None:
    centre = make_centre(tmp_path / "centre")
    run.say(status("finished", 1))
    (run.run_dir / "rounds.jsonl").write_text(f"{json.dumps(line(1))}\n")
    serve(centre, run)
    with OperatorClient(centre.socket) as client:
        events = list(client.watch())
    assert [event.WhichOneof("kind") for event in events] == ["round", "status"]
