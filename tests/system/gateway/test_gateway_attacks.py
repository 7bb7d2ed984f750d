"""Attacks on a real SuperLink through the real gateway, while a real SuperNode has to stay online."""

import importlib
import pkgutil
import re
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import flwr.proto
import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from icmoe_server.gateway_app import FLEET_PATHS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
PATIENCE = 5.0


def flower_paths() -> list[str]:
    """Every call of every interface that this Flower knows, from its routes and from its protocol files."""
    paths = {path for _, path in PROTOBUF_REQUEST_TYPES}
    for module in pkgutil.iter_modules(flwr.proto.__path__):
        if not module.name.endswith("_pb2"):
            continue
        services = importlib.import_module(f"flwr.proto.{module.name}").DESCRIPTOR.services_by_name.values()
        for service in services:
            for method in service.methods:
                call = re.sub(r"(?<!^)(?=[A-Z])", "-", method.name).lower()
                paths |= {f"/v1/{service.name.lower()}/{call}", f"/{service.full_name}/{method.name}"}
    return sorted(paths)


FORBIDDEN = [path for path in flower_paths() if path not in FLEET_PATHS.values()]

# How a path may be spelled so that a careless prefix match lets it in.
SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda path: path,
    "dots": lambda path: f"/v1/fleet/../..{path}",
    "encoded dots": lambda path: f"/v1/fleet/%2e%2e/%2E%2E{path}",
    "encoded slashes": lambda path: "/v1/fleet/get-run/..%2f..%2f..%2f.." + path.replace("/", "%2f"),
    "double slashes": lambda path: path.replace("/", "//"),
    "upper case": str.upper,
    "encoded letter": lambda path: path[:4] + f"%{ord(path[4]):02x}" + path[5:],
    "parameters": lambda path: f"/v1/fleet/get-run;/..;/../..{path}",
    "query": lambda path: f"/v1/fleet/get-run?/../../..{path}",
    "trailing slash": lambda path: f"{path}/",
    "whole address": lambda path: f"https://127.0.0.1{path}",
}


def test_the_attack_works_without_the_gateway(world: Any) -> None:
    """Else the tests below would prove nothing."""
    with world.http(world.superlink) as connection:
        status, body = world.ask(connection, "POST", "/v1/control/list-nodes")
    assert status == 200
    assert len(ListNodesResponse.FromString(body).nodes_info) == 2
    assert len(FORBIDDEN) > 100
    assert sum(path.startswith("/v1/control/") for path in FORBIDDEN) >= 40
    assert sum(path.startswith("/v1/runtime/") for path in FORBIDDEN) >= 20


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_attack_by_a_control_or_runtime_call_passes_the_gateway(
    world: Any, served_meanwhile: Any, spelling: str
) -> None:
    with served_meanwhile(), world.http() as connection:
        for path in [*FORBIDDEN, "/docs", "/redoc", "/openapi.json"]:
            assert world.ask(connection, "POST", SPELLINGS[spelling](path)) == (404, b"not found\n"), path
        time.sleep(0.5)
    assert world.control.runs() == {}


def test_no_attack_by_another_method_passes_the_gateway(world: Any, served_meanwhile: Any) -> None:
    with served_meanwhile(), world.http() as connection:
        for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "post"):
            for path in [*FLEET_PATHS.values(), "/v1/control/list-nodes"]:
                expected = 405 if path in FLEET_PATHS.values() else 404
                assert world.ask(connection, method, path)[0] == expected
        time.sleep(0.5)


def test_fleet_calls_without_a_registered_key_are_refused_by_flower(world: Any) -> None:
    with world.http() as connection:
        answers = {path: world.ask(connection, "POST", path)[0] for path in FLEET_PATHS.values()}
    assert set(answers.values()) <= {400, 401, 403, 404}, answers
    world.check_site()


@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_attack_with_100_mb_bodies(world: Any, served_meanwhile: Any, framing: str) -> None:
    piece = bytes(1_000_000)
    with served_meanwhile():
        for _ in range(3):
            url = f"https://127.0.0.1:{world.gateway}/v1/fleet/push-object"
            content: Any = piece * 100 if framing == "declared" else iter([piece] * 100)
            try:
                answer = httpx.post(url, content=content, headers=PROTOBUF, verify=world.tls, trust_env=False)
                assert answer.status_code == 413
            except httpx.TransportError:
                pass  # cut while it was still sending
    assert world.gateway_process.memory_full_info().pss < 150e6


def test_attack_with_slow_headers_slow_bodies_and_500_idle_connections(world: Any, served_meanwhile: Any) -> None:
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\n"
    quiet = world.gateway_process.memory_full_info().pss
    with ExitStack() as stack, served_meanwhile():
        for number in range(500):
            if number % 2:
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", world.gateway), timeout=30))
            else:
                peer = stack.enter_context(world.connect())
                peer.sendall((b"", head[:20], head, head + b"Content-Length: 9000\r\n\r\nx")[number % 8 // 2])
        begin = time.monotonic()
        url = f"https://127.0.0.1:{world.gateway}/health"
        assert httpx.get(url, verify=world.tls, trust_env=False).status_code == 200
        assert time.monotonic() - begin < PATIENCE
        time.sleep(35)  # one heartbeat of the SuperNode
        loaded = world.gateway_process.memory_full_info().pss
    print(f"gateway PSS: {quiet / 1e6:.0f} MB before, {loaded / 1e6:.0f} MB with 500 idle connections")
    assert loaded < 200e6


def test_the_gateway_costs_a_call_little(world: Any) -> None:
    seconds: dict[int, list[float]] = {world.superlink: [], world.gateway: []}
    for _ in range(3):  # in turns, so that a busy moment of the machine meets both
        for port, found in seconds.items():
            with world.signed_calls(port) as call:
                call()
                found += [call() for _ in range(100)]
    direct, through = (statistics.median(found) for found in seconds.values())
    pss = world.gateway_process.memory_full_info().pss
    print(
        f"a call takes {through * 1e3:.2f} ms through the gateway and {direct * 1e3:.2f} ms without: "
        f"ratio {through / direct:.2f}; gateway PSS {pss / 1e6:.0f} MB"
    )
    assert through - direct < 0.05
    assert pss < 100e6


def test_the_gateway_log_stays_short_under_attack(world: Any) -> None:
    with world.http() as connection:
        for _ in range(1000):
            world.ask(connection, "POST", "/v1/control/list-nodes")
    lines = (world.logs / "gateway.log").read_text().splitlines()
    assert len(lines) < 300
    assert any("refused 127.0.0.1 POST /" in line for line in lines)
    assert "Traceback" not in "\n".join(lines)
