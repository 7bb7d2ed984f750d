"""Which secret a folder's pseudonyms were made with: a fingerprint beside the manifest, never the secret itself.

With another secret every patient would get a second pseudonym, and the same patient could land in two splits.
"""

import hashlib
import json
import os
from pathlib import Path

from icmoe.errors import ConfigError

FILE_NAME = "pseudonyms.json"
_KEY = "secret_fingerprint"


def fingerprint(secret: bytes) -> str:
    """Twelve hexadecimal digits by which a secret can be told from others; 32 random bytes cannot be guessed back."""
    return hashlib.sha256(b"icmoe-fl pseudonym secret\n" + secret).hexdigest()[:12]


def noted_fingerprint(folder: Path) -> str:
    """The fingerprint noted in a folder; empty if there is none.

    Raises:
        ConfigError: if the note is damaged.
    """
    path = folder / FILE_NAME
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[_KEY])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read, so it is unknown which secret this folder belongs to. Restore it from a backup, "
            "or use another folder."
        ) from error


def refuse_other_secret(folder: Path, secret: bytes) -> None:
    """Refuse a secret other than the one that a folder's pseudonyms were made with.

    Raises:
        ConfigError: if it is another one.
    """
    noted = noted_fingerprint(folder)
    if noted and noted != fingerprint(secret):
        raise ConfigError(
            f"the pseudonyms of {folder} were made with the secret {noted}, this one is {fingerprint(secret)}: a "
            "patient would get two pseudonyms. Give the right one with --secret, or use another folder."
        )


def note_secret(folder: Path, secret: bytes) -> None:
    """Write the secret's fingerprint into a folder."""
    path = folder / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({_KEY: fingerprint(secret)}) + "\n", encoding="utf-8")
    temporary.replace(path)
