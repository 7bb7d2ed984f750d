"""DICOM as hospitals have it: mixed patients, sparse segmentations, 8-bit JPEG."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGBaseline8Bit

from icmoe.data import dicom
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import DataError, MaskError

ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats" / "dicom"
CT = ROOT / "ct_3slice_with_seg"
FILM = ROOT / "pydicom" / "examples_ybr_color.dcm"

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


def slices() -> list[pydicom.Dataset]:
    return [pydicom.dcmread(CT / f"{number}.dcm") for number in ("01", "02", "03")]


def save(folder: Path, datasets: list[pydicom.Dataset]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{number}.dcm")
    return folder


class TestPatients:
    def with_ids(self, folder: Path, ids: list[str | None]) -> Path:
        datasets = slices()
        for dataset, identifier in zip(datasets, ids, strict=True):
            if identifier is None:
                del dataset.PatientID
            else:
                dataset.PatientID = identifier
        return save(folder, datasets)

    def test_one_series_of_two_patients_is_refused(self, tmp_path: Path) -> None:
        folder = self.with_ids(tmp_path / "ct", ["Anna7", "Anna7", "Bert8"])
        with pytest.raises(DataError, match="has 2 different PatientIDs") as refused:
            read_volume(folder)
        assert "Anna7" not in str(refused.value)

    @pytest.mark.parametrize("ids", [["", "Anna7", "Anna7 "], [None, None, "Anna7"]])
    def test_files_without_an_id_follow_the_others(self, tmp_path: Path, ids: list[str | None]) -> None:
        folder = self.with_ids(tmp_path / "ct", ids)
        assert read_volume(folder).grid.array.shape == (3, 512, 512)
        (series,) = dicom.list_series(folder)
        assert series.patient == "Anna7"

    def test_no_id_at_all(self, tmp_path: Path) -> None:
        (series,) = dicom.list_series(self.with_ids(tmp_path / "ct", ["", None, ""]))
        assert series.patient == ""


class TestSparseSegmentation:
    """A SEG holds frames only where a segment is; without SpacingBetweenSlices the image tells the distance."""

    def sparse(self, path: Path, keep: list[int], *, distance: float | None = None) -> Path:
        dataset = pydicom.dcmread(CT / "liver.dcm")
        frames, masks = list(dataset.PerFrameFunctionalGroupsSequence), dataset.pixel_array
        dataset.PerFrameFunctionalGroupsSequence = [frames[index] for index in keep]
        dataset.NumberOfFrames = len(keep)
        packed = np.packbits(masks[keep].reshape(-1), bitorder="little").tobytes()
        dataset.PixelData = packed + b"\0" * (len(packed) % 2)
        measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        del measures.SpacingBetweenSlices
        if distance is not None:
            measures.SpacingBetweenSlices = distance
        dataset.save_as(path)
        return path

    def expected(self, keep: list[int]) -> np.ndarray:
        """The whole label with the other frames empty, told by their positions."""
        whole = read_labels(CT / "liver.dcm", image=CT)
        frames = pydicom.dcmread(CT / "liver.dcm").PerFrameFunctionalGroupsSequence
        places = [np.array(frames[index].PlanePositionSequence[0].ImagePositionPatient, dtype=float) for index in keep]
        wanted = [round(float(whole.map_reference_to_indices(place[None])[0, 0])) for place in places]
        return np.where(np.isin(np.arange(3), wanted)[:, None, None], whole.array, 0)

    @pytest.mark.parametrize("keep", [[0, 2], [2, 0], [0], [1], [2], [1, 2], [2, 0, 1]])
    def test_frames_lie_where_they_say(self, tmp_path: Path, keep: list[int]) -> None:
        labels = read_labels(self.sparse(tmp_path / "seg.dcm", keep), image=CT)
        expected = self.expected(keep)
        assert expected.any()
        np.testing.assert_array_equal(labels.array, expected)

    @pytest.mark.parametrize("keep", [[0, 2], [1]])
    def test_on_an_image_stored_the_other_way_round(self, tmp_path: Path, keep: list[int]) -> None:
        image = read_volume(CT).grid.permute_spatial_axes([2, 1, 0]).flip_spatial([2])
        labels = dicom.read_segmentation(self.sparse(tmp_path / "seg.dcm", keep), image.get_geometry(), ())
        np.testing.assert_array_equal(labels.array, self.expected(keep).transpose(2, 1, 0)[:, :, ::-1])

    def test_a_coarser_grid_that_the_label_states_is_still_another_grid(self, tmp_path: Path) -> None:
        with pytest.raises(MaskError, match="not on its image's grid"):
            read_labels(self.sparse(tmp_path / "seg.dcm", [0, 2], distance=2.0), image=CT)

    def test_frames_between_slices_are_refused(self, tmp_path: Path) -> None:
        path = self.sparse(tmp_path / "seg.dcm", [0, 2])
        dataset = pydicom.dcmread(path)
        place = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
        place.ImagePositionPatient = [*place.ImagePositionPatient[:2], place.ImagePositionPatient[2] + 0.5]
        dataset.save_as(path)
        with pytest.raises(MaskError, match="between the slices"):
            dicom.read_segmentation(path, read_volume(CT).grid.get_geometry(), ())


class TestBaselineJpeg:
    """8 bits, process 1: what ultrasound machines and secondary captures write."""

    def grey(self, folder: Path, photometric: str) -> tuple[Path, np.ndarray]:
        shown = Image.fromarray((read_volume(CT).grid.array[1] / 8 + 128).clip(0, 255).astype(np.uint8))
        stream = io.BytesIO()
        shown.save(stream, format="JPEG", quality=90)
        dataset: Any = slices()[1]
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -100
        dataset.PhotometricInterpretation = photometric
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        for tag in ("SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue"):
            if tag in dataset:
                delattr(dataset, tag)
        dataset.save_as(folder / "a.dcm", implicit_vr=False, little_endian=True)
        decoded = np.asarray(Image.open(io.BytesIO(stream.getvalue()))).astype(np.float32)
        return folder / "a.dcm", decoded * 2 - 100

    def test_grey(self, tmp_path: Path) -> None:
        path, expected = self.grey(tmp_path, "MONOCHROME2")
        pixels = dicom.read_picture(path)
        assert pixels.max() > pixels.min()
        # Decoders of JPEG may differ by one level, here of two units.
        np.testing.assert_allclose(pixels, expected, atol=2.0)

    def test_grey_shown_white_on_black(self, tmp_path: Path) -> None:
        path, expected = self.grey(tmp_path, "MONOCHROME1")
        np.testing.assert_allclose(dicom.read_picture(path), expected.max() + expected.min() - expected, atol=4.0)

    def test_colour_of_a_real_scanner_is_rgb(self, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(FILM)
        frame = next(generate_frames(dataset.PixelData, number_of_frames=int(dataset.NumberOfFrames)))
        del dataset.NumberOfFrames
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(tmp_path / "a.dcm")
        pixels = dicom.read_picture(tmp_path / "a.dcm")
        expected = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")).astype(np.float32)
        assert pixels.shape == (240, 320, 3)
        assert np.abs(pixels - expected).mean() < 2.0
