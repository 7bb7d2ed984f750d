"""Which bytes a check was about, so that images or masks exchanged behind an unchanged manifest are noticed.

A file whose size differs has changed; one with the same size and times has not, and is not opened. Only where size is
equal and a time is not, as after a copy, a move to another disk or a touch, its content decides: a moved data folder
stays checked, at the price of reading it once at each start until the next check (``cp -p`` and ``rsync -a`` keep the
time of the content, but not that of the entry). The second time, of the entry, is there for exchanges that keep the
first one: two masks that change names, or an archive that was unpacked again.

Not noticed: a file added to the folder of a DICOM series. Reading that series says so where slices no longer fit.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icmoe.data import dicom
from icmoe.data.dicom_files import series_digest
from icmoe.data.manifest import Sample
from icmoe.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileState:
    """A file as the check read it.

    Attributes:
        name: path relative to the data folder.
        size: bytes.
        modified_ns: when the content changed, in nanoseconds.
        changed_ns: when the directory's entry changed, such as its name.
        sha256: of the content.
    """

    name: str
    size: int
    modified_ns: int
    changed_ns: int
    sha256: str


def read_states(samples: Sequence[Sample], *, root: Path) -> tuple[FileState, ...]:
    """States of all files that these lines of the manifest point to; what cannot be read has none.

    To be called before the files are parsed: what changes while a check runs then counts as changed.

    Args:
        samples: lines of the manifest.
        root: the data folder.
    """
    paths = dict.fromkeys(path for sample in samples for path in _files_of(sample))
    states = (_read_state(path, root=root) for path in paths)
    return tuple(state for state in states if state is not None)


def states_of(samples: Iterable[Sample], states: Iterable[FileState], *, root: Path) -> tuple[FileState, ...]:
    """The states that belong to these samples, once each, by name."""
    wanted = {path for sample in samples for path in (sample.image, sample.mask)}
    # An image may be the folder of a series.
    kept = {state.name: state for state in states if wanted & {root / state.name, *(root / state.name).parents}}
    return tuple(kept[name] for name in sorted(kept))


def source_digests(samples: Sequence[Sample], states: Iterable[FileState], *, root: Path) -> tuple[str, ...]:
    """Digest of each sample's image file, or of all files of its series, without reading any of them.

    Args:
        samples: usable ones.
        states: as the check recorded them.
        root: the data folder.
    """
    below: dict[Path, list[str]] = {}
    for state in states:
        path = root / state.name
        for place in (path, *path.parents):
            below.setdefault(place, []).append(state.sha256)
    found = (below[sample.image] for sample in samples)
    return tuple(series_digest(digests) if len(digests) > 1 else digests[0] for digests in found)


def count_changed(states: Iterable[FileState], *, root: Path) -> int:
    """Number of files that are gone or hold something else than when they were checked.

    Args:
        states: as recorded.
        root: where the data folder is now.
    """
    changed = [state.name for state in states if _has_changed(state, root / state.name)]
    if changed:
        logger.info("changed since the check, first of %d: %s", len(changed), ", ".join(changed[:5]))
    return len(changed)


def _files_of(sample: Sample) -> Iterator[Path]:
    if sample.image.is_dir():
        try:
            yield from dicom.find_series(sample.image, sample.series).files
        except DataError:
            return  # whoever opens it says why
    else:
        yield sample.image
    yield sample.mask


def _read_state(path: Path, *, root: Path) -> FileState | None:
    try:
        found = path.stat()
        digest = _digest(path)
    except OSError:
        return None
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return FileState(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, digest)


def _has_changed(state: FileState, path: Path) -> bool:
    try:
        found = path.stat()
        if found.st_size != state.size:
            return True
        if (found.st_mtime_ns, found.st_ctime_ns) == (state.modified_ns, state.changed_ns):
            return False
        return _digest(path) != state.sha256
    except OSError:
        return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
