"""``icmoe-fl server start``: bring a centre up and keep it up until its run has ended."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from icmoe.commands.server_init import DEFAULT_DIR, CentreDir
from icmoe.config import RunConfig, load_run_config
from icmoe.errors import EXIT_INTERRUPTED

LINE_SPEEDS = (4, 30)
"""Mbit/s of a slow and of a usual uplink of a hospital."""


def start(
    config: Annotated[Path, typer.Option(help="Run config, such as configs/run/cardiac.yaml; names the sites.")],
    folder: CentreDir = DEFAULT_DIR,
    name: Annotated[str, typer.Option(help="Name of the run directory in runs/. Default: the config's.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a config value, may be repeated.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with pretrained weights, for sam_vit_* and medsam_vit_b.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Accept weights that differ from the published ones.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only print bytes and minutes per round, then end.")
    ] = False,
) -> None:
    r"""Bring the centre up and keep it up until its run has ended. Started again, it goes on where it was.

    Everything may be killed at any moment: the run continues from its last finished round.

    Example: icmoe-fl server start --config configs/run/cardiac.yaml --set 'federation.sites=\[hospitalA,hospitalB]'
    """
    # The supervisor forks its children; gRPC, which answers operators, would warn of it each time.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from icmoe_server.centre import Centre
    from icmoe_server.supervisor import StartRequest, Supervisor, prepare_run

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    centre = Centre.load(folder)
    run = load_run_config(config, override or [])
    request = StartRequest(
        centre=centre,
        run=run,
        config=config,
        overrides=override or (),
        run_dir=centre.runs / (name or config.stem),
        checkpoint=checkpoint,
        verify_checkpoint=not trust_checkpoint,
        say=typer.echo,
    )
    if estimate:
        prepare_run(request)
        print_estimate(run, request.run_dir)
        return
    state = Supervisor(request).run()
    if state == "interrupted":
        typer.echo("The centre has ended in order. Start it again with the same command to go on.")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"The run is {state}: {request.run_dir}")
    if state == "finished":
        from icmoe.report import write_report, write_tensorboard

        write_tensorboard(request.run_dir)
        typer.echo(f"Report: {write_report(request.run_dir)}")


def print_estimate(run: RunConfig, run_dir: Path) -> None:
    """Bytes and minutes that a round needs on the line of a site and of the centre."""
    from icmoe.checkpoint import latest_checkpoint

    arrays = latest_checkpoint(run_dir).arrays.values()
    down = sum(array.nbytes for array in arrays)
    up = down // 2 if run.federation.communication.dtype == "float16" else down
    table = Table(title="Payload of a round", caption="without TLS and HTTP, which add a few per cent")
    for column in ("", "MB", *(f"minutes at {speed} Mbit/s" for speed in LINE_SPEEDS)):
        table.add_column(column, justify="left" if not column else "right")
    num_sites = len(run.federation.sites)
    rows = {"a site sends": up, "a site receives": down, "the centre sends": down * num_sites}
    rows["the centre receives"] = up * num_sites
    for what, num_bytes in rows.items():
        minutes = [f"{num_bytes * 8 / speed / 1e6 / 60:.2f}" for speed in LINE_SPEEDS]
        table.add_row(what, f"{num_bytes / 1e6:.2f}", *minutes)
    Console().print(table)
