"""The centre's folder: what it is, where things are in it, and how it is made.

::

    centre.yaml             what a person may change
    pki/  secrets/          certificates, keys, shared secret
    sites.json              who may take part
    state/                  database, Flower's home, nodes.json, operator.sock, lock
    logs/  runs/<name>/

Only its owner can look inside.
"""

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from icmoe.addresses import check_host, split_address
from icmoe.errors import ConfigError, RunError
from icmoe_server.centre_config import (
    CONFIG_FILE,
    DEFAULT_BIND,
    DEFAULT_SUPERLINK_PORT,
    CentreConfig,
    config_text,
    parse_config,
    read_config,
)
from icmoe_server.pki import (
    CA,
    OPERATOR,
    SERVER,
    certificate_names,
    make_ca,
    make_client_certificate,
    make_server_certificate,
    write_file,
)
from icmoe_server.registry import SiteRegistry

__all__ = ["Centre", "CentreConfig", "init_centre", "renew_certificates"]

_SECRET_BYTES = 32


@dataclass(frozen=True)
class Centre:
    """Paths of a centre folder.

    Attributes:
        root: the folder, absolute.
        config: what its ``centre.yaml`` says.
    """

    root: Path
    config: CentreConfig

    @classmethod
    def load(cls, root: Path) -> Self:
        """Open a centre folder.

        Raises:
            ConfigError: if it is none, or ``centre.yaml`` or a key is missing or wrong.
        """
        root = root.absolute()
        centre = cls(root, read_config(root / CONFIG_FILE))
        needed = (centre.ca_cert, centre.server_cert, centre.server_key, centre.superexec_secret, centre.registry)
        missing = [str(path.relative_to(root)) for path in needed if not path.is_file()]
        if missing:
            raise ConfigError(f"the centre folder {root} lacks {', '.join(missing)}; restore it from a backup.")
        return centre

    @property
    def pki(self) -> Path:
        """Folder of certificates and keys."""
        return self.root / "pki"

    @property
    def config_file(self) -> Path:
        """``centre.yaml``."""
        return self.root / CONFIG_FILE

    @property
    def ca_cert(self) -> Path:
        """Certificate of the centre's own authority."""
        return self.pki / f"{CA}.crt"

    @property
    def server_cert(self) -> Path:
        """Server certificate followed by the CA's."""
        return self.pki / f"{SERVER}.crt"

    @property
    def server_key(self) -> Path:
        """Its key."""
        return self.pki / f"{SERVER}.key"

    @property
    def operator_cert(self) -> Path:
        """Client certificate of an operator who comes over TCP."""
        return self.pki / f"{OPERATOR}.crt"

    @property
    def operator_key(self) -> Path:
        """Its key."""
        return self.pki / f"{OPERATOR}.key"

    @property
    def receipt_heads(self) -> Path:
        """The last receipt of each site that was countersigned, over all runs."""
        return self.state / "receipts.json"

    @property
    def superexec_secret(self) -> Path:
        """Shared by SuperLink and SuperExec."""
        return self.root / "secrets" / "superexec"

    @property
    def registry(self) -> Path:
        """``sites.json``."""
        return self.root / "sites.json"

    @property
    def state(self) -> Path:
        """Folder of what processes keep."""
        return self.root / "state"

    @property
    def nodes(self) -> Path:
        """What the supervisor last saw of each site."""
        return self.state / "nodes.json"

    @property
    def database(self) -> Path:
        """Flower's."""
        return self.state / "superlink.db"

    @property
    def flwr_home(self) -> Path:
        """Flower's home folder."""
        return self.state / "flwr_home"

    @property
    def socket(self) -> Path:
        """Where operators connect; relative paths are relative to the folder."""
        return self.root / (self.config.operator.socket or self.state / "operator.sock")

    @property
    def lock(self) -> Path:
        """Held by the one supervisor."""
        return self.state / "lock"

    @property
    def logs(self) -> Path:
        """Folder of log files."""
        return self.root / "logs"

    @property
    def runs(self) -> Path:
        """Folder of run directories."""
        return self.root / "runs"


