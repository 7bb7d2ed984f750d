import hashlib
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from icmoe.errors import ConfigError
from icmoe_server.pki import (
    ca_fingerprint,
    certificate_names,
    days_left,
    make_ca,
    make_client_certificate,
    make_server_certificate,
    write_file,
)

HOST = "fl.example.org"
NAMES = (HOST, "192.0.2.7", "2001:db8::7", HOST)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    make_ca(folder)
    make_server_certificate(folder, names=NAMES)
    make_client_certificate(folder)
    return folder


@contextmanager
def listening(pki: Path, *, name: str = "server", mutual: bool = False) -> Iterator[int]:
    """A TLS server on loopback that says hello to whoever it lets in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    if mutual:
        context.load_verify_locations(pki / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED

    def serve() -> None:
        with suppress(OSError):  # the other side hung up, or the test is over
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                    secured.sendall(b"hello")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def greet(port: int, *, trust: Path, host: str, client: Path | None = None) -> bytes:
    """What a strict client hears that expects ``host``."""
    context = ssl.create_default_context(cafile=str(trust))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if client is not None:
        context.load_cert_chain(client, client.with_suffix(".key"))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        return secured.recv(5)


@pytest.mark.parametrize("host", [*NAMES, "localhost", "127.0.0.1"])
def test_the_right_names_are_accepted(pki: Path, host: str) -> None:
    with listening(pki) as port:
        assert greet(port, trust=pki / "ca.crt", host=host) == b"hello"


@pytest.mark.parametrize("host", ["example.org", "fl.example.com", "192.0.2.8", "127.0.0.2"])
def test_another_host_is_refused(pki: Path, host: str) -> None:
    with listening(pki) as port, pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        greet(port, trust=pki / "ca.crt", host=host)


def test_another_authority_is_refused(pki: Path, tmp_path: Path) -> None:
    make_ca(tmp_path)
    with listening(pki) as port, pytest.raises(ssl.SSLCertVerificationError, match="self-signed certificate in"):
        greet(port, trust=tmp_path / "ca.crt", host=HOST)


def test_an_expired_certificate_is_refused(pki: Path) -> None:
    make_server_certificate(pki, names=[HOST], name="expired", at=datetime.now(UTC) - timedelta(days=398))
    assert days_left(pki / "expired.crt") < 0
    with listening(pki, name="expired") as port, pytest.raises(ssl.SSLCertVerificationError, match="has expired"):
        greet(port, trust=pki / "ca.crt", host=HOST)


def test_an_operator_is_known_by_a_client_certificate(pki: Path) -> None:
    with listening(pki, mutual=True) as port:
        assert greet(port, trust=pki / "ca.crt", host=HOST, client=pki / "operator.crt") == b"hello"


@pytest.mark.parametrize("client", [None, "server.crt"])
def test_nobody_else_passes_as_an_operator(pki: Path, client: str | None) -> None:
    with listening(pki, mutual=True) as port, pytest.raises((ssl.SSLError, ConnectionError)):
        greet(port, trust=pki / "ca.crt", host=HOST, client=pki / client if client else None)


def test_an_operators_certificate_makes_no_server(pki: Path) -> None:
    with listening(pki, name="operator") as port, pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        greet(port, trust=pki / "ca.crt", host=HOST)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_chain(pki: Path) -> None:
    for purpose, name in (("sslserver", "server"), ("sslclient", "operator")):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.crt", f"{name}.crt"]
        done = subprocess.run(command, cwd=pki, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, f"{name}.crt: OK"), done.stderr


def test_the_server_sends_leaf_and_authority(pki: Path) -> None:
    leaf, authority = x509.load_pem_x509_certificates((pki / "server.crt").read_bytes())
    assert authority == x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes())
    leaf.verify_directly_issued_by(authority)
    assert certificate_names(pki / "server.crt") == (*NAMES[:3], "localhost", "127.0.0.1")


def test_how_long_they_live(pki: Path) -> None:
    now = datetime.now(UTC)
    for name, days in (("ca", 3650), ("server", 397), ("operator", 397)):
        certificate = x509.load_pem_x509_certificate((pki / f"{name}.crt").read_bytes())
        assert abs(certificate.not_valid_before_utc - (now - timedelta(days=1))) < timedelta(minutes=10)
        assert abs(certificate.not_valid_after_utc - (now + timedelta(days=days))) < timedelta(minutes=10)
        assert days_left(pki / f"{name}.crt") == days - 1


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    make_ca(tmp_path, at=datetime.now(UTC) - timedelta(days=3640))
    make_server_certificate(tmp_path, names=[HOST])
    assert days_left(tmp_path / "server.crt") == days_left(tmp_path / "ca.crt") == 9


def test_an_expired_authority_signs_no_more(tmp_path: Path) -> None:
    make_ca(tmp_path, at=datetime.now(UTC) - timedelta(days=3651))
    with pytest.raises(ConfigError, match="has expired on 20"):
        make_server_certificate(tmp_path, names=[HOST])
    assert not (tmp_path / "server.key").exists()


def test_a_renewal_keeps_the_key(pki: Path) -> None:
    key, old = (pki / "server.key").read_bytes(), (pki / "server.crt").read_bytes()
    make_server_certificate(pki, names=NAMES)
    assert (pki / "server.key").read_bytes() == key
    assert (pki / "server.crt").read_bytes() != old
    with listening(pki) as port:
        assert greet(port, trust=pki / "ca.crt", host=HOST) == b"hello"


def test_two_authorities_differ_in_name_and_fingerprint(pki: Path, tmp_path: Path) -> None:
    make_ca(tmp_path)
    one, other = (x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()) for folder in (pki, tmp_path))
    assert one.subject != other.subject
    der = ssl.PEM_cert_to_DER_cert((pki / "ca.crt").read_text())
    assert ca_fingerprint(pki / "ca.crt") == hashlib.sha256(der).hexdigest() != ca_fingerprint(tmp_path / "ca.crt")


def test_mixed_up_authorities_sign_nothing(pki: Path, tmp_path: Path) -> None:
    make_ca(tmp_path)
    shutil.copy(pki / "ca.crt", tmp_path / "ca.crt")
    with pytest.raises(ConfigError, match="do not belong together"):
        make_server_certificate(tmp_path, names=[HOST])


@pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    make_ca(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"cannot read .*{name} .*restore it from a backup"):
        make_server_certificate(tmp_path, names=[HOST])


def test_files_are_private_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watch(file: int) -> None:
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())

    monkeypatch.setattr("icmoe_server.pki.os.fsync", watch)
    write_file(tmp_path / "secret", b"0")
    assert seen == [0o600, 0o600]  # under its temporary name, then under its own
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_file(tmp_path / "folder", b"0")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
