"""Units of NIfTI headers: what comes out is in millimetres."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from icmoe.data.nifti import read_nifti, write_nifti
from icmoe.data.outputs import write_volume
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import MaskError

VALUES = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.int16)
SPACING, ORIGIN = np.array([0.5, 0.7, 3.0]), np.array([-40.0, 20.0, 110.0])


def save(path: Path, *, code: int, per_mm: float) -> Path:
    """A volume whose header counts in a unit of which ``per_mm`` make a millimetre."""
    affine = np.diag([*SPACING * per_mm, 1.0])
    affine[:3, 3] = ORIGIN * per_mm
    image = nib.Nifti1Image(VALUES, affine)
    image.header["xyzt_units"] = code
    nib.save(image, path)
    return path


# The codes of seconds (8) and milliseconds (16) share the byte; 5 is none of the standard's.
@pytest.mark.parametrize(
    ("code", "per_mm"),
    [(0, 1.0), (2, 1.0), (10, 1.0), (1, 1e-3), (17, 1e-3), (3, 1e3), (11, 1e3), (8, 1.0), (5, 1.0)],
)
def test_is_read_in_millimetres(tmp_path: Path, code: int, per_mm: float) -> None:
    volume, _ = read_nifti(save(tmp_path / "a.nii", code=code, per_mm=per_mm))
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    np.testing.assert_allclose(volume.get_affine("RAS")[:3, 3], ORIGIN, rtol=1e-6)
    np.testing.assert_array_equal(volume.array, VALUES)


def test_label_and_image_may_count_in_different_units(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii", code=3, per_mm=1e3)
    label = save(tmp_path / "label.nii", code=2, per_mm=1.0)
    np.testing.assert_array_equal(read_labels(label, image=image).array, VALUES)
    wrong = save(tmp_path / "wrong.nii", code=3, per_mm=1.0)
    with pytest.raises(MaskError, match="not on its image's grid"):
        read_labels(wrong, image=image)


def test_a_prediction_keeps_the_units_of_its_image(tmp_path: Path) -> None:
    image = save(tmp_path / "image.nii", code=3, per_mm=1e3)
    write_volume(tmp_path / "mask.nii", read_volume(image).grid, like=image)
    write_nifti(tmp_path / "again.nii", VALUES, image)
    for name in ("mask.nii", "again.nii"):
        written = nib.load(tmp_path / name)
        assert written.header.get_xyzt_units()[0] == "micron"
        np.testing.assert_array_equal(written.affine, nib.load(image).affine)
        np.testing.assert_array_equal(read_labels(tmp_path / name, image=image).array, VALUES)
