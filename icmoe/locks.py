"""Who works on a folder: a file that a living process holds locked. The kernel opens the lock when the process dies."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from icmoe.errors import ConfigError

_LOOK_EVERY = 0.2


@contextmanager
def hold(path: Path, *, otherwise: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock while the block lasts.

    Args:
        path: of the lock; made if need be.
        otherwise: what to tell a person if another process holds it.
        patience: seconds to wait for it.

    Raises:
        ConfigError: if another process holds it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("ab") as file:
        while not _take(file):
            if time.monotonic() >= deadline:
                raise ConfigError(otherwise)
            time.sleep(_LOOK_EVERY)
        yield


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    if not path.exists():
        return False
    with path.open("ab") as file:
        return not _take(file)


def _take(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
