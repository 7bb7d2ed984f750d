"""The checks that need the centre: look-up, connection, certificate, clock. Each goes on from the one before.

Each returns its sentence, or raises; a line break divides what is so from what to do about it.
"""

import ssl
import time
from pathlib import Path

from icmoe.errors import ConnectError, NetworkError
from icmoe_client.connection import Connection, trust

MAX_AHEAD, MAX_BEHIND = 4.0, 300.0
"""Seconds that a site's clock may differ: Flower refuses signed calls from 5 s ahead or 305 s behind."""

RENEWAL_DAYS = 30


def check_name(connection: Connection) -> str:
    """The name of the centre, or of the proxy, can be looked up.

    Raises:
        ConnectError: if not.
    """
    host, _ = connection.first_hop
    addresses = connection.look_up()
    if connection.proxy is not None:
        return f"The proxy {host} is at {addresses[0]}; it will look up {connection.host}."
    return f"{host} is at {addresses[0]}."


def check_connection(connection: Connection) -> str:
    """A TCP connection opens.

    Raises:
        NetworkError: if not; a ``ConnectError`` where it may later.
    """
    connection.connect()
    way = " through the proxy {}:{}".format(*connection.first_hop) if connection.proxy is not None else ""
    return f"{connection.host}:{connection.port} can be reached{way}."


def check_certificate(connection: Connection, ca_certificate: Path | None) -> str:
    """TLS starts, and the certificate is trusted and has the right name.

    Raises:
        NetworkError: if not.
    """
    secured = connection.secure(trust(ca_certificate))
    certificate = secured.getpeercert() or {}
    days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86400)
    sentence = f"{secured.version()} with {connection.host}, whose certificate is valid for {days} more days."
    if days < RENEWAL_DAYS:
        return f"{sentence}\nRemind the centre to run 'icmoe-fl server init --renew' before."
    return sentence


def check_clock(connection: Connection) -> str:
    """The centre answers, and both clocks agree.

    Raises:
        ConnectError: if the centre does not answer as it should.
        NetworkError: if this machine's clock is off too far.
    """
    health = connection.ask_health()
    if health.status != 200:
        raise ConnectError(
            f"The centre's gateway answers with HTTP {health.status}, so the centre does not work at the moment.\n"
            "Wait, then ask the centre: its logs/gateway.log says why."
        )
    if health.ahead is None:
        return "The centre answers. It does not tell its time, so the clocks could not be compared."
    way = f"{abs(health.ahead):.0f} s {'ahead of' if health.ahead > 0 else 'behind'} the centre's"
    # A slow answer on a full line must not pass for a wrong clock.
    if not -MAX_BEHIND - health.within <= health.ahead <= MAX_AHEAD + health.within:
        raise NetworkError(
            f"This machine's clock is {way}, and the centre refuses signed calls above {MAX_AHEAD:.0f} s ahead or "
            f"{MAX_BEHIND:.0f} s behind.\nLet the clock be set by NTP ('timedatectl set-ntp true'), here or there."
        )
    return f"The centre answers. This machine's clock is {way}."
