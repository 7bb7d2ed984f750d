"""The pre-flight check: each seeded defect on its own, on small data made here."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from icmoe.data.check_findings import KINDS, Finding
from icmoe.data.checked import load_check, require_checked, usable_samples, withdraw_checked, write_checked
from icmoe.data.checking import CheckReport, check_data
from icmoe.data.isolation import Lost, run_isolated
from icmoe.data.manifest import load_manifest
from icmoe.errors import DataError, ManifestError

SIDE = 32
COLUMNS = ("image", "mask", "patient", "split", "spacing")
Row = dict[str, str]


def picture(seed: int) -> np.ndarray:
    """Smooth random grey; different seeds look different, also to a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def write_manifest(root: Path, rows: list[Row], extra: tuple[str, ...] = ()) -> None:
    columns = (*COLUMNS, *extra)
    lines = [",".join(columns), *(",".join(row.get(name, "") for name in columns) for row in rows)]
    (root / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Twelve sound pictures: eight to train, two each to validate and test."""
    label = np.zeros((SIDE, SIDE), dtype=np.uint8)
    label[8:20, 8:20] = 1
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    made = []
    for number, split in enumerate(["train"] * 8 + ["val"] * 2 + ["test"] * 2):
        Image.fromarray(picture(number)).save(tmp_path / f"images/{number:02d}.png")
        Image.fromarray(label).save(tmp_path / f"masks/{number:02d}.png")
        made.append({
            "image": f"images/{number:02d}.png", "mask": f"masks/{number:02d}.png", "patient": f"p{number}",
            "split": split, "spacing": "0.7",
        })  # fmt: skip
    return made


def save(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(path)


def save_dicom(path: Path, values: np.ndarray, **tags: Any) -> None:
    """One small CT picture; ``PixelData=None`` leaves the pixels out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    fields = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(), "PatientID": "secret77", "PatientName": "Muster^Anna", "Modality": "CT",
        "Rows": values.shape[0], "Columns": values.shape[1], "SamplesPerPixel": 1, "BitsAllocated": 8,
        "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": values.astype(np.uint8).tobytes(),
    } | tags  # fmt: skip
    for tag, value in fields.items():
        if value is not None:
            setattr(dataset, tag, value)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)


def use_dicom(root: Path, rows: list[Row], number: int, *, name: str = "slice.dcm", **tags: Any) -> None:
    (root / rows[number]["image"]).unlink()
    rows[number]["image"] = f"images/{name}"
    save_dicom(root / "images" / name, picture(number), **tags)


def truncate(root: Path, rows: list[Row]) -> None:
    path = root / rows[3]["image"]
    path.write_bytes(path.read_bytes()[:150])


def empty_shell(root: Path, rows: list[Row]) -> None:
    use_dicom(root, rows, 3, PixelData=None)


def lose_image(root: Path, rows: list[Row]) -> None:
    (root / rows[3]["image"]).unlink()


def lose_mask(root: Path, rows: list[Row]) -> None:
    (root / rows[3]["mask"]).unlink()


def damage_mask(root: Path, rows: list[Row]) -> None:
    (root / rows[3]["mask"]).write_bytes(b"no picture")


def crop_mask(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["mask"], np.ones((SIDE, SIDE - 4)))


def colour_mask(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["mask"], np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)))


def strange_value(root: Path, rows: list[Row]) -> None:
    label = np.zeros((SIDE, SIDE))
    label[4:8, 4:8] = 9
    save(root / rows[3]["mask"], label)


def empty_mask(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["mask"], np.zeros((SIDE, SIDE)))


def full_mask(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["mask"], np.ones((SIDE, SIDE)))


def copy_to_other_patient(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["image"], picture(2))


def copy_to_other_split(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["image"], picture(8))


def recompress(root: Path, rows: list[Row]) -> None:
    (root / rows[3]["image"]).unlink()
    rows[3]["image"] = "images/03.jpg"
    Image.fromarray(picture(2)).save(root / rows[3]["image"], quality=80)


def divide_patient(root: Path, rows: list[Row]) -> None:
    rows[3]["patient"] = "p8"


def forget_lines(root: Path, rows: list[Row]) -> None:
    save(root / "images" / "03b.png", picture(40))


