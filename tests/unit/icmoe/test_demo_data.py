import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icmoe.config import load_run_config
from icmoe.data import demo
from icmoe.errors import DataError, RunError

pytest.importorskip("nilearn", reason="the template ships inside nilearn: pip install 'icmoe-fl[demo]'")

DEMO_CONFIG = Path(__file__).parents[3] / "configs" / "run" / "demo.yaml"


@pytest.fixture(scope="module")
def anatomy() -> demo.ByteArray:
    return demo.load_anatomy()


@pytest.fixture(scope="module")
def one_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 18 patients with one slice each: seconds less than the whole set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "LEVELS_MM", demo.LEVELS_MM[:1])
        return demo.write_demo_data(tmp_path_factory.mktemp("demo") / "data", seed=3)


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_manifest_has_every_column_and_three_scanners(one_level_folder: Path) -> None:
    rows = manifest(one_level_folder)
    assert tuple(rows[0]) == demo.COLUMNS
    assert {row["site"] for row in rows} == {"scanner_a_3t", "scanner_b_1t5", "scanner_c_lowfield"}
    assert {(row["site"], float(row["spacing"])) for row in rows} == {(s.site, s.spacing) for s in demo.SCANNERS}
    assert len({row["image"] for row in rows} | {row["mask"] for row in rows}) == 2 * len(rows)


def test_patients_are_split_four_one_one_and_never_across(one_level_folder: Path) -> None:
    owners = {(row["patient"], row["site"], row["split"]) for row in manifest(one_level_folder)}
    assert len({patient for patient, _, _ in owners}) == len(owners) == 18
    for scanner in demo.SCANNERS:
        splits = Counter(split for _, site, split in owners if site == scanner.site)
        assert splits == {"train": 4, "val": 1, "test": 1}


def test_image_and_mask_agree_with_the_manifest(one_level_folder: Path) -> None:
    for row in manifest(one_level_folder):
        with Image.open(one_level_folder / row["image"]) as image, Image.open(one_level_folder / row["mask"]) as mask:
            assert image.mode == mask.mode == "L"
            assert image.size == mask.size == (int(row["width"]), int(row["height"]))
            values = set(np.unique(np.asarray(mask)).tolist())
        assert values <= {0, demo.GREY_MATTER, demo.WHITE_MATTER}
        if row["split"] == "test":
            assert values == {0, demo.GREY_MATTER, demo.WHITE_MATTER}


def test_white_matter_is_brighter_than_grey_at_every_scanner(one_level_folder: Path) -> None:
    for row in manifest(one_level_folder):
        image = np.asarray(Image.open(one_level_folder / row["image"])).astype(float)
        mask = np.asarray(Image.open(one_level_folder / row["mask"]))
        background, grey, white = (image[mask == value].mean() for value in (0, 1, 2))
        assert background < grey < white


