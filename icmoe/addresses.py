"""Hosts and ``host:port`` addresses, as people write them into commands and config files."""

import re
from ipaddress import ip_address

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")


def split_address(address: str) -> tuple[str, int]:
    """Take ``fl.example.org:8443``, ``192.0.2.1:8443`` or ``[2001:db8::1]:8443`` apart.

    Returns:
        Host, without brackets, and port.

    Raises:
        ValueError: if it is anything else.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError("host:port such as fl.example.org:8443 is needed")
    if host.startswith("[") and host.endswith("]"):
        return str(ip_address(host[1:-1])), int(port)
    if ":" in host:
        raise ValueError("an IPv6 address stands in brackets, such as [2001:db8::1]:8443")
    return check_host(host), int(port)


def check_host(host: str) -> str:
    """Give back a host name or an IP address.

    Raises:
        ValueError: if it is neither.
    """
    if re.fullmatch(r"[0-9.]+", host) or ":" in host:
        return str(ip_address(host))
    if _HOST.match(host) is None:
        raise ValueError(
            f"{host!r} is no host name; letters, digits, dots and dashes are allowed (names in other scripts in their "
            "xn-- form)"
        )
    return host
