"""The ServerApp of a real centre. The app that travels names this module; its process belongs to one run directory."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from icmoe.config import load_run_config
from icmoe.errors import IcmoeError
from icmoe.locks import hold
from icmoe.processes import MAX_LOG_BYTES, NUM_OLD_LOGS
from icmoe_server.app import Plan, run_federation
from icmoe_server.centre import Centre
from icmoe_server.receipt_desk import ReceiptDesk
from icmoe_server.receipts import KEY as RECEIPT_KEY
from icmoe_server.receipts import ReceiptBook
from icmoe_server.registry import SiteRegistry, read_nodes
from icmoe_server.status import CENTRE_VARIABLE, RUN_VARIABLE, SERVER_APP_LOG, server_app_lock

PREDECESSOR_PATIENCE = 60.0
"""Seconds for a ServerApp whose run was ended to notice that and leave."""

logger = logging.getLogger(__name__)


def registered_sites(centre: Centre) -> Callable[[], Mapping[str, int]]:
    """Site name -> node id by the key that was registered under the name, whatever a node calls itself."""

    def registered() -> dict[str, int]:
        nodes = read_nodes(centre.nodes)
        active = SiteRegistry(centre.registry).active()
        return {
            name: int(nodes[site.fingerprint].node_id) for name, site in active.items() if site.fingerprint in nodes
        }

    return registered


def receipt_keys(centre: Centre) -> dict[str, str]:
    """Site name -> public key of its receipts."""
    return {name: site.receipt_public_key for name, site in SiteRegistry(centre.registry).active().items()}


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what happens inside to a file, how it broke included: Flower keeps that in its database only."""
    handler = RotatingFileHandler(path, maxBytes=MAX_LOG_BYTES, backupCount=NUM_OLD_LOGS, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger(__package__)
    package.addHandler(handler)
    try:
        yield
    except IcmoeError as error:
        logger.error("%s", error)
        raise
    except Exception:
        logger.exception("the run broke")
        raise
    finally:
        package.removeHandler(handler)
        handler.close()


def _plan(centre: Centre, run_dir: Path) -> Plan:
    run = load_run_config(run_dir / "config.yaml")
    book = ReceiptBook(run_dir, key=centre.pki / RECEIPT_KEY, heads=centre.receipt_heads)
    return Plan(
        run=run,
        run_dir=run_dir,
        sites=run.federation.sites,
        registered=registered_sites(centre),
        desk=ReceiptDesk(book, keys=lambda: receipt_keys(centre)),
    )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Go on with the run of this process, once no other process does."""
    centre = Centre.load(Path(os.environ[CENTRE_VARIABLE]))
    with logged(centre.logs / SERVER_APP_LOG):
        run_dir = Path(os.environ[RUN_VARIABLE])
        busy = f"another ServerApp works on {run_dir.name} still"
        with hold(server_app_lock(run_dir), otherwise=busy, patience=PREDECESSOR_PATIENCE):
            run_federation(_plan(centre, run_dir), grid)
