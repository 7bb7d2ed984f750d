"""Segmenting what is in no data set: the same bits as in evaluation, in the geometry of the input."""

import itertools
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from icmoe.checkpoint import Checkpoint, mark_best, save_checkpoint
from icmoe.commands.predict import predict, predict_inputs
from icmoe.config import RunConfig
from icmoe.data.cache import FeatureCache
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import FeatureSpec, encode_samples
from icmoe.data.inputs import find_inputs
from icmoe.data.manifest import Sample
from icmoe.data.sources import load_pixels
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import BackboneError, CheckpointError, ConfigError, DataError, RunError
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.prediction import BATCH_SIZE, Prediction, Predictor, load_run, trained_intensity
from icmoe.prediction_writer import Request, Writer
from icmoe.training import dump_arrays, evaluate
from icmoe_client.workbench import ENCODE_BATCH_SIZE

CT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats" / "dicom" / "ct_3slice_with_seg"
needs_files = pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")
GRID, SIZE = 8, 32
SEED = 2  # initial weights that give every class some pixels
RUN = RunConfig.model_validate(
    {
        "task": {"name": "two", "classes": {"liver": 100, "else": 255}},
        "model": {"width": 16, "residual_rank": 2, "experts": {"adaptive": 1}},
        "train": {"precision": "fp32"},
    }
)
CHECKPOINT = Checkpoint(3, RUN.digest(), "tiny", {}, {})


