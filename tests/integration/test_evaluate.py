"""``icmoe-fl evaluate`` on a finished run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from icmoe.data.checked import write_checked
from icmoe.data.checking import check_data

pytestmark = pytest.mark.slow


def test_scores_equal_the_run_and_pages_stand_alone(icmoe_fl: Any, finished: Path, discs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    done = icmoe_fl.run("evaluate", run, "--data", discs, "--against", run, "--against-checkpoint", "round_000")
    assert done.process.returncode == 0, done.output
    out = run / "evaluation"
    result = json.loads((out / "evaluation.json").read_text())
    expected = json.loads((run / "results.json").read_text())
    for site, scores in expected["sites"].items():
        assert result["sites"][site]["dice"]["mean"] == pytest.approx(scores["dice"], abs=1e-6)
        assert result["sites"][site]["hd95"]["mean"] == pytest.approx(scores["hd95"], abs=1e-6)
    assert result["mean_over_sites"]["dice"]["mean"] == pytest.approx(expected["mean_dice"], abs=1e-6)
    assert result["against"]["difference"] > 0.1  # the untrained model knows nothing of discs
    assert result["against"]["p_value"] is None  # three patients are too few to tell
    assert len((out / "cases.csv").read_text().splitlines()) == 4
    assert (result["geometry"], {row["unit"] for row in result["sites"].values()}) == ("per slice", {"px"})
    patient = result["patients"][0]
    (volume,) = [one for one in result["volumes"] if one["site"] == patient["site"]]
    expected_error = (volume["predicted_volume"] - volume["true_volume"]) / volume["true_volume"]
    assert patient["classes"]["disc"]["volume_difference"] == pytest.approx(expected_error)
    assert len((out / "volumes.csv").read_text().splitlines()) == 4
    assert "HD95 and surface Dice are per slice: some images are pictures" in done.output
    page = (out / "evaluation.html").read_text()
    assert page.count('<figure class="example">') == 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients to test on: balls in 8 slices 3 mm apart, of 0.5 mm pixels. Of the second, one slice is missing."""
    folder = tmp_path_factory.mktemp("volumes")
    rows, columns, slices = np.mgrid[:64, :64, :8]
    ball = ((rows - 32) ** 2 + (columns - 30) ** 2 + (6 * (slices - 4)) ** 2 < 18**2).astype(np.uint8)
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    pixels = (60 + 100 * ball + np.random.default_rng(0).normal(0, 8, ball.shape)).clip(0, 255)
    nib.save(nib.Nifti1Image(pixels.astype(np.uint8), affine), folder / "v.nii")
    nib.save(nib.Nifti1Image(ball, affine), folder / "m.nii")
    shutil.copy(folder / "v.nii", folder / "w.nii")
    lines = ["image,mask,patient,split,site,slice,axis,intensity"]
    lines += [f"{name}.nii,m.nii,{name},test,oslo,{number},axial,stored" for name in "vw" for number in range(8)]
    del lines[-4]
    lines.append("w.nii,m.nii,t,train,oslo,4,axial,stored")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_volumes_are_measured_in_3d(run_main: Any, finished: Path, volumes: Path, tmp_path: Path) -> None:
    code, output = run_main("evaluate", finished, "--data", volumes, "--out", tmp_path)
    assert code == 0, output
    result = json.loads((tmp_path / "evaluation.json").read_text())
    row = result["sites"]["oslo"]
    assert (result["geometry"], row["unit"]) == ("3-D", "mm")
    assert (row["num_images"], row["num_surfaces"], row["num_surfaces_left_out"]) == (9, 1, 1)  # slices with a ball
    whole, gaps = result["volumes"]
    assert (whole["volume_unit"], gaps["volume_unit"], gaps["hd95"]) == ("ml", "mm2", None)
    true = np.count_nonzero(np.asarray(nib.load(volumes / "m.nii").dataobj)) * 0.5 * 0.5 * 3 / 1000
    assert whole["true_volume"] == pytest.approx(true)
    assert row["hd95"]["mean"] == whole["hd95"]
    assert "1 volumes without 3 consecutive slices are left out of HD95 and surface Dice" in output
    assert "HD95<br>3-D" in (tmp_path / "evaluation.html").read_text()


def test_images_that_the_check_left_out_are_not_scored(
    run_main: Any, finished: Path, discs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "discs"
    shutil.copytree(discs, data)
    (data / "b4.png").write_bytes(b"\x89PNG broken")
    write_checked(check_data(data, num_thumbnails=0, max_bad_share=0.5), data)
    code, output = run_main("evaluate", finished, "--data", data, "--out", tmp_path / "out")
    assert code == 0, output
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (set(result["sites"]), result["left_out_by_check"]) == ({"a", "c"}, {"b": 1})
    assert "b: 1 images that the data check left out are not scored" in output
    assert "1 images of b" in (tmp_path / "out" / "evaluation.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--split", "all"], "train, val, test"),
        (["--checkpoint", "round_099"], "round_099"),
        (["--against", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use(run_main: Any, finished: Path, discs: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    code, output = run_main("evaluate", finished, "--data", discs, "--out", tmp_path / "out", *arguments)
    assert code in (2, 6)
    assert told in output
