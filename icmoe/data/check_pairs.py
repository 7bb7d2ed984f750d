"""Who is who: images that two patients share, equal or nearly so, and ids that tell no patients apart."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from icmoe.data.check_findings import Finding, Reading

MAX_DISTANCE = 6
"""Bits, of 64, in which difference hashes of nearly equal images may differ."""
MAX_LEVELS = 3.0
"""Mean difference of 16 x 16 grey signatures, of 255 levels, that nearly equal images may have."""
MIN_SOURCES = 3
"""Pictures and volumes of a site from which an id that all share, or none has, is reported."""
_ROWS = 512
_BIT_COUNTS = np.array([value.bit_count() for value in range(2**16)], dtype=np.uint8)


def patient_findings(site: str, readings: Sequence[Reading]) -> Iterator[Finding]:
    """Ids of a site that make its splits meaningless: one for all, or none at all."""
    sources = {(reading.sample.image, reading.sample.series) for reading in readings}
    if len(sources) >= MIN_SOURCES and len({reading.sample.patient for reading in readings}) == 1:
        message = f"all {len(sources)} pictures and volumes of site {site} belong to one patient."
        yield Finding("one-patient", _names(readings), message)
    without = [reading for reading in readings if reading.opened.lacks_patient_id]
    nameless = {(reading.sample.image, reading.sample.series) for reading in without}
    # Where one id covers several, somebody told the patients apart in another way.
    own = len({reading.sample.patient for reading in without}) == len(nameless)
    if len(nameless) >= MIN_SOURCES and own:
        message = f"{len(nameless)} pictures and volumes of site {site} have no PatientID."
        yield Finding("patient-id-missing", _names(without), message)


def duplicates(readings: Sequence[Reading]) -> Iterator[Finding]:
    """Identical pixels under two patients. Blank images are alike by nature and left out."""
    groups: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        pixels = reading.opened.pixels
        if pixels is not None and not pixels.constant:
            groups[pixels.pixel_digest].append(reading)
    for members in groups.values():
        if len({_patient(member) for member in members}) > 1:
            splits = {member.sample.split for member in members}
            code = "duplicate-across-splits" if len(splits) > 1 else "duplicate-image"
            yield Finding(code, _names(members), f"identical pixels for {_describe(members)}.")


def near_duplicates(readings: Sequence[Reading]) -> Iterator[Finding]:
    """Images of different patients that differ by compression, scaling or brightness only; one finding per group.

    Two steps: difference hashes within ``MAX_DISTANCE`` bits, then signatures within ``MAX_LEVELS``. The hash alone
    calls images with a dark background alike.
    """
    known = [
        reading for reading in readings if reading.opened.pixels is not None and not reading.opened.pixels.constant
    ]
    pixels = [reading.opened.pixels for reading in known if reading.opened.pixels is not None]
    groups = list(range(len(known)))
    for first, second in _close_hashes(np.array([one.difference_hash for one in pixels], dtype=np.uint64)):
        same = pixels[first].pixel_digest == pixels[second].pixel_digest
        if same or _patient(known[first]) == _patient(known[second]):
            continue
        if _signature_distance(pixels[first].signature, pixels[second].signature) <= MAX_LEVELS:
            groups[_root(groups, second)] = _root(groups, first)
    members: dict[int, list[Reading]] = defaultdict(list)
    for index, reading in enumerate(known):
        members[_root(groups, index)].append(reading)
    for group in members.values():
        if len(group) > 1:
            yield Finding("near-duplicate", _names(group), f"nearly the same picture for {_describe(group)}.")


def _close_hashes(hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, within ``MAX_DISTANCE`` bits; in blocks, so that memory grows with the number of images."""
    for start in range(0, len(hashes), _ROWS):
        differing = hashes[start : start + _ROWS, None] ^ hashes[None, start:]
        parts = differing.view(np.uint16).reshape(*differing.shape, 4)
        distances = sum(_BIT_COUNTS[parts[..., part]] for part in range(4))
        for row, column in np.argwhere(distances <= MAX_DISTANCE):
            if row < column:
                yield start + int(row), start + int(column)


def _signature_distance(first: bytes, second: bytes) -> float:
    one, other = (np.frombuffer(content, dtype=np.uint8).astype(np.int16) for content in (first, second))
    return float(np.abs(one - other).mean())


def _root(groups: list[int], index: int) -> int:
    while groups[index] != index:
        groups[index] = groups[groups[index]]
        index = groups[index]
    return index


def _patient(reading: Reading) -> tuple[str, str]:
    return reading.sample.site, reading.sample.patient


def _names(members: Sequence[Reading]) -> tuple[str, ...]:
    return tuple(member.name for member in members)


def _describe(members: Sequence[Reading]) -> str:
    seen = dict.fromkeys((m.sample.patient, m.sample.site, m.sample.split) for m in members)
    shown = [f"patient {patient} (site {site}, {split})" for patient, site, split in list(seen)[:4]]
    return " and ".join(shown) + (f" and {len(seen) - 4} more" if len(seen) > 4 else "")
