"""Parts of an export; the whole command runs in tests/integration."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icmoe.checkpoint import Checkpoint
from icmoe.config import RunConfig
from icmoe.data.features import FeatureSpec
from icmoe.errors import RunError
from icmoe.export.card import collect_facts
from icmoe.export.check_images import check_images
from icmoe.export.network import DeployedNetwork
from icmoe.export.onnx_file import onnx_files, write_onnx
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe

SIDE = 64
RUN = RunConfig.model_validate({"task": {"name": "discs", "classes": {"disc": 1}}})
CHECKPOINT = Checkpoint(2, RUN.digest(), "tiny", {}, {})
RESULTS: dict[str, Any] = {
    "best_round": 2,
    "trainable_params": 5,
    "sites": {"oslo": {"num_test": 4, "dice": 0.9, "dice_per_class": {}, "hd95": None, "hd95_unit": "px"}},
    "mean_dice": 0.9,
    "worst_site": {"name": "oslo", "dice": 0.9},
    "epsilon": {},
}


class TestCard:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        (tmp_path / "results.json").write_text(json.dumps(RESULTS))
        lines = [json.dumps({"round": number, "num_examples": {"oslo": 7}}) for number in (1, 2)]
        (tmp_path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path

    @pytest.mark.parametrize("torn", [b'{"round": 3, "num_ex', b'{"round": 3, "note": "\xc3', b"\x00\x00\x00"])
    def test_a_last_line_that_was_cut_off(self, run_dir: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
        with (run_dir / "rounds.jsonl").open("ab") as file:
            file.write(torn)
        with caplog.at_level(logging.WARNING):
            facts = collect_facts(run_dir, RUN, CHECKPOINT)
        assert facts["sites"]["oslo"]["training_images"] == 7
        assert facts["sites"]["oslo"]["rounds_answered"] == 2
        assert "cut off" in caplog.text

    @pytest.mark.parametrize("line", ['{"round": 1, "num', "[1]"])
    def test_damage_before_the_last_line(self, run_dir: Path, line: str) -> None:
        path = run_dir / "rounds.jsonl"
        path.write_text(line + "\n" + path.read_text())
        with pytest.raises(RunError, match=r"line 1 of rounds\.jsonl"):
            collect_facts(run_dir, RUN, CHECKPOINT)


class TinyExperts(nn.Module):
    """Class probabilities from the embeddings alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, image_embeddings: Tensor, detail: Tensor, decoder: nn.Module) -> "TinyOutput":
        return TinyOutput(torch.softmax(self.head(image_embeddings) + detail.mean(), dim=1))


class TinyDecoder(nn.Module):
    embedding_size = SIDE // 4


class TinyOutput:
    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities


def network(*, needs_detail: bool = False) -> DeployedNetwork:
    torch.manual_seed(0)
    backbone = Backbone(
        name="tiny",
        image_encoder=nn.Conv2d(3, 8, 4, stride=4),
        decoder=cast("FrozenDecoder", TinyDecoder()),
        image_size=SIDE,
        pixel_norm="minmax",
    )
    return DeployedNetwork(
        backbone, cast("IcMoe", TinyExperts()), image_size=SIDE, detail_size=SIDE // 2, needs_detail=needs_detail
    ).eval()


def spec(deployed: DeployedNetwork) -> FeatureSpec:
    return FeatureSpec.of(deployed.backbone, detail_size=deployed.detail_size, precision="fp32")


class TestCheckImages:
    def test_the_runs_own_pictures_stand_beside_shapes_and_noise(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "examples").mkdir()
        np.savez(tmp_path / "examples" / "00.npz", image=np.full((9, 7, 3), 5, np.uint8))
        (tmp_path / "examples" / "01.npz").write_bytes(b"PK broken")
        for needs_detail in (False, True):
            deployed = network(needs_detail=needs_detail)
            images = check_images(deployed, spec(deployed), tmp_path)
            assert list(images) == ["noise", "gradient", "shapes", "examples/00.npz"]
            for inputs in images.values():
                assert [tuple(one.shape) for one in inputs] == [(1, 3, SIDE, SIDE), (1, 3, SIDE // 2, SIDE // 2)][
                    : 1 + needs_detail
                ]
                assert all(0 <= float(one.min()) <= float(one.max()) <= 1 for one in inputs)
        assert "01.npz" in caplog.text

    def test_shapes_have_outlines_and_flat_regions(self, tmp_path: Path) -> None:
        deployed = network()
        image = check_images(deployed, spec(deployed), tmp_path)["shapes"][0]
        steps = image.diff(dim=-1).abs()
        assert float(steps.max()) > 0.2
        assert float((steps < 1e-3).float().mean()) > 0.5


@pytest.mark.slow
class TestOnnx:
    def test_weights_too_large_for_one_file_lie_beside_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime
        from torch.onnx._internal.exporter import _onnx_program

        monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
        deployed = network()
        images = check_images(deployed, spec(deployed), tmp_path)
        check = write_onnx(deployed, tmp_path / "out" / "model.onnx", images)
        assert check.files == ("model.onnx", "model.onnx.data")
        assert check.images == ("noise", "gradient", "shapes")
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(check.files)
        assert {path.name for path in onnx_files(tmp_path / "out")} == set(check.files)
        session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
        (image,) = deployed.example(seed=5)
        np.testing.assert_allclose(
            session.run(None, {"image": image.numpy()})[0], deployed(image).detach().numpy(), atol=1e-5
        )

    def test_one_image_without_an_answer_is_enough(self, tmp_path: Path) -> None:
        deployed = network()
        images = check_images(deployed, spec(deployed), tmp_path)
        unknown = torch.full_like(images["noise"][0], torch.nan)
        with pytest.raises(RunError, match="differs from torch by up to nan"):
            write_onnx(deployed, tmp_path / "model.onnx", images | {"unknown": (unknown,)})
        assert list(tmp_path.iterdir()) == []
