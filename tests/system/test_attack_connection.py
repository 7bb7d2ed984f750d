"""Everything that can be wrong between a hospital and the centre: each gets its own sentence, exit code 5, and an end.

A real SuperLink behind real gateways; at the hospitals the real ``icmoe-fl client --site``, one process for each fault,
all of them at the same time.
"""

import http.client
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from icmoe.data.checked import write_checked
from icmoe.data.checking import check_data
from icmoe.flower_engine import ControlClient, flower_environment, public_key_bytes, superlink_command
from icmoe_client.site_init import init_site
from icmoe_client.site_keys import flower_public_key
from icmoe_server.pki import make_ca, make_server_certificate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ELSEWHERE = "127.0.0.2"
"""Also this machine, and not in the certificate."""

AT_ONCE = 90.0
"""Seconds within which a fault that no waiting mends ends a client, with a dozen of them on two cores."""

CLOCK = """\
# The clock of a machine that is off by as many seconds as a file says.
import datetime, os, sys, time

REAL, REAL_TIME = datetime.datetime, time.time


def ahead():
    with open(os.environ["TEST_CLOCK"]) as file:
        return float(file.read())


class Kind(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, REAL)


class Wrong(REAL, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return REAL.now(tz) + datetime.timedelta(seconds=ahead())


time.time = lambda: REAL_TIME() + ahead()
if any("flower-supernode" in argument for argument in sys.orig_argv):
    datetime.datetime = Wrong
"""


@dataclass
class Client:
    """``icmoe-fl client --site`` of one hospital.

    Attributes:
        process: of the command.
        log: its output.
        started: on the monotonic clock.
        ended: likewise; ``None`` while it runs.
    """

    process: "subprocess.Popen[bytes]"
    log: Path
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def __post_init__(self) -> None:
        threading.Thread(target=self._note_end, daemon=True).start()

    def _note_end(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()

    @property
    def output(self) -> str:
        """Without line breaks: a table wraps sentences."""
        return " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())

    @property
    def seconds(self) -> float:
        """From start to end."""
        assert self.ended is not None
        return self.ended - self.started


@dataclass
class Study:
    """A centre's folder, its sites, and what runs."""

    root: Path
    superlink: int
    control: ControlClient
    stack: ExitStack
    ports: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        """Start a process that ends with the module; its log is ``name.log``."""
        full = flower_environment(self.root / f"home-{name}", OMP_NUM_THREADS="1", COLUMNS="200", **environment)
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=full, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.stack.callback(kill_all, process)
        return process

    def open_gateway(
        self, name: str, *, host: str = "127.0.0.1", port: int = 0, certificate: str = "server"
    ) -> "subprocess.Popen[bytes]":
        """Open a door to the SuperLink; ``ports`` says where."""
        command = [sys.executable, "-m", "icmoe_server.gateway", "--upstream", f"https://127.0.0.1:{self.superlink}"]
        command += ["--upstream-ca", str(self.root / "ca.crt"), "--bind", f"{host}:{port}"]
        command += ["--certificate", str(self.root / f"{certificate}.crt"), "--key", str(self.root / "server.key")]
        process = self.run(name, command)
        log = self.root / f"{name}.log"
        wait_for(lambda: process.poll() is not None or " port " in log.read_text())
        self.ports[name] = int(re.findall(r" port (\d+) ", log.read_text())[0])
        return process

    def add_site(self, name: str, server: str, *, registered: bool = True, ca: str = "ca") -> int | None:
        """Make a hospital, and let the centre know it; Flower's node id."""
        site = init_site(
            self.root / "sites",
            name=name,
            server=server,
            data=self.root / "data",
            ca_sha256=None,
            ca_file=self.root / f"{ca}.crt",
        ).site
        return self.control.register(flower_public_key(site.flower_key), name=name) if registered else None

    def start_client(self, name: str, *options: str, log: str = "", **environment: str) -> Client:
        command = [str(Path(sys.executable).with_name("icmoe-fl")), "client", "--site", name]
        command += ["--config", str(self.root / "sites" / f"{name}.yaml"), *options]
        cache = {"ICMOE_CACHE_DIR": str(self.root / "cache")}
        log = log or f"client-{name}"
        return Client(self.run(log, command, **cache, **environment), self.root / f"{log}.log")

    def key(self, name: str) -> Path:
        return self.root / "sites" / name / "flower.key"

    def is_online(self, name: str) -> bool:
        key = public_key_bytes(flower_public_key(self.key(name)))
        return any(node.online for node in self.control.nodes() if node.public_key == key)

    def wrong_clock(self, name: str, seconds: float) -> dict[str, str]:
        """Environment of a machine whose clock is ahead by some seconds."""
        (self.root / "clock").mkdir(exist_ok=True)
        (self.root / "clock" / "sitecustomize.py").write_text(CLOCK)
        self.set_clock(name, seconds)
        return {"PYTHONPATH": str(self.root / "clock"), "TEST_CLOCK": str(self.root / f"{name}.clock")}

    def set_clock(self, name: str, seconds: float) -> None:
        whole = self.root / f"{name}.clock.new"
        whole.write_text(str(seconds))
        whole.replace(self.root / f"{name}.clock")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        top = psutil.Process(process.pid)
        for member in [top, *top.children(recursive=True)]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait(30)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"nothing within {seconds:.0f} s"
        time.sleep(0.2)
    return found


def write_data(folder: Path) -> None:
    """Four images that passed the check; no client of this module trains on them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,mask,patient,split"]
    for number, split in enumerate(("train", "train", "val", "test")):
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / f"{number}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 16 + number : 48] = 1
        Image.fromarray(mask).save(folder / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,p{number},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    write_checked(check_data(folder, classes={"disc": 1}, num_workers=1), folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A centre, three more doors that are wrong in one way each, and a hospital for every fault."""
    root = tmp_path_factory.mktemp("connection")
    make_ca(root)
    make_server_certificate(root, names=[])
    shutil.copy(root / "server.key", root / "expired.key")
    make_server_certificate(root, names=[], name="expired", at=datetime.now(UTC) - timedelta(days=500))
    (root / "stranger").mkdir()
    make_ca(root / "stranger")
    shutil.copy(root / "stranger" / "ca.crt", root / "stranger.crt")
    (root / "secret").write_bytes(secrets.token_bytes(32))
    write_data(root / "data")
    port = free_port()
    files = {"certificate": root / "server.crt", "key": root / "server.key", "ca_certificate": root / "ca.crt"}
    with ExitStack() as stack:
        control = stack.enter_context(ControlClient(port=port, ca_certificate=root / "ca.crt"))
        made = Study(root=root, superlink=port, control=control, stack=stack)
        made.run("superlink", superlink_command(port=port, database=root / "db", secret=root / "secret", **files))
        wait_for(lambda: answers(port))
        made.open_gateway("centre")
        made.open_gateway("expired", certificate="expired")
        made.open_gateway("elsewhere", host=ELSEWHERE)
        made.ports |= {"plain": free_port(), "early": free_port()}
        made.run("plain", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(made.ports["plain"])])
        for name in ("first", "ahead", "behind", "drifting", "cutoff"):
            made.add_site(name, f"127.0.0.1:{made.ports['centre']}")
        for name in ("expired", "plain", "early"):
            made.add_site(name, f"127.0.0.1:{made.ports[name]}")
        made.add_site("elsewhere", f"{ELSEWHERE}:{made.ports['elsewhere']}")
        made.add_site("distrustful", f"127.0.0.1:{made.ports['centre']}", ca="stranger")
        made.add_site("unknown", f"127.0.0.1:{made.ports['centre']}", registered=False)
        node = made.add_site("revoked", f"127.0.0.1:{made.ports['centre']}")
        assert node is not None
        control.unregister(node)
        made.add_site("copy", f"127.0.0.1:{made.ports['centre']}", registered=False)
        shutil.copy(made.key("first"), made.key("copy"))
        yield made


def answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def told(study: Study) -> dict[str, Client]:
    """All faults at once; every client that must end has ended."""
    clients = {"first": study.start_client("first")}
    wait_for(lambda: study.is_online("first"))
    for name in ("unknown", "revoked", "copy", "plain", "distrustful", "expired", "elsewhere", "early", "cutoff"):
        clients[name] = study.start_client(name)
    clients["second"] = study.start_client("first", log="second")
    for name, seconds in (("ahead", 600), ("behind", -600), ("drifting", 0)):
        clients[name] = study.start_client(name, **study.wrong_clock(name, seconds))
    wait_for(lambda: study.is_online("cutoff") and study.is_online("drifting"), seconds=120)
    study.control.unregister(next(node.node_id for node in study.control.nodes() if is_key(node, study.key("cutoff"))))
    study.set_clock("drifting", 600)
    for name in ("cutoff", "drifting"):
        clients[name].started = time.monotonic()
    ending = [client for name, client in clients.items() if name not in ("first", "early")]
    wait_for(lambda: all(client.ended for client in ending), seconds=240)
    return clients


def is_key(node: Any, key: Path) -> bool:
    return bool(node.public_key == public_key_bytes(flower_public_key(key)))


def received(plain: socket.socket) -> bytes:
    try:
        return plain.recv(100)
    except ConnectionError:
        return b""