class TinyDecoder(nn.Module):
    embedding_size = GRID

    def __init__(self) -> None:
        super().__init__()
        self.mask_tokens = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, class_tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(SEED)
    backbone = Backbone(
        name="tiny",
        image_encoder=nn.Sequential(nn.Conv2d(3, 256, SIZE // GRID, stride=SIZE // GRID), nn.GroupNorm(1, 256)),
        decoder=cast("FrozenDecoder", TinyDecoder()),
        image_size=SIZE,
        pixel_norm="minmax",
    )
    model = build_icmoe(RUN.model, num_classes=RUN.task.num_classes, backbone=backbone, seed=SEED)
    return Predictor(RUN, model, backbone, FeatureSpec.of(backbone, detail_size=SIZE, precision="fp32"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def save_pictures(folder: Path, count: int = 6) -> list[Path]:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 255, (24 + index, 40, 3), dtype=np.uint8)).save(path)
    return paths


def segment(source: Path, out: Path, predictor: Predictor, **wishes: Any) -> dict[str, str]:
    writer = Writer(out, RUN, CHECKPOINT, Request(**wishes))
    items = find_inputs(source, out=out)
    return predict_inputs(items, writer, predictor, Console(quiet=True))


def test_the_same_labels_as_evaluation_from_the_cache(tmp_path: Path, out: Path, predictor: Predictor) -> None:
    assert BATCH_SIZE == ENCODE_BATCH_SIZE
    images = save_pictures(tmp_path / "images")
    assert segment(tmp_path / "images", out, predictor) == {}
    # The predictions become the truth: evaluation has to agree with every pixel of it.
    samples = [
        Sample(image=path, mask=out / path.stem / "mask.png", patient=path.stem, split="test", site="s")
        for path in images
    ]
    cache = FeatureCache(tmp_path / "cache")
    encode_samples(
        predictor.backbone, samples, views=("identity",), cache=cache, detail_size=SIZE, precision="fp32",
        batch_size=ENCODE_BATCH_SIZE,
    )  # fmt: skip
    data = SegmentationDataset(samples, cache=cache, features=predictor.spec, classes=(100, 255), label_size=SIZE)
    assert all(len(np.unique(data.original_labels(index))) == 3 for index in range(len(samples)))
    scores = evaluate(predictor.model, predictor.backbone.decoder, data, num_classes=3, precision="fp32")
    assert [score.mean_dice for score in scores] == [1.0] * len(samples)


def test_probabilities_votes_and_entropy(tmp_path: Path, predictor: Predictor) -> None:
    (path,) = save_pictures(tmp_path, 1)
    sample = Sample(image=path, mask=path, patient="", split="test", site="")
    (prediction,) = predictor.predict([load_pixels(sample)])
    np.testing.assert_allclose(prediction.probabilities.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(prediction.probabilities.argmax(axis=0), prediction.labels)
    assert prediction.votes.shape == (3, 24, 40)
    entropy = prediction.vote_entropy()
    assert entropy.min() >= 0
    assert entropy.max() <= np.log(3) + 1e-6
    certain = np.array([1.0, 0.0, 0.0], np.float32)[:, None, None]
    equal = np.full((3, 1, 1), 1 / 3, np.float32)
    for votes, expected in ((certain, 0.0), (equal, np.log(3))):
        found = Prediction(prediction.labels, prediction.probabilities, votes).vote_entropy()
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_all_48_axis_orders_give_the_same_prediction(tmp_path: Path, predictor: Predictor) -> None:
    values = np.random.default_rng(1).integers(1, 500, (6, 8, 10)).astype(np.int16)
    affine = np.diag([1.0, 1.5, 4.0, 1.0])
    affine[:3, 3] = (-20, 11, 300)
    original = nib.Nifti1Image(values, affine)
    (tmp_path / "in").mkdir()
    orders = list(itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3)))
    transforms = [np.array(list(zip(axes, flips, strict=True)), dtype=float) for axes, flips in orders]
    for number, transform in enumerate(transforms):
        nib.save(original.as_reoriented(transform), tmp_path / "in" / f"{number}.nii")
    assert segment(tmp_path / "in", tmp_path / "out", predictor, maps=("uncertainty",)) == {}
    expected: dict[str, np.ndarray] = {}
    for number in range(len(transforms)):
        stored = nib.load(tmp_path / "in" / f"{number}.nii")
        for name in ("mask", "vote_entropy"):
            written = nib.load(tmp_path / "out" / str(number) / f"{name}.nii.gz")
            assert written.shape == stored.shape
            np.testing.assert_array_equal(written.affine, stored.affine)
            canonical = np.asarray(nib.as_closest_canonical(written).dataobj)
            np.testing.assert_array_equal(canonical, expected.setdefault(name, canonical))
    assert set(np.unique(expected["mask"])) == {0, 100, 255}
    about = json.loads((tmp_path / "out" / "0" / "prediction.json").read_text())
    assert (about["axis"], about["slices"], about["intensity"]) == ("axial", 10, "percentile:0.5:99.5")
    voxels = about["classes"]["liver"]["voxels"]
    assert voxels == (expected["mask"] == 100).sum()
    assert about["classes"]["liver"]["ml"] == pytest.approx(voxels * 6 / 1000)


def test_maps_of_volumes_and_pictures(tmp_path: Path, predictor: Predictor) -> None:
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((5, 6, 4)).astype(np.float32), np.eye(4)), tmp_path / "v.nii"
    )
    save_pictures(tmp_path, 1)
    maps = ("probability", "uncertainty", "votes", "overlay")
    assert segment(tmp_path, tmp_path / "out", predictor, maps=maps) == {}
    names = ["vote_adaptive.0", "vote_basic.0", "vote_semantic.0"]
    volume = tmp_path / "out" / "v"
    votes = [nib.load(volume / f"{name}.nii.gz") for name in names]
    assert {str(vote.get_data_dtype()) for vote in votes} == {"float32"}
    np.testing.assert_allclose(sum(vote.get_fdata() for vote in votes), 1, atol=1e-5)
    assert (volume / "probability_background.nii.gz").exists()
    assert len(list(volume.glob("overlay_*.png"))) == 4
    with np.load(tmp_path / "out" / "0" / "maps.npz") as stored:
        arrays = dict(stored)
    assert set(names) | {"vote_entropy", "probability_liver", "probability_else"} < set(arrays)
    with Image.open(tmp_path / "out" / "0" / "overlay.png") as overlay:
        assert arrays["vote_entropy"].shape == (overlay.height, overlay.width)


