"""Which images a report shows; the pictures themselves are looked at in tests/integration."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from icmoe import examples

TRUTH = np.zeros((8, 8), np.uint8)
TRUTH[2:6, 2:6] = 1


class Labelled:
    """Images whose truth is a square, or empty for some."""

    def __init__(self, *, num_images: int, empty: tuple[int, ...] = ()) -> None:
        self.num_images, self.empty = num_images, empty

    def __len__(self) -> int:
        return self.num_images

    def original_labels(self, index: int) -> npt.NDArray[np.uint8]:
        return np.zeros_like(TRUTH) if index in self.empty else TRUTH


def choose(data: Labelled, missed_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Predict the square without some of its rows: the more are missed, the lower the Dice."""

    def predict(bench: Any, data: Any, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        prediction = TRUTH.copy()
        prediction[2 : 2 + missed_rows[index]] = 0
        return prediction, np.zeros_like(prediction)

    monkeypatch.setattr(examples, "predict_one", predict)
    bench: Any = SimpleNamespace(run=SimpleNamespace(task=SimpleNamespace(num_classes=2)))
    return examples._typical_and_worst(bench, data)  # type: ignore[arg-type]


def test_the_median_and_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Labelled(num_images=5), [0, 4, 1, 2, 3], monkeypatch) == [3, 1]


def test_one_image_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Labelled(num_images=1), [2], monkeypatch) == [0]


def test_images_without_foreground_have_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Labelled(num_images=3, empty=(1,)), [0, 4, 3], monkeypatch) == [0, 2]


def test_only_empty_images_still_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Labelled(num_images=2, empty=(0, 1)), [0, 0], monkeypatch) == [0]
