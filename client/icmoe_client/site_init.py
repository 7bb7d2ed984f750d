"""``icmoe-fl site init``: what a hospital needs to take part, made at the hospital.

The order is such that it may be broken off anywhere and started again: what is there is kept, what is missing is made.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from icmoe import __version__
from icmoe.config import describe_validation
from icmoe.enrolment import Enrolment, now
from icmoe.errors import ConfigError, RunError, TlsError
from icmoe_client.connection import fetch_chain
from icmoe_client.site_file import SiteConfig, load_site
from icmoe_client.site_keys import flower_public_key, make_flower_key, make_receipt_key, receipt_public_key, write_new
from icmoe_client.site_template import SITE_FILES, render_site_file


@dataclass(frozen=True)
class Initialised:
    """What ``init_site`` leaves behind.

    Attributes:
        site: as its file says.
        site_file: its path.
        enrolment: what the centre needs.
        enrolment_file: what travels there.
        made: files that are new.
        kept: files that were there.
    """

    site: SiteConfig
    site_file: Path
    enrolment: Enrolment
    enrolment_file: Path
    made: tuple[Path, ...]
    kept: tuple[Path, ...]


def init_site(
    folder: Path, *, name: str, server: str | None, data: Path | None, ca_sha256: str | None, ca_file: Path | None
) -> Initialised:
    """Make what is missing of site file, certificate, keys and enrolment.

    Args:
        folder: for ``NAME.yaml``, ``NAME.enrolment.json`` and the folder ``NAME``, which gets mode 0700.
        name: of the site.
        server: of the centre, host:port; needed where there is no site file yet.
        data: folder with ``manifest.csv``; needed where there is no site file yet.
        ca_sha256: fingerprint of the centre's authority, hexadecimal.
        ca_file: its certificate; without it the certificate is fetched from the server.

    Raises:
        ConfigError: if something is missing, contradicts what is there, or a key is damaged.
        TlsError: if a certificate has another fingerprint.
        NetworkError: if the server cannot be reached.
        RunError: if something cannot be written.
    """
    folder = folder.absolute()
    site_file, enrolment_file = folder / f"{name}.yaml", folder / f"{name}.enrolment.json"
    if site_file.exists():
        site = load_site(site_file, name=name)
        _require_as_given(site, site_file, server=server, data=data)
    else:
        site = _plan_site(folder / name, name=name, server=server, data=data)
    # May ask the network or refuse, so it comes before anything is made.
    authority = _authority(site, ca_sha256=ca_sha256, ca_file=ca_file)
    book = _Book([], [])
    _make_private_folder(folder / name)
    if site.ca_certificate is not None:
        book.keep_or_make(site.ca_certificate, lambda path: write_new(path, authority))
    text = render_site_file(name=name, server=site.server, data=site.data)
    book.keep_or_make(site_file, lambda path: write_new(path, text.encode()))
    book.keep_or_make(site.flower_key, make_flower_key)
    book.keep_or_make(site.receipt_key, make_receipt_key)
    _make_private_folder(site.state_dir)
    enrolment = _enrol(site, enrolment_file, book)
    return Initialised(site, site_file, enrolment, enrolment_file, tuple(book.made), tuple(book.kept))


@dataclass(frozen=True)
class _Book:
    made: list[Path]
    kept: list[Path]

    def keep_or_make(self, path: Path, make: Callable[[Path], None]) -> None:
        if path.exists():
            self.kept.append(path)
        else:
            make(path)
            self.made.append(path)


def fingerprint(certificate: x509.Certificate) -> str:
    """Sha256 of a certificate as it travels (DER), hexadecimal."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def _plan_site(own: Path, *, name: str, server: str | None, data: Path | None) -> SiteConfig:
    if server is None or data is None:
        raise ConfigError(
            f"a new site needs --server HOST:PORT and --data DIR; there is no site file of {name!r} here yet. The "
            "centre's 'icmoe-fl server init' prints the whole line."
        )
    files = {key: own / file for key, file in SITE_FILES.items()}
    try:
        return SiteConfig.model_validate({"name": name, "server": server, "data": data.absolute(), **files})
    except ValidationError as error:
        raise ConfigError(f"the site cannot be made like this:\n{describe_validation(error, SiteConfig)}") from error


