"""NIfTI and DICOM volumes: real files of the shared data, and small ones made here."""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import generate_uid

from icmoe.data import dicom
from icmoe.data.manifest import Sample
from icmoe.data.sources import image_digest, load_pixels, load_raw_labels, load_size
from icmoe.data.volumes import natural_axis, read_labels, read_volume, turn
from icmoe.errors import DataError, MaskError

ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats"
CT = ROOT / "dicom" / "ct_3slice_with_seg"
PYDICOM = ROOT / "dicom" / "pydicom"
PROSTATE = ROOT / "nifti" / "prostate_mr"
needs_files = pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    """Files under one path change between tests."""
    yield
    for cached in (read_volume, read_labels, dicom.list_series):
        cached.cache_clear()


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def random_volume(seed: int = 0, shape: tuple[int, ...] = (6, 8, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 500, shape).astype(np.int16)


def all_orders(image: nib.Nifti1Image) -> Iterator[nib.Nifti1Image]:
    """The same volume in all 48 axis orders."""
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product([1, -1], repeat=3):
            yield image.as_reoriented(np.array(list(zip(axes, flips, strict=True)), dtype=float))


def copy_series(folder: Path, *, names: list[str] | None = None, **changes: Any) -> Path:
    """The three CT slices under other names, with changed tags."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in zip(("01", "02", "03"), names or ["01", "02", "03"], strict=True):
        dataset = pydicom.dcmread(CT / f"{number}.dcm")
        for tag, value in changes.items():
            setattr(dataset, tag, value)
        dataset.save_as(folder / f"{name}.dcm")
    return folder


def reference_labels(name: str) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(CT / name))))


@needs_files
@pytest.mark.shared_data
class TestSeries:
    def test_spacing_comes_from_positions(self) -> None:
        stored = read_volume(CT)
        assert stored.modality == "CT"
        np.testing.assert_allclose(stored.grid.spacing, (1.0, 0.810547, 0.810547))
        assert stored.grid.array.min() == -3024.0  # Hounsfield: slope and intercept are applied

    def test_equals_itk(self) -> None:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(CT / f"{number}.dcm") for number in ("03", "02", "01")])
        expected = sitk.GetArrayFromImage(reader.Execute())
        np.testing.assert_array_equal(turn(read_volume(CT).grid, "axial").array, expected)

    def test_file_names_mean_nothing(self, tmp_path: Path) -> None:
        renamed = copy_series(tmp_path / "ct", names=["z", "a", "m"])
        np.testing.assert_array_equal(read_volume(renamed).grid.array, read_volume(CT).grid.array)

    def test_a_missing_slice_is_refused(self, tmp_path: Path) -> None:
        folder = copy_series(tmp_path / "ct")
        third = pydicom.dcmread(folder / "03.dcm")
        third.ImagePositionPatient = [*third.ImagePositionPatient[:2], -130.69]
        third.save_as(folder / "03.dcm")
        with pytest.raises(DataError, match="missing or doubled"):
            read_volume(folder)

    def test_a_doubled_slice_is_refused(self, tmp_path: Path) -> None:
        folder = copy_series(tmp_path / "ct")
        doubled = pydicom.dcmread(folder / "03.dcm")
        doubled.SOPInstanceUID = generate_uid()
        doubled.save_as(folder / "04.dcm")
        with pytest.raises(DataError, match="missing or doubled"):
            read_volume(folder)

    def test_an_empty_shell_is_refused(self, tmp_path: Path) -> None:
        folder = copy_series(tmp_path / "ct")
        shell = pydicom.dcmread(folder / "02.dcm")
        del shell.PixelData
        shell.save_as(folder / "02.dcm")
        with pytest.raises(DataError, match="empty shell"):
            read_volume(folder)

    def test_slices_of_another_pixel_spacing_are_refused(self, tmp_path: Path) -> None:
        folder = copy_series(tmp_path / "ct")
        other = pydicom.dcmread(folder / "02.dcm")
        other.PixelSpacing = [0.5, 0.5]
        other.save_as(folder / "02.dcm")
        with pytest.raises(DataError, match="different pixel spacings"):
            read_volume(folder)

    def test_slices_shown_white_on_black_keep_one_scale(self, tmp_path: Path) -> None:
        folder = copy_series(tmp_path / "mr", PhotometricInterpretation="MONOCHROME1", Modality="MR")
        expected = read_volume(CT).grid.array
        inverted = read_volume(folder).grid.array
        np.testing.assert_array_equal(inverted, expected.max() + expected.min() - expected)

    def test_mixed_series_are_told_apart(self, tmp_path: Path) -> None:
        copy_series(tmp_path / "both", names=["a1", "a2", "a3"])
        other = generate_uid()
        copy_series(tmp_path / "both", names=["b1", "b2", "b3"], SeriesInstanceUID=other, RescaleIntercept=0)
        with pytest.raises(DataError, match=r"2 image series.*column series"):
            read_volume(tmp_path / "both")
        assert read_volume(tmp_path / "both", series=other).grid.array.min() == -2000.0


@needs_files
@pytest.mark.shared_data
class TestSegmentation:
    def test_seg_reverse_equals_the_reference(self) -> None:
        labels = turn(read_labels(CT / "liver.dcm", image=CT), "axial")
        np.testing.assert_array_equal(labels.array, reference_labels("liver_seg.nrrd"))

    @pytest.mark.parametrize("seed", range(3))
    def test_seg_reverse_frames_in_any_order(self, tmp_path: Path, seed: int) -> None:
        shuffled = pydicom.dcmread(CT / "liver.dcm")
        frames = list(shuffled.PerFrameFunctionalGroupsSequence)
        masks = shuffled.pixel_array
        order = random.Random(seed).sample(range(3), 3)
        shuffled.PerFrameFunctionalGroupsSequence = [frames[index] for index in order]
        packed = np.packbits(masks[order].reshape(-1), bitorder="little").tobytes()
        shuffled.PixelData = packed + b"\0" * (len(packed) % 2)
        shuffled.save_as(tmp_path / "seg.dcm")
        renamed = copy_series(tmp_path / "ct", names=random.Random(seed).sample(["q", "r", "s"], 3))
        labels = turn(read_labels(tmp_path / "seg.dcm", image=renamed), "axial")
        np.testing.assert_array_equal(labels.array, reference_labels("liver_seg.nrrd"))

    def test_seg_reverse_a_frame_away_from_the_image_it_names_is_refused(self, tmp_path: Path) -> None:
        wrong = pydicom.dcmread(CT / "liver.dcm")
        first, second = (frame.DerivationImageSequence for frame in wrong.PerFrameFunctionalGroupsSequence[:2])
        wrong.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence = second
        wrong.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence = first
        wrong.save_as(tmp_path / "seg.dcm")
        with pytest.raises(MaskError, match=r"1\.00 mm away"):
            read_labels(tmp_path / "seg.dcm", image=CT)

    def test_overlapping_segments_are_refused(self) -> None:
        with pytest.raises(MaskError, match="overlap"):
            read_labels(CT / "partial_overlaps.dcm", image=CT)

    def test_a_segmentation_of_another_series_is_refused(self, tmp_path: Path) -> None:
        other = tmp_path / "ct"
        other.mkdir()
        for number in ("01", "02", "03"):
            dataset = pydicom.dcmread(CT / f"{number}.dcm")
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.save_as(other / f"{number}.dcm")
        with pytest.raises(MaskError, match="another one"):
            read_labels(CT / "liver.dcm", image=other)

    @pytest.mark.parametrize("missing", ["01", "03"])
    def test_seg_reverse_a_series_that_lost_its_first_or_last_slice_is_refused(
        self, tmp_path: Path, missing: str
    ) -> None:
        folder = copy_series(tmp_path / "ct")
        (folder / f"{missing}.dcm").unlink()
        with pytest.raises(MaskError, match="Slices of the image may be missing"):
            read_labels(CT / "liver.dcm", image=folder)

    def test_slices_of_image_and_label_lie_on_each_other(self) -> None:
        for number in range(3):
            sample = Sample(
                CT, CT / "liver.dcm", "p", "train", "s", str(number), axis="axial", intensity="window:0:100"
            )
            pixels, labels = load_pixels(sample), load_raw_labels(sample)
            assert pixels.shape == (512, 512, 3)
            assert (pixels.min(), pixels.max()) == (0.0, 255.0)
            # A liver without contrast agent has 50 to 60 HU, half of that window.
            assert 80 < np.median(pixels[labels == 1]) < 200
            assert np.median(pixels[labels == 0]) < 80


@needs_files
@pytest.mark.shared_data
class TestNifti:
    def test_labels_lie_on_their_image(self) -> None:
        image = PROSTATE / "Prostatex_0000.nii.gz"
        stored = read_volume(image)
        assert natural_axis(stored.grid) == "axial"
        labels = read_labels(PROSTATE / "Prostatex_0000_lab.nii.gz", image=image)
        expected = np.asarray(nib.load(PROSTATE / "Prostatex_0000_lab.nii.gz").dataobj)
        np.testing.assert_array_equal(labels.array, expected)


class TestOrientation:
    @pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
    def test_all_48_axis_orders_give_the_same_slices(self, tmp_path: Path, axis: Any) -> None:
        affine = np.diag([2.0, 3.0, 5.0, 1.0])
        affine[:3, 3] = [-7.0, 11.0, 13.0]
        image = nib.Nifti1Image(random_volume(), affine)
        seen = []
        for number, turned in enumerate(all_orders(image)):
            path = tmp_path / f"{number}.nii"
            nib.save(turned, path)
            labels = read_labels(path, image=path)
            volume = turn(read_volume(path).grid, axis)
            np.testing.assert_array_equal(turn(labels, axis).array, volume.array)
            seen.append((volume.array, volume.affine))
        assert len(seen) == 48
        for array, place in seen[1:]:
            np.testing.assert_array_equal(array, seen[0][0])
            np.testing.assert_allclose(place, seen[0][1], atol=1e-5)

    def test_axial_slices_look_as_a_radiologist_expects(self, tmp_path: Path) -> None:
        values = np.zeros((4, 5, 6), np.int16)
        values[0, 4, 5] = 1  # with x running from right to left: the right-most, front-most voxel nearest the head
        path = save_nifti(tmp_path / "a.nii", values, np.diag([-1.0, 1.0, 1.0, 1.0]))
        volume = turn(read_volume(path).grid, "axial")
        assert volume.array.shape == (6, 5, 4)
        assert volume.array[5, 0, 0] == 1  # last slice (head), first row (front), first column (patient's right)

    def test_labels_in_another_axis_order_than_the_image(self, tmp_path: Path) -> None:
        image = nib.Nifti1Image(random_volume(), np.diag([2.0, 3.0, 5.0, 1.0]))
        nib.save(image, tmp_path / "image.nii")
        for number, turned in enumerate(all_orders(image)):
            nib.save(turned, tmp_path / f"label{number}.nii")
            labels = read_labels(tmp_path / f"label{number}.nii", image=tmp_path / "image.nii")
            np.testing.assert_array_equal(labels.array, random_volume())

    def test_natural_axis_crosses_the_thickest_spacing(self, tmp_path: Path) -> None:
        for spacing, axis in (
            ((5, 1, 1), "sagittal"),
            ((1, 5, 1), "coronal"),
            ((1, 1, 5), "axial"),
            ((1, 1, 1), "axial"),
        ):
            path = save_nifti(tmp_path / "a.nii", random_volume(), np.diag([*spacing, 1.0]))
            assert natural_axis(read_volume(path).grid) == axis
            read_volume.cache_clear()


class TestRefusals:
    def refused(self, path: Path, match: str, **how: str) -> None:
        with pytest.raises(DataError, match=match):
            read_volume(path, **how)

    def test_a_sheared_affine(self, tmp_path: Path) -> None:
        affine = np.eye(4)
        affine[0, 2] = 0.2
        self.refused(save_nifti(tmp_path / "a.nii", random_volume(), affine), r"sheared affine.*11\.\d degrees")

    def test_a_label_on_another_grid(self, tmp_path: Path) -> None:
        image = save_nifti(tmp_path / "image.nii", random_volume(), np.eye(4))
        shifted = np.eye(4)
        shifted[0, 3] = 0.4
        save_nifti(tmp_path / "shifted.nii", random_volume(), shifted)
        save_nifti(tmp_path / "smaller.nii", random_volume(shape=(5, 8, 10)), np.eye(4))
        with pytest.raises(MaskError, match="not on its image's grid"):
            read_labels(tmp_path / "shifted.nii", image=image)
        with pytest.raises(MaskError, match=r"5 x 8 x 10 voxels, its image .* has 6 x 8 x 10"):
            read_labels(tmp_path / "smaller.nii", image=image)

    @pytest.mark.parametrize("shift", [2.0, -2.0])
    def test_a_label_moved_by_whole_voxels(self, tmp_path: Path, shift: float) -> None:
        image = save_nifti(tmp_path / "image.nii", random_volume(), np.eye(4))
        moved = np.eye(4)
        moved[2, 3] = shift
        save_nifti(tmp_path / "moved.nii", random_volume(), moved)
        with pytest.raises(MaskError, match="not on its image's grid"):
            read_labels(tmp_path / "moved.nii", image=image)

    def test_a_label_with_fractions(self, tmp_path: Path) -> None:
        image = save_nifti(tmp_path / "image.nii", random_volume(), np.eye(4))
        save_nifti(tmp_path / "soft.nii", random_volume().astype(np.float32) / 2, np.eye(4))
        with pytest.raises(MaskError, match="whole numbers"):
            read_labels(tmp_path / "soft.nii", image=image)

    def test_nan(self, tmp_path: Path) -> None:
        values = random_volume().astype(np.float32)
        values[0, 0, 0] = np.nan
        self.refused(save_nifti(tmp_path / "a.nii", values, np.eye(4)), "NaN")

    def test_four_axes_need_a_frame(self, tmp_path: Path) -> None:
        path = save_nifti(tmp_path / "a.nii.gz", random_volume(shape=(3, 4, 5, 2)), np.eye(4))
        self.refused(path, r"holds 2 volumes.*column frame, 0 to 1")
        self.refused(path, "holds 2 volumes", frame="2")
        np.testing.assert_array_equal(
            read_volume(path, frame="1").grid.array, random_volume(shape=(3, 4, 5, 2))[..., 1]
        )

    def test_a_header_that_promises_too_much(self, tmp_path: Path) -> None:
        path = save_nifti(tmp_path / "a.nii", random_volume(), np.eye(4))
        content = bytearray(path.read_bytes())
        content[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
        path.write_bytes(bytes(content))
        self.refused(path, "truncated or its header damaged")

    def test_a_slice_beyond_the_volume(self, tmp_path: Path) -> None:
        path = save_nifti(tmp_path / "a.nii", random_volume(), np.eye(4))
        sample = Sample(path, path, "p", "train", "s", "10", axis="axial")
        for load in (load_pixels, load_raw_labels):
            with pytest.raises(DataError, match=r"10 axial slices.*number 10"):
                load(sample)


def test_digests_name_volume_slice_and_rule(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", random_volume(), np.eye(4))
    samples = [
        Sample(path, path, "p", "train", "s", number, axis=axis, intensity=rule)
        for number in ("0", "1") for axis in ("axial", "coronal") for rule in ("stored", "percentile:0.5:99.5")
    ]  # fmt: skip
    assert len({image_digest(sample) for sample in samples}) == 8
    assert load_size(samples[0]) == (8, 6)


@needs_files
@pytest.mark.shared_data
class TestTransferSyntaxes:
    @pytest.mark.parametrize("name", ["bigendian", "implicit", "RLE", "jp2klossless", "jpeg_ls_lossless", "padded"])
    def test_lossless_copies_of_one_image_are_equal(self, name: str) -> None:
        expected = dicom.read_picture(PYDICOM / "MR_small.dcm")
        np.testing.assert_array_equal(dicom.read_picture(PYDICOM / f"MR_small_{name}.dcm"), expected)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("JPEG-lossy.dcm", (1024, 256)),
            ("JPGExtended.dcm", (1024, 256)),
            ("JPEG2000.dcm", (1024, 256)),
            ("ExplVR_BigEnd.dcm", (60, 80, 3)),
            ("examples_palette.dcm", (350, 800, 3)),
            ("examples_rgb_color.dcm", (240, 320, 3)),
            ("examples_jpeg2k.dcm", (480, 640, 3)),
            ("image_dfl.dcm", (512, 512)),
        ],
    )
    def test_pictures_are_read(self, name: str, shape: tuple[int, ...]) -> None:
        pixels = dicom.read_picture(PYDICOM / name)
        assert pixels.shape == shape
        assert pixels.max() > pixels.min()
        assert len(shape) == 2 or pixels.max() <= 255

    def test_uncompressed_ybr_is_converted_once(self, tmp_path: Path) -> None:
        dataset = pydicom.dcmread(PYDICOM / "examples_rgb_color.dcm")
        expected = dataset.pixel_array
        converted = convert_color_space(expected, "RGB", "YBR_FULL")
        dataset.PhotometricInterpretation, dataset.PixelData = "YBR_FULL", converted.tobytes()
        dataset.save_as(tmp_path / "ybr.dcm")
        assert np.abs(dicom.read_picture(tmp_path / "ybr.dcm") - expected).max() <= 3

    def test_monochrome1_is_shown_bright_on_dark(self) -> None:
        path = PYDICOM / "dicomdirtests" / "77654033" / "CR1" / "6154"
        stored = pydicom.dcmread(path).pixel_array.astype(float)
        assert np.corrcoef(stored.ravel(), dicom.read_picture(path).ravel())[0, 1] == pytest.approx(-1.0)
