"""The centre's private certificate authority: EC P-384, SHA-384, one level.

A public authority cannot certify 127.0.0.1, which Flower's own SuperExec needs, so the centre signs for itself and
hospitals pin the fingerprint of its CA.
"""

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from icmoe.errors import ConfigError

CA_DAYS = 3650
LEAF_DAYS = 397
BACKDATED = timedelta(days=1)
"""A hospital whose clock is behind would refuse a certificate of the future."""

LOOPBACK = ("localhost", "127.0.0.1")
"""Flower's own processes reach the SuperLink under these names, whatever the world calls it."""

CA, SERVER, OPERATOR = "ca", "server", "operator"

_CLOSED = {
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "encipher_only": False,
    "decipher_only": False,
}


def make_ca(folder: Path, *, at: datetime | None = None) -> None:
    """Make ``ca.key`` and ``ca.crt``, valid for ten years.

    Args:
        folder: of the certificates, exists.
        at: time of issue; ``None`` is now.
    """
    key = _make_key(folder / f"{CA}.key")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two authorities with one name would be mixed up by trust stores and by people.
    name = _name(f"icmoe-fl CA {identifier.digest.hex()[:8]}")
    issued = at or datetime.now(UTC)
    certificate = (
        _builder(key, subject=name, issuer=name, not_before=issued, not_after=issued + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **_CLOSED), critical=True
        )
        .sign(key, SHA384())
    )
    write_file(folder / f"{CA}.crt", _pem(certificate))


def make_server_certificate(
    folder: Path, *, names: Sequence[str], name: str = SERVER, at: datetime | None = None
) -> None:
    """Make ``server.crt`` for the given hosts and for loopback. An existing ``server.key`` is used again.

    So a renewal replaces one file, in one step: certificate and key cannot be torn apart by a power cut.

    Args:
        folder: with the CA.
        names: DNS names and IP addresses.
        name: of the files.
        at: time of issue; ``None`` is now.

    Raises:
        ConfigError: if the CA is missing, damaged or expired.
    """
    hosts = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys((*names, *LOOPBACK))])
    _issue(folder, name=name, title="icmoe-fl centre", usage=ExtendedKeyUsageOID.SERVER_AUTH, hosts=hosts, at=at)


def make_client_certificate(folder: Path, *, name: str = OPERATOR, at: datetime | None = None) -> None:
    """Make ``operator.crt``, with which an operator reaches the centre over mutual TLS.

    Raises:
        ConfigError: if the CA is missing, damaged or expired.
    """
    _issue(folder, name=name, title=f"icmoe-fl {name}", usage=ExtendedKeyUsageOID.CLIENT_AUTH, hosts=None, at=at)


def ca_fingerprint(path: Path) -> str:
    """Sha256 of a certificate's DER form, hexadecimal: what hospitals pin."""
    return hashlib.sha256(_load_certificate(path).public_bytes(Encoding.DER)).hexdigest()


def certificate_names(path: Path) -> tuple[str, ...]:
    """Hosts a certificate is valid for."""
    names = _load_certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names)


def days_left(path: Path) -> int:
    """Whole days until a certificate expires; negative when it has."""
    return (_load_certificate(path).not_valid_after_utc - datetime.now(UTC)).days


def write_file(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads, complete or not at all, also across a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # With its mode from the start: a secret that is made public for a moment is public.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _issue(
    folder: Path,
    *,
    name: str,
    title: str,
    usage: x509.ObjectIdentifier,
    hosts: x509.SubjectAlternativeName | None,
    at: datetime | None,
) -> None:
    authority, authority_key = _load_certificate(folder / f"{CA}.crt"), _load_key(folder / f"{CA}.key")
    issued = at or datetime.now(UTC)
    if authority.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigError(
            f"the certificate authority {folder / CA}.crt has expired on {authority.not_valid_after_utc:%Y-%m-%d}. "
            "Make a new centre folder with 'icmoe-fl server init'; every hospital then needs its new fingerprint."
        )
    if authority.public_key() != authority_key.public_key():
        raise ConfigError(f"{CA}.crt and {CA}.key in {folder} do not belong together; restore both from one backup.")
    path = folder / f"{name}.key"
    key = _load_key(path) if path.exists() else _make_key(path)
    builder = (
        _builder(
            key,
            subject=_name(title),
            issuer=authority.subject,
            not_before=issued,
            not_after=min(issued + timedelta(days=LEAF_DAYS), authority.not_valid_after_utc),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **_CLOSED), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if hosts is not None:
        builder = builder.add_extension(hosts, critical=False)
    write_file(folder / f"{name}.crt", _pem(builder.sign(authority_key, SHA384())) + _pem(authority))


def _builder(
    key: ec.EllipticCurvePrivateKey, *, subject: x509.Name, issuer: x509.Name, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before - BACKDATED)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(title: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no EC key, so it is not ours; restore it from a backup.")
    return key


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {path} ({error}); restore it from a backup of the centre folder.")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
