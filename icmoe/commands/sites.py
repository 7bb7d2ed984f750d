"""``icmoe-fl sites``: who may take part."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from icmoe.commands.server_init import DEFAULT_DIR, CentreDir

if TYPE_CHECKING:
    from icmoe_server.registry import NodeStatus, RegisteredSite

sites_app = typer.Typer(no_args_is_help=True, help="At the centre: which hospitals may take part.")
_DASH = "-"
_SHOWN_DIGITS = 16
_FRESH_SECONDS = 60.0


@sites_app.command("add")
def add(
    enrolment: Annotated[Path, typer.Argument(help="The NAME.enrolment.json that the hospital sent.")],
    folder: CentreDir = DEFAULT_DIR,
) -> None:
    """Let a hospital take part: ENROLMENT is the file it sent. Works while the centre runs and while it does not.

    Example: icmoe-fl sites add hospitalA.enrolment.json
    """
    from icmoe.enrolment import Enrolment, grouped
    from icmoe_server.centre import Centre
    from icmoe_server.registry import SiteRegistry

    centre = Centre.load(folder)
    read = Enrolment.read(enrolment)
    site = SiteRegistry(centre.registry).add(read)
    typer.echo(f"{site.name} may take part since {site.added}. Its key:")
    typer.echo(f"  {grouped(site.fingerprint)}")
    typer.echo(f"Compare it by telephone with the hospital. If it differs: icmoe-fl sites revoke {site.name}")
    if _minor(read.flwr_version) != _minor(version("flwr")):
        typer.echo(
            f"{site.name} has flwr {read.flwr_version}, this centre {version('flwr')}: the first two numbers must be "
            "equal before it can connect."
        )
    typer.echo(f"The hospital then runs: icmoe-fl client --site {site.name}")


@sites_app.command("list")
def list_sites(
    folder: CentreDir = DEFAULT_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show all hospitals, also revoked ones, and when the centre last saw them."""
    from icmoe_server.centre import Centre
    from icmoe_server.registry import SiteRegistry, read_nodes

    centre = Centre.load(folder)
    sites = SiteRegistry(centre.registry).sites()
    nodes = read_nodes(centre.nodes)
    if not _is_fresh(centre.nodes):
        # A centre that was killed could not take its last word back.
        nodes = {key: node.model_copy(update={"online": False}) for key, node in nodes.items()}
    if as_json:
        typer.echo(json.dumps([_record(site, nodes.get(site.fingerprint)) for site in sites]))
    elif sites:
        Console().print(_table(sites, nodes))
    else:
        typer.echo("No hospital takes part yet: icmoe-fl sites add NAME.enrolment.json")


@sites_app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="As 'icmoe-fl sites list' names it.")],
    folder: CentreDir = DEFAULT_DIR,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Shut the hospital NAME out. Its key can never come back; a new key of the same hospital can.

    A running centre cuts it off within seconds, also in the middle of a round.
    """
    from icmoe_server.centre import Centre
    from icmoe_server.registry import SiteRegistry

    registry = SiteRegistry(Centre.load(folder).registry)
    if not yes and name in registry.active():
        typer.confirm(f"Shut {name} out? Its key can never come back.", abort=True)
    site = registry.revoke(name)
    typer.echo(f"{site.name} is out since {site.revoked}. To return it makes new keys: icmoe-fl site init {site.name}")


def _is_fresh(path: Path) -> bool:
    """Whether a supervisor is at work: it writes this file every few seconds."""
    return path.exists() and time.time() - path.stat().st_mtime < _FRESH_SECONDS


def _record(site: "RegisteredSite", node: "NodeStatus | None") -> dict[str, str | bool | None]:
    return {
        "name": site.name,
        "fingerprint": site.fingerprint,
        "added": site.added,
        "revoked": site.revoked,
        "node_id": node.node_id if node else None,
        "last_seen": node.last_seen if node else None,
        "online": bool(node and node.online and site.revoked is None),
    }


def _table(sites: "tuple[RegisteredSite, ...]", nodes: "dict[str, NodeStatus]") -> Table:
    table = Table(title="Sites")
    for column in ("site", "state", "last seen", "added", "key"):
        table.add_column(column, overflow="fold")
    for site in sites:
        record = _record(site, nodes.get(site.fingerprint))
        if site.revoked is not None:
            state = f"[red]revoked {site.revoked}[/]"
        else:
            state = "[green]online[/]" if record["online"] else "offline"
        table.add_row(
            site.name, state, str(record["last_seen"] or _DASH), site.added, f"{site.fingerprint[:_SHOWN_DIGITS]}..."
        )
    return table


def _minor(release: str) -> list[str]:
    return release.split(".")[:2]
