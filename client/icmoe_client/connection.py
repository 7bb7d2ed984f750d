"""A way to the centre, one step at a time, so that each failure gets its own sentence.

Every ``NetworkError`` here has two lines: what is wrong, and what to do.
"""

import base64
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from cryptography import x509

from icmoe.errors import ConfigError, ConnectError, NetworkError
from icmoe_client.connection_errors import TIMEOUT, brief, explain_connect, explain_tls

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Health:
    """What the centre says of itself.

    Attributes:
        status: of ``GET /health``; 200 is fine.
        ahead: seconds by which this machine's clock is ahead of the centre's; ``None`` where it sent no date.
        within: seconds by which ``ahead`` may be wrong: half of what the answer took.
    """

    status: int
    ahead: float | None
    within: float = 0.0


class Connection:
    """A connection to the centre: look up, connect (through the proxy of the environment), secure, ask.

    Args:
        host: of the centre.
        port: of the centre.

    Raises:
        NetworkError: if the environment names a proxy that cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.proxy = _find_proxy(host, port)
        self._http: HTTPConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._http is not None:
            self._http.close()

    @property
    def first_hop(self) -> tuple[str, int]:
        """Where the bytes go first: the proxy, or the centre."""
        if self.proxy is None:
            return self.host, self.port
        return self.proxy.hostname or "", self.proxy.port or 80

    def look_up(self) -> list[str]:
        """Addresses of the first hop.

        Raises:
            ConnectError: if the name is unknown.
        """
        host, port = self.first_hop
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConnectError(
                f"The name {host} cannot be looked up ({getattr(error, 'strerror', None) or error}).\n"
                + ("Check HTTPS_PROXY" if self.proxy else "Check 'server' in the site file")
                + f", and whether this machine has a name server: 'getent hosts {host}'."
            ) from error
        return sorted({str(entry[4][0]) for entry in found})

    def connect(self) -> None:
        """Open a TCP connection, through the proxy where there is one.

        Raises:
            NetworkError: if it does not open; a ``ConnectError`` where it may later.
        """
        self._http = HTTPConnection(*self.first_hop, timeout=TIMEOUT)
        if self.proxy is not None:
            self._http.set_tunnel(self.host, self.port, headers=_proxy_login(self.proxy))
        try:
            self._http.connect()
        except (OSError, HTTPException) as error:
            raise explain_connect(error, self.host, self.port, proxy=self.first_hop if self.proxy else None) from error

    def secure(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        """Start TLS on the open connection.

        Raises:
            TlsError: if the other side is not trusted, or does not speak TLS.
            ConnectError: if it does not answer.
        """
        assert self._http is not None
        try:
            secured = context.wrap_socket(self._http.sock, server_hostname=self.host)
        except (OSError, ValueError) as error:
            shown = self._peek() if isinstance(error, ssl.SSLCertVerificationError) else None
            raise explain_tls(error, self.host, self.port, shown=shown) from error
        self._http.sock = secured
        return secured

    def ask_health(self) -> Health:
        """``GET /health`` over the secured connection.

        Raises:
            ConnectError: if no HTTP answer comes.
        """
        assert self._http is not None
        before = time.time()
        try:
            self._http.request("GET", "/health")
            answer = self._http.getresponse()
        except (OSError, HTTPException) as error:
            raise ConnectError(
                f"{self.host}:{self.port} speaks TLS but gives no HTTP answer ({brief(error)}).\n"
                "Check the port in 'server' of the site file; if it is right, ask the centre for its gateway.log."
            ) from error
        after = time.time()
        with suppress(TypeError, ValueError):
            # A date is cut off to whole seconds, so the centre's clock is half a second further on average.
            date = parsedate_to_datetime(str(answer.headers["Date"])).replace(tzinfo=UTC)
            ahead = (before + after) / 2 - (date.timestamp() + 0.5)
            return Health(answer.status, ahead, within=(after - before) / 2)
        return Health(answer.status, None)

    def _peek(self) -> x509.Certificate | None:
        """The certificate that was refused, to describe it; trusted for nothing else."""
        with suppress(OSError, HTTPException, ValueError, NetworkError), Connection(self.host, self.port) as again:
            again.connect()
            return x509.load_der_x509_certificate(again.secure(_trust_anybody()).getpeercert(binary_form=True) or b"")
        return None


def trust(ca_certificate: Path | None) -> ssl.SSLContext:
    """What a site trusts: the centre's authority only, or with ``None`` those of the operating system.

    Raises:
        ConfigError: if the file is missing or holds no certificate.
    """
    if ca_certificate is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca_certificate)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{ca_certificate} cannot be read as a certificate ({brief(error)}).\n"
            "Get it again: 'icmoe-fl site init' with --ca-sha256 or --ca-file."
        ) from error
    return context


def fetch_chain(host: str, port: int) -> list[bytes]:
    """The certificates that a server shows, its own first, as DER. Nobody has vouched for them.

    Raises:
        NetworkError: if there is no TLS server.
    """
    with Connection(host, port) as connection:
        connection.look_up()
        connection.connect()
        secured = connection.secure(_trust_anybody())
        # Public from Python 3.13 on. Until then it hides one level deeper; pip reads it there as well.
        shown = secured._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
        return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in shown or ()]


def _trust_anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _find_proxy(host: str, port: int) -> SplitResult | None:
    """The proxy of the environment that httpx, and so Flower, would take; none for this machine itself."""
    proxies = getproxies()
    text = proxies.get("https") or proxies.get("all")
    if not text or host in _LOOPBACK or proxy_bypass(f"{host}:{port}"):
        return None
    proxy = urlsplit(text if "://" in text else f"http://{text}")
    with suppress(ValueError):
        if proxy.scheme == "http" and proxy.hostname and proxy.port != 0:
            return proxy
    raise NetworkError(
        f"HTTPS_PROXY names a proxy that cannot be used ({proxy.scheme}://{proxy.hostname}).\n"
        "Write it as http://proxy.example.org:3128; traffic through it is still TLS to the centre."
    )


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
