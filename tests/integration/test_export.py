"""``icmoe-fl export`` on a finished run: what comes out is run by others' tools and gives our masks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(icmoe_fl: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    done = icmoe_fl.run("export", finished, "--out", out, "--format", "adapters,onnx,monai")
    assert done.process.returncode == 0, done.output
    assert "differs from torch by at most" in done.output
    assert "of 6 images: noise, gradient, shapes, examples/00.npz, examples/01.npz, examples/02.npz" in done.output
    return out


def test_adapters_and_card(exported: Path, finished: Path) -> None:
    expected = load_file(finished / "best" / "adapters.safetensors")
    found = load_file(exported / "adapters.safetensors")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    facts, results = (
        json.loads(path.read_text()) for path in (exported / "model_card.json", finished / "results.json")
    )
    assert facts["mean_dice"] == results["mean_dice"]
    assert facts["backbone_sha256"] == results["backbone_sha256_after"]
    assert {name: site["training_images"] for name, site in facts["sites"].items()} == {"a": 3, "b": 3, "c": 3}
    card = (exported / "README.md").read_text()
    for text in ("Intended use", "Limits", results["backbone_sha256_after"], f"{results['mean_dice']:.3f}"):
        assert text in card


def test_onnx_gives_torch_probabilities_on_an_image_it_was_not_checked_with(exported: Path, finished: Path) -> None:
    import onnxruntime
    import torch

    from icmoe.export.network import DeployedNetwork
    from icmoe.prediction import Predictor, load_run

    network = DeployedNetwork.of(Predictor.load(*load_run(finished, "best")))
    (image,) = network.example(seed=99)
    with torch.no_grad():
        expected = network(image).numpy()
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["probabilities"], {"image": image.numpy()})
    assert found.shape == (1, 2, 256, 256)
    assert np.abs(found - expected).max() <= 1e-4
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.9999


def test_the_bundle_runs_alone_and_gives_our_masks(
    exported: Path, icmoe_fl: Any, finished: Path, discs: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(exported / "monai_bundle", bundle)
    (bundle / "input").mkdir()
    for site in "abc":
        # A wide picture, so that swapped axes would show.
        Image.open(discs / f"{site}4.png").crop((0, 8, 64, 56)).save(bundle / "input" / f"{site}.png")
    with Image.open(bundle / "input" / "a.png") as picture:
        # Values beyond 8 bits, and a picture that shrinks to less than half: fine noise must not turn into shapes.
        Image.fromarray(np.asarray(picture).astype(np.uint16) * 200 + 3000).save(bundle / "input" / "deep.png")
        large = np.asarray(picture.resize((640, 480), Image.Resampling.BICUBIC)).astype(int)
    large[::2, ::2] += 60
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(bundle / "input" / "large.png")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    subprocess.run(command, cwd=bundle, check=True, timeout=300, capture_output=True)
    done = icmoe_fl.run("predict", finished, bundle / "input", "--out", tmp_path / "ours")
    assert done.process.returncode == 0, done.output
    for name in ("a", "b", "c", "deep", "large"):
        ours = np.asarray(Image.open(tmp_path / "ours" / name / "mask.png"))
        theirs = np.asarray(Image.open(bundle / "output" / f"{name}_mask.png"))
        assert ours.shape == theirs.shape == ((480, 640) if name == "large" else (48, 64))
        assert ours.any()
        assert (ours == theirs).mean() > 0.995, name


def test_a_folder_that_is_not_empty_is_kept(run_main: Any, exported: Path, finished: Path) -> None:
    code, output = run_main("export", finished, "--out", exported)
    assert code == 2
    assert "not empty" in output


def test_wrong_format(run_main: Any, finished: Path, tmp_path: Path) -> None:
    code, output = run_main("export", finished, "--out", tmp_path / "out", "--format", "tensorrt")
    assert code == 2
    assert "adapters, onnx, monai" in output
