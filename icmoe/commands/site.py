"""``icmoe-fl site``: what a hospital needs to take part, made at the hospital."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icmoe.errors import ConfigError

if TYPE_CHECKING:
    from icmoe_client.site_init import Initialised

site_app = typer.Typer(no_args_is_help=True, help="A hospital's own keys and settings.")


@site_app.callback()
def _site() -> None:
    """Keep ``init`` a subcommand: Typer would make a single command the whole program."""


@site_app.command("init")
def init(
    name: Annotated[str, typer.Argument(help="Name of this hospital, as agreed with the centre.")],
    server: Annotated[str | None, typer.Option(help="The centre, host:port.")] = None,
    ca_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Fingerprint of the centre's authority, as the centre printed it.")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="Certificate of the centre's authority, instead of fetching it.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with manifest.csv.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="For the site file. Default: $ICMOE_SITE_DIR, else configs/site.")
    ] = None,
) -> None:
    """Make this hospital's keys, site file and enrolment. What is there already is kept.

    The private keys stay here. The one file that goes to the centre holds their public halves. Called again, for which
    the name is enough, it changes nothing and shows the enrolment once more.

    Example: icmoe-fl site init hospitalA --server fl.example.org:8443 --ca-sha256 5d1f... --data /data/icmoe
    """
    from icmoe_client.site_file import DIRECTORY_VARIABLE, LOCAL_DIRECTORY
    from icmoe_client.site_init import init_site

    chosen = folder or Path(os.environ.get(DIRECTORY_VARIABLE) or LOCAL_DIRECTORY)
    if chosen.exists() and not chosen.is_dir():
        raise ConfigError(f"{chosen} is a file; --dir takes a folder.")
    done = init_site(chosen, name=name, server=server, data=data, ca_sha256=ca_sha256, ca_file=ca_file)
    _show(done, name=name)


def _show(done: "Initialised", *, name: str) -> None:
    from icmoe.enrolment import grouped

    for word, files in (("made", done.made), ("kept", done.kept)):
        for file in files:
            typer.echo(f"{word}  {file}")
    typer.echo(f"\nEnrolment of {name}, in {done.enrolment_file}:\n{done.enrolment.model_dump_json(indent=2)}")
    typer.echo(f"\nFingerprint of this hospital's key: {grouped(done.enrolment.fingerprint)}")
    typer.echo(
        f"\nSend {done.enrolment_file.name} to the centre; nothing in it is secret. The centre reads the fingerprint "
        "back to you by telephone.\n"
        f"Read {done.site_file}: it says what a run may ask of this hospital.\n"
        f"Then: icmoe-fl data check {done.site.data}\n"
        f"and:  icmoe-fl client --site {name} --check"
    )
