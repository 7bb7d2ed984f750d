"""How stored values become the grey an expert sees: one stated rule per image, the same in training and prediction.

A rule is text, as it stands in the manifest's column ``intensity``:

- ``stored`` (or nothing): values as they are; for 8-bit pictures.
- ``window:LOW:HIGH``: what lies outside is cut off; for CT, in Hounsfield units.
- ``percentile:LOW:HIGH``: the same with percentiles of the whole volume's foreground (voxels above its lowest value);
  for MR, whose units mean nothing.

The last two give 0..255.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from icmoe.errors import ManifestError

STORED = "stored"
CT_SOFT_TISSUE = "window:-160:240"
MR_PERCENTILES = "percentile:0.5:99.5"

Values = npt.NDArray[np.float32]


def default_rule(modality: str) -> str:
    """The rule for a DICOM modality: a soft-tissue window for CT, values as they are for colour, else percentiles."""
    return {"CT": CT_SOFT_TISSUE, "": MR_PERCENTILES, "MR": MR_PERCENTILES, "PT": MR_PERCENTILES}.get(modality, STORED)


@dataclass(frozen=True)
class IntensityRule:
    """A parsed rule; see the module."""

    kind: Literal["stored", "window", "percentile"]
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "IntensityRule":
        """Read a rule.

        Raises:
            ManifestError: if it is none.
        """
        if text in ("", STORED):
            return cls("stored")
        kind, *numbers = text.split(":")
        try:
            low, high = (float(number) for number in numbers)
        except ValueError:
            low = high = math.nan
        sensible = low < high and math.isfinite(high - low) and (kind != "percentile" or (low >= 0 and high <= 100))
        if kind not in ("window", "percentile") or not sensible:
            raise ManifestError(
                f"intensity is {text!r}. Write stored, window:LOW:HIGH such as {CT_SOFT_TISSUE}, or "
                f"percentile:LOW:HIGH such as {MR_PERCENTILES}."
            )
        return cls("window" if kind == "window" else "percentile", low, high)

    def limits(self, volume: npt.NDArray[np.floating]) -> tuple[float, float] | None:
        """Values that become 0 and 255 in every slice of ``volume``; ``None`` leaves values as they are."""
        if self.kind == "stored":
            return None
        if self.kind == "window":
            return self.low, self.high
        foreground = volume[volume > volume.min()]
        if not foreground.size:
            return float(volume.min()), float(volume.min()) + 1.0
        low, high = np.percentile(foreground, [self.low, self.high])
        return float(low), float(max(high, low + 1e-6))


def apply_limits(values: npt.NDArray[np.floating], limits: tuple[float, float] | None) -> Values:
    """Map ``limits`` to 0..255 and cut off what lies outside; any shape."""
    if limits is None:
        return values.astype(np.float32)
    low, high = limits
    scaled: Values = ((np.clip(values, low, high) - low) * (255.0 / (high - low))).astype(np.float32)
    return scaled
