"""How far half-precision features are from fp32 ones. What it does to Dice is measured by training."""

from statistics import fmean

import torch
from torch import Tensor

from icmoe.data.readers import read_image
from icmoe.data.transforms import fit_to_square
from icmoe.simulation import num_cpus
from icmoe_client.workbench import frozen_backbone

from .document import number, table
from .sites import Setup
from .stopwatch import Figures

NUM_IMAGES = 8


def measure(setup: Setup) -> Figures:
    """Compare the features of some images with those of fp32, one image per pass."""
    torch.set_num_threads(num_cpus())
    errors: dict[str, list[float]] = {name: [] for name in _variants(torch.zeros(1), torch.zeros(1))}
    backbone = frozen_backbone("lite_medsam", None, None, True, "cpu")
    for sample in setup.samples("train", 1 if setup.quick else NUM_IMAGES):
        image = fit_to_square(read_image(sample.image), backbone.image_size, pixel_norm=backbone.pixel_norm)[None]
        with torch.inference_mode():
            exact = backbone(image)
            with torch.autocast("cpu", torch.bfloat16):
                rough = backbone(image)
        for name, features in _variants(exact, rough).items():
            errors[name].append(_relative_error(features.float(), exact))
    return {"errors": errors}


def _variants(exact: Tensor, rough: Tensor) -> dict[str, Tensor]:
    return {
        "fp32, stored as fp16": exact.half(),
        "bf16 autocast, not stored": rough,
        "bf16 autocast, stored as fp16 (shipped)": rough.half(),
    }


def _relative_error(features: Tensor, exact: Tensor) -> float:
    return float((features - exact).norm() / exact.norm())


def render(figures: Figures) -> str:
    """Mean and worst image."""
    rows = [[name, number(fmean(errors)), number(max(errors))] for name, errors in figures["errors"].items()]
    return table(["features, against fp32", "relative L2 error, mean over images", "worst image"], rows)
