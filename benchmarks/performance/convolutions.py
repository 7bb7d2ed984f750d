"""Dilated 3 x 3 convolutions: why the adaptive expert's branches are dense on half the width.

Times forward and backward, and compares the gradients with those in float64: some are wrong without a warning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from icmoe.allocator import keep_memory

from .document import number, table
from .sites import Setup
from .stopwatch import Cost, Figures, middle, now

BATCH, SIDE, DILATION = 4, 64, 4
PASSES = 10
KINDS: Mapping[str, tuple[int, int]] = {
    "depthwise, 64 channels": (64, 64),
    "groups of 8, 64 channels": (64, 8),
    "dense, 64 channels": (64, 1),
    "dense, 32 channels (ours)": (32, 1),
}
"""Name to channels and number of groups."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: costs, and the gradients of weight and input."""

    forward: Cost
    backward: Cost
    gradients: tuple[Tensor, Tensor]


def measure(setup: Setup) -> Figures:
    """Time all kinds in turn, on one thread as a site's process has it."""
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = list(product(KINDS, ("fp32", "bf16"), ("contiguous", "channels last")))
    layers = {kind: _make(*KINDS[kind]) for kind in KINDS}
    passes: dict[tuple[str, str, str], list[Pass]] = {case: [] for case in cases}
    for _ in range(2 if setup.quick else 1 + PASSES):
        for kind, precision, layout in cases:
            passes[kind, precision, layout].append(_run(*layers[kind], precision=precision, layout=layout))
    exact = {kind: _run(*layers[kind], precision="fp64", layout="contiguous").gradients for kind in KINDS}
    return {"rows": [_summarise(case, passes[case], exact[case[0]]) for case in cases]}


def _make(channels: int, groups: int) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """Convolution, input and gradient of the output."""
    layer = nn.Conv2d(channels, channels, 3, padding=DILATION, dilation=DILATION, groups=groups, bias=False)
    shape = (BATCH, channels, SIDE, SIDE)
    return layer, torch.randn(shape), torch.randn(shape)


def _run(layer: nn.Conv2d, x: Tensor, gradient: Tensor, *, precision: str, layout: str) -> Pass:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format
    weight = layer.weight.detach().to(dtype, memory_format=memory_format).requires_grad_()
    x = x.detach().to(dtype, memory_format=memory_format).requires_grad_()
    start = now()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = nn.functional.conv2d(x, weight, padding=DILATION, dilation=DILATION, groups=layer.groups)
    between = now()
    y.backward(gradient.to(y.dtype, memory_format=memory_format))  # type: ignore[no-untyped-call]
    end = now()
    assert weight.grad is not None
    assert x.grad is not None
    return Pass(between - start, end - between, (weight.grad, x.grad))


def _summarise(case: tuple[str, str, str], passes: list[Pass], exact: tuple[Tensor, Tensor]) -> Figures:
    """The first pass warms up: its time does not count, its gradients do."""
    kind, precision, layout = case
    errors = {
        name: [_relative_error(one.gradients[index], exact[index]) for one in passes]
        for index, name in enumerate(("weight", "input"))
    }
    return {
        "kind": kind,
        "precision": precision,
        "layout": layout,
        "forward": middle([one.forward for one in passes[1:]]).figures(),
        "backward": middle([one.backward for one in passes[1:]]).figures(),
        "errors": errors,
    }


def _relative_error(gradient: Tensor, exact: Tensor) -> float | None:
    """L2; None where a value is NaN or infinite, which JSON cannot hold."""
    error = float((gradient.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else None


def render(figures: Figures) -> str:
    """One row per case; times in milliseconds of CPU."""
    rows = []
    for row in figures["rows"]:
        base = next(
            other["backward"]["cpu"]
            for other in figures["rows"]
            if (other["precision"], other["layout"]) == (row["precision"], row["layout"]) and "ours" in other["kind"]
        )
        rows.append(
            [
                f"{row['kind']}, {row['precision']}, {row['layout']}",
                *(number(1000 * row[name]["cpu"]) for name in ("forward", "backward")),
                number(row["backward"]["cpu"] / base),
                *(_worst(row["errors"][name]) for name in ("weight", "input")),
            ]
        )
    header = [
        f"batch {BATCH}, {SIDE} x {SIDE}, dilation {DILATION}, 1 thread",
        "forward, CPU ms",
        "backward, CPU ms",
        "backward, times ours",
        "relative error of the weight's gradient",
        "of the input's gradient",
    ]
    return table(header, rows)


def _worst(errors: Sequence[float | None]) -> str:
    finite = [error for error in errors if error is not None]
    if len(finite) < len(errors):
        return f"NaN in {len(errors) - len(finite)} of {len(errors)} passes"
    return f"{max(finite):.1e}"
