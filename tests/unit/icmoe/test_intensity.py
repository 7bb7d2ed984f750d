import numpy as np
import pytest

from icmoe.data.intensity import IntensityRule, apply_limits, default_rule
from icmoe.errors import ManifestError


def test_a_window_cuts_and_scales_to_0_255() -> None:
    values = np.array([-1000.0, -160.0, 40.0, 240.0, 3000.0])
    limits = IntensityRule.parse("window:-160:240").limits(values)
    np.testing.assert_allclose(apply_limits(values, limits), [0, 0, 127.5, 255, 255])


def test_percentiles_look_at_the_foreground_only() -> None:
    volume = np.zeros((10, 10, 11))
    volume[..., 0] = np.arange(1, 101).reshape(10, 10)
    limits = IntensityRule.parse("percentile:0:50").limits(volume)
    assert limits == (1.0, 50.5)


def test_stored_leaves_values_as_they_are() -> None:
    values = np.array([3.0, 70000.0])
    for text in ("", "stored"):
        np.testing.assert_array_equal(apply_limits(values, IntensityRule.parse(text).limits(values)), values)


def test_a_constant_volume_is_finite() -> None:
    volume = np.full((2, 2, 2), 7.0)
    limits = IntensityRule.parse("percentile:0.5:99.5").limits(volume)
    assert np.isfinite(apply_limits(volume, limits)).all()


@pytest.mark.parametrize(
    "text", ["ct", "window", "window:1", "window:5:5", "window:9:3", "window:a:b", "percentile:-1:50",
             "percentile:1:101", "window:nan:3", "window:1:2:3", "stored:1:2"]
)  # fmt: skip
def test_a_wrong_rule_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ManifestError, match="window:LOW:HIGH"):
        IntensityRule.parse(text)


def test_each_modality_has_a_rule_that_parses() -> None:
    assert {IntensityRule.parse(default_rule(modality)).kind for modality in ("CT", "MR", "US", "")} == {
        "window", "percentile", "stored"
    }  # fmt: skip
