"""A real SuperLink behind the real gateway, with one real SuperNode online."""

import http.client
import re
import secrets
import signal
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
import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from icmoe.flower_engine import ControlClient, flower_environment, superlink_command, supernode_command
from icmoe_server.pki import make_ca, make_server_certificate

PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
PATIENCE = 5.0
"""Seconds that a site's call may take under attack; Flower itself waits 30."""


@dataclass
class World:
    """A centre with one site online."""

    tls: ssl.SSLContext
    superlink: int
    gateway: int
    gateway_process: psutil.Process
    control: ControlClient
    site_key: bytes
    site_process: "subprocess.Popen[bytes]"
    logs: Path
    probe_key: ec.EllipticCurvePrivateKey

    def connect(self, port: int | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port or self.gateway), timeout=30)
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1")

    def ask(self, connection: http.client.HTTPSConnection, method: str, target: str) -> tuple[int, bytes]:
        """Send a target as it is spelled; a client library would tidy it up."""
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in PROTOBUF.items():
            connection.putheader(name, value)
        connection.putheader("content-length", "0")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()

    @contextmanager
    def http(self, port: int | None = None) -> Iterator[http.client.HTTPSConnection]:
        connection = http.client.HTTPSConnection("127.0.0.1", port or self.gateway, timeout=30, context=self.tls)
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def signed_calls(self, port: int) -> Iterator[Callable[[], float]]:
        """A second registered node, by whose signed calls the service is measured; each gives its seconds."""
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(self.probe_key, self.probe_key.public_key()),
        ]
        authority = (self.logs.parent / "ca.crt").read_bytes()
        with FleetHttpClient.from_server_address(f"127.0.0.1:{port}", False, authority, interceptors) as client:
            key = public_key_to_bytes(self.probe_key.public_key())
            node = client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30))
            request = PullMessagesRequest()
            request.node.node_id = node.node_id

            def call() -> float:
                start = time.perf_counter()
                client.PullMessages(request)
                return time.perf_counter() - start

            try:
                yield call
            finally:
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    def check_site(self) -> None:
        """The SuperNode has noticed nothing."""
        assert self.site_process.poll() is None
        assert [node.online for node in self.control.nodes() if node.public_key == self.site_key] == [True]
        assert "attempt failed" not in (self.logs / "site.log").read_text()


@dataclass
class Watch:
    """Signed calls in the background; ``slowest`` in seconds."""

    seconds: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)


@pytest.fixture
def served_meanwhile(world: World) -> Callable[[], AbstractContextManager[None]]:
    """Fail if a site's calls fail or become slow while the block attacks."""
    return lambda: watched(world)


@contextmanager
def watched(world: World) -> Iterator[None]:
    watch, ended = Watch(), threading.Event()

    def go_on() -> None:
        try:
            with world.signed_calls(world.gateway) as call:
                while not ended.is_set():
                    watch.seconds.append(call())
                    ended.wait(0.1)
        except (httpx.HTTPError, OSError) as error:
            watch.errors.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)
    assert watch.errors == []
    assert len(watch.seconds) >= 3
    assert max(watch.seconds) < PATIENCE
    world.check_site()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def openssh(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, str]:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public.decode()


@contextmanager
def running(command: list[str], folder: Path, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    environment = flower_environment(folder / f"home-{name}")
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        if process.poll() is None:
            family += family[0].children(recursive=True)
            process.send_signal(signal.SIGTERM)
            psutil.wait_procs(family, timeout=10)
        for member in family[1:]:
            if member.is_running():
                member.kill()
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    pki = tmp_path_factory.mktemp("centre")
    logs = pki / "logs"
    logs.mkdir()
    make_ca(pki)
    make_server_certificate(pki, names=[])
    (pki / "secret").write_bytes(secrets.token_bytes(32))
    files = {"certificate": pki / "server.crt", "key": pki / "server.key", "ca_certificate": pki / "ca.crt"}
    tls = ssl.create_default_context(cafile=pki / "ca.crt")
    superlink_port = free_port()
    site_key, probe_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    private, public = openssh(site_key)
    (pki / "site.key").write_bytes(private)
    with ExitStack() as stack:

        def start(command: list[str], name: str) -> "subprocess.Popen[bytes]":
            return stack.enter_context(running(command, logs, name))

        start(superlink_command(port=superlink_port, database=pki / "db", secret=pki / "secret", **files), "superlink")
        command = [sys.executable, "-m", "icmoe_server.gateway", "--upstream", f"https://127.0.0.1:{superlink_port}"]
        command += ["--upstream-ca", str(files["ca_certificate"]), "--bind", "127.0.0.1:0"]
        command += ["--certificate", str(files["certificate"]), "--key", str(files["key"])]
        gateway = start(command, "gateway")
        log = logs / "gateway.log"
        gateway_port = int(wait_for(lambda: re.findall(r" port (\d+) ", log.read_text()))[0])
        health = f"https://127.0.0.1:{gateway_port}/health"
        wait_for(lambda: httpx.get(health, verify=tls, trust_env=False).is_success)
        control = stack.enter_context(ControlClient(port=superlink_port, ca_certificate=files["ca_certificate"]))
        control.register(public, name="hospitalA")
        control.register(openssh(probe_key)[1], name="probe")
        site = start(
            supernode_command(
                server=f"127.0.0.1:{gateway_port}",
                ca_certificate=files["ca_certificate"],
                key=pki / "site.key",
                site="hospitalA",
                port=free_port(),
            ),
            "site",
        )
        wait_for(lambda: any(node.online for node in control.nodes()))
        yield World(
            tls=tls,
            superlink=superlink_port,
            gateway=gateway_port,
            gateway_process=psutil.Process(gateway.pid),
            control=control,
            site_key=public_key_to_bytes(site_key.public_key()),
            site_process=site,
            logs=logs,
            probe_key=probe_key,
        )
