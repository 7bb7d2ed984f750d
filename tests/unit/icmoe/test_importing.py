"""From a hospital's folder to a manifest: real DICOM and NIfTI, and folders as people keep them."""

import csv
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from typer.testing import CliRunner

from icmoe.cli import app
from icmoe.data.importing import ImportRequest, import_folder, split_patients
from icmoe.data.manifest import load_manifest
from icmoe.data.pairing import find_pairs
from icmoe.data.pseudonyms import load_secret, pseudonym
from icmoe.data.sources import load_pixels, load_raw_labels
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import ConfigError, DataError, IcmoeError

SECRET = bytes(range(32))
ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats"
CT = ROOT / "dicom" / "ct_3slice_with_seg"
needs_files = pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    yield
    read_volume.cache_clear()
    read_labels.cache_clear()


def request(source: Path, out: Path, **changes: Any) -> ImportRequest:
    settings: dict[str, Any] = {"labels": "nifti", "site": "h", "secret": SECRET, **changes}
    return ImportRequest(source=source, out=out, **settings)


def nifti(path: Path, *, seed: int = 0, high: int = 300, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, high, (6, 5, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def cases(folder: Path, count: int) -> Path:
    for number in range(count):
        nifti(folder / f"P{number:02d}_t1.nii.gz", seed=number)
        nifti(folder / f"P{number:02d}_t1_seg.nii.gz", seed=number, high=3)
    return folder


def lines_of(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@needs_files
@pytest.mark.shared_data
class TestDicom:
    @pytest.mark.parametrize("write_labels", [False, True])
    def test_seg_reverse_import_equals_the_reference(self, tmp_path: Path, write_labels: bool) -> None:
        wanted = {"labels": "seg", "label_pattern": "liver.dcm", "write_labels": write_labels}
        report = import_folder(request(CT, tmp_path / "out", **wanted))
        assert (report.num_images, report.skipped) == (3, {})
        samples = load_manifest(tmp_path / "out").samples
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(CT / "liver_seg.nrrd")))
        for sample, truth in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(load_raw_labels(sample), truth)
            assert sample.spacing == (0.810547, 0.810547)
            assert sample.intensity == "window:-160:240"
        assert report.values == {0: 679334, 1: 107098}

    def test_two_segmentations_of_a_series_need_a_choice(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"liver\.dcm, partial_overlaps\.dcm; choose with --label-pattern"):
            import_folder(request(CT, tmp_path / "out", labels="seg"))


@needs_files
@pytest.mark.shared_data
def test_nifti_slices_lie_on_the_volume(tmp_path: Path) -> None:
    import_folder(request(ROOT / "nifti", tmp_path / "out"))
    samples = load_manifest(tmp_path / "out").samples
    assert len(samples) == 19
    stored = nib.load(ROOT / "nifti" / "prostate_mr" / "Prostatex_0000_lab.nii.gz")
    # Its axes run to the left, the back and the head: slices, rows and columns of an axial view, transposed.
    expected = np.asarray(stored.dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(np.stack([load_raw_labels(sample) for sample in samples]), expected)
    pixels = load_pixels(samples[9])
    assert pixels.shape == (384, 384, 3)
    assert 0.0 <= pixels.min() < pixels.max() <= 255.0


class TestPairs:
    def test_usual_names_and_folders(self, tmp_path: Path) -> None:
        cases(tmp_path / "a", 1)
        nifti(tmp_path / "b" / "imagesTr" / "liver_7_0000.nii.gz")
        nifti(tmp_path / "b" / "labelsTr" / "liver_7.nii.gz", high=2)
        nifti(tmp_path / "alone.nii")
        found = find_pairs(tmp_path, labels="nifti", patient_pattern="", label_pattern="")
        assert [(pair.patient, pair.label.name) for pair in found.pairs] == [
            ("P00_t1", "P00_t1_seg.nii.gz"),
            ("liver_7", "liver_7.nii.gz"),
        ]
        assert found.skipped == {"alone.nii": "no label beside it"}

    def test_a_pattern_names_labels_and_patients(self, tmp_path: Path) -> None:
        nifti(tmp_path / "P1" / "t2.nii.gz")
        nifti(tmp_path / "P1" / "truth" / "outline_t2.nii.gz", high=2)
        found = find_pairs(
            tmp_path, labels="nifti", patient_pattern="(P[0-9]+)/", label_pattern="truth/outline_{name}.nii.gz"
        )
        assert [pair.patient for pair in found.pairs] == ["P1"]

    @pytest.mark.parametrize(
        ("patterns", "told"),
        [
            ({"patient_pattern": "("}, "no regular expression"),
            ({"patient_pattern": "P[0-9]+"}, "needs a group"),
            ({"label_pattern": "{patient}.nii"}, "may use {name} only"),
        ],
    )
    def test_wrong_patterns(self, tmp_path: Path, patterns: dict[str, str], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            find_pairs(cases(tmp_path, 1), labels="nifti", **({"patient_pattern": "", "label_pattern": ""} | patterns))

    def test_the_same_image_in_two_formats_is_no_label(self, tmp_path: Path) -> None:
        nifti(tmp_path / "img" / "a.nii")
        nifti(tmp_path / "img" / "a.nii.gz")
        nifti(tmp_path / "labels" / "a.nii.gz", high=2)
        found = find_pairs(tmp_path, labels="nifti", patient_pattern="", label_pattern="")
        assert {pair.label for pair in found.pairs} == {tmp_path / "labels" / "a.nii.gz"}

    def test_equal_names_in_two_folders_need_a_pattern(self, tmp_path: Path) -> None:
        for patient in ("P1", "P2"):
            nifti(tmp_path / patient / "t2.nii.gz")
            nifti(tmp_path / patient / "t2_seg.nii.gz", high=2)
        with pytest.raises(ConfigError, match="--patient-pattern"):
            find_pairs(tmp_path, labels="nifti", patient_pattern="", label_pattern="")
        found = find_pairs(tmp_path, labels="nifti", patient_pattern="([^/]+)/[^/]+$", label_pattern="")
        assert [pair.patient for pair in found.pairs] == ["P1", "P2"]

    def test_a_folder_without_pairs_says_what_is_there(self, tmp_path: Path) -> None:
        nifti(tmp_path / "alone.nii")
        with pytest.raises(DataError, match=r"alone\.nii: no label beside it"):
            find_pairs(tmp_path, labels="nifti", patient_pattern="", label_pattern="")
        with pytest.raises(DataError, match="does not exist"):
            find_pairs(tmp_path / "nowhere", labels="nifti", patient_pattern="", label_pattern="")


class TestImport:
    def test_nothing_is_copied_and_paths_stay_relative(self, tmp_path: Path) -> None:
        import_folder(request(cases(tmp_path / "archive", 3), tmp_path / "out"))
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "manifest.csv", "pseudonyms.json", "source",
        }  # fmt: skip
        assert all(line["image"].startswith("source/P") for line in lines_of(tmp_path / "out"))
        assert len(load_manifest(tmp_path / "out").samples) == 12

    def test_into_the_folder_itself(self, tmp_path: Path) -> None:
        import_folder(request(cases(tmp_path / "data", 3), tmp_path / "data"))
        assert all(line["image"].startswith("P") for line in lines_of(tmp_path / "data"))

    def test_labels_outside_the_folder_are_refused(self, tmp_path: Path) -> None:
        nifti(tmp_path / "Task" / "imagesTr" / "a.nii.gz")
        nifti(tmp_path / "Task" / "labelsTr" / "a.nii.gz", high=2)
        with pytest.raises(ConfigError, match="Give a folder that holds images and labels"):
            import_folder(request(tmp_path / "Task" / "imagesTr", tmp_path / "out"))

    def test_linked_files_stay_where_they_are_linked(self, tmp_path: Path) -> None:
        archive = cases(tmp_path / "elsewhere", 3)
        (tmp_path / "linked").mkdir()
        for path in archive.iterdir():
            (tmp_path / "linked" / path.name).symlink_to(path)
        import_folder(request(tmp_path / "linked", tmp_path / "out"))
        assert len(load_manifest(tmp_path / "out").samples) == 12

    def test_patients_are_pseudonyms_and_never_across_splits(self, tmp_path: Path) -> None:
        archive = cases(tmp_path / "archive", 6)
        report = import_folder(request(archive, tmp_path / "out", patient_pattern="(P[0-9]+)"))
        text = (tmp_path / "out" / "manifest.csv").read_text()
        assert "," + pseudonym("P03", secret=SECRET) + "," in text
        assert pseudonym("P03", secret=bytes(32)) not in text
        assert {name: len(patients) for name, patients in report.patients.items()} == {"train": 4, "val": 1, "test": 1}
        again = import_folder(request(archive, tmp_path / "again", patient_pattern="(P[0-9]+)"))
        assert again.patients == report.patients
        other = import_folder(request(archive, tmp_path / "other", patient_pattern="(P[0-9]+)", seed=1))
        assert other.patients != report.patients

    def test_a_bad_file_is_left_out_with_its_reason(self, tmp_path: Path) -> None:
        archive = cases(tmp_path / "archive", 3)
        damaged = archive / "P01_t1.nii.gz"
        damaged.write_bytes(damaged.read_bytes()[:60])
        nifti(archive / "P02_t1_seg.nii.gz", high=3, affine=np.diag([1.0, 1.0, 4.0, 1.0]))
        report = import_folder(request(archive, tmp_path / "out"))
        assert report.num_images == 4
        assert "cannot be read" in report.skipped["P01_t1.nii.gz"]
        assert "not on its image's grid" in report.skipped["P02_t1.nii.gz"]

    def test_all_bad_is_an_error(self, tmp_path: Path) -> None:
        archive = cases(tmp_path / "archive", 1)
        (archive / "P00_t1.nii.gz").write_bytes(b"nothing")
        with pytest.raises(DataError, match="none of the 1 pairs"):
            import_folder(request(archive, tmp_path / "out"))

    def test_another_axis_and_rule(self, tmp_path: Path) -> None:
        wanted = {"axis": "sagittal", "intensity": "window:0:100"}
        import_folder(request(cases(tmp_path / "archive", 3), tmp_path / "out", **wanted))
        assert {(line["axis"], line["intensity"], line["spacing"]) for line in lines_of(tmp_path / "out")} == {
            ("sagittal", "window:0:100", "3x1")
        }
        assert load_pixels(load_manifest(tmp_path / "out").samples[0]).shape == (4, 5, 3)

    def test_pictures(self, tmp_path: Path) -> None:
        for number in range(3):
            for folder in ("images", "masks"):
                path = tmp_path / "eyes" / folder / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.zeros((4, 5), np.uint8)).save(path)
        import_folder(request(tmp_path / "eyes", tmp_path / "out", labels="mask"))
        assert [line["mask"] for line in lines_of(tmp_path / "out")] == [f"source/masks/{n}.png" for n in range(3)]

    def test_an_existing_manifest_is_kept(self, tmp_path: Path) -> None:
        archive = cases(tmp_path / "archive", 3)
        import_folder(request(archive, tmp_path / "out"))
        before = (tmp_path / "out" / "manifest.csv").read_bytes()
        with pytest.raises(ConfigError, match="already holds"):
            import_folder(request(archive, tmp_path / "out", seed=3))
        assert (tmp_path / "out" / "manifest.csv").read_bytes() == before


class TestSplit:
    @pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (20, (14, 3, 3))])
    def test_sizes(self, count: int, sizes: tuple[int, ...]) -> None:
        splits = split_patients([str(n) for n in range(count)], fractions=(0.7, 0.15, 0.15), seed=0)
        assert tuple(list(splits.values()).count(name) for name in ("train", "val", "test")) == sizes

    @pytest.mark.parametrize("fractions", [(0.5, 0.1, 0.1), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
    def test_shares_must_sum_to_one(self, fractions: tuple[float, float, float]) -> None:
        with pytest.raises(ConfigError, match="sum to 1"):
            split_patients(["a"], fractions=fractions, seed=0)


class TestSecret:
    def test_is_made_once_and_only_for_its_owner(self, tmp_path: Path) -> None:
        path = tmp_path / "keys" / "pseudonym.key"
        secret = load_secret(path)
        assert len(secret) == 32
        assert load_secret(path) == secret
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert load_secret(tmp_path / "other.key") != secret

    @pytest.mark.parametrize("content", ["", "hello", "abcd"])
    def test_a_damaged_one_is_never_replaced(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "pseudonym.key"
        path.write_text(content)
        with pytest.raises(IcmoeError, match="Restore it from a backup"):
            load_secret(path)
        assert path.read_text() == content


class TestSecretOfAFolder:
    """One patient must not get two pseudonyms because a path was mistyped."""

    def test_a_new_secret_is_said_loudly_and_an_old_one_is_not(self, tmp_path: Path) -> None:
        archive, key = cases(tmp_path / "archive", 3), tmp_path / "key"
        first = invoke("import", archive, "--out", tmp_path / "a", "--labels", "nifti", "--secret", key)
        assert f"A NEW SECRET WAS MADE: {key}" in first.stderr
        again = invoke("import", archive, "--out", tmp_path / "b", "--labels", "nifti", "--secret", key)
        assert again.exit_code == 0, again.output
        assert "NEW SECRET" not in again.output
        assert (tmp_path / "a" / "pseudonyms.json").read_text() == (tmp_path / "b" / "pseudonyms.json").read_text()
        assert load_secret(key).hex() not in (tmp_path / "a" / "pseudonyms.json").read_text()

    def test_a_mistyped_path_makes_no_secret_for_a_folder_that_has_one(self, tmp_path: Path) -> None:
        archive, out = cases(tmp_path / "archive", 3), tmp_path / "out"
        invoke("import", archive, "--out", out, "--labels", "nifti", "--secret", tmp_path / "key")
        (out / "manifest.csv").rename(tmp_path / "old.csv")
        wrong = invoke("import", archive, "--out", out, "--labels", "nifti", "--secret", tmp_path / "kay")
        assert isinstance(wrong.exception, ConfigError)
        assert "kay does not exist" in str(wrong.exception)
        assert not (tmp_path / "kay").exists()
        assert not (out / "manifest.csv").exists()

    def test_another_secret_is_refused(self, tmp_path: Path) -> None:
        archive, out = cases(tmp_path / "archive", 3), tmp_path / "out"
        import_folder(request(archive, out))
        (out / "manifest.csv").rename(tmp_path / "old.csv")
        with pytest.raises(ConfigError, match="were made with the secret"):
            import_folder(request(archive, out, secret=bytes(32)))
        import_folder(request(archive, out))
        assert (out / "manifest.csv").read_text() == (tmp_path / "old.csv").read_text()

    @pytest.mark.parametrize(("made", "told"), [(False, "kay does not exist"), (True, "were made with the secret")])
    def test_removal_with_the_wrong_secret_is_refused(self, tmp_path: Path, made: bool, told: str) -> None:
        out = tmp_path / "out"
        import_folder(request(cases(tmp_path / "archive", 3), out))
        if made:
            load_secret(tmp_path / "kay")
        done = invoke("remove", out, "--patient", "P00_t1", "--secret", tmp_path / "kay")
        assert isinstance(done.exception, ConfigError)
        assert told in str(done.exception)

    def test_a_damaged_note_is_never_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "pseudonyms.json").write_text("{")
        with pytest.raises(ConfigError, match="Restore it from a backup"):
            import_folder(request(cases(tmp_path / "archive", 3), out))
        assert (out / "pseudonyms.json").read_text() == "{"


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], standalone_mode=False)