def invert_depth(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["image"], picture(3) // 40)


def blank(root: Path, rows: list[Row]) -> None:
    save(root / rows[3]["image"], np.full((SIDE, SIDE), 7))


def centimetres(root: Path, rows: list[Row]) -> None:
    rows[3]["spacing"] = "0.07"


def forget_spacing(root: Path, rows: list[Row]) -> None:
    rows[3]["spacing"] = ""


def burn_in(root: Path, rows: list[Row]) -> None:
    use_dicom(root, rows, 3, BurnedInAnnotation="YES")


def capture_screen(root: Path, rows: list[Row]) -> None:
    use_dicom(root, rows, 3, SOPClassUID=SecondaryCaptureImageStorage)


def name_patient(root: Path, rows: list[Row]) -> None:
    use_dicom(root, rows, 3, name="muster_03.dcm")


def keep_patient_id(root: Path, rows: list[Row]) -> None:
    use_dicom(root, rows, 3)
    rows[3]["patient"] = "secret77"


def forget_patients(root: Path, rows: list[Row]) -> None:
    """One id for all, as anonymisation often leaves it; so they can only be in one split."""
    for row in rows:
        row["patient"], row["split"] = "ANON", "train"


def lose_patient_ids(root: Path, rows: list[Row]) -> None:
    for number in (3, 4, 5):
        use_dicom(root, rows, number, name=f"slice{number}.dcm", PatientID="", PatientName="")


def no_test_images(root: Path, rows: list[Row]) -> None:
    rows[10]["split"] = rows[11]["split"] = "val"


def no_training_images(root: Path, rows: list[Row]) -> None:
    for row in rows:
        row["split"] = "val"


def misspell_split(root: Path, rows: list[Row]) -> None:
    rows[3]["split"] = "training"


Seed = Callable[[Path, list[Row]], None]
DEFECTS: Mapping[str, tuple[Seed, str, str, str]] = {
    # what is broken: how, code, severity, file
    "truncated image": (truncate, "image-unreadable", "error", "images/03.png"),
    "empty DICOM shell": (empty_shell, "empty-shell", "error", "images/slice.dcm"),
    "image missing": (lose_image, "image-missing", "error", "images/03.png"),
    "mask missing": (lose_mask, "mask-missing", "error", "images/03.png"),
    "mask unreadable": (damage_mask, "mask-unreadable", "error", "images/03.png"),
    "mask of another size": (crop_mask, "geometry-mismatch", "error", "images/03.png"),
    "colour mask": (colour_mask, "mask-invalid", "error", "images/03.png"),
    "value without a class": (strange_value, "value-without-class", "error", "images/03.png"),
    "empty mask": (empty_mask, "empty-mask", "warning", "images/03.png"),
    "one class everywhere": (full_mask, "one-class-mask", "warning", "images/03.png"),
    "patient under two ids": (copy_to_other_patient, "duplicate-image", "warning", "images/03.png"),
    "two ids across splits": (copy_to_other_split, "duplicate-across-splits", "error", "images/03.png"),
    "recompressed copy": (recompress, "near-duplicate", "warning", "images/03.jpg"),
    "patient in two splits": (divide_patient, "patient-in-two-splits", "error", "images/03.png"),
    "unpaired file": (forget_lines, "unpaired-file", "warning", "images/03b.png"),
    "intensity outlier": (invert_depth, "intensity-outlier", "warning", "images/03.png"),
    "constant image": (blank, "constant-image", "error", "images/03.png"),
    "spacing in another unit": (centimetres, "spacing-outlier", "warning", "images/03.png"),
    "no spacing": (forget_spacing, "spacing-missing", "warning", "images/03.png"),
    "burned-in text": (burn_in, "burned-in-text", "warning", "images/slice.dcm"),
    "screen capture": (capture_screen, "burned-in-text", "warning", "images/slice.dcm"),
    "name in the path": (name_patient, "identifying-tag", "warning", "images/muster_03.dcm"),
    "hospital id as patient": (keep_patient_id, "identifying-tag", "warning", "images/slice.dcm"),
    "one id for all patients": (forget_patients, "one-patient", "warning", "images/03.png"),
    "no PatientID": (lose_patient_ids, "patient-id-missing", "warning", "images/slice4.dcm"),
    "no test images": (no_test_images, "split-missing", "warning", ""),
    "no training images": (no_training_images, "no-training-images", "error", ""),
    "misspelt split": (misspell_split, "manifest-line", "error", "images/03.png"),
}


def check(root: Path, **options: Any) -> CheckReport:
    return check_data(root, **{"classes": {"lesion": 1}, "num_thumbnails": 0, **options})


def of_code(report: CheckReport, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


def test_sound_folder(tmp_path: Path, rows: list[Row]) -> None:
    write_manifest(tmp_path, rows)
    report = check(tmp_path)
    assert report.findings == ()
    assert (report.found, report.usable, report.skipped) == (12, 12, ())
    (site,) = report.sites
    assert site.images == {"train": 8, "val": 2, "test": 2}
    assert site.height == (SIDE, SIDE, SIDE)
    assert site.row_spacing == (0.7, 0.7, 0.7)
    assert sum(site.histogram) == pytest.approx(1.0, abs=1e-3)
    assert [(label.name, label.pixels, label.images) for label in report.labels] == [
        ("background", 12 * (SIDE * SIDE - 144), 12),
        ("lesion", 12 * 144, 12),
    ]
    assert json.loads(json.dumps(report.to_json()))["usable"] == 12


@pytest.mark.parametrize("defect", DEFECTS)
def test_seeded_defect(tmp_path: Path, rows: list[Row], defect: str) -> None:
    seed, code, severity, file = DEFECTS[defect]
    seed(tmp_path, rows)
    write_manifest(tmp_path, rows)
    report = check(tmp_path)
    (finding,) = of_code(report, code)
    assert finding.kind.severity == severity
    assert finding.kind.remedy.endswith(".")
    assert not file or file in finding.files
    assert str(tmp_path) not in finding.message
    others = {one.code for one in report.findings} - {code}
    # A capture or a missing split may not hide behind a flood of consequences.
    assert others <= {"split-missing", "intensity-outlier", "unpaired-file"}


def test_skips_few_damaged_files_but_no_leak(tmp_path: Path, rows: list[Row]) -> None:
    truncate(tmp_path, rows)
    write_manifest(tmp_path, rows)
    report = check(tmp_path, max_bad_share=0.1)
    assert report.stopping == ()
    assert (report.found, report.usable) == (12, 11)
    assert report.skipped_by_reason == {KINDS["image-unreadable"].title: 1}
    assert check(tmp_path, max_bad_share=0.05).stopping == report.errors
    divide_patient(tmp_path, rows)
    write_manifest(tmp_path, rows)
    assert [one.code for one in check(tmp_path, max_bad_share=1.0).stopping] == ["patient-in-two-splits"]


def test_goes_on_after_many_bad_lines(tmp_path: Path, rows: list[Row]) -> None:
    for row in rows[:6]:
        (tmp_path / row["mask"]).unlink()
    rows[7]["split"] = "x"
    rows.append({"image": "../outside.png", "mask": rows[8]["mask"], "patient": "a", "split": "val"})
    rows.append({"image": "", "mask": rows[8]["mask"], "patient": "a", "split": "val"})
    write_manifest(tmp_path, rows)
    report = check(tmp_path)
    assert len(of_code(report, "mask-missing")) == 6
    assert len(of_code(report, "manifest-line")) == 3
    assert (report.found, report.usable, len(report.skipped)) == (14, 5, 9)


def test_doubled_line_is_opened_once(tmp_path: Path, rows: list[Row]) -> None:
    write_manifest(tmp_path, [*rows, rows[3]])
    (finding,) = of_code(check(tmp_path), "manifest-line")
    assert finding.files == ("images/03.png",)
    assert "listed 2 times" in finding.message


def test_unpaired_files_behind_the_link_of_an_import(tmp_path: Path, rows: list[Row]) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "images").rename(archive / "images")
    (tmp_path / "masks").rename(archive / "masks")
    save(archive / "images" / "forgotten.png", picture(40))
    folder = tmp_path / "imported"
    folder.mkdir()
    (folder / "source").symlink_to(archive)
    linked = [{**row, "image": f"source/{row['image']}", "mask": f"source/{row['mask']}"} for row in rows]
    write_manifest(folder, linked)
    (finding,) = check(folder).findings
    assert finding.files == ("source/images/forgotten.png",)


def test_without_classes_values_are_listed(tmp_path: Path, rows: list[Row]) -> None:
    strange_value(tmp_path, rows)
    write_manifest(tmp_path, rows)
    report = check(tmp_path, classes=None)
    assert report.findings == ()
    assert [(label.name, label.images) for label in report.labels] == [
        ("background", 12),
        ("value 1", 11),
        ("value 9", 1),
    ]


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"there is no manifest\.csv"):
        check(tmp_path)