def _require_as_given(site: SiteConfig, site_file: Path, *, server: str | None, data: Path | None) -> None:
    """A second call changes nothing, so it must not look as if it did."""
    if server not in (None, site.server):
        raise ConfigError(f"{site_file} names the server {site.server}, not {server}. Change it there, by hand.")
    if data is not None and data.absolute() != site.data:
        raise ConfigError(f"{site_file} names the data folder {site.data}, not {data}. Change it there, by hand.")


def _make_private_folder(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}. Give another --dir.") from error


def _enrol(site: SiteConfig, path: Path, book: _Book) -> Enrolment:
    enrolment = Enrolment(
        site=site.name,
        flower_public_key=flower_public_key(site.flower_key),
        receipt_public_key=receipt_public_key(site.receipt_key),
        icmoe_version=__version__,
        flwr_version=version("flwr"),
        created=now(),
    )
    if path.exists():
        old = Enrolment.read(path)
        if old.model_copy(update={"created": enrolment.created}) == enrolment:
            book.kept.append(path)
            return old
    enrolment.write(path)
    book.made.append(path)
    return enrolment


def _authority(site: SiteConfig, *, ca_sha256: str | None, ca_file: Path | None) -> bytes:
    """The certificate that the site is to trust, PEM: what it has, or what is found and compared."""
    if site.ca_certificate is None:
        return b""
    there = site.ca_certificate if site.ca_certificate.exists() else ca_file
    if there is None and ca_sha256 is None:
        raise ConfigError(
            "give --ca-sha256 HEX, as 'icmoe-fl server init' printed it at the centre, or the certificate itself with "
            "--ca-file FILE. Without either nobody could tell the centre from an impostor."
        )
    if there is not None:
        certificate = _load_certificate(there)
        if ca_sha256 is not None:
            _require_same(certificate, _clean(ca_sha256), source=str(there))
        if ca_file is not None:
            _require_same(certificate, fingerprint(_load_certificate(ca_file)), source=str(there))
    else:
        certificate = _fetch_authority(site, _clean(ca_sha256 or ""))
    return certificate.public_bytes(Encoding.PEM)


def _fetch_authority(site: SiteConfig, wanted: str) -> x509.Certificate:
    server = site.server
    shown = [x509.load_der_x509_certificate(one) for one in fetch_chain(*site.address)]
    found = next((one for one in shown if fingerprint(one) == wanted), None)
    if found is None and len(shown) == 1:
        raise TlsError(
            f"{server} shows only its own certificate, not the one of its authority, so it cannot be compared with "
            f"--ca-sha256 {wanted}. Let the centre send you its ca.crt and give it with --ca-file."
        )
    if found is None:
        raise TlsError(
            f"{server} shows the authority {fingerprint(shown[-1])}, but --ca-sha256 is {wanted}. Nothing was "
            "written. Either the number is mistyped or outdated, or somebody between here and the centre answers in "
            "its place (a man in the middle; a firewall that opens TLS is one). Compare the number with the centre by "
            "telephone, and ask your network people for an exception from TLS inspection."
        )
    if not _is_authority(found):
        raise TlsError(
            f"--ca-sha256 {wanted} is the fingerprint of the server's own certificate, which changes with every "
            "renewal. Ask the centre for the one of its authority, which 'icmoe-fl server init' prints."
        )
    return found


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the certificate {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM form; the centre's is pki/ca.crt.") from error
    if not _is_authority(certificate):
        raise ConfigError(f"{path} is not the certificate of an authority; the centre's is pki/ca.crt.")
    return certificate


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _require_same(certificate: x509.Certificate, wanted: str, *, source: str) -> None:
    if fingerprint(certificate) != wanted:
        raise TlsError(
            f"{source} has the fingerprint {fingerprint(certificate)}, but {wanted} was given. Nothing was changed. "
            "Compare the number with the centre by telephone: one of the two is mistyped, outdated or forged."
        )


def _clean(ca_sha256: str) -> str:
    """Accept a fingerprint as people and other programs write it."""
    digits = re.sub(r"[\s:]", "", ca_sha256.lower().removeprefix("sha256:"))
    if re.fullmatch(r"[0-9a-f]{64}", digits) is None:
        raise ConfigError(f"--ca-sha256 is {ca_sha256!r}. It has 64 hexadecimal digits; colons and spaces may stand.")
    return digits
