r"""The one door of the centre: TLS outside, Flower's SuperLink on loopback inside, and 13 names that open it.

Flower's Fleet, Control and Runtime interfaces share one port, and Control asks nobody who he is: whoever reaches it
runs his own code at every hospital. So only what :mod:`icmoe_server.gateway_app` names passes. Its own process::

    python -m icmoe_server.gateway --upstream https://127.0.0.1:9620 --upstream-ca ca.crt \
        --bind 0.0.0.0:8443 --certificate server.crt --key server.key
"""

import argparse
import asyncio
import logging
import ssl
import sys
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path

import httpx

from icmoe.errors import ConfigError, IcmoeError
from icmoe_server.gateway_app import WAIT_SECONDS, Gateway
from icmoe_server.gateway_limits import Listener, RefusalLog
from icmoe_server.gateway_server import GatewayServer, listen, server_tls

UPSTREAM_SECONDS = 60.0
UPSTREAM_CONNECTIONS = 128
LOGGED_REFUSALS = 20
LOGGED_REFUSALS_SECONDS = 60.0

logger = logging.getLogger(__name__)


def run_gateway(*, upstream: str, upstream_ca: Path, bind: str, certificate: Path, key: Path) -> None:
    """Serve until SIGTERM or SIGINT. Must be called in the main thread.

    Args:
        upstream: the SuperLink, ``https://127.0.0.1:PORT``.
        upstream_ca: the only certificate authority that may have signed the SuperLink's certificate.
        bind: ``host:port`` to listen on; port 0 takes a free one, which the log names.
        certificate: PEM, leaf first, then the authorities up to the one that the sites know.
        key: PEM, unencrypted.

    Raises:
        ConfigError: if one of them cannot be used.
    """
    url = httpx.URL(upstream)
    if url.scheme != "https" or not url.host or url.path != "/" or url.query:
        raise ConfigError(f"upstream is {upstream!r}; it must be https://host:port and nothing more")
    try:
        upstream_tls = ssl.create_default_context(cafile=upstream_ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{upstream_ca} cannot be used to check the SuperLink: {error}; it must be PEM") from None
    tls = server_tls(certificate, key)
    with listen(bind) as listener:
        asyncio.run(_run(url, upstream_tls, listener, tls))


async def _run(url: httpx.URL, upstream_tls: ssl.SSLContext, listener: Listener, tls: ssl.SSLContext) -> None:
    refusals = RefusalLog(logger, lines=LOGGED_REFUSALS, window=LOGGED_REFUSALS_SECONDS)
    client = httpx.AsyncClient(
        base_url=url,
        verify=upstream_tls,
        timeout=httpx.Timeout(UPSTREAM_SECONDS, connect=5.0, pool=WAIT_SECONDS),
        limits=httpx.Limits(max_connections=UPSTREAM_CONNECTIONS, max_keepalive_connections=32),
        # httpx would keep an answer's cookie and send it along with the calls of all other sites.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=False,  # a proxy of the environment is for the way out, not for loopback
        follow_redirects=False,
    )
    async with client:
        app = Gateway(client, connections=listener.connections, refusals=refusals)
        host, port = listener.getsockname()[:2]
        logger.info("the gateway listens on %s port %d and forwards to %s", host, port, url)
        await GatewayServer(app, listener=listener, tls=tls, refusals=refusals).serve()
    logger.info("the gateway has ended")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m icmoe_server.gateway", description="the Fleet-only TLS gateway")
    parser.add_argument("--upstream", required=True, metavar="URL", help="the SuperLink, https://127.0.0.1:PORT")
    parser.add_argument("--upstream-ca", required=True, type=Path, metavar="PEM", help="who signed its certificate")
    parser.add_argument("--bind", required=True, metavar="HOST:PORT", help="where to listen, such as 0.0.0.0:8443")
    parser.add_argument("--certificate", required=True, type=Path, metavar="PEM", help="what the sites are shown")
    parser.add_argument("--key", required=True, type=Path, metavar="PEM", help="its private key")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # They write one line per request, and know nothing of a limit.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    try:
        run_gateway(**vars(options))
    except IcmoeError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
