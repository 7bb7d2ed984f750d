"""Patient ids that tell nobody who a patient is: a keyed hash under a secret that stays at the site.

The same patient gets the same pseudonym in every import with the same secret, so that a withdrawal finds all images.
Without the secret a pseudonym cannot be traced by trying ids, which a plain hash would allow.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from icmoe.errors import DataError, RunError

SECRET_BYTES = 32
_LENGTH = 12


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
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip()) if _is_hex(path) else b""
        if len(secret) != SECRET_BYTES:
            raise DataError(
                f"{path} is no secret of icmoe-fl (64 hexadecimal digits). Restore it from a backup: with another one "
                "all patients get new pseudonyms."
            ) from None
        return secret
    except OSError as error:
        raise RunError(f"cannot write the site's secret {path}: {error.strerror}. Choose another --secret.") from error
    secret = secrets.token_bytes(SECRET_BYTES)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
    return secret


def pseudonym(patient: str, *, secret: bytes) -> str:
    """Twelve hexadecimal digits for a patient id."""
    return hmac.new(secret, patient.strip().encode(), hashlib.sha256).hexdigest()[:_LENGTH]


def _is_hex(path: Path) -> bool:
    try:
        int(path.read_text(encoding="ascii").strip(), 16)
    except (ValueError, OSError):
        return False
    return True
