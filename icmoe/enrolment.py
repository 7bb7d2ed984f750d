"""What travels from a hospital to the centre before anything else: ``NAME.enrolment.json``, public keys only.

The centre reads it as a stranger's file: limited in size, every field checked, keys really parsed.
"""

import hashlib
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from icmoe.checkpoint import write_json
from icmoe.config import describe_validation
from icmoe.errors import ConfigError, RunError

MAX_BYTES = 8192
"""A whole enrolment is under 1 KB."""

SITE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$"
"""No dot and no slash, because names become file names; no dash in front, because they follow options."""


def canonical_flower_key(text: str) -> str:
    """An OpenSSH public key on the curve P-384, without its comment: one key, one text.

    Raises:
        ValueError: if it is anything else.
    """
    if len(text.strip().splitlines()) != 1:
        raise ValueError("one OpenSSH public key on one line is needed")
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("this is not an OpenSSH public key") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ValueError("Flower needs an EC P-384 key, which begins with ecdsa-sha2-nistp384")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def flower_key_fingerprint(public_key: str) -> str:
    """Sha256 of a canonical OpenSSH public key, as hexadecimal digits. ``ssh-keygen -l`` shows the same in base64."""
    return hashlib.sha256(b64decode(public_key.split()[1])).hexdigest()


def grouped(fingerprint: str) -> str:
    """A fingerprint as people compare it by telephone: groups of four digits."""
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def now() -> str:
    """This moment, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _utc_time(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError("a time in UTC such as 2026-01-31T08:00:00+00:00 is needed")
    return text


SiteName = Annotated[str, Field(pattern=SITE_NAME)]
FlowerPublicKey = Annotated[str, Field(max_length=1024), AfterValidator(canonical_flower_key)]
ReceiptPublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
UtcTime = Annotated[str, Field(max_length=40), AfterValidator(_utc_time)]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!-]{1,64}$")]


class Enrolment(BaseModel):
    """A hospital's wish to take part."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: SiteName
    flower_public_key: FlowerPublicKey = Field(description="OpenSSH text, EC P-384; kept without its comment")
    receipt_public_key: ReceiptPublicKey = Field(description="Ed25519, hexadecimal")
    icmoe_version: Version
    flwr_version: Version
    created: UtcTime

    @property
    def fingerprint(self) -> str:
        """What both sides compare by telephone: sha256 of the Flower key, hexadecimal."""
        return flower_key_fingerprint(self.flower_public_key)

    def write(self, path: Path) -> None:
        """Write the file that travels, complete or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        try:
            write_json(path, self.model_dump())
        except OSError as error:
            raise RunError(f"cannot write the enrolment {path}: {error.strerror}. Choose another folder.") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what a hospital sent.

        Raises:
            ConfigError: if it is no enrolment or a damaged one.
        """
        text = _read_limited(path)
        if "PRIVATE KEY" in text:
            raise ConfigError(
                f"{path} holds a private key, which must never leave its hospital. Delete this file; the hospital "
                "makes new keys with 'icmoe-fl site init' and sends NAME.enrolment.json."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(
                f"{path} is not a valid enrolment; ask the hospital for its NAME.enrolment.json again:\n"
                + _harmless(describe_validation(error, cls))
            ) from error


def _read_limited(path: Path) -> str:
    """At most ``MAX_BYTES`` of text; anything but a plain file could block or never end."""
    try:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}; give the NAME.enrolment.json that the hospital sent.")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes, so it is no enrolment.")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"cannot read the enrolment {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text, so it is no enrolment.") from error


def _harmless(text: str) -> str:
    """Names of unknown keys are a stranger's words: nothing in them may steer a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