def test_ids_that_tell_patients_apart_are_no_finding(tmp_path: Path, rows: list[Row]) -> None:
    lose_patient_ids(tmp_path, rows)
    # Somebody told the patients apart by other means: two of the pictures are of one.
    rows[3]["patient"] = rows[4]["patient"]
    write_manifest(tmp_path, rows)
    assert of_code(check(tmp_path), "patient-id-missing") == []
    for row in rows[1:]:
        row["patient"], row["split"] = "p1", "train"
    write_manifest(tmp_path, rows)
    assert of_code(check(tmp_path), "one-patient") == []


class TestVolumes:
    def prepare(self, root: Path, rows: list[Row], *, label_shape: tuple[int, ...] = (12, 10, 6)) -> None:
        volume = np.random.default_rng(3).integers(1, 400, (12, 10, 6)).astype(np.int16)
        label = np.zeros(label_shape, dtype=np.uint8)
        label[3:8, 3:8, 2:5] = 1
        nib.save(nib.Nifti1Image(volume, np.diag([0.7, 0.7, 3.0, 1.0])), root / "scan.nii.gz")
        nib.save(nib.Nifti1Image(label, np.diag([0.7, 0.7, 3.0, 1.0])), root / "label.nii.gz")
        address = {"image": "scan.nii.gz", "mask": "label.nii.gz", "patient": "v", "split": "train", "axis": "axial"}
        rows += [
            {**address, "slice": str(number), "spacing": "0.7", "intensity": "percentile:1:99"} for number in range(6)
        ]
        write_manifest(root, rows, extra=("slice", "axis", "intensity"))

    def test_slices(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        report = check(tmp_path)
        (empty,) = report.findings
        assert empty.code == "empty-mask"
        assert empty.files == tuple(f"scan.nii.gz [axial {number}]" for number in (0, 1, 5))
        assert report.usable == 18

    def test_blank_slices(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        scan = nib.load(tmp_path / "scan.nii.gz")
        values = np.asarray(scan.dataobj).copy()
        values[:, :, 0] = values[:, :, 5] = 7
        nib.save(nib.Nifti1Image(values, scan.affine), tmp_path / "scan.nii.gz")
        report = check(tmp_path)
        (finding,) = of_code(report, "constant-slice")
        assert finding.kind.severity == "warning"
        assert finding.files == ("scan.nii.gz [axial 0]", "scan.nii.gz [axial 5]")
        assert (report.usable, report.errors) == (18, ())

    def test_slices_of_one_volume_are_one_patient_of_course(self, tmp_path: Path, rows: list[Row]) -> None:
        rows.clear()
        self.prepare(tmp_path, rows)
        assert of_code(check(tmp_path), "one-patient") == []

    def test_grid_mismatch_is_one_finding(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows, label_shape=(12, 10, 7))
        (finding,) = check(tmp_path).errors
        assert finding.code == "geometry-mismatch"
        assert len(finding.files) == 6

    def test_damaged_volume_is_one_finding(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        content = (tmp_path / "scan.nii.gz").read_bytes()
        (tmp_path / "scan.nii.gz").write_bytes(content[: len(content) // 2])
        report = check(tmp_path)
        (finding,) = report.errors
        assert finding.code == "image-unreadable"
        assert (len(finding.files), len(report.skipped), report.usable) == (6, 6, 12)

    def test_thumbnails_show_findings_first(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        report = check(tmp_path, num_thumbnails=8)
        assert len(report.thumbnails) == 8
        assert report.thumbnails[0].name == "scan.nii.gz [axial 0]"
        assert all(max(one.image.shape) == 64 and one.image.shape == one.labels.shape for one in report.thumbnails)


@pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")
@pytest.mark.shared_data
class TestSeries:
    """A real CT series with its segmentation, beside the pictures made here."""

    def prepare(self, root: Path, rows: list[Row]) -> None:
        source = Path(os.environ["ICMOE_TEST_DATA"]) / "formats" / "dicom" / "ct_3slice_with_seg"
        (root / "ct").mkdir()
        for name in ("01.dcm", "02.dcm", "03.dcm"):
            shutil.copy(source / name, root / "ct")
        shutil.copy(source / "liver.dcm", root / "liver.dcm")
        address = {"image": "ct", "mask": "liver.dcm", "patient": "v", "split": "train", "axis": "axial"}
        rows += [{**address, "slice": str(n), "spacing": "0.81", "intensity": "window:-160:240"} for n in range(3)]
        write_manifest(root, rows, extra=("slice", "axis", "intensity"))

    def test_sound_series(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        report = check(tmp_path)
        assert report.usable == 15
        assert report.errors == ()
        assert of_code(report, "unpaired-file") == []

    def test_empty_shell_in_a_series(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        shell = pydicom.dcmread(tmp_path / "ct" / "02.dcm")
        del shell.PixelData
        shell.save_as(tmp_path / "ct" / "02.dcm")
        (finding,) = check(tmp_path).errors
        assert finding.code == "empty-shell"
        assert finding.files == tuple(f"ct [axial {number}]" for number in range(3))
        assert "ct/02.dcm" in finding.message

    def test_segmentation_of_another_series(self, tmp_path: Path, rows: list[Row]) -> None:
        self.prepare(tmp_path, rows)
        other = {str(index): generate_uid() for index in range(3)}
        for index, name in enumerate(("01.dcm", "02.dcm", "03.dcm")):
            dataset = pydicom.dcmread(tmp_path / "ct" / name)
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = other[str(index)]
            dataset.save_as(tmp_path / "ct" / name)
        (finding,) = check(tmp_path).errors
        assert finding.code == "geometry-mismatch"
        assert "made on another one" in finding.message


class TestRecord:
    def test_round_trip_and_change(self, tmp_path: Path, rows: list[Row]) -> None:
        truncate(tmp_path, rows)
        forget_spacing(tmp_path, rows[:1] * 4)
        write_manifest(tmp_path, rows)
        with pytest.raises(DataError, match="never checked"):
            require_checked(tmp_path)
        report = check(tmp_path, max_bad_share=0.1)
        write_checked(report, tmp_path)
        checked = require_checked(tmp_path)
        assert checked.accepted == ("spacing-missing",)
        assert checked.classes == {"lesion": 1}
        assert len(checked.digests) == 11
        names = [sample.image.name for sample in usable_samples(load_manifest(tmp_path), checked)]
        assert len(names) == 11
        assert "03.png" not in names
        rows[0]["spacing"] = "0.8"
        write_manifest(tmp_path, rows)
        with pytest.raises(DataError, match="changed since its check"):
            require_checked(tmp_path)
        withdraw_checked(tmp_path)
        assert load_check(tmp_path) is None

    def test_damaged_record(self, tmp_path: Path) -> None:
        (tmp_path / "check.json").write_text("{}", encoding="utf-8")
        with pytest.raises(DataError, match="is damaged"):
            load_check(tmp_path)


def misbehave(item: int) -> int:
    """Die, hang or fail as a codec may."""
    if item == 1:
        os.abort()
    if item == 2:
        time.sleep(60)
    if item == 3:
        raise ValueError("odd")
    return item * 10


class TestIsolation:
    @pytest.mark.slow
    def test_bad_items_cost_only_themselves(self) -> None:
        chunks = [[(0, 0), (1, 1), (2, 2)], [(3, 3), (4, 4)]]
        results = dict(run_isolated(misbehave, chunks, num_workers=1, seconds_per_item=2.0))
        assert results[0] == 0
        assert results[4] == 40
        reasons = [result.reason for result in (results[1], results[2], results[3]) if isinstance(result, Lost)]
        assert ["exit code -6" in reasons[0], "more than 2 s" in reasons[1], "ValueError: odd" in reasons[2]] == [
            True
        ] * 3

    def test_workers_do_not_import_torch(self) -> None:
        ((_, loaded),) = run_isolated(_is_loaded, [[(0, "torch")]], num_workers=1)
        assert loaded is False


def _is_loaded(module: str) -> bool:
    import sys

    return module in sys.modules


def test_reads_with_pydicom(tmp_path: Path) -> None:
    """The DICOM made here is sound, so that what the check says of it is about the seeded defect."""
    save_dicom(tmp_path / "a.dcm", picture(0))
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "a.dcm").pixel_array, picture(0))