@pytest.mark.parametrize(
    ("name", "sentence", "remedy"),
    [
        ("unknown", "does not accept the key of unknown: it was not added yet, or was revoked", "'icmoe-fl sites add'"),
        ("revoked", "does not accept the key of revoked: it was not added yet, or was revoked", "A revoked key never"),
        ("plain", "answers, but in plain text instead of TLS", "Never go on without TLS"),
        ("distrustful", "comes from an unknown authority: CN=icmoe-fl CA", "Do not go on"),
        ("expired", "The certificate of 127.0.0.1, or of its authority, has expired on 20", "--renew"),
        ("elsewhere", "The certificate is not for 127.0.0.2 but for localhost, 127.0.0.1", "Write one of these names"),
        ("ahead", "clock is 600 s ahead of the centre's", "Let the clock be set by NTP"),
        ("behind", "clock is 600 s behind the centre's", "Let the clock be set by NTP"),
        ("second", "the key of first is in use: its client runs on this machine already", "Leave that one alone"),
    ],
)
def test_attack_or_fault_at_the_start_ends_at_once(
    told: dict[str, Client], name: str, sentence: str, remedy: str
) -> None:
    client = told[name]
    output = re.sub(r"\b(599|601) s", "600 s", client.output)
    assert client.process.returncode == 5, client.output
    assert sentence in output
    assert remedy in output
    assert "Traceback" not in output
    assert "is connected" not in output
    assert client.seconds < AT_ONCE


def test_attack_with_a_copied_key_ends_and_the_first_goes_on(study: Study, told: dict[str, Client]) -> None:
    copy, first = told["copy"], told["first"]
    assert copy.process.returncode == 5, copy.output
    assert "holds this key as in use: that is so for a minute after a crash. Trying on." in copy.output
    assert "another process, on this machine or on one that has a copy of the key, is connected with it" in copy.output
    assert "does not answer" not in copy.output
    assert "Traceback" not in copy.output
    assert copy.seconds > 75
    assert first.ended is None
    assert study.is_online("first")
    assert first.output.count("is connected to") == 1
    assert "Trying on" not in first.output


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cutoff", "does not accept the key of cutoff: it was not added yet, or was revoked"),
        ("drifting", "clock is 600 s ahead of the centre's"),
    ],
)
def test_attack_or_fault_on_the_way_ends_a_connected_client(told: dict[str, Client], name: str, sentence: str) -> None:
    client = told[name]
    assert f"{name} is connected to" in client.output
    assert client.process.returncode == 5, client.output
    assert sentence in re.sub(r"\b(599|601) s", "600 s", client.output)
    assert "Traceback" not in client.output
    assert client.seconds < AT_ONCE


def test_a_centre_that_is_not_up_is_waited_for_aloud(study: Study, told: dict[str, Client]) -> None:
    early, waiting = told["early"], f"Nobody listens at 127.0.0.1:{study.ports['early']}. Trying on."
    assert early.output.count(waiting) >= 1
    door = study.open_gateway("early door", port=study.ports["early"])
    wait_for(lambda: "early is connected to" in early.output)
    assert study.is_online("early")
    before = early.output.count(waiting)
    kill_all(door)
    wait_for(lambda: early.output.count(waiting) > before)
    study.open_gateway("early door again", port=study.ports["early"])
    supernode = study.root / "sites" / "early" / "state" / "logs" / "supernode.log"
    wait_for(lambda: "Connection successful" in supernode.read_text() or early.output.count("is connected to") > 1)
    assert early.ended is None
    early.process.send_signal(signal.SIGTERM)
    assert early.process.wait(60) == 0, early.output
    assert not study.is_online("early")


def test_check_disturbs_nobody(study: Study, told: dict[str, Client]) -> None:
    """Neither a SuperNode at work nor the centre's view of a site that was never online."""
    running, away = (
        study.start_client("first", "--check", log="check"),
        study.start_client("ahead", "--check", log="away"),
    )
    for client in (running, away):
        assert client.process.wait(AT_ONCE) == 0, client.output
    pid = told["first"].process.pid
    in_use = f"accepts the key of first, and it is in use: the client of this machine runs as process {pid}."
    assert in_use in running.output
    assert "The centre accepts the key of ahead." in away.output
    assert told["first"].output.count("is connected to") == 1
    assert study.is_online("first")
    assert [node.last_seen for node in study.control.nodes() if is_key(node, study.key("ahead"))] == [None]


def test_attack_in_plain_text_gets_no_answer(study: Study, told: dict[str, Client]) -> None:
    with socket.create_connection(("127.0.0.1", study.ports["centre"]), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"HTTP" not in received(plain)
    tls = ssl.create_default_context(cafile=study.root / "ca.crt")
    secured = http.client.HTTPSConnection("127.0.0.1", study.ports["centre"], timeout=20, context=tls)
    secured.request("GET", "/health")
    assert secured.getresponse().status == 200
    secured.close()