class TestCommands:
    def test_import_then_remove(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_SITE_DIR", str(tmp_path / "site"))
        monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "cache"))
        out = tmp_path / "out"
        done = invoke(
            "import", cases(tmp_path / "archive", 4), "--out", out, "--labels", "nifti", "--site", "hospitalA"
        )
        assert done.exit_code == 0, done.output
        assert "data check" in done.output
        patient = lines_of(out)[0]["patient"]
        removed = invoke("remove", out, "--patient", "P00_t1", "--json")
        assert json.loads(removed.output)["patient"] == patient
        assert patient not in {line["patient"] for line in lines_of(out)}
        assert len(lines_of(out)) == 12
        note = json.loads((out / "withdrawals.jsonl").read_text())
        assert (note["patient"], note["images"], note["unread"]) == (patient, 4, 0)
        again = invoke("remove", out, "--patient", "P00_t1")
        assert isinstance(again.exception, DataError)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (["--labels", "png"], "seg, rtstruct, nifti, mask"),
            (["--labels", "nifti", "--roi", "Liver"], "--labels rtstruct"),
            (["--labels", "rtstruct", "--roi", "Liver", "--roi", "liver "], "each name once"),
            (["--labels", "nifti", "--axis", "up"], "axial, coronal, sagittal"),
            (["--labels", "nifti", "--split", "0.7,0.3"], "three shares"),
            (["--labels", "nifti", "--intensity", "ct"], "window:LOW:HIGH"),
        ],
    )
    def test_wrong_use(self, tmp_path: Path, changes: list[str], told: str) -> None:
        secret = ["--secret", str(tmp_path / "key")]
        done = invoke("import", cases(tmp_path / "archive", 1), "--out", tmp_path / "out", *changes, *secret)
        assert isinstance(done.exception, IcmoeError)
        assert told in str(done.exception)
        assert not (tmp_path / "out" / "manifest.csv").exists()
