"""May a SuperNode start now? What can pass is waited for; what needs a person is said in words and ends the client."""

import time

from icmoe.errors import AuthError, ConnectError
from icmoe_client.connection import Connection
from icmoe_client.network_checks import check_certificate, check_clock, check_connection, check_name
from icmoe_client.registration import check_registration
from icmoe_client.site_file import SiteConfig

UNKNOWN_PATIENCE = 20.0
"""Seconds an unknown key is asked for again: a centre that has just come up, or runs ``sites add``, needs a few."""


class Admission:
    """The network part of ``client --check``, made before each start of a SuperNode.

    Flower itself tries for ever where a centre is away, and ends with few words, or none, where a certificate, the
    clock or the key is wrong. Asked first, the same causes have names.

    Args:
        site: its settings.
    """

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        self._unknown_since: float | None = None

    def obstacle(self) -> str:
        """Why a SuperNode must not start yet; empty if it may.

        Raises:
            NetworkError: if waiting does not help.
        """
        try:
            check_centre(self._site)
        except ConnectError as error:
            self._unknown_since = None
            return _first_line(error)
        except AuthError as error:
            self._unknown_since = self._unknown_since or time.monotonic()
            if time.monotonic() - self._unknown_since >= UNKNOWN_PATIENCE:
                raise
            return _first_line(error)
        self._unknown_since = None
        return ""


def check_centre(site: SiteConfig) -> None:
    """Go all the way: name, connection, certificate, clock, key.

    Raises:
        ConnectError: if the centre does not answer now.
        AuthError: if it does not accept the key now.
        NetworkError: if certificate or clock are wrong.
    """
    with Connection(*site.address) as connection:
        check_name(connection)
        check_connection(connection)
        check_certificate(connection, site.ca_certificate)
        check_clock(connection)
    check_registration(site)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
