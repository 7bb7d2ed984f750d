"""Patient ids that tell nobody who a patient is: a keyed hash under a secret that stays at the site.

The same patient gets the same pseudonym in every import with the same secret, so that a withdrawal finds all images.
Without the secret a pseudonym cannot be traced by trying ids, which a plain hash would allow.
"""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from icmoe.errors import DataError, RunError

SECRET_BYTES = 32
_LENGTH = 12
_HEX = re.compile(f"[0-9a-fA-F]{{{2 * SECRET_BYTES}}}")


def default_secret_path() -> Path:
    """``$ICMOE_SITE_DIR/pseudonym.key``, else ``~/.config/icmoe-fl/pseudonym.key``."""
    folder = os.environ.get("ICMOE_SITE_DIR")
    return (Path(folder) if folder else Path.home() / ".config" / "icmoe-fl") / "pseudonym.key"


def load_secret(path: Path) -> bytes:
    """Read the site's secret; make one with mode 0600 where there is none.

    Raises:
        DataError: if the file is no secret of ours.
        RunError: if it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_secret(path)
    except OSError as error:
        raise RunError(f"cannot write the site's secret {path}: {error.strerror}. Choose another --secret.") from error
    secret = secrets.token_bytes(SECRET_BYTES)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
    return secret


def pseudonym(patient: str, *, secret: bytes) -> str:
    """Twelve hexadecimal digits for a patient id."""
    return hmac.new(secret, patient.strip().encode(), hashlib.sha256).hexdigest()[:_LENGTH]


def _read_secret(path: Path) -> bytes:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (ValueError, OSError):
        text = ""
    # Python's own readers of numbers also take signs, 0x, underscores and blanks between digits.
    if not _HEX.fullmatch(text):
        raise DataError(
            f"{path} is no secret of icmoe-fl ({2 * SECRET_BYTES} hexadecimal digits). Restore it from a backup: with "
            "another one all patients get new pseudonyms."
        )
    return bytes.fromhex(text)
