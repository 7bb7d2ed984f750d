"""From a hospital's volumes to masks in their geometry: import, check, simulate, predict, on a real prostate MR."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

PROSTATE = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats" / "nifti" / "prostate_mr"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared_data,
    pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set"),
]

CONFIG = """\
task: {name: prostate zones, classes: {central_gland: 1, peripheral_zone: 2}}
model: {backbone: lite_medsam, width: 16, residual_rank: 2}
train: {local_epochs: 1, batch_size: 2, basic_every: 2}
federation: {num_rounds: 2}
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients made of one: the middle slices, each copy with a noise of its own."""
    folder = tmp_path_factory.mktemp("archive")
    image, label = (nib.load(PROSTATE / f"Prostatex_0000{end}.nii.gz") for end in ("", "_lab"))
    rng = np.random.default_rng(0)
    for patient in ("P1", "P2", "P3"):
        middle = image.slicer[:, :, 7:11]
        noisy = np.asarray(middle.dataobj) + rng.integers(0, 20, middle.shape)
        nib.save(nib.Nifti1Image(noisy.astype(np.uint16), middle.affine, middle.header), folder / f"{patient}.nii.gz")
        nib.save(label.slicer[:, :, 7:11], folder / f"{patient}_lab.nii.gz")
    return folder


def test_import_check_simulate_predict(icmoe_fl: Any, archive: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = icmoe_fl.run(*arguments)
        assert done.process.returncode == 0, done.output
        return str(done.output)

    data, config, out = tmp_path / "data", tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    secret = ("--secret", tmp_path / "key")
    imported = run("data", "import", archive, "--out", data, "--labels", "nifti", "--site", "hospitalA", *secret)
    assert "0: " in imported
    checked = run("data", "check", data, "--config", config, "--no-step", "--accept")
    assert "used 12 of 12" in checked
    run("simulate", config, "--data", data, "--out", out)
    results = json.loads((out / "results.json").read_text())
    assert results["sites"]["hospitalA"]["num_test"] == 4
    assert results["sites"]["hospitalA"]["hd95_unit"] == "mm"
    run("predict", out, archive / "P2.nii.gz", "--out", tmp_path / "masks", "--uncertainty")
    image, mask = nib.load(archive / "P2.nii.gz"), nib.load(tmp_path / "masks" / "P2" / "mask.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
