"""One client per site folder: Flower would refuse a second one, in words that fit a dozen other causes."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from icmoe.errors import AuthError, ConfigError
from icmoe.locks import hold, is_held
from icmoe_client.site_file import SiteConfig

PATIENCE = 1.0
"""Seconds for a lock that somebody only looks at."""


@contextmanager
def only_client(site: SiteConfig) -> Iterator[None]:
    """Be the one client of a site on this machine while the block lasts.

    Raises:
        AuthError: if there is one already.
        ConfigError: if the site's folder is missing or cannot be written to.
    """
    path = _lock_file(site)
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}. Run 'icmoe-fl site init {site.name}' again.")
    with ExitStack() as held:
        try:
            held.enter_context(hold(path, otherwise=_in_use(site), patience=PATIENCE))
            path.write_text(str(os.getpid()), encoding="ascii")
        except ConfigError as error:
            raise AuthError(str(error)) from error
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}. Run this as the user who owns it.") from error
        yield


def other_client(site: SiteConfig) -> str | None:
    """Process id of the client that runs here, if it is not this one; ``None`` also where it cannot be seen."""
    path = _lock_file(site)
    try:
        pid = path.read_text(encoding="ascii", errors="replace") if is_held(path) else None
    except OSError:
        return None
    return None if pid == str(os.getpid()) else pid


def _in_use(site: SiteConfig) -> str:
    path = _lock_file(site)
    pid = path.read_text(encoding="ascii", errors="replace") if path.exists() else "unknown"
    return (
        f"the key of {site.name} is in use: its client runs on this machine already, as process {pid}. Leave that one "
        "alone, or end it first. This one has changed nothing."
    )


def _lock_file(site: SiteConfig) -> Path:
    return site.state_dir / "client.lock"