@pytest.mark.parametrize("scanner", demo.SCANNERS, ids=lambda scanner: scanner.site)
def test_same_seed_gives_same_pixels_and_another_seed_another_patient(
    anatomy: demo.ByteArray, scanner: demo.Scanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LEVELS_MM", demo.LEVELS_MM[1:2])
    (first,), (again,), (other,) = (demo.draw_patient(anatomy, scanner, patient_seed=(s, 0, 0)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first[1] != other[1]) > 0.05


@pytest.mark.parametrize("patient", range(6))
def test_deformation_never_folds(patient: int) -> None:
    step = 4.0
    axes = (np.arange(low, high, step) for low, high in ((20, 176), (20, 216), (50, 125)))
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    moved = demo.deform(points, np.random.default_rng((0, 0, patient)))
    jacobian = np.stack([np.stack(np.gradient(axis, step)) for axis in moved])
    determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
    assert determinant.min() > 0.3
    assert determinant.max() < 3.0
    assert np.sqrt(np.square(moved - points).sum(axis=0)).max() > 5.0


def test_control_grids_stay_below_the_folding_bound() -> None:
    assert sum(largest / spacing for spacing, largest in demo._CONTROL_GRIDS) < 0.48


def test_slice_shows_the_front_up_and_the_patients_right_on_the_left() -> None:
    x, y, z = demo.slice_positions(demo.SCANNERS[2], np.random.default_rng(0))
    assert x[0, 0, 0, 0] > x[0, 0, 0, -1]
    assert y[0, 0, 0, 0] > y[0, 0, -1, 0]
    assert z[0].max() - z[0].min() == pytest.approx(4.0)
    assert np.all(np.diff(z[:, 0, 0, 0]) > 0)


class TestFolder:
    @pytest.fixture(autouse=True)
    def _one_patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "LEVELS_MM", demo.LEVELS_MM[:1])
        monkeypatch.setattr(demo, "SCANNERS", demo.SCANNERS[:1])
        monkeypatch.setattr(demo, "PATIENT_SPLITS", ("train",))

    def test_same_seed_writes_same_bytes(self, tmp_path: Path) -> None:
        first, second = (demo.write_demo_data(tmp_path / name, seed=5) for name in ("one", "two"))
        assert file_bytes(first) == file_bytes(second)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

    def test_progress_reports_every_slice(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        demo.write_demo_data(tmp_path / "data", progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 1)]

    def test_complete_folder_is_reused_without_drawing(self, tmp_path: Path) -> None:
        folder = demo.write_demo_data(tmp_path / "data")
        seen: list[int] = []
        assert demo.write_demo_data(folder, progress=lambda done, _: seen.append(done)) == folder
        assert seen == []

    def test_foreign_file_beside_the_data_does_no_harm(self, tmp_path: Path) -> None:
        folder = demo.write_demo_data(tmp_path / "data")
        (folder / "notes.txt").write_text("mine")
        demo.write_demo_data(folder)
        assert (folder / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("damage", ["manifest", "image", "version", "seed"])
    def test_damaged_or_older_folder_is_written_anew(self, tmp_path: Path, damage: str) -> None:
        folder = demo.write_demo_data(tmp_path / "data")
        whole = file_bytes(folder)
        record = json.loads((folder / "demo.json").read_text())
        if damage == "manifest":
            (folder / "manifest.csv").unlink()
        elif damage == "image":
            path = next(folder.rglob("images/*.png"))
            path.write_bytes(path.read_bytes()[:100])
        else:
            (folder / "demo.json").write_text(json.dumps({**record, damage: -1}))
        demo.write_demo_data(folder)
        assert file_bytes(folder) == whole
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    def test_empty_folder_is_taken(self, tmp_path: Path) -> None:
        assert len(manifest(demo.write_demo_data(tmp_path))) == 1

    def test_foreign_folder_is_refused_and_untouched(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.csv").write_text("image,mask\n")
        with pytest.raises(DataError, match="holds no demo data"):
            demo.write_demo_data(tmp_path)
        assert file_bytes(tmp_path) == {"manifest.csv": b"image,mask\n"}

    def test_interrupted_write_leaves_nothing(self, tmp_path: Path) -> None:
        def interrupt(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            demo.write_demo_data(tmp_path / "data", progress=interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_no_space_says_what_to_do(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match=r"cannot write the demo data to .* give another folder"):
            demo.write_demo_data(tmp_path / "file" / "data")


@pytest.mark.parametrize("package", ["nilearn", "nibabel"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"pip install 'icmoe-fl\[demo\]'"):
        demo.write_demo_data(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_shipped_config_fits_the_data() -> None:
    config = load_run_config(DEMO_CONFIG)
    assert config.task.classes == {"grey_matter": demo.GREY_MATTER, "white_matter": demo.WHITE_MATTER}
    assert config.task.note.startswith("One averaged brain")
    assert config.simulation.partition == "manifest"
