"""Whatever happens to a file on the way to us: it is read, or refused with a DataError. No traceback, hang or death."""

import gzip
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from icmoe.data import dicom
from icmoe.data.manifest import Sample
from icmoe.data.nifti import is_nifti
from icmoe.data.sources import load_pixels, load_raw_labels
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import DataError

FORMATS = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats"
CT = FORMATS / "dicom" / "ct_3slice_with_seg"
NUM_MUTATIONS = 200
SECONDS = 300.0

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set"),
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Truncate, flip bytes, or write a wrong length; gzip streams are damaged inside as often as outside."""
    if content[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        return gzip.compress(mutated(gzip.decompress(content), rng), compresslevel=1)
    damaged = bytearray(content)
    match rng.randrange(4):
        case 0:
            del damaged[rng.randrange(len(damaged)) :]
        case 1:
            for _ in range(rng.randrange(1, 20)):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        case 2:  # the header is where lengths and types are
            for _ in range(rng.randrange(1, 8)):
                damaged[rng.randrange(min(2000, len(damaged)))] = rng.randrange(256)
        case _:
            start = rng.randrange(max(1, min(2000, len(damaged)) - 4))
            damaged[start : start + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x01\0\0\0"]
            )
    return bytes(damaged)


def attempts(path: Path) -> Iterator[Callable[[], Any]]:
    """All ways in which a manifest could point to a file."""
    axis = "axial" if is_nifti(path) else ""
    itself = Sample(path, path, "p", "train", "s", "0", axis=axis, intensity="percentile:1:99")
    yield lambda: load_pixels(itself)
    yield lambda: load_raw_labels(itself)
    if dicom.is_dicom(path):
        mask = Sample(CT, path, "p", "train", "s", "0", axis="axial")
        yield lambda: load_raw_labels(mask)


def read_or_refuse(path: Path) -> bool:
    """Whether anything could be read; any other error than ours goes up."""
    read = False
    for attempt in attempts(path):
        try:
            read = attempt().size > 0 or read
        except DataError as error:
            if path.name not in str(error) and str(path.parent) not in str(error):
                raise AssertionError("the message does not name the file") from error
        read_volume.cache_clear()
        read_labels.cache_clear()
    return read


def read_all_mutations(count: int) -> None:
    files = [path for path in sorted(FORMATS.rglob("*")) if path.is_file() and path.suffix not in (".txt", ".md")]
    rng = random.Random(20261123)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            original = rng.choice(files)
            path = Path(folder) / original.name
            path.write_bytes(mutated(original.read_bytes(), rng))
            read_or_refuse(path)
            path.unlink()


def test_every_shared_file_is_read_or_refused() -> None:
    files = [path for path in sorted(FORMATS.rglob("*")) if path.is_file()]
    results = {path.name: read_or_refuse(path) for path in files}
    assert len(results) > 60
    # So that a reader which refuses everything does not pass.
    assert sum(results.values()) > 40
    assert not results["MR_truncated.dcm"]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_200_damaged_files_are_read_or_refused() -> None:
    # In a process of its own: a codec that crashes must show as a failure, not end the tests.
    process = multiprocessing.get_context("spawn").Process(target=read_all_mutations, args=(NUM_MUTATIONS,))
    process.start()
    process.join(SECONDS)
    alive = process.is_alive()
    process.kill()
    assert not alive, "a reader hangs"
    assert process.exitcode == 0
