"""A centre as a site sees it: an authority, certificates, and small servers on loopback."""

import datetime as dt
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Serve = Callable[..., int]
DAY = dt.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """Makes certificates into a folder."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def sha256(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issue(
        self, *names: str, since: dt.timedelta = -DAY, until: dt.timedelta = 365 * DAY, with_chain: bool = True
    ) -> ssl.SSLContext:
        """A server's context, valid for names from and until these distances from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = _sign(self, "server", key, ca=False, since=since, until=until, names=names)
        chain = self.folder / f"{leaf.serial_number}.crt"
        shown = [leaf, self.certificate] if with_chain else [leaf]
        chain.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in shown))
        key_file = chain.with_suffix(".key")
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key_file)
        return context


def _sign(
    authority: Authority | None,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
    since: dt.timedelta = -DAY,
    until: dt.timedelta = 365 * DAY,
    names: tuple[str, ...] = (),
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + since)
        .not_valid_after(now + until)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    return builder.sign(authority.key if authority else key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture
def make_authority(tmp_path: Path) -> Callable[[str], Authority]:
    def make(name: str) -> Authority:
        folder = tmp_path / f"pki-{name}"
        folder.mkdir()
        key = ec.generate_private_key(ec.SECP256R1())
        authority = Authority(folder, _sign(None, name, key, ca=True), key)
        authority.file.write_bytes(authority.certificate.public_bytes(Encoding.PEM))
        return authority

    return make


@pytest.fixture
def authority(make_authority: Callable[[str], Authority]) -> Authority:
    return make_authority("centre")


@pytest.fixture
def serve() -> Generator[Serve, None, None]:
    """Start servers that answer /health, and any POST: over TLS with a context, else in plain text. Gives the port.

    ``answers`` are status and body of one POST after the other; the last is given again.
    """
    with ExitStack() as running:

        def start(
            context: ssl.SSLContext | None,
            *,
            clock: dt.timedelta | None = dt.timedelta(0),
            status: int = 200,
            delay: float = 0.0,
            answers: list[tuple[int, str]] | None = None,
        ) -> int:
            return running.enter_context(_running(_handler(clock, status, delay, answers or [(404, "")]), context))

        yield start


def _handler(
    clock: dt.timedelta | None, status: int, delay: float, answers: list[tuple[int, str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            code, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response_only(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            self.send_response_only(status if self.path == "/health" else 404)
            if clock is not None:
                self.send_header("Date", self.date_time_string((dt.datetime.now(dt.UTC) + clock).timestamp()))
            self.send_header("Content-Length", "2")
            time.sleep(delay)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None) -> Iterator[int]:
    class Server(ThreadingHTTPServer):
        daemon_threads = False

        def finish_request(self, request: object, client_address: object) -> None:
            # In the thread of the connection, so that a client that refuses the certificate disturbs nobody.
            with suppress(OSError):
                if context is not None:
                    request = context.wrap_socket(request, server_side=True)  # type: ignore[arg-type]
                super().finish_request(request, client_address)  # type: ignore[arg-type]
                if isinstance(request, ssl.SSLSocket):
                    request.close()

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the machine that runs the tests."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def raw_server() -> Generator[Callable[[Callable[[socket.socket], object]], int], None, None]:
    """Serve connections, one after the other, with a function of the socket."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(treat: Callable[[socket.socket], object]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0.1)

        def loop() -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                with accepted, suppress(OSError):
                    accepted.settimeout(5)
                    treat(accepted)

        listeners.append(listener)
        threads.append(threading.Thread(target=loop))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join()
