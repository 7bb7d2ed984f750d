"""What is written of predictions, and what is found to predict; without torch."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from icmoe.data import outputs
from icmoe.data.dicom import list_series
from icmoe.data.dicom_seg import PRIVATE_SCHEME, code_of, read_sources, write_segmentation
from icmoe.data.inputs import Input, find_inputs, slices_of
from icmoe.data.volumes import read_labels, read_volume, turn
from icmoe.errors import ConfigError, DataError
from icmoe.types import AXES

ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats"
CT = ROOT / "dicom" / "ct_3slice_with_seg"
PYDICOM = ROOT / "dicom" / "pydicom"
needs_files = pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")
DIGEST = "d" * 64


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def random_labels(shape: tuple[int, ...], *, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, classes, shape).astype(np.uint8)


def save_nifti(path: Path, shape: tuple[int, ...] = (4, 5, 6), *, spacing: tuple[float, ...] = (1, 1, 3)) -> Path:
    values = np.random.default_rng(0).integers(0, 500, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
    return path


def save_png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(path)
    return path


def test_none_of_this_imports_torch() -> None:
    program = "import sys, icmoe.data.outputs, icmoe.data.inputs, icmoe.data.dicom_seg; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class TestRawValues:
    @pytest.mark.parametrize(
        ("values", "kind"), [((1, 255), np.uint8), ((500,), np.uint16), ((-3, 9), np.int16), ((70_000,), np.int32)]
    )
    def test_smallest_type_that_holds_them(self, values: tuple[int, ...], kind: type) -> None:
        labels = random_labels((5, 7), classes=len(values) + 1)
        raw = outputs.to_raw_values(labels, values)
        assert raw.dtype == kind
        np.testing.assert_array_equal(raw, np.array([0, *values])[labels])

    @pytest.mark.parametrize("values", [(1, 2), (255, 500)])
    def test_a_png_gives_them_back(self, tmp_path: Path, values: tuple[int, ...]) -> None:
        raw = outputs.to_raw_values(random_labels((5, 7)), values)
        outputs.write_mask_png(tmp_path / "mask.png", raw)
        with Image.open(tmp_path / "mask.png") as written:
            np.testing.assert_array_equal(np.asarray(written), raw)

    def test_a_png_refuses_what_it_cannot_hold(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="0 to 65535"):
            outputs.write_mask_png(tmp_path / "mask.png", np.zeros((2, 2), np.int16))


class TestVolumes:
    @pytest.mark.parametrize("axis", AXES)
    def test_slices_return_to_the_files_own_order_shape_and_affine(self, tmp_path: Path, axis: str) -> None:
        original = nib.load(save_nifti(tmp_path / "a.nii.gz"))
        for number, (axes, flip) in enumerate(itertools.product(itertools.permutations(range(3)), [1, -1])):
            turned_file = original.as_reoriented(np.array([[a, flip if i else 1] for i, a in enumerate(axes)], float))
            path = tmp_path / f"{number}.nii.gz"
            nib.save(turned_file, path)
            stored = read_volume(path)
            turned = turn(stored.grid, axis)  # type: ignore[arg-type]
            back = outputs.place(turned, turned.array.astype(np.int16), stored.grid.get_geometry())
            outputs.write_volume(tmp_path / "back.nii.gz", back, like=path)
            written = nib.load(tmp_path / "back.nii.gz")
            assert written.shape == turned_file.shape
            np.testing.assert_array_equal(written.affine, nib.load(path).affine)
            np.testing.assert_array_equal(written.get_fdata(), turned_file.get_fdata())

    def test_one_volume_called_four_dimensional_stays_so(self, tmp_path: Path) -> None:
        path = save_nifti(tmp_path / "a.nii", (4, 5, 6, 1))
        stored = read_volume(path)
        outputs.write_volume(tmp_path / "b.nii", stored.grid, like=path)
        assert nib.load(tmp_path / "b.nii").shape == (4, 5, 6, 1)

    def test_a_map_of_one_frame_has_the_grid_of_one_frame(self, tmp_path: Path) -> None:
        path = save_nifti(tmp_path / "a.nii", (4, 5, 6, 2))
        stored = read_volume(path, frame="1")
        outputs.write_volume(tmp_path / "b.nii", stored.grid, like=path)
        written = nib.load(tmp_path / "b.nii")
        assert written.shape == (4, 5, 6)
        np.testing.assert_array_equal(written.get_fdata(), nib.load(path).get_fdata()[..., 1])


class TestOverlays:
    def test_slices_with_something_in_them_come_first(self) -> None:
        labels = np.zeros((30, 2, 2), np.uint8)
        assert outputs.choose_slices(labels, most=3) == [0, 14, 29]
        labels[10:13, 0, 0] = 1
        assert outputs.choose_slices(labels, most=12) == [10, 11, 12]

    def test_outlines_lie_inside_their_class(self, tmp_path: Path) -> None:
        labels = np.zeros((9, 9), np.uint8)
        labels[2:7, 2:7] = 2
        grey = np.repeat(np.linspace(0, 900, 81, dtype=np.float32).reshape(9, 9, 1), 3, axis=2)
        outputs.write_overlay(tmp_path / "o.png", grey, labels, colours=["#FF0000", "#00FF00"])
        with Image.open(tmp_path / "o.png") as written:
            picture = np.asarray(written)
        green = (picture == (0, 255, 0)).all(axis=-1)
        expected = labels == 2
        expected[3:6, 3:6] = False
        np.testing.assert_array_equal(green, expected)
        assert picture[0, 0, 0] == 0
        assert picture[8, 8, 0] == 255


class TestFinding:
    def test_a_mixed_folder(self, tmp_path: Path, out: Path) -> None:
        save_png(tmp_path / "b.png")
        save_png(tmp_path / "deep" / "b.png")
        save_nifti(tmp_path / "a.nii.gz")
        save_png(tmp_path / ".hidden" / "x.png")
        save_png(out / "b" / "mask.png")
        (tmp_path / "notes.txt").touch()
        found = find_inputs(tmp_path, out=out, frame="2")
        assert [(item.name, item.kind, item.frame) for item in found] == [
            ("a", "nifti", "2"), ("b", "picture", ""), ("deep__b", "picture", "")
        ]  # fmt: skip

    def test_equal_names_are_told_apart(self, tmp_path: Path, out: Path) -> None:
        save_png(tmp_path / "a.png")
        save_nifti(tmp_path / "a.nii")
        assert [item.name for item in find_inputs(tmp_path, out=out)] == ["a.nii", "a.png"]

    def test_a_damaged_dicom_file_is_listed_so_that_it_is_reported(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"broken")
        (item,) = find_inputs(tmp_path, out=out)
        assert item.kind == "dicom_picture"

    def test_what_cannot_be_segmented_is_refused(self, tmp_path: Path, out: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            find_inputs(tmp_path / "nothing", out=out)
        with pytest.raises(DataError, match="nothing to segment"):
            find_inputs(tmp_path, out=out)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(DataError, match="no known kind"):
            find_inputs(tmp_path / "notes.txt", out=out)

    def test_default_rules_and_axis(self, tmp_path: Path) -> None:
        volume = Input("a", save_nifti(tmp_path / "a.nii", spacing=(1, 3, 1)), "nifti")
        samples = slices_of(volume, axis=None, intensity="")
        assert len(samples) == 5
        assert (samples[4].axis, samples[4].slice, samples[4].intensity) == ("coronal", "4", "percentile:0.5:99.5")
        assert len(slices_of(volume, axis="sagittal", intensity="")) == 4
        (picture,) = slices_of(Input("b", save_png(tmp_path / "b.png"), "picture"), axis="axial", intensity="")
        assert (picture.axis, picture.intensity) == ("", "stored")

    @needs_files
    @pytest.mark.shared_data
    def test_dicom(self, tmp_path: Path, out: Path) -> None:
        (series,) = find_inputs(CT, out=out)
        assert (series.name, series.kind) == (CT.name, "series")
        assert slices_of(series, axis=None, intensity="")[0].intensity == "window:-160:240"
        found = find_inputs(PYDICOM, out=out)
        assert len({item.name for item in found}) == len(found)
        kinds = {item.name: item.kind for item in found}
        assert kinds["CT_small"] == "dicom_picture"
        assert not any(name.startswith("rtplan") for name in kinds)
        with pytest.raises(DataError, match="not an image"):
            find_inputs(CT / "liver.dcm", out=out)


def test_names_are_coded() -> None:
    assert code_of("left_ventricle")[1].value == "87878005"
    assert code_of("RV") == code_of("right-ventricle")
    assert code_of("tumour")[0].value == "49755003"
    private = code_of("something else")[1]
    assert private.scheme_designator == PRIVATE_SCHEME
    assert len(private.value) <= 16
    assert private != code_of("something more")[1]


@needs_files
@pytest.mark.shared_data
class TestSegmentation:
    NAMES = ("liver", "no known organ")

    def write(self, folder: Path, path: Path, labels: np.ndarray) -> Input:
        item = Input("x", folder, "series")
        stored = item.read()
        sources = read_sources(item, stored.instances)
        write_segmentation(path, labels, sources, class_names=self.NAMES, model=DIGEST)
        return item

    @pytest.mark.parametrize("filled", [(0, 1, 2), (1,), ()])
    def test_reads_back_on_its_series(self, tmp_path: Path, filled: tuple[int, ...]) -> None:
        labels = np.zeros((3, 512, 512), np.uint8)
        for index in filled:
            labels[index, 100:200, 50:300] = random_labels((100, 250))
        path = tmp_path / "mask.dcm"
        item = self.write(CT, path, labels)
        np.testing.assert_array_equal(read_labels(path, image=CT).array, labels)
        segmentation = hd.seg.segread(path)
        described = [segmentation.get_segment_description(number) for number in (1, 2)]
        assert [segment.segment_label for segment in described] == list(self.NAMES)
        assert (
            segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "icmoe-fl"
        )
        uids = read_volume(CT).instances
        for frame in segmentation.PerFrameFunctionalGroupsSequence:
            place = frame.PlanePositionSequence[0].ImagePositionPatient
            (source,) = frame.DerivationImageSequence[0].SourceImageSequence
            index = uids.index(source.ReferencedSOPInstanceUID)
            expected = item.read().grid.map_indices_to_reference(np.array([[index, 0, 0]]))[0]
            np.testing.assert_allclose(np.array(place, float), expected, atol=1e-3)

    @pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is not installed")
    @pytest.mark.parametrize("kind", ["series", "x-ray"])
    def test_dciodvfy_finds_no_error(self, tmp_path: Path, kind: str) -> None:
        if kind == "series":
            self.write(CT, tmp_path / "mask.dcm", random_labels((3, 512, 512)))
        else:
            path = PYDICOM / "dicomdirtests" / "77654033" / "CR1" / "6154"
            (source,) = read_sources(Input("x", path, "dicom_picture"), ())
            labels = random_labels((1, source.Rows, source.Columns))
            write_segmentation(tmp_path / "mask.dcm", labels, [source], class_names=self.NAMES, model=DIGEST)
        done = subprocess.run(["dciodvfy", "-new", tmp_path / "mask.dcm"], capture_output=True, text=True, check=False)
        assert "Segmentation" in done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []

    def test_pseudonymised_and_foreign_patients(self, tmp_path: Path) -> None:
        for number in ("01", "02", "03"):
            dataset = pydicom.dcmread(CT / f"{number}.dcm")
            for tag in ("PatientBirthDate", "StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientSex"):
                if tag in dataset:
                    delattr(dataset, tag)
            dataset.SpecificCharacterSet = ["ISO 2022 IR 6", "ISO 2022 IR 87"]
            dataset.PatientName = "Yamada^Tarou=山田^太郎"
            dataset.save_as(tmp_path / f"{number}.dcm")
        self.write(tmp_path, tmp_path / "mask.dcm", random_labels((3, 512, 512)))
        assert str(pydicom.dcmread(tmp_path / "mask.dcm").PatientName) == "Yamada^Tarou=山田^太郎"

    def test_images_that_allow_no_segmentation(self, tmp_path: Path) -> None:
        for number in ("01", "02", "03"):
            dataset = pydicom.dcmread(CT / f"{number}.dcm")
            dataset.StudyInstanceUID = generate_uid()
            dataset.save_as(tmp_path / f"{number}.dcm")
        list_series.cache_clear()
        with pytest.raises(DataError, match="--format nifti"):
            self.write(tmp_path, tmp_path / "mask.dcm", random_labels((3, 512, 512)))
        assert not (tmp_path / "mask.dcm").exists()
