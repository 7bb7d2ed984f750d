"""``icmoe-fl server init``: make the centre's folder, or renew its certificate."""

from pathlib import Path
from typing import Annotated

import typer

from icmoe.errors import ConfigError

CentreDir = Annotated[
    Path, typer.Option("--dir", envvar="ICMOE_CENTRE_DIR", help="The centre's folder.", show_default=True)
]
DEFAULT_DIR = Path("centre")


def init(
    folder: CentreDir = DEFAULT_DIR,
    advertise: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="What hospitals connect to, such as fl.example.org:8443.")
    ] = "",
    bind: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the gateway listens. Default: 0.0.0.0:8443.")
    ] = "",
    san: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="One more name of the server, may be repeated.")
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Only make new certificates, from the authority that is there.")
    ] = False,
) -> None:
    """Make the folder of a centre: its own certificate authority, keys, config and an empty list of sites.

    Nothing that exists is ever overwritten. The private keys never leave the folder: keep a backup of it, encrypted.

    Example: icmoe-fl server init --advertise fl.example.org:8443
    """
    if renew:
        if advertise or bind:
            raise ConfigError("--renew takes --dir and --san only; change advertise and bind in centre.yaml.")
        _renew(folder, san or [])
        return
    from icmoe_server.centre import init_centre
    from icmoe_server.centre_config import DEFAULT_BIND
    from icmoe_server.pki import ca_fingerprint, days_left

    if not advertise:
        raise ConfigError("--advertise HOST:PORT is needed: what hospitals connect to, such as fl.example.org:8443.")
    centre = init_centre(folder, advertise=advertise, bind=bind or DEFAULT_BIND, sans=san or [])
    typer.echo(f"Made the centre {centre.root}. Back it up now, encrypted: its keys cannot be made again.")
    typer.echo(f"The server certificate is good for {days_left(centre.server_cert)} days; renew it with --renew.")
    typer.echo("Each hospital runs this, with its own name:")
    typer.echo(f"  icmoe-fl site init NAME --server {advertise} --ca-sha256 {ca_fingerprint(centre.ca_cert)}")
    typer.echo("and sends NAME.enrolment.json. Then here: icmoe-fl sites add NAME.enrolment.json")


def _renew(folder: Path, sans: list[str]) -> None:
    from icmoe_server.centre import Centre, renew_certificates
    from icmoe_server.pki import days_left

    centre = Centre.load(folder)
    before = days_left(centre.server_cert)
    names = renew_certificates(centre, sans=sans)
    typer.echo(
        f"The server certificate had {before} days left and now has {days_left(centre.server_cert)}. It is valid for "
        f"{', '.join(names)}."
    )
    typer.echo(
        f"The authority itself has {days_left(centre.ca_cert)} days left. Hospitals change nothing. Restart the centre "
        "to use the new certificate."
    )
