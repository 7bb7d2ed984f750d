import math

import numpy as np
import pytest

from icmoe.metrics import ImageScore, Labels, mean_or_none, score_image
from icmoe.types import IGNORE_INDEX


def table(rows: list[list[int]]) -> Labels:
    return np.array(rows, dtype=np.uint8)


def dot(row: int, column: int, *, label: int = 1, shape: tuple[int, int] = (8, 10)) -> Labels:
    labels = np.zeros(shape, dtype=np.uint8)
    labels[row, column] = label
    return labels


def test_golden_dice_on_a_2x2_table() -> None:
    score = score_image(table([[1, 0], [0, 2]]), table([[1, 1], [0, 2]]), num_classes=3)
    assert score.dice == pytest.approx([2 / 3, 1.0])
    assert score.mean_dice == pytest.approx(5 / 6)
    assert score.hd95 is None


def test_a_class_absent_from_the_truth_is_none_even_if_predicted() -> None:
    score = score_image(table([[1, 2], [0, 0]]), table([[1, 1], [0, 0]]), num_classes=4, with_hd95=True)
    assert score.dice == [pytest.approx(2 / 3), None, None]
    assert score.hd95 is not None
    assert score.hd95[1:] == [None, None]
    assert score.mean_dice == pytest.approx(2 / 3)


def test_an_image_without_foreground_has_no_dice() -> None:
    empty = table([[0, 0], [0, 0]])
    score = score_image(table([[1, 0], [0, 0]]), empty, num_classes=2, with_hd95=True)
    assert score.dice == [None]
    assert score.hd95 == [None]
    assert score.mean_dice is None


@pytest.mark.parametrize(("spacing", "diagonal"), [(None, math.hypot(8, 10)), ((0.5, 2.0), math.hypot(4, 20))])
def test_a_present_class_not_predicted_scores_zero_and_the_diagonal(
    spacing: tuple[float, float] | None, diagonal: float
) -> None:
    score = score_image(np.zeros((8, 10), np.uint8), dot(2, 3), num_classes=2, with_hd95=True, spacing=spacing)
    assert score.dice == [0.0]
    assert score.hd95 == pytest.approx([diagonal])


@pytest.mark.parametrize(
    ("spacing", "across", "down"), [(None, 3.0, 4.0), ((1.0, 2.0), 6.0, 4.0), ((0.5, 1.0), 3.0, 2.0)]
)
def test_hd95_is_in_units_of_the_spacing(spacing: tuple[float, float] | None, across: float, down: float) -> None:
    for truth, expected in ((dot(1, 4), across), (dot(5, 1), down)):
        score = score_image(dot(1, 1), truth, num_classes=2, with_hd95=True, spacing=spacing)
        assert score.hd95 == pytest.approx([expected])


def test_a_perfect_prediction() -> None:
    truth = dot(2, 2) + dot(5, 5, label=2)
    score = score_image(truth, truth, num_classes=3, with_hd95=True)
    assert score.dice == [1.0, 1.0]
    assert score.hd95 == [0.0, 0.0]


def test_ignored_pixels_count_nowhere() -> None:
    truth, prediction = dot(2, 2), dot(2, 2)
    truth[:, 6:] = IGNORE_INDEX
    prediction[:, 6:] = 1
    score = score_image(prediction, truth, num_classes=2, with_hd95=True)
    assert score.dice == [1.0]
    assert score.hd95 == [0.0]


def test_an_image_that_is_ignored_everywhere_has_no_dice() -> None:
    truth = np.full((4, 4), IGNORE_INDEX, dtype=np.uint8)
    assert score_image(dot(1, 1, shape=(4, 4)), truth, num_classes=2, with_hd95=True).mean_dice is None


def test_scores_are_plain_numbers() -> None:
    score = score_image(dot(1, 1), dot(1, 1), num_classes=2, with_hd95=True)
    assert score.hd95 is not None
    assert all(type(value) is float for value in [*score.dice, *score.hd95])


def test_mean_leaves_out_what_is_absent() -> None:
    assert mean_or_none([0.5, None, 1.0]) == pytest.approx(0.75)
    assert mean_or_none([None]) is None
    assert mean_or_none([]) is None
    assert ImageScore(dice=[None, 0.25]).mean_dice == pytest.approx(0.25)
