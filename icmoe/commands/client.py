"""``icmoe-fl client``: a hospital takes part."""

from pathlib import Path
from typing import Annotated

import typer


def client(
    site: Annotated[str, typer.Option(help="Name of this hospital, as in its site file.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Site file. Default: SITE.yaml in $ICMOE_SITE_DIR, configs/site or /etc/icmoe-fl/site."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only test everything and explain, then end.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Take part in no further round, until --resume.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="End a pause.")] = False,
) -> None:
    """Let this hospital take part: check everything, connect to the centre, train when it asks.

    One outbound HTTPS connection, no inbound port. Images stay here; only expert and router parameters leave. Runs
    until it is told to end (Ctrl-C, SIGTERM), and connects again by itself after every interruption.

    Example: icmoe-fl client --site hospitalA --check
    """
    from icmoe.errors import ConfigError
    from icmoe_client import schedule
    from icmoe_client.preflight import may_start, print_checks, run_checks
    from icmoe_client.registration import check_registration
    from icmoe_client.site_file import find_site_file, load_site
    from icmoe_client.site_lock import only_client
    from icmoe_client.supernode import SuperNode

    path = find_site_file(site, config)
    settings = load_site(path, name=site)
    if check + pause + resume > 1:
        raise ConfigError("--check, --pause and --resume exclude each other; give one of them.")
    if pause or resume:
        changed = schedule.pause(settings) if pause else schedule.resume(settings)
        typer.echo(f"{site} {'is paused' if pause else 'takes part'}{'' if changed else ' already'}.")
        return
    if check:
        raise typer.Exit(print_checks(run_checks(settings, registration=check_registration)))
    with only_client(settings):
        results = run_checks(settings, registration=check_registration)
        code = print_checks(results)
        # A centre that is not up yet is waited for; everything else has to be put right first.
        if not may_start(results):
            raise typer.Exit(code)
        SuperNode(settings, path, say=typer.echo).run()
