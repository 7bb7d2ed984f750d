"""Cases of one image and the tables made of them; the whole command runs in tests/integration."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from icmoe.errors import DataError
from icmoe.evaluation import Case, _write_cases, compare, score_case, summarise
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
    assert (square.dice, square.hd95, square.surface_dice, square.volume_error) == (1.0, 0.0, 1.0, 0.0)
    assert (other.dice, other.hd95, other.surface_dice, other.volume_error) == (None, None, None, None)
    assert not square.in_mm


def test_a_shift_of_two_pixels() -> None:
    square, _ = score(squares(shift=2), squares())
    assert square.dice == pytest.approx(0.8)
    assert square.hd95 == 2.0
    assert square.volume_error == 0.0
    assert square.surface_dice is not None
    # The two sides that moved lie 2 pixels off, beyond the tolerance; most of top and bottom lies within it.
    assert 0.3 < square.surface_dice < 0.7
    assert score(squares(shift=2), squares(), tolerance=2.0)[0].surface_dice == 1.0


def test_spacing_turns_distances_into_mm() -> None:
    square, _ = score(squares(shift=2), squares(), spacing=(1.0, 0.5))
    assert square.hd95 == 1.0
    assert square.surface_dice == 1.0
    assert square.in_mm


def test_a_missed_class_and_a_made_up_one() -> None:
    missed, made_up = score(squares() * 2, squares())
    assert (missed.dice, missed.surface_dice, missed.volume_error) == (0.0, 0.0, -1.0)
    assert (made_up.dice, made_up.predicted_pixels) == (None, 100)


def test_ignored_pixels_count_nowhere() -> None:
    truth = squares()
    truth[5:15, 15:] = IGNORE_INDEX
    square, _ = score(squares(shift=2), truth)
    assert (square.true_pixels, square.predicted_pixels) == (100, 80)


def cases(site: str, dice: list[float], *, per_patient: int = 2) -> list[Case]:
    template = Case(site, "", "", "", "square", 0.0, 1.0, 0.9, 0.1, 100, 110, True)
    return [
        replace(template, patient=f"p{number // per_patient}", image=f"{number}.png", dice=value)
        for number, value in enumerate(dice)
    ]


def test_sites_count_the_same_in_the_mean_over_sites() -> None:
    everything = cases("oslo", [0.9] * 8) + cases("bergen", [0.5] * 2)
    result = summarise(everything, seed=0)
    assert result["mean_over_sites"]["dice"]["mean"] == pytest.approx(0.7)
    assert result["sites"]["oslo"]["num_patients"] == 4
    assert result["classes"]["square"]["dice"]["mean"] == pytest.approx(0.82)
    assert result["sites"]["bergen"]["dice"]["ci95"] is None  # one patient says nothing about the next
    assert result["sites"]["oslo"]["dice"]["ci95"] is not None


def test_the_volume_error_of_a_patient_is_over_all_slices() -> None:
    one, two = cases("oslo", [0.9, 0.8])
    result = summarise([replace(one, predicted_pixels=150), replace(two, predicted_pixels=70)], seed=0)
    assert result["patients"][0]["volume_error"] == pytest.approx(0.1)


def test_images_without_foreground_are_left_out_of_means() -> None:
    empty = replace(cases("oslo", [0.0])[0], image="e.png", dice=None, hd95=None, surface_dice=None, volume_error=None)
    result = summarise([*cases("oslo", [0.8, 0.9]), empty], seed=0)
    assert result["sites"]["oslo"]["dice"]["mean"] == pytest.approx(0.85)
    assert result["sites"]["oslo"]["num_images"] == 2
    assert summarise([empty], seed=0)["mean_over_sites"] is None


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
    _write_cases(tmp_path / "cases.csv", score(squares(), squares()))
    with (tmp_path / "cases.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["class_name"], line["dice"]) for line in lines] == [("square", "1.0"), ("other", "")]