@needs_files
@pytest.mark.shared_data
def test_a_dicom_seg_equals_the_nifti(tmp_path: Path, predictor: Predictor) -> None:
    for form in ("seg", "nifti"):
        assert segment(CT, tmp_path / form, predictor, form=form) == {}
    seg = read_labels(tmp_path / "seg" / CT.name / "mask.dcm", image=CT)
    nifti = read_labels(tmp_path / "nifti" / CT.name / "mask.nii.gz", image=CT)
    np.testing.assert_array_equal(np.array([0, 100, 255])[seg.array], nifti.array)
    assert len(np.unique(seg.array)) == 3
    about = json.loads((tmp_path / "seg" / CT.name / "prediction.json").read_text())
    assert about["classes"]["else"]["value"] == 2  # the segment's number
    assert about["classes"]["else"]["voxels"] == (seg.array == 2).sum()
    # Columns first, as converters write it, and still on the same place.
    assert nib.load(tmp_path / "nifti" / CT.name / "mask.nii.gz").shape == read_volume(CT).grid.spatial_shape[::-1]


class TestFolders:
    def test_a_bad_file_stops_nothing(self, tmp_path: Path, out: Path, predictor: Predictor) -> None:
        save_pictures(tmp_path / "in", 3)
        (tmp_path / "in" / "1.png").write_bytes(b"\x89PNG broken")
        (tmp_path / "in" / "v.nii").write_bytes(b"no volume")
        failed = segment(tmp_path / "in", out, predictor)
        assert set(failed) == {"1", "v"}
        assert "Export it again" in failed["v"]
        assert sorted(path.name for path in out.iterdir()) == ["0", "2"]

    def test_what_is_done_is_skipped(self, tmp_path: Path, out: Path, predictor: Predictor) -> None:
        save_pictures(tmp_path / "in", 2)
        segment(tmp_path / "in", out, predictor)
        items = find_inputs(tmp_path / "in", out=out)
        writer = Writer(out, RUN, CHECKPOINT, Request())
        (out / "1" / "mask.png").unlink()
        assert [writer.is_done(item, overwrite=False) for item in items] == [True, False]
        assert not writer.is_done(items[0], overwrite=True)
        for other in (
            Writer(out, RUN, replace(CHECKPOINT, server_round=4), Request()),
            Writer(out, RUN, CHECKPOINT, Request(maps=("votes",))),
        ):
            with pytest.raises(ConfigError, match="--overwrite"):
                other.is_done(items[0], overwrite=False)
            assert not other.is_done(items[0], overwrite=True)

    def test_folders_of_others_are_left_alone(self, tmp_path: Path, out: Path) -> None:
        (path,) = save_pictures(tmp_path / "in", 1)
        (out / "0").mkdir(parents=True)
        writer = Writer(out, RUN, CHECKPOINT, Request())
        (item,) = find_inputs(path, out=out)
        assert not writer.is_done(item, overwrite=False)
        (out / "0" / "thesis.txt").touch()
        with pytest.raises(ConfigError, match=r"no prediction of ours.*--out, or move or rename"):
            writer.is_done(item, overwrite=True)

    @pytest.mark.parametrize(("source", "out"), [("in", "in"), ("in", "."), ("in/ct", "in")])
    def test_images_that_lie_in_the_output_folder(self, tmp_path: Path, source: str, out: str) -> None:
        save_pictures(tmp_path / "in", 1)
        (tmp_path / "in" / "ct").mkdir()
        app = typer.Typer()
        app.command()(predict)
        with pytest.raises(ConfigError, match=rf"Choose a folder for --out .*{Path(source).name}_masks"):
            app([str(tmp_path), str(tmp_path / source), "--out", str(tmp_path / out)], standalone_mode=False)

    def test_a_full_disk(self, tmp_path: Path, out: Path, predictor: Predictor) -> None:
        nib.save(nib.Nifti1Image(np.random.default_rng(0).random((40, 40, 4)), np.eye(4)), tmp_path / "v.nii")
        with small_disk(2000), pytest.raises(RunError, match="Free some space"):
            segment(tmp_path / "v.nii", out, predictor, maps=("probability",))
        assert list(out.iterdir()) == []


