"""What a failed step towards the centre means, in two lines each: what is wrong, and what to do.

A ``ConnectError`` may pass while a client waits; any other error stays until a person has acted.
"""

import ssl
from datetime import UTC, datetime

from cryptography import x509

from icmoe.errors import ConnectError, NetworkError, TlsError

TIMEOUT = 10.0
"""Seconds for each step."""

_ENDED_BY_PEER = (ssl.SSLEOFError, ConnectionError)
_NOT_TLS = (
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
    "WRONG_VERSION_NUMBER",
)

# X509_V_ERR_* of OpenSSL.
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64


def explain_connect(error: Exception, host: str, port: int, *, proxy: tuple[str, int] | None) -> NetworkError:
    """Why no TCP connection opens.

    Args:
        error: as the socket raised it.
        host: of the centre.
        port: of the centre.
        proxy: that the connection was to go through.
    """
    if proxy is not None:
        return _explain_proxy(error, f"{host}:{port}", "{}:{}".format(*proxy))
    if isinstance(error, ConnectionRefusedError):
        return ConnectError(
            f"Nobody listens at {host}:{port}.\n"
            "Ask the centre whether 'icmoe-fl server start' runs and which port it advertises."
        )
    if isinstance(error, TimeoutError):
        return ConnectError(
            f"{host}:{port} does not answer within {TIMEOUT:.0f} s.\n"
            "As a rule a firewall drops the packets: ask for outbound TCP from this machine to that host and port, or "
            "set HTTPS_PROXY if the way out is a proxy."
        )
    return ConnectError(
        f"{host}:{port} cannot be reached ({brief(error)}).\nCheck cable, route and firewall of this machine."
    )


def explain_tls(error: Exception, host: str, port: int, *, shown: x509.Certificate | None) -> NetworkError:
    """Why TLS does not come about.

    Args:
        error: as the TLS library raised it.
        host: of the centre.
        port: of the centre.
        shown: the certificate that was refused, where it is known.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error.verify_code, host, shown)
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
        return TlsError(
            f"{host}:{port} answers, but in plain text instead of TLS.\n"
            "Check the port in 'server' of the site file: it must be the gateway's. Never go on without TLS."
        )
    if isinstance(error, _ENDED_BY_PEER):
        # A gateway that is being started again does this too, so it is worth another try.
        return ConnectError(
            f"{host}:{port} closed the connection when TLS began.\n"
            "A firewall may break TLS off, or another program has this port: ask your network people, then the centre."
        )
    if isinstance(error, TimeoutError):
        return ConnectError(
            f"{host}:{port} accepts the connection but says nothing for {TIMEOUT:.0f} s.\n"
            "The centre is overloaded or hangs, or a firewall holds TLS back: try again, then ask the centre."
        )
    return TlsError(
        f"TLS with {host}:{port} fails ({brief(error)}).\n"
        "Another program may have this port, or a firewall changes the traffic: ask the centre."
    )


def brief(error: Exception) -> str:
    """The few words of an error that say something."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__


def _explain_proxy(error: Exception, centre: str, proxy: str) -> NetworkError:
    if "Tunnel connection failed: 407" in str(error):
        return NetworkError(f"The proxy {proxy} wants a login.\nGive it as HTTPS_PROXY=http://user:password@{proxy}.")
    if "Tunnel connection failed" in str(error):
        return ConnectError(
            f"The proxy {proxy} does not let us through to {centre} ({brief(error)}).\n"
            f"Ask your network people to allow CONNECT to {centre}, or add the host to NO_PROXY if the way is direct."
        )
    return ConnectError(
        f"The proxy {proxy}, which HTTPS_PROXY names, does not answer ({brief(error)}).\n"
        "Correct HTTPS_PROXY, or unset it if the way to the centre is direct."
    )


def _explain_certificate(verify_code: int, host: str, shown: x509.Certificate | None) -> TlsError:
    today = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if verify_code == _EXPIRED:
        until = f" on {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        return TlsError(
            f"The certificate of {host}, or of its authority, has expired{until}.\n"
            f"By this machine's clock it is {today}. If that is right, the centre must run 'icmoe-fl server init "
            "--renew' and start again."
        )
    if verify_code == _NOT_YET_VALID:
        since = f" before {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        return TlsError(
            f"The certificate of {host} is not yet valid{since}.\n"
            f"By this machine's clock it is {today}. If that is wrong, set the clock (NTP); else tell the centre."
        )
    if verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        names = f" but for {', '.join(_names(shown))}" if shown else ""
        return TlsError(
            f"The certificate is not for {host}{names}.\n"
            "Write one of these names into 'server' of the site file, or ask the centre for a certificate with the "
            "name you use."
        )
    issuer = f": {shown.issuer.rfc4514_string()}" if shown else ""
    return TlsError(
        f"The certificate of {host} comes from an unknown authority{issuer}.\n"
        "Do not go on: a firewall may open TLS here (ask for an exception), somebody may sit in between, or the centre "
        "has a new authority. Compare its fingerprint with the centre by telephone."
    )


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ["no name at all"]
    return [str(name.value) for name in names]
