"""From config to modules: the only place below the apps that knows both. All sizes are decided here."""

from typing import cast

import torch
from torch import nn

from icmoe.config import ModelConfig
from icmoe.errors import ConfigError
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.experts import AdaptiveExpert, BasicExpert, SemanticExpert
from icmoe.modeling.icmoe import IcMoe
from icmoe.modeling.router import Router

EMBED_DIM = 256
MAX_TRAINABLE = 1_950_000
"""Design budget of the default model; also the size of a round's update (4 bytes each)."""


def grid_size(config: ModelConfig, backbone: Backbone) -> int:
    """Side G of the logit grid.

    Raises:
        ConfigError: if ``logit_stride`` does not give the embedding grid times a power of two.
    """
    if config.logit_stride is None:
        return 2 * backbone.embedding_size
    size = backbone.image_size // config.logit_stride
    factor = size // backbone.embedding_size
    if factor < 1 or size * config.logit_stride != backbone.image_size or factor & (factor - 1):
        allowed = [str(backbone.image_size // (backbone.embedding_size << n)) for n in range(4)]
        raise ConfigError(
            f"model.logit_stride {config.logit_stride} does not fit {backbone.name} at {backbone.image_size} px; "
            f"use one of {', '.join(s for s in allowed if s != '0')}"
        )
    return size


def detail_size(config: ModelConfig, backbone: Backbone) -> int:
    """Side D of the image the stem sees.

    Raises:
        ConfigError: if it is not a whole multiple of the logit grid.
    """
    size = config.detail_size or max(backbone.image_size, grid_size(config, backbone))
    if size % grid_size(config, backbone):
        grid = grid_size(config, backbone)
        raise ConfigError(f"model.detail_size {size} must be a multiple of the logit grid {grid}")
    return size


def build_icmoe(config: ModelConfig, *, num_classes: int, backbone: Backbone, seed: int) -> IcMoe:
    """Build a freshly initialised model; the same seed gives the same weights.

    Args:
        config: the run's model section.
        num_classes: K, background included.
        backbone: gives sizes and SAM's mask tokens.
        seed: of the initialisation. The caller's random state is left as it was.

    Returns:
        The model, in training mode, float32.
    """
    grid = grid_size(config, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IcMoe(
            basic=[
                BasicExpert(embed_dim=EMBED_DIM, num_classes=num_classes, rank=config.residual_rank, grid_size=grid)
                for _ in range(config.experts.basic)
            ],
            semantic=[
                SemanticExpert(
                    embed_dim=EMBED_DIM,
                    num_classes=num_classes,
                    width=config.width,
                    grid_size=grid,
                    temperature=config.temperature,
                )
                for _ in range(config.experts.semantic)
            ],
            adaptive=[
                AdaptiveExpert(
                    embed_dim=EMBED_DIM,
                    num_classes=num_classes,
                    width=config.width,
                    embedding_size=backbone.embedding_size,
                    grid_size=grid,
                    detail_size=detail_size(config, backbone),
                )
                for _ in range(config.experts.adaptive)
            ],
            router=Router(
                embed_dim=EMBED_DIM, width=config.width // 2, num_experts=config.experts.total, grid_size=grid
            ),
            adaptive_voting=config.voting == "ppav",
            top_k=config.top_k,
        )
    for expert in model.family("basic"):
        cast(BasicExpert, expert).start_from(backbone.decoder.mask_tokens)
    return model.to(memory_format=torch.channels_last)


def normalisation_params(model: nn.Module) -> frozenset[str]:
    """Names of all tensors of normalisation layers, found by layer type."""
    return frozenset(
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for parameter, _ in module.named_parameters(recurse=False)
    )