class TestBadInput:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        backbone = load_backbone("lite_medsam")
        model = build_icmoe(RUN.model, num_classes=3, backbone=backbone, seed=0)
        for number in (0, 2, 11):
            save_checkpoint(folder, Checkpoint(number, RUN.digest(), backbone.digest(), dump_arrays(model), {}))
        mark_best(folder, 2)
        (folder / "config.yaml").write_text(RUN.model_dump_json())
        return folder

    def test_checkpoints(self, run_dir: Path) -> None:
        rounds = {name: load_run(run_dir, name)[1].server_round for name in ("best", "final", "round_000")}
        assert rounds == {"best": 2, "final": 11, "round_000": 0}
        for name in ("round_7", "../run", "worst"):
            with pytest.raises(CheckpointError, match="best, final and round_NNN"):
                load_run(run_dir, name)
        run, found = load_run(run_dir, "best")
        assert Predictor.load(run, found).spec.backbone_digest == found.backbone_digest
        with pytest.raises(BackboneError, match="--backbone-checkpoint"):
            Predictor.load(run, replace(found, backbone_digest="other"))
        arrays = {name: array for name, array in found.arrays.items() if "adaptive" not in name}
        with pytest.raises(ConfigError, match="site's own file"):
            Predictor.load(run, replace(found, arrays=arrays))
        (run_dir / "config.yaml").write_text(
            RUN.model_copy(update={"train": RUN.train.model_copy(update={"seed": 1})}).model_dump_json()
        )
        with pytest.raises(CheckpointError, match="another run config"):
            load_run(run_dir, "best")

    def test_folders_that_are_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run directory"):
            load_run(tmp_path / "nothing", "best")
        (tmp_path / "seed_0").mkdir()
        (tmp_path / "seed_0" / "config.yaml").write_text(RUN.model_dump_json())
        with pytest.raises(ConfigError, match="seed_0"):
            load_run(tmp_path, "best")
        with pytest.raises(CheckpointError, match="none yet"):
            load_run(tmp_path / "seed_0", "final")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--axis", "oblique"], "axial, coronal, sagittal"),
            (["--format", "jpeg"], "auto, png, nifti, seg"),
            (["--format", "seg"], "does not fit"),
            (["--intensity", "window:5"], "window:LOW:HIGH"),
        ],
    )
    def test_options(self, tmp_path: Path, options: list[str], message: str) -> None:
        (path,) = save_pictures(tmp_path, 1)
        app = typer.Typer()
        app.command()(predict)
        with pytest.raises(ConfigError, match=message):
            app([str(tmp_path), str(path), "--out", str(tmp_path / "out"), *options], standalone_mode=False)

    def test_too_little_memory_for_the_maps(self, predictor: Predictor, out: Path) -> None:
        collected = Writer(out, RUN, CHECKPOINT, Request(maps=("votes",))).collect(10**9, predictor.model.expert_names)
        grid = np.ones((3, 100, 100), np.float32)
        with pytest.raises(DataError, match="leave out"):
            collected.add(Prediction(grid[0].astype(np.uint8), grid, grid))


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Refuse to write files beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ('{"intensity": ["window:0:80"]}', "window:0:80"),
        ('{"intensity": ["stored", "window:0:80"]}', ""),
        ("{}", ""),
        ("{", ""),
        (None, ""),
    ],
)
def test_the_rule_of_training_is_taken_where_there_was_one(tmp_path: Path, content: str | None, rule: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert trained_intensity(tmp_path) == rule