def init_centre(
    root: Path,
    *,
    advertise: str,
    bind: str = DEFAULT_BIND,
    sans: Sequence[str] = (),
    superlink_port: int = DEFAULT_SUPERLINK_PORT,
) -> Centre:
    """Make a centre folder: authority, certificates, secret, empty registry. Never overwrites anything.

    Args:
        root: new or empty.
        advertise: host:port that hospitals connect to.
        bind: host:port the gateway listens on.
        sans: further hosts the server certificate is valid for.
        superlink_port: on loopback.

    Raises:
        ConfigError: if a value is wrong or the folder is in use.
        RunError: if it cannot be written.
    """
    config = parse_config(
        {"advertise": advertise, "bind": bind, "superlink_port": superlink_port}, source="the command"
    )
    names = _hosts(config, sans)
    centre = Centre(root.absolute(), config)
    _claim(centre)
    folders = (centre.superexec_secret.parent, centre.state, centre.flwr_home, centre.logs, centre.runs)
    try:
        for folder in folders:
            folder.mkdir(mode=0o700)
        make_ca(centre.pki)
        make_server_certificate(centre.pki, names=names)
        make_client_certificate(centre.pki)
        write_file(centre.superexec_secret, secrets.token_bytes(_SECRET_BYTES))
        SiteRegistry(centre.registry).create()
        # Last, because a folder with this file is a whole one.
        write_file(centre.config_file, config_text(config).encode())
    except (OSError, RunError) as error:
        for folder in (centre.pki, *folders):
            shutil.rmtree(folder, ignore_errors=True)
        centre.registry.unlink(missing_ok=True)
        raise _unwritable(centre.root, error) from error
    return centre


def renew_certificates(centre: Centre, *, sans: Sequence[str] = ()) -> tuple[str, ...]:
    """Make new server and operator certificates from the same authority and keys; hospitals change nothing.

    Args:
        centre: an existing one.
        sans: further hosts, besides those of the old certificate and of ``advertise``.

    Returns:
        The hosts of the new certificate.

    Raises:
        ConfigError: if a host is wrong, or the authority is missing or expired.
        RunError: if the files cannot be written.
    """
    names = (*certificate_names(centre.server_cert), *_hosts(centre.config, sans))
    try:
        make_server_certificate(centre.pki, names=names)
        make_client_certificate(centre.pki)
    except OSError as error:
        raise _unwritable(centre.root, error) from error
    return certificate_names(centre.server_cert)


def _claim(centre: Centre) -> None:
    """Make the folder ours and private; of two that try at once, one gets it."""
    root = centre.root
    try:
        if centre.config_file.exists():
            raise ConfigError(
                f"{root} is a centre already, with its own authority and keys, which nothing may replace. Start it "
                "with 'icmoe-fl server start', renew its certificate with 'icmoe-fl server init --renew', or choose "
                "another --dir."
            )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = sorted(path.name for path in root.iterdir() if path.name != "lost+found")
        if found:
            raise ConfigError(
                f"{root} is not empty: it holds {', '.join(found[:5])}. If this was a centre, restore its "
                f"{CONFIG_FILE} from a backup; if an interrupted init left it, remove it; else choose another --dir."
            )
        root.chmod(0o700)
        centre.pki.mkdir(mode=0o700)
    except FileExistsError as error:
        raise ConfigError(f"{root} is a file or another init is at work in it; choose another --dir.") from error
    except OSError as error:
        raise _unwritable(root, error) from error


def _hosts(config: CentreConfig, sans: Sequence[str]) -> tuple[str, ...]:
    try:
        return (split_address(config.advertise)[0], *(check_host(name) for name in sans))
    except ValueError as error:
        raise ConfigError(f"--san takes a host name or an IP address: {error}.") from error


def _unwritable(root: Path, error: OSError | RunError) -> RunError:
    reason = error.strerror if isinstance(error, OSError) else error
    return RunError(
        f"cannot write the centre folder {root}: {reason}. Choose a --dir that this user owns, on a disk with space."
    )
