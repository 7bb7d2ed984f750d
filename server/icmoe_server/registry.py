"""Who may take part: ``sites.json``, the public keys that ``icmoe-fl sites`` let in and shut out.

A revoked key is never forgotten, so that it can never come back. The supervisor reads this file and makes Flower
follow; only ``SiteRegistry`` writes it.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from icmoe.config import describe_validation
from icmoe.enrolment import Enrolment, FlowerPublicKey, ReceiptPublicKey, SiteName, UtcTime, flower_key_fingerprint, now
from icmoe.errors import AuthError, ConfigError, RunError
from icmoe_server.pki import write_file


@dataclass(frozen=True)
class RegisteredSite:
    """A site with one key pair; a site that changed its keys has one entry for each.

    Attributes:
        name: of the site.
        flower_public_key: OpenSSH text, EC P-384, without a comment.
        receipt_public_key: Ed25519, hexadecimal.
        added: ISO 8601, UTC.
        revoked: ISO 8601, UTC; ``None`` for a site that may take part.
    """

    name: SiteName
    flower_public_key: FlowerPublicKey
    receipt_public_key: ReceiptPublicKey
    added: UtcTime
    revoked: UtcTime | None = None

    @property
    def fingerprint(self) -> str:
        """Sha256 of the Flower key, hexadecimal."""
        return flower_key_fingerprint(self.flower_public_key)


class NodeStatus(BaseModel):
    """What the supervisor last saw of a key's SuperNode.

    Attributes:
        node_id: Flower's.
        last_seen: ISO 8601, UTC; ``None`` if it was never online.
        online: whether its heartbeat was fresh.
    """

    model_config = ConfigDict(frozen=True)

    node_id: str
    last_seen: str | None = None
    online: bool = False


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    sites: tuple[RegisteredSite, ...] = ()


_NODES = TypeAdapter(dict[str, NodeStatus])


class SiteRegistry:
    """The registry file of a centre.

    Args:
        path: of ``sites.json``, which ``icmoe-fl server init`` makes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self) -> None:
        """Write an empty registry."""
        self._write(())

    def sites(self) -> tuple[RegisteredSite, ...]:
        """All entries, also revoked ones, in the order in which they were added.

        Raises:
            ConfigError: if the file is missing or damaged. An absent registry is not an empty one: that would let
                revoked keys back in.
        """
        try:
            return _File.model_validate_json(self._path.read_bytes()).sites
        except OSError as error:
            raise ConfigError(
                f"cannot read the registry of sites {self._path}: {error.strerror}. Restore it from a backup."
            ) from error
        except ValidationError as error:
            raise ConfigError(
                f"the registry of sites {self._path} is damaged; restore it from a backup:\n"
                + describe_validation(error, _File)
            ) from error

    def active(self) -> dict[str, RegisteredSite]:
        """Sites that may take part, by name."""
        return {site.name: site for site in self.sites() if site.revoked is None}

    def add(self, enrolment: Enrolment) -> RegisteredSite:
        """Let a site take part. The same enrolment twice changes nothing.

        Raises:
            AuthError: if a key was revoked, belongs to another site, or the site already takes part with other keys.
            ConfigError: if the registry cannot be read.
            RunError: if it cannot be written.
        """
        with self._locked():
            sites = self.sites()
            for site in sites:
                if _same_keys(site, enrolment) and site.revoked is None:
                    return site
                _check_against(site, enrolment)
            new = RegisteredSite(
                name=enrolment.site,
                flower_public_key=enrolment.flower_public_key,
                receipt_public_key=enrolment.receipt_public_key,
                added=now(),
            )
            self._write((*sites, new))
        return new

    def revoke(self, name: str) -> RegisteredSite:
        """Shut a site out for ever; it may come back with new keys only.

        Raises:
            ConfigError: if no such site takes part.
            RunError: if the registry cannot be written.
        """
        with self._locked():
            sites = self.sites()
            found = next((site for site in sites if site.name == name and site.revoked is None), None)
            if found is None:
                raise ConfigError(_no_such_site(name, sites))
            revoked = replace(found, revoked=now())
            self._write(tuple(revoked if site is found else site for site in sites))
        return revoked

    def _write(self, sites: tuple[RegisteredSite, ...]) -> None:
        content = _File(sites=sites).model_dump_json(indent=1)
        try:
            write_file(self._path, content.encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"cannot write the registry of sites {self._path}: {error.strerror}. Nothing was changed."
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time. The lock is a file of its own, because the registry is replaced at every change."""
        try:
            file = self._path.with_suffix(".lock").open("ab")
        except OSError as error:
            raise RunError(
                f"cannot lock the registry of sites {self._path}: {error.strerror}. Nothing was changed."
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_nodes(path: Path) -> dict[str, NodeStatus]:
    """Read the supervisor's ``nodes.json``: what was last seen of each key, by fingerprint.

    Returns:
        Empty if there is no such file, as before the first start.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        return _NODES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise ConfigError(f"cannot read {path}. Remove it: a running centre writes it again.") from error


def _same_keys(site: RegisteredSite, enrolment: Enrolment) -> bool:
    mine = (site.name, site.flower_public_key, site.receipt_public_key)
    return mine == (enrolment.site, enrolment.flower_public_key, enrolment.receipt_public_key)


def _check_against(site: RegisteredSite, enrolment: Enrolment) -> None:
    """Refuse an enrolment that an entry of the registry forbids."""
    known = site.flower_public_key == enrolment.flower_public_key
    if known or site.receipt_public_key == enrolment.receipt_public_key:
        kind = "Flower" if known else "receipt"
        if site.revoked is not None:
            raise AuthError(
                f"this {kind} key of {enrolment.site!r} was revoked on {site.revoked} (as {site.name!r}) and can "
                "never come back. The hospital makes new keys with 'icmoe-fl site init'."
            )
        if site.name != enrolment.site:
            raise AuthError(
                f"this {kind} key already belongs to the site {site.name!r}, so {enrolment.site!r} cannot have it. "
                "Each hospital makes its own keys with 'icmoe-fl site init'."
            )
    if site.revoked is None and site.name.casefold() == enrolment.site.casefold():
        raise AuthError(
            f"the site {site.name!r} already takes part with another key. If the hospital made new keys, revoke the "
            f"old ones first: icmoe-fl sites revoke {site.name}. If it did not, somebody else uses its name."
        )


def _no_such_site(name: str, sites: tuple[RegisteredSite, ...]) -> str:
    gone = [site.revoked for site in sites if site.name == name]
    if gone:
        return f"the site {name!r} was revoked on {gone[-1]} already."
    active = ", ".join(site.name for site in sites if site.revoked is None)
    return f"no site {name!r} takes part. These do: {active or 'none yet'}."
