"""A site's two private keys. They are made at the site and never leave it."""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from icmoe.errors import ConfigError, RunError


def make_flower_key(path: Path) -> None:
    """Make the EC P-384 key that Flower knows a site by, in the only form Flower reads.

    Raises:
        RunError: if it cannot be written. An existing file is never touched.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def make_receipt_key(path: Path) -> None:
    """Make the Ed25519 key that signs receipts.

    Raises:
        RunError: if it cannot be written. An existing file is never touched.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def flower_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a Flower key.

    Raises:
        ConfigError: if it is missing, readable by others, or no unencrypted P-384 key in OpenSSH format.
    """
    try:
        key = load_ssh_private_key(_read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no unencrypted private key in OpenSSH format.\n"
            "Flower reads no other form. Restore the file from a backup, or enrol again under a new key."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{path} is not an EC P-384 key, and Flower takes no other kind here.\n"
            "Use the one that 'icmoe-fl site init' made."
        )
    return key


def flower_public_key(path: Path) -> str:
    """Read a Flower key and give its public half in OpenSSH form.

    Raises:
        ConfigError: as ``flower_private_key``.
    """
    key = flower_private_key(path)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def receipt_public_key(path: Path) -> str:
    """Read a receipt key, OpenSSH or PEM, and give its public half as hex.

    Raises:
        ConfigError: if it is missing, readable by others, or no unencrypted Ed25519 key.
    """
    content = _read_private(path)
    load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no unencrypted private key.\nRestore the file from a backup, or enrol again under a new key."
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key.\nUse the one that 'icmoe-fl site init' made.")
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def write_new(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, complete or not at all, and never over another.

    Raises:
        RunError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        # A rename would replace what somebody else made meanwhile; a link refuses.
        path.hardlink_to(temporary)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_private(path: Path) -> bytes:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"others on this machine may read the private key {path}.\nRun 'chmod 600 {path}'.")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the private key {path}: {error.strerror}.\nRun 'icmoe-fl site init', which makes what is "
            "missing, or run this as the user who owns the key."
        ) from error
