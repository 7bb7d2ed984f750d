"""Cases of one image and of one volume, and the tables made of them; the whole command runs in tests/integration."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from icmoe.data.checked import write_checked
from icmoe.data.checking import check_data
from icmoe.data.manifest import Sample, load_manifest
from icmoe.errors import DataError
from icmoe.evaluation import EvaluationRequest, select_images, write_cases
from icmoe.evaluation_cases import (
    Case,
    VolumeCase,
    choose_geometry,
    group_slices,
    score_case,
    score_volume,
    surface_scores,
    voxel_size,
)
from icmoe.evaluation_tables import compare, summarise
from icmoe.types import IGNORE_INDEX

WHERE = ("oslo", "p1", "a.png", "")


def squares(*, shift: int = 0) -> np.ndarray:
    labels = np.zeros((40, 40), np.uint8)
    labels[5:15, 5 + shift : 15 + shift] = 1
    return labels


def score(prediction: np.ndarray, truth: np.ndarray, **changes: object) -> list[Case]:
    settings = {"where": WHERE, "classes": ("square", "other"), "spacing": None, "tolerance": 1.0} | changes
    return score_case(prediction, truth, **settings)  # type: ignore[arg-type]


def test_a_perfect_prediction() -> None:
    square, other = score(squares(), squares())
    assert (square.dice, square.hd95, square.surface_dice) == (1.0, 0.0, 1.0)
    assert (other.dice, other.hd95, other.surface_dice) == (None, None, None)
    assert square.unit == "px"


def test_a_shift_of_two_pixels() -> None:
    square, _ = score(squares(shift=2), squares())
    assert square.dice == pytest.approx(0.8)
    assert square.hd95 == 2.0
    assert square.surface_dice is not None
    # The two sides that moved lie 2 pixels off, beyond the tolerance; most of top and bottom lies within it.
    assert 0.3 < square.surface_dice < 0.7
    assert score(squares(shift=2), squares(), tolerance=2.0)[0].surface_dice == 1.0


def test_spacing_turns_distances_into_mm() -> None:
    square, _ = score(squares(shift=2), squares(), spacing=(1.0, 0.5))
    assert square.hd95 == 1.0
    assert square.surface_dice == 1.0
    assert square.unit == "mm"


def test_a_missed_class_and_a_made_up_one() -> None:
    missed, made_up = score(squares() * 2, squares())
    assert (missed.dice, missed.surface_dice, missed.predicted_pixels) == (0.0, 0.0, 0)
    assert (made_up.dice, made_up.predicted_pixels) == (None, 100)


def test_ignored_pixels_count_nowhere() -> None:
    truth = squares()
    truth[5:15, 15:] = IGNORE_INDEX
    square, _ = score(squares(shift=2), truth)
    assert (square.true_pixels, square.predicted_pixels) == (100, 80)


def cases(site: str, dice: list[float], *, per_patient: int = 2) -> list[Case]:
    template = Case(site, "", "", "", "square", 0.0, 1.0, 0.9, "mm", 100, 110)
    return [
        replace(template, patient=f"p{number // per_patient}", image=f"{number}.png", dice=value)
        for number, value in enumerate(dice)
    ]


def tables(cases: list[Case], volumes: list[VolumeCase] | None = None, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"geometry": "per slice", "seed": 0, **changes}
    return summarise(cases, volumes or [], **settings)


def test_sites_count_the_same_in_the_mean_over_sites() -> None:
    everything = cases("oslo", [0.9] * 8) + cases("bergen", [0.5] * 2)
    result = tables(everything)
    assert result["mean_over_sites"]["dice"]["mean"] == pytest.approx(0.7)
    assert result["sites"]["oslo"]["num_patients"] == 4
    assert result["classes"]["square"]["dice"]["mean"] == pytest.approx(0.82)
    assert result["sites"]["bergen"]["dice"]["ci95"] is None  # one patient says nothing about the next
    assert result["sites"]["oslo"]["dice"]["ci95"] is not None


class TestVolumes:
    def volumes(self, cases: list[Case], **changes: Any) -> list[VolumeCase]:
        settings = {"volume": "", "spacings": [None] * 2, "slice_distance": None} | changes
        return score_volume(cases, **settings)

    def test_slices_are_added_up_before_they_are_compared(self) -> None:
        one, two = cases("oslo", [0.9, 0.8])
        pair = [replace(one, predicted_pixels=150), replace(two, predicted_pixels=70)]
        (volume,) = self.volumes(pair)
        assert (volume.true_volume, volume.predicted_volume, volume.volume_unit) == (200, 220, "px")
        assert volume.volume_difference == pytest.approx(0.1)

    def test_what_is_predicted_on_slices_without_the_class_counts(self) -> None:
        one, two = cases("oslo", [0.9, 0.9])
        (volume,) = self.volumes([one, replace(two, dice=None, true_pixels=0, predicted_pixels=90)])
        assert volume.volume_difference == pytest.approx(1.0)

    def test_units(self) -> None:
        pair = cases("oslo", [0.9, 0.8])
        (area,) = self.volumes(pair, spacings=[(0.5, 0.5), (2.0, 2.0)])
        assert (area.true_volume, area.volume_unit) == (425.0, "mm2")
        (volume,) = self.volumes(pair, spacings=[(0.5, 0.5)] * 2, slice_distance=8.0)
        assert volume.true_volume == pytest.approx(0.4)
        assert volume.volume_unit == "ml"
        (mixed,) = self.volumes(pair, spacings=[(0.5, 0.5), None])
        assert mixed.volume_unit == "px"

    def test_errors_of_opposite_sign_cancel_in_no_absolute_value(self) -> None:
        """Neither between two classes of a patient, nor between two patients."""
        pairs = [
            [replace(case, class_name=name, predicted_pixels=pixels) for name, pixels in (("a", more), ("b", less))]
            for case, more, less in zip(cases("oslo", [0.5, 0.6], per_patient=1), (150, 50), (50, 150), strict=True)
        ]
        volumes = [one for pair in pairs for one in self.volumes(pair, spacings=[None])]
        result = tables([case for pair in pairs for case in pair], volumes)
        for row in (result["sites"]["oslo"], *result["classes"].values()):
            assert row["volume_difference"]["mean"] == 0.0
            assert row["absolute_volume_difference"]["mean"] == 0.5
        first = result["patients"][0]
        assert (first["volume_difference"], first["absolute_volume_difference"]) == (0.0, 0.5)
        assert [row["volume_difference"] for row in first["classes"].values()] == [0.5, -0.5]
        assert len(result["volumes"]) == 4


class TestUnits:
    def mixed(self) -> list[Case]:
        in_mm = cases("oslo", [0.9] * 4)
        return [*in_mm[:3], replace(in_mm[3], unit="px", hd95=100.0, surface_dice=0.1)]

    def test_pixels_are_never_averaged_with_mm(self) -> None:
        for row in (*tables(self.mixed())["sites"].values(), *tables(self.mixed())["classes"].values()):
            assert (row["hd95"]["mean"], row["surface_dice"]["mean"]) == (1.0, pytest.approx(0.9))
            assert (row["unit"], row["num_surfaces"], row["num_surfaces_left_out"]) == ("mm", 3, 1)
            assert row["num_images"] == 4

    def test_pixels_stand_where_nothing_has_a_spacing(self) -> None:
        bergen = [replace(case, unit="px", hd95=7.0) for case in cases("bergen", [0.9] * 2)]
        result = tables([*self.mixed(), *bergen])
        assert (result["sites"]["bergen"]["hd95"]["mean"], result["sites"]["bergen"]["unit"]) == (7.0, "px")
        assert result["classes"]["square"]["num_surfaces_left_out"] == 3
        patients = {row["patient"]: row for row in tables(self.mixed())["patients"]}
        assert [patients["p1"][key] for key in ("hd95", "unit", "num_surfaces_left_out")] == [1.0, "mm", 1]


class TestGeometry:
    def samples(self, numbers: list[int], *, path: str = "v.nii", **changes: Any) -> list[Sample]:
        template = Sample(Path(path), Path("m.nii"), "p1", "test", "oslo", axis="axial", **changes)
        return [replace(template, slice=str(number)) for number in numbers]

    def choose(self, samples: list[Sample]) -> str:
        return choose_geometry(group_slices(samples, names=[f"{one.image} {one.slice}" for one in samples]))[0]

    def test_slices_are_put_in_order_by_volume(self) -> None:
        samples = [*self.samples([2, 0]), *self.samples([10, 9, 11], path="w.nii"), *self.samples([1])]
        groups = group_slices(samples, names=[f"{one.image} {one.slice}" for one in samples])
        assert [(group.volume, group.indices) for group in groups] == [("v.nii 0", (1, 5, 0)), ("w.nii 9", (3, 2, 4))]
        assert all(group.is_whole for group in groups)

    def test_volumes_are_measured_in_3d_and_pictures_per_slice(self) -> None:
        picture = Sample(Path("a.png"), Path("m.png"), "p2", "test", "oslo")
        assert self.choose(self.samples([0, 1, 2])) == "3-D"
        assert self.choose([*self.samples([0, 1, 2]), picture]) == "per slice"
        assert self.choose(self.samples([0, 5, 10])) == "per slice"
        assert self.choose([*self.samples([0, 5, 10]), *self.samples([0, 1, 2], path="w.nii")]) == "3-D"

    def test_volumes_with_gaps_are_left_out_and_counted(self) -> None:
        one, two = cases("oslo", [0.9, 0.8], per_patient=1)
        whole, gaps = (
            score_volume([case], volume=name, spacings=[(1.0, 1.0)], slice_distance=None)[0]
            for case, name in ((one, "v"), (two, "w"))
        )
        row = tables([one, two], [replace(whole, hd95=4.0, surface_dice=0.5, unit="mm"), gaps], geometry="3-D")
        found = row["sites"]["oslo"]
        assert (found["hd95"]["mean"], found["unit"]) == (4.0, "mm")
        assert (found["num_surfaces"], found["num_surfaces_left_out"], found["num_images"]) == (1, 1, 2)

    def test_the_distance_of_slices_counts(self) -> None:
        truth = np.zeros((8, 30, 30), np.uint8)
        truth[2:6, 5:20, 5:20] = 1
        spacing = (5.0, 1.0, 1.0)
        moved = np.roll(truth, 1, axis=0)
        hd95, share = surface_scores(moved, truth, class_id=1, spacing=spacing, tolerance=2.0)
        assert hd95 == 5.0  # each slice alone, in the plane, sees the missing one only
        assert share is not None
        assert 0.1 < share < 0.9
        assert surface_scores(moved, truth, class_id=1, spacing=spacing, tolerance=5.0)[1] == 1.0
        assert surface_scores(truth, truth, class_id=1, spacing=spacing, tolerance=0.0) == (0.0, 1.0)
        assert surface_scores(truth, truth, class_id=2, spacing=spacing, tolerance=0.0) == (None, None)
        missed, none = surface_scores(truth * 0, truth, class_id=1, spacing=spacing, tolerance=1.0)
        assert missed == pytest.approx(np.sqrt(40**2 + 30**2 + 30**2))
        assert none == 0.0

    def test_the_spacing_is_that_of_the_turned_volume(self, tmp_path: Path) -> None:
        path = tmp_path / "v.nii"
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([0.5, 0.7, 3.0, 1.0])), path)
        assert voxel_size(self.samples([0], path=str(path))[0]) == pytest.approx((3.0, 0.7, 0.5))
        assert voxel_size(Sample(Path("a.png"), Path("m.png"), "p", "test", "s")) is None


class TestSelection:
    @pytest.fixture
    def request_(self, tmp_path: Path) -> EvaluationRequest:
        lines, rng = ["image,mask,patient,split,site"], np.random.default_rng(0)
        for name, split in (("a", "train"), ("b", "test"), ("c", "test")):
            for file, high in ((f"{name}.png", 255), (f"{name}_mask.png", 2)):
                Image.fromarray(rng.integers(0, high, (12, 12), np.uint8)).save(tmp_path / file)
            lines.append(f"{name}.png,{name}_mask.png,{name},{split},oslo")
        (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
        return EvaluationRequest(run_dir=tmp_path, data=tmp_path, out=tmp_path / "out")

    def check(self, folder: Path, *damaged: str) -> None:
        for name in damaged:
            (folder / name).write_bytes(b"\x89PNG broken")
        write_checked(check_data(folder, num_thumbnails=0, max_bad_share=0.9), folder)

    def test_images_that_the_check_left_out_are_not_scored(self, request_: EvaluationRequest) -> None:
        manifest = load_manifest(request_.data)
        assert len(select_images(manifest, request_).sites["oslo"]) == 2
        self.check(request_.data, "a.png", "b.png")
        selection = select_images(manifest, request_)
        assert [sample.image.name for sample in selection.sites["oslo"]] == ["c.png"]
        assert selection.left_out == {"oslo": 1}

    def test_none_left(self, request_: EvaluationRequest) -> None:
        self.check(request_.data, "b.png", "c.png")
        with pytest.raises(DataError, match="left out all 2"):
            select_images(load_manifest(request_.data), request_)

    def test_a_manifest_that_changed_since_its_check(self, request_: EvaluationRequest) -> None:
        self.check(request_.data)
        path = request_.data / "manifest.csv"
        path.write_text(path.read_text() + "\n")
        with pytest.raises(DataError, match="changed since"):
            select_images(load_manifest(request_.data), request_)


def test_images_without_foreground_are_left_out_of_means() -> None:
    empty = replace(cases("oslo", [0.0])[0], image="e.png", dice=None, hd95=None, surface_dice=None)
    result = tables([*cases("oslo", [0.8, 0.9]), empty])
    assert result["sites"]["oslo"]["dice"]["mean"] == pytest.approx(0.85)
    assert result["sites"]["oslo"]["num_images"] == 2
    assert tables([empty])["mean_over_sites"] is None


def test_comparing_in_pairs() -> None:
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.5, 0.8, 40)
    result = compare(cases("oslo", (dice + 0.1).tolist()), cases("oslo", dice.tolist()), seed=0)
    assert result["difference"] == pytest.approx(0.1)
    assert (result["num_patients"], result["num_better"]) == (20, 20)
    assert result["p_value"] < 0.001
    assert result["ci95"] == pytest.approx((0.1, 0.1))


def test_other_images_cannot_be_compared() -> None:
    for other in (cases("oslo", [0.5]), [replace(case, class_name="disc") for case in cases("oslo", [0.5, 0.6])]):
        with pytest.raises(DataError, match="same images and classes"):
            compare(cases("oslo", [0.5, 0.6]), other, seed=0)


def test_the_csv_has_a_line_per_image_and_class(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.csv", score(squares(), squares()))
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["class_name"], line["dice"], line["unit"]) for line in lines] == [
        ("square", "1.0", "px"),
        ("other", "", "px"),
    ]
