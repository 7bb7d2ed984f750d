"""A folder of frozen features on disk, safe under several processes and a sudden death.

An entry is one safetensors file, ``root/ab/abcdef....safetensors``, named by the sha256 of everything it depends on. So
an entry is never out of date, and processes share the folder without locks: whoever writes a key writes the same
content, under a temporary name that is renamed when complete. A killed writer leaves only its temporary file.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icmoe.errors import ConfigError, DataError, RunError

DEFAULT_LIMIT_GB = 20.0
STALE_SECONDS = 3600.0

_ENTRIES = f"[0-9a-f][0-9a-f]/{'?' * 64}.safetensors"  # so that purge removes nothing of anybody else
_IMAGE = "image_sha256"
_TEMPORARY = "[0-9a-f][0-9a-f]/*.icmoe-tmp"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheInfo:
    """What is in a cache folder, or what was removed from it."""

    entries: int
    bytes: int
    limit_bytes: int
    root: Path


class FeatureCache:
    """A folder of entries. Reading and writing need no lock.

    Args:
        root: made with mode 0700 when missing: features tell a lot about the images. The mode of a folder that
            exists is left alone, with a warning where others may read it.
        limit_bytes: what ``encode_samples`` keeps to.
    """

    def __init__(self, root: Path, *, limit_bytes: int = int(DEFAULT_LIMIT_GB * 10**9)) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the cache folder {root}: {error.strerror}. Set ICMOE_CACHE_DIR to one you may write to."
            ) from error
        if root.stat().st_mode & 0o077:
            _logger.warning("others on this machine can look into %s: run 'chmod 700 %s'", root, root)

    def path(self, key: str) -> Path:
        """Where the entry of a key is or would be."""
        return self.root / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Say whether a complete entry exists; safetensors compares its header with the file's size."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return set(file.keys()) == {"embeddings", "detail"}
        except (OSError, SafetensorError):
            return False

    def load(self, key: str) -> tuple[Tensor, Tensor]:
        """Read an entry.

        Returns:
            Embeddings (256, h, w) float16 and the detail image (3, D, D) uint8.

        Raises:
            DataError: if the entry is missing or damaged.
        """
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return file.get_tensor("embeddings"), file.get_tensor("detail")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the cached features {self.path(key)} are missing or damaged ({error}). "
                "Start again: what is missing is computed anew."
            ) from error

    def store(self, key: str, *, image_digest: str, embeddings: Tensor, detail: Tensor) -> None:
        """Write an entry: complete or not at all.

        Args:
            key: its name.
            image_digest: of the image it is made of, so that a withdrawn patient's entries are found.
            embeddings: (256, h, w) float16.
            detail: (3, D, D) uint8.

        Raises:
            OSError: if it cannot be written; nothing is left behind.
        """
        tensors = {"embeddings": embeddings.contiguous(), "detail": detail.contiguous()}
        content = save(tensors, metadata={_IMAGE: image_digest})
        try:
            self._write(self.path(key), content)
        except FileNotFoundError:
            # A purge at this moment took the folder or the temporary file away.
            self._write(self.path(key), content)

    def info(self) -> CacheInfo:
        """Count entries and bytes."""
        return self._describe([size for _, size in self._files(_ENTRIES)])

    def purge(self) -> CacheInfo:
        """Remove all entries and temporary files, and say what went."""
        removed = []
        for pattern in (_ENTRIES, _TEMPORARY):
            for path, size in self._files(pattern):
                path.unlink(missing_ok=True)
                removed += [size] if pattern == _ENTRIES else []
        return self._describe(removed)

    def remove_images(self, digests: Collection[str]) -> CacheInfo:
        """Remove all entries of images, in whatever view and for whatever backbone, and say what went."""
        removed = []
        for path, size in self._files(_ENTRIES):
            try:
                with safe_open(path, framework="pt") as file:
                    digest = (file.metadata() or {}).get(_IMAGE)
            except (OSError, SafetensorError):
                continue
            if digest in digests:
                path.unlink(missing_ok=True)
                removed.append(size)
        return self._describe(removed)

    def remove_stale(self) -> None:
        """Remove temporary files that killed writers left behind more than an hour ago."""
        for path, _ in self._files(_TEMPORARY, older_than=STALE_SECONDS):
            path.unlink(missing_ok=True)

    def _describe(self, sizes: Sequence[int]) -> CacheInfo:
        return CacheInfo(entries=len(sizes), bytes=sum(sizes), limit_bytes=self.limit_bytes, root=self.root)

    def _files(self, pattern: str, *, older_than: float = -math.inf) -> Iterator[tuple[Path, int]]:
        for path in self.root.glob(pattern):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if time.time() - status.st_mtime > older_than:
                yield path, status.st_size

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Not synced to disk first: an entry that a power cut truncates is found by its header and computed again.
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".icmoe-tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def default_cache_dir() -> Path:
    """``$ICMOE_CACHE_DIR/features``, else ``icmoe-fl/features`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if folder := os.environ.get("ICMOE_CACHE_DIR"):
        return Path(folder).expanduser() / "features"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "icmoe-fl" / "features"


def open_cache() -> FeatureCache:
    """Open the default cache with the limit of ``$ICMOE_CACHE_LIMIT_GB`` (20 where unset).

    Raises:
        ConfigError: if the limit is not a positive number.
        RunError: if the folder cannot be made.
    """
    text = os.environ.get("ICMOE_CACHE_LIMIT_GB") or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        raise ConfigError(
            f"ICMOE_CACHE_LIMIT_GB is {text!r}. Give the size limit of the feature cache in GB, such as 20."
        )
    return FeatureCache(default_cache_dir(), limit_bytes=int(limit * 10**9))
