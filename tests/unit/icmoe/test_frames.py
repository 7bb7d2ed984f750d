"""One DICOM file with several frames: read as a volume, and its prediction written as DICOM SEG and NIfTI."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.uid import generate_uid

from icmoe.data import dicom, outputs
from icmoe.data.dicom_seg import read_sources, write_segmentation
from icmoe.data.inputs import Input, find_inputs, slices_of
from icmoe.data.pairing import find_pairs
from icmoe.data.volumes import read_labels, read_volume, turn
from icmoe.errors import DataError
from icmoe.types import AXES, Axis

ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats" / "dicom"
CT = ROOT / "ct_3slice_with_seg"
FILM = ROOT / "pydicom" / "examples_ybr_color.dcm"
NAMES = ("liver", "no known organ")
PART = slice(200, 248)
ORDERS = [(0, 1, 2), (2, 0, 1)]

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set"),
]


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    """Files under one path change between tests."""
    yield
    for cached in (read_volume, read_labels, dicom.list_series):
        cached.cache_clear()


def enhanced(path: Path, order: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A part of the three CT slices as frames of one file, in this order."""
    slices = [pydicom.dcmread(CT / f"{number}.dcm") for number in ("01", "02", "03")]
    for one in slices:
        one.PatientName = "Doe^Jan"
        one.PixelData = np.ascontiguousarray(one.pixel_array[PART, PART]).tobytes()
        one.Rows = one.Columns = PART.stop - PART.start
        across, down, height = (float(value) for value in one.ImagePositionPatient)
        shift = PART.start * float(one.PixelSpacing[0])
        one.ImagePositionPatient = [round(across + shift, 6), round(down + shift, 6), height]
    made = LegacyConvertedEnhancedCTImage(
        slices,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    frames, pixels = list(made.PerFrameFunctionalGroupsSequence), made.pixel_array
    made.PerFrameFunctionalGroupsSequence = [frames[index] for index in order]
    made.PixelData = np.ascontiguousarray(pixels[list(order)]).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
    return path


def predicted(item: Input, axis: Axis) -> hd.Volume:
    """Labels as a model gives them, slice by slice along an axis, brought to the order of the file."""
    stored = item.read()
    turned = turn(stored.grid, axis)
    labels = np.random.default_rng(0).integers(0, 3, turned.spatial_shape).astype(np.uint8)
    if axis == "axial":
        labels[1] = 0  # no frame of the SEG for this one
    return outputs.place(turned, labels, stored.grid.get_geometry())


@pytest.mark.parametrize("order", ORDERS)
def test_equals_its_slices(tmp_path: Path, order: tuple[int, ...]) -> None:
    stored, series = read_volume(enhanced(tmp_path / "ct.dcm", order)), read_volume(CT)
    assert stored.modality == "CT"
    np.testing.assert_array_equal(stored.grid.array, series.grid.array[:, PART, PART])
    corner = series.grid.map_indices_to_reference(np.array([[0, PART.start, PART.start]]))[0]
    np.testing.assert_allclose(stored.grid.position, corner, atol=1e-5)
    np.testing.assert_allclose(stored.grid.affine[:3, :3], series.grid.affine[:3, :3], atol=1e-6)


def test_is_found_as_one_input(tmp_path: Path) -> None:
    (item,) = find_inputs(enhanced(tmp_path / "a" / "ct.dcm").parent, out=tmp_path / "out")
    assert (item.name, item.kind, item.is_volume) == ("ct", "series", True)
    samples = slices_of(item, axis=None, intensity="")
    assert [(sample.axis, sample.slice) for sample in samples] == [("axial", str(number)) for number in range(3)]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("order", ORDERS)
def test_segmentation_reads_back(tmp_path: Path, order: tuple[int, ...], axis: Axis) -> None:
    image = enhanced(tmp_path / "ct.dcm", order)
    item = Input("ct", image, "series")
    labels, path = predicted(item, axis), tmp_path / "seg.dcm"
    write_segmentation(path, labels, read_sources(item, item.read().instances), class_names=NAMES, model="d" * 64)
    np.testing.assert_array_equal(read_labels(path, image=image).array, labels.array)
    source = pydicom.dcmread(image)
    places = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in source.PerFrameFunctionalGroupsSequence]
    written = hd.seg.segread(path)
    assert len(written.PerFrameFunctionalGroupsSequence) == (4 if axis == "axial" else 6)
    for frame in written.PerFrameFunctionalGroupsSequence:
        (named,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert named.ReferencedSOPInstanceUID == source.SOPInstanceUID
        # The frame that is named lies where this one lies, in whatever order the image stores its frames.
        np.testing.assert_allclose(
            np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float),
            np.array(places[int(named.ReferencedFrameNumber) - 1], dtype=float),
            atol=1e-3,
        )


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    item = Input("ct", enhanced(tmp_path / "ct.dcm"), "series")
    sources = read_sources(item, item.read().instances)
    write_segmentation(tmp_path / "seg.dcm", predicted(item, "axial"), sources, class_names=NAMES, model="d" * 64)
    done = subprocess.run(["dciodvfy", "-new", tmp_path / "seg.dcm"], capture_output=True, text=True, check=False)
    assert "Segmentation" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []


def test_nifti_lies_where_the_frames_lie(tmp_path: Path) -> None:
    item = Input("ct", enhanced(tmp_path / "ct.dcm", (2, 0, 1)), "series")
    labels = predicted(item, "axial")
    outputs.write_volume(tmp_path / "mask.nii.gz", labels, like=None)
    written = nib.load(tmp_path / "mask.nii.gz")
    back = read_labels(tmp_path / "mask.nii.gz", image=item.path)
    assert written.shape == (48, 48, 3)
    np.testing.assert_array_equal(back.array, labels.array)


def test_is_paired_with_its_segmentation(tmp_path: Path) -> None:
    image = enhanced(tmp_path / "archive" / "ct.dcm")
    item = Input("ct", image, "series")
    labels, path = predicted(item, "axial"), tmp_path / "archive" / "seg.dcm"
    write_segmentation(path, labels, read_sources(item, item.read().instances), class_names=NAMES, model="d" * 64)
    (pair,) = find_pairs(tmp_path / "archive", labels="seg", patient_pattern="", label_pattern="").pairs
    read = read_labels(pair.label, image=pair.image, series=pair.series)
    np.testing.assert_array_equal(read.array, labels.array)


def test_a_film_is_no_volume() -> None:
    with pytest.raises(DataError, match=r"examples_ybr_color.dcm holds 30 frames .* single pictures"):
        read_volume(FILM)
    with pytest.raises(DataError, match="several frames"):
        dicom.read_picture(FILM)
