"""A centre folder and a run that says something, without the rest of a centre."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from icmoe_server.operator.messages import ChildInfo
from icmoe_server.operator.server import serve_operator
from icmoe_server.operator.service import OperatorService

SITES = ("hospitalA", "hospitalB", "hospitalC")


def line(server_round: int, **more: Any) -> dict[str, Any]:
    """A line of ``rounds.jsonl`` as the ServerApp writes it."""
    answered = [site for site in SITES if site not in more.get("missing", {}) and site not in more.get("failed", {})]
    dice = {site: min(0.99, 0.5 + 0.04 * server_round + 0.05 * number) for number, site in enumerate(answered)}
    shares = {"basic.0": 0.25, "semantic.0": 0.25, "adaptive.0": 0.3, "adaptive.1": 0.2}
    return {
        "round": server_round, "asked": list(SITES), "answered": answered, "scored_round": server_round - 1,
        "failed": {}, "quarantined": {}, "val_dice": dice, "train_loss": dict.fromkeys(answered, 1.5),
        "num_examples": dict.fromkeys(answered, 3), "bytes_up": dict.fromkeys(answered, 220_272),
        "bytes_down": dict.fromkeys(SITES, 220_272), "expert_shares": dict.fromkeys(answered, shares),
        "epsilon": dict.fromkeys(answered), "aggregated": True, "seconds": 21.5, "missing": {}, "refused": {},
        "late": 0, "waited": 0.0, **more,
    }  # fmt: skip


def status(state: str, server_round: int, **sites: str) -> dict[str, Any]:
    """A ``status.json`` with a site in each state."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    roll_call = {site: {"state": word, "since": since, "reason": None} for site, word in sites.items()}
    return {
        "state": state, "round": server_round, "num_rounds": 10, "reason": None, "updated": since,
        "roll_call": roll_call,
    }  # fmt: skip


@dataclass
class Run:
    """A run directory, a list of processes, and how to write them."""

    run_dir: Path
    children: list[ChildInfo] = field(
        default_factory=lambda: [ChildInfo("superlink", 101, "running", 0), ChildInfo("gateway", 102, "running", 0)]
    )

    def say(self, content: dict[str, Any]) -> None:
        """Replace ``status.json``, as a whole."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.run_dir / ".status.tmp"
        temporary.write_text(json.dumps(content))
        temporary.replace(self.run_dir / "status.json")

    def service(self) -> OperatorService:
        """Serve this run, looking at its files often."""
        return OperatorService(self.run_dir, lambda: list(self.children), poll_seconds=0.02)


@dataclass(frozen=True)
class Authority:
    """A private CA that signs."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, *, valid_days: int = 1) -> tuple[bytes, bytes]:
        """Certificate and key of ``name``, for localhost and 127.0.0.1; ``valid_days=0`` is an expired one."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        certificate = (
            _builder(name, self.certificate.subject, key, valid_days=valid_days)
            .add_extension(alternative, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    certificate = _builder("test CA", name, key).add_extension(constraints, critical=True).sign(key, hashes.SHA256())
    return Authority(certificate, key)


def _builder(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, valid_days: int = 1
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=valid_days, hours=-1))
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def make_centre(root: Path, *, tcp: str | None = None) -> Any:
    """Give the part of a ``Centre`` that the operator service uses, with its certificates."""
    centre = SimpleNamespace(
        root=root,
        socket=root / "state" / "operator.sock",
        ca_cert=root / "ca.crt",
        server_cert=root / "server.crt",
        server_key=root / "server.key",
        operator_cert=root / "operator.crt",
        operator_key=root / "operator.key",
        config=SimpleNamespace(operator=SimpleNamespace(tcp=tcp)),
    )
    root.mkdir(parents=True, exist_ok=True)
    centre.authority = authority = make_authority()
    centre.ca_cert.write_bytes(authority.pem())
    for name, cert, key in (
        ("server", centre.server_cert, centre.server_key),
        ("operator", centre.operator_cert, centre.operator_key),
    ):
        for path, content in zip((cert, key), authority.issue(name), strict=True):
            path.write_bytes(content)
    return centre


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "cardiac")


@pytest.fixture
def serve() -> Iterator[Callable[[Any, Run], grpc.Server]]:
    """Start servers that end with the test."""
    servers: list[grpc.Server] = []

    def start(centre: Any, run: Run) -> grpc.Server:
        servers.append(serve_operator(centre, run.service()))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(None).wait()
