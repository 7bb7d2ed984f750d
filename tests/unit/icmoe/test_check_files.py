"""What is noticed between a check and the training: another manifest, other images, other masks."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from icmoe.data import check_files
from icmoe.data.checked import load_check, require_checked, write_checked
from icmoe.data.checking import check_data
from icmoe.errors import DataError

SIDE = 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures and a volume of three slices, checked; one picture is damaged and left out."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    label = np.zeros((SIDE, SIDE), np.uint8)
    label[4:9, 4:9] = 1
    lines = ["image,mask,patient,split,spacing,axis,slice,intensity"]
    for number, split in enumerate(["train", "train", "val", "test"]):
        # Uncompressed, so that exchanged files have equal sizes.
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"{number}.tif")
        Image.fromarray(np.roll(label, number, axis=0)).save(folder / f"{number}_mask.tif")
        lines.append(f"{number}.tif,{number}_mask.tif,p{number},{split},1,,,")
    volume = rng.integers(1, 400, (SIDE, SIDE, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "scan.nii")
    nib.save(nib.Nifti1Image(np.repeat(label[..., None], 3, axis=2), np.eye(4)), folder / "label.nii")
    lines += [f"scan.nii,label.nii,v,train,1,axial,{number},percentile:1:99" for number in range(3)]
    damaged = folder / "1.tif"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    pass_check(folder)
    return folder


def pass_check(folder: Path) -> None:
    report = check_data(folder, classes={"lesion": 1}, num_thumbnails=0, max_bad_share=0.2)
    assert report.stopping == ()
    write_checked(report, folder)


def exchange(one: Path, other: Path) -> None:
    """Two files change their names; each keeps its size and the time of its content."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def replace_quietly(path: Path) -> None:
    """Other content of the same size under the same time."""
    before = path.stat()
    flip_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange_at_one_time(folder: Path) -> None:
    for name in ("0_mask.tif", "3_mask.tif"):
        os.utime(folder / name, ns=(10**18, 10**18))
    pass_check(folder)
    exchange(folder / "0_mask.tif", folder / "3_mask.tif")


def lose_last(folder: Path) -> None:
    for name in ("3.tif", "3_mask.tif"):
        (folder / name).unlink()


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "image overwritten": (lambda folder: flip_byte(folder / "0.tif"), 1),
    "mask overwritten": (lambda folder: flip_byte(folder / "0_mask.tif"), 1),
    "mask of another size": (lambda folder: Image.new("L", (8, 8)).save(folder / "2_mask.tif"), 1),
    "masks exchanged": (lambda folder: exchange(folder / "0_mask.tif", folder / "3_mask.tif"), 2),
    "masks of one time exchanged": (exchange_at_one_time, 2),
    "image and mask gone": (lose_last, 2),
    "volume overwritten": (lambda folder: flip_byte(folder / "scan.nii"), 1),
    "label of a volume overwritten": (lambda folder: flip_byte(folder / "label.nii"), 1),
    "other content under the old time": (lambda folder: replace_quietly(folder / "2.tif"), 1),
}


def test_nothing_changed(data: Path) -> None:
    checked = require_checked(data)
    names = [state.name for state in checked.files]
    assert names == [
        "0.tif", "0_mask.tif", "2.tif", "2_mask.tif", "3.tif", "3_mask.tif", "label.nii", "scan.nii",
    ]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_changes_are_counted_and_not_named(data: Path, what: str) -> None:
    change, count = CHANGES[what]
    change(data)
    with pytest.raises(DataError, match=f"^{count} of 8 image and mask files changed") as refused:
        require_checked(data)
    assert not any(part in str(refused.value) for part in (str(data), ".tif", ".nii"))


def test_a_file_that_the_check_left_out_may_change(data: Path) -> None:
    flip_byte(data / "1.tif")
    flip_byte(data / "1_mask.tif")
    require_checked(data)


def test_a_moved_a_copied_and_a_touched_folder_stay_checked(data: Path, tmp_path: Path) -> None:
    require_checked(data.rename(tmp_path / "moved"))
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copyfile)
    for path in (tmp_path / "copied").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    require_checked(tmp_path / "copied")
    flip_byte(tmp_path / "copied" / "0_mask.tif")
    with pytest.raises(DataError, match="1 of 8"):
        require_checked(tmp_path / "copied")


def test_only_files_with_another_time_are_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    digest = check_files._digest

    def note(path: Path) -> str:
        opened.append(path.name)
        return digest(path)

    monkeypatch.setattr(check_files, "_digest", note)
    require_checked(data)
    assert opened == []
    os.utime(data / "3.tif")
    require_checked(data)
    assert opened == ["3.tif"]


def test_names_stand_in_the_sites_own_log(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_byte(data / "0_mask.tif")
    with caplog.at_level(logging.INFO, logger="icmoe.data.check_files"), pytest.raises(DataError, match="1 of 8"):
        require_checked(data)
    assert "0_mask.tif" in caplog.text


def test_what_changes_while_the_check_runs_was_not_checked(data: Path) -> None:
    def edit(done: int, total: int) -> None:
        if done == total:
            flip_byte(data / "0.tif")

    write_checked(check_data(data, num_thumbnails=0, max_bad_share=0.2, progress=edit), data)
    with pytest.raises(DataError, match="1 of 8"):
        require_checked(data)


def test_a_manifest_edited_while_the_check_runs_was_not_checked(data: Path) -> None:
    path = data / "manifest.csv"
    before = path.read_bytes()

    def edit(*_: int) -> None:
        path.write_bytes(before.replace(b"p0,train", b"p0,test"))

    write_checked(check_data(data, num_thumbnails=0, max_bad_share=0.2, progress=edit), data)
    assert path.read_bytes() != before
    with pytest.raises(DataError, match="changed since its check"):
        require_checked(data)
    path.write_bytes(before)
    require_checked(data)


def test_a_record_of_an_earlier_version(data: Path) -> None:
    record = json.loads((data / "check.json").read_text())
    (data / "check.json").write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(DataError, match=r"format 1, this one reads 2\)\. Run 'icmoe-fl data check"):
        load_check(data)


@pytest.mark.parametrize("files", [["0.tif"], {"0.tif": [1, 2]}, {"0.tif": None}])
def test_a_damaged_list_of_files(data: Path, files: object) -> None:
    record = json.loads((data / "check.json").read_text())
    (data / "check.json").write_text(json.dumps({**record, "files": files}))
    with pytest.raises(DataError, match="is damaged"):
        load_check(data)


@pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")
@pytest.mark.shared_data
def test_files_of_a_series_count_each(data: Path) -> None:
    source = Path(os.environ["ICMOE_TEST_DATA"]) / "formats" / "dicom" / "ct_3slice_with_seg"
    (data / "ct").mkdir()
    for name in ("01.dcm", "02.dcm", "03.dcm"):
        shutil.copy(source / name, data / "ct" / name)
    shutil.copy(source / "liver.dcm", data / "liver.dcm")
    with (data / "manifest.csv").open("a") as manifest:
        manifest.writelines(f"ct,liver.dcm,c,train,0.8,axial,{number},window:-160:240\n" for number in range(3))
    pass_check(data)
    assert len(require_checked(data).files) == 12
    dataset = pydicom.dcmread(data / "ct" / "02.dcm")
    dataset.RescaleIntercept = float(dataset.RescaleIntercept) + 1
    dataset.save_as(data / "ct" / "02.dcm")
    with pytest.raises(DataError, match="1 of 12"):
        require_checked(data)
