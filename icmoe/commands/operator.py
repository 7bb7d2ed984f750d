"""``icmoe-fl server status|watch|stop``: ask a running centre."""

import json
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType

from icmoe.errors import ConfigError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from icmoe_server.operator import operator_pb2 as pb
    from icmoe_server.operator.client import OperatorClient

REDRAWS_PER_SECOND = 2

Folder = Annotated[Path, typer.Option("--dir", envvar="ICMOE_CENTRE_DIR", help="Folder of the centre.")]
Address = Annotated[
    str | None, typer.Option(help="host:port of a centre on another machine (operator.tcp in its centre.yaml).")
]
Ca = Annotated[Path | None, typer.Option(help="With --address: the centre's pki/ca.crt.")]
Cert = Annotated[Path | None, typer.Option(help="With --address: the centre's pki/operator.crt.")]
Key = Annotated[Path | None, typer.Option(help="With --address: the centre's pki/operator.key.")]
DEFAULT_FOLDER = Path("centre")


def status(
    folder: Folder = DEFAULT_FOLDER,
    address: Address = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show how the run stands: round, roll-call of the sites, processes of the centre.

    Example: icmoe-fl server status --dir /srv/icmoe
    """
    from icmoe_server.operator.messages import status_record
    from icmoe_server.operator.scene import Scene
    from icmoe_server.operator.view import draw

    _print_anything()
    with _connect(folder, address, ca=ca, cert=cert, key=key) as client:
        answer = client.status()
    if as_json:
        typer.echo(json.dumps(status_record(answer)))
    else:
        console = Console()
        console.print(draw(Scene(status=answer), now=datetime.now(UTC), ascii_only=console.options.ascii_only))


def watch(
    folder: Folder = DEFAULT_FOLDER,
    address: Address = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: a round or a status.")] = False,
) -> None:
    """Watch the run until it ends; Ctrl-C ends the watching only.

    In a terminal a live view, otherwise one line for each change. Ends with code 6 if the run fails.

    Example: icmoe-fl server watch
    """
    _print_anything()
    with _connect(folder, address, ca=ca, cert=cert, key=key) as client:
        show = _print_json if as_json else _show_live if sys.stdout.isatty() else _print_lines
        try:
            last = show(client.watch())
        except KeyboardInterrupt:
            typer.echo("No longer watching; the run goes on.", err=True)
            return
    if last is not None and last.state == "failed":
        raise RunError(f"the run {last.run} failed: {last.reason or 'see the logs of the centre'}")


def stop(
    folder: Folder = DEFAULT_FOLDER,
    address: Address = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the round under way; its work is lost.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --now: do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Stop the run after the round under way. The next server start goes on where it was.

    Example: icmoe-fl server stop --now --yes
    """
    if now and not yes and not _confirmed():
        typer.echo("Nothing was stopped.", err=True)
        raise typer.Exit(1)

    from icmoe_server.operator import operator_pb2 as pb

    with _connect(folder, address, ca=ca, cert=cert, key=key) as client:
        answer = client.stop(now=now)
    at_once = answer.when == pb.NOW
    if as_json:
        typer.echo(json.dumps({"when": "now" if at_once else "after_round", "round": answer.round}))
    elif at_once:
        typer.echo("The run stops now. The next start repeats the round under way.")
    else:
        typer.echo(f"The run stops after round {answer.round}." if answer.round else "The run stops before round 1.")


def _confirmed() -> bool:
    if not _is_terminal():
        raise ConfigError("stop --now throws away the round under way and asks first; in a script, add --yes.")
    return typer.confirm("Stop now? All sites lose their work in this round.")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _connect(
    folder: Path, address: str | None, *, ca: Path | None, cert: Path | None, key: Path | None
) -> "OperatorClient":
    from icmoe_server.operator.client import OperatorClient, TcpTarget

    if address is None:
        if ca or cert or key:
            raise ConfigError("--ca, --cert and --key belong to --address; the Unix socket needs none of them.")

        from icmoe_server.centre import Centre

        return OperatorClient(Centre.load(folder).socket)
    if ca is None or cert is None or key is None:
        missing = ", ".join(f"--{name}" for name, path in (("ca", ca), ("cert", cert), ("key", key)) if path is None)
        raise ConfigError(
            f"--address needs {missing} too: files ca.crt, operator.crt and operator.key of the centre's folder pki/, "
            "copied to this machine over a safe way."
        )
    return OperatorClient(TcpTarget(address, ca, cert, key))


def _print_anything() -> None:
    """A site's reason may hold letters that the terminal has not."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _print_json(events: "Iterable[pb.Event]") -> "pb.RunStatus | None":
    from icmoe_server.operator.messages import round_record, status_record

    last = None
    for event in events:
        if event.WhichOneof("kind") == "round":
            typer.echo(json.dumps({"round": round_record(event.round)}))
        else:
            last = event.status
            typer.echo(json.dumps({"status": status_record(last)}))
    return last


def _print_lines(events: "Iterable[pb.Event]") -> "pb.RunStatus | None":
    from icmoe_server.operator.lines import describe
    from icmoe_server.operator.scene import Scene

    scene = Scene()
    for event in events:
        for line in describe(scene, event):
            typer.echo(line)
        scene = scene.after(event)
    return scene.status


def _show_live(events: "Iterator[pb.Event]") -> "pb.RunStatus | None":
    from rich.live import Live

    from icmoe_server.operator.scene import Scene
    from icmoe_server.operator.view import draw

    console = Console()
    scene = Scene()

    def picture() -> RenderableType:
        return draw(scene, now=datetime.now(UTC), ascii_only=console.options.ascii_only)

    with Live(get_renderable=picture, console=console, refresh_per_second=REDRAWS_PER_SECOND):
        for event in events:
            scene = scene.after(event)
    return scene.status
