"""From a finished run to masks, with the real backbone and as the command line does it."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from PIL import Image

from icmoe.commands.predict import predict as predict_command
from icmoe.data.cache import open_cache
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import encode_samples
from icmoe.data.manifest import Sample
from icmoe.errors import DataError
from icmoe.prediction import BATCH_SIZE, Predictor, load_run
from icmoe.training import predict

pytestmark = pytest.mark.slow


def run_predict(*arguments: object) -> None:
    app = typer.Typer()
    app.command()(predict_command)
    app([str(argument) for argument in arguments], standalone_mode=False)


def labels_from_the_cache(run_dir: Path, samples: list[Sample]) -> list[np.ndarray]:
    """What evaluation sees: its own reading, cache and batches."""
    predictor = Predictor.load(*load_run(run_dir, "best"))
    run, spec = predictor.run, predictor.spec
    cache = open_cache()
    encode_samples(
        predictor.backbone, samples, views=("identity",), cache=cache, detail_size=spec.detail_size,
        precision=spec.precision, batch_size=BATCH_SIZE,
    )  # fmt: skip
    data = SegmentationDataset(
        samples, cache=cache, features=spec, classes=tuple(run.task.classes.values()), label_size=spec.detail_size
    )
    labels = []
    for start in range(0, len(samples), BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, len(samples)))
        items = [data.load(index, "identity") for index in indices]
        probabilities, _ = predict(predictor.model, predictor.backbone.decoder, items, precision=run.train.precision)
        labels += [data.restore(i, p).argmax(dim=0).numpy() for i, p in zip(indices, probabilities, strict=True)]
    return labels


def test_a_folder_of_pictures_and_a_volume(
    finished: Path,
    discs: Path,
    tmp_path: Path,
    icmoe_fl: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(icmoe_fl.cache))
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    names = ["a3", "a4", "b3", "b4", "c3"]
    for name in names:
        shutil.copy(discs / f"{name}.png", source)
    with Image.open(discs / "a3.png") as picture:
        volume = np.stack([np.asarray(picture), np.asarray(picture).T], axis=2)
    affine = np.array([[0, -2.0, 0, 5], [2, 0, 0, -7], [0, 0, 6, 1], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(volume, affine), source / "volume.nii.gz")
    (source / "broken.png").write_bytes(b"\x89PNG")

    with pytest.raises(DataError, match=r"1 of 7 inputs could not be segmented:\n  broken: "):
        run_predict(finished, source, "--out", out, "--overlay", "--uncertainty")

    assert "Masks of 6 of 7 inputs" in capsys.readouterr().out
    samples = [
        Sample(image=source / f"{name}.png", mask=out / name / "mask.png", patient=name, split="test", site="s")
        for name in names
    ]
    for sample, expected in zip(samples, labels_from_the_cache(finished, samples), strict=True):
        with Image.open(sample.mask) as mask:
            np.testing.assert_array_equal(np.asarray(mask), expected)
    mask = nib.load(out / "volume" / "mask.nii.gz")
    assert mask.shape == volume.shape
    np.testing.assert_array_equal(mask.affine, affine)
    about = json.loads((out / "volume" / "prediction.json").read_text())
    assert about["config_digest"] == (finished / "config.sha256").read_text().split()[0]
    assert about["classes"]["disc"]["voxels"] == np.count_nonzero(mask.get_fdata())

    (source / "broken.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run_predict(finished, source, "--out", out, "--overlay", "--uncertainty")
    assert "6 of 6 inputs are done already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
