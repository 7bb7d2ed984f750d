"""May this site's key take part, and is a client of it at work here? Speaks Flower through the adapter."""

from icmoe.errors import AuthError
from icmoe.flower_probe import knows_key
from icmoe_client.connection import trust
from icmoe_client.site_file import SiteConfig
from icmoe_client.site_keys import flower_private_key
from icmoe_client.site_lock import other_client


def check_registration(site: SiteConfig) -> str:
    """Ask the centre; whatever the answer, nothing changes there.

    Returns:
        One sentence.

    Raises:
        AuthError: if the centre does not accept the key.
        ConnectError: if it gives no answer.
    """
    key = flower_private_key(site.flower_key)
    if not knows_key(site.server, tls=trust(site.ca_certificate), key=key):
        raise AuthError(
            f"{site.server} does not accept the key of {site.name}: it was not added yet, or was revoked.\n"
            f"Send {site.name}.enrolment.json to the centre, which runs 'icmoe-fl sites add'. A revoked key never "
            "comes back: move it away and make a new one with 'icmoe-fl site init'."
        )
    pid = other_client(site)
    in_use = f", and it is in use: the client of this machine runs as process {pid}" if pid else ""
    return f"The centre accepts the key of {site.name}{in_use}."
