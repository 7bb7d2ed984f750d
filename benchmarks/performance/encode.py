"""Seconds to encode an image: precision, batch size, memory layout, what happens to freed memory, threads."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icmoe.allocator import keep_memory
from icmoe.data.readers import read_image
from icmoe.data.transforms import fit_to_square
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.simulation import num_cpus

from .document import ratio, seconds, table
from .sites import Setup
from .stopwatch import Figures, in_fresh_process, middle, timed

PASSES = {1: 3, 4: 1}
"""Timed passes for each batch size, after one that is not."""
SHIPPED = {"precision": "bf16", "layout": "channels last", "memory": "kept", "batch": 4}


def measure(setup: Setup) -> Figures:
    """Time all combinations; each precision, layout and memory setting in a process of its own."""
    files = [sample.image for sample in setup.samples("train", max(PASSES))]
    threads = [num_cpus()] if setup.quick else sorted({1, num_cpus()})
    cells: list[Figures] = []
    for precision, layout, memory in product(("fp32", "bf16"), ("contiguous", "channels last"), ("freed", "kept")):
        if setup.quick and (layout, memory) != ("channels last", "kept"):
            continue
        setting = {"precision": precision, "layout": layout, "memory": memory}
        cells += in_fresh_process(_time_setting, setting, files, threads, quick=setup.quick)
    return {"cells": cells, "threads": max(threads)}


def _time_setting(
    setting: Mapping[str, str], files: Sequence[Path], thread_counts: Sequence[int], *, quick: bool
) -> list[Figures]:
    if setting["memory"] == "kept":
        keep_memory()
    backbone = load_backbone("lite_medsam")
    if setting["layout"] == "channels last":
        backbone.to(memory_format=torch.channels_last)
    images = torch.stack(
        [fit_to_square(read_image(file), backbone.image_size, pixel_norm=backbone.pixel_norm) for file in files]
    )
    cells = []
    for threads, batch in product(thread_counts, PASSES):
        torch.set_num_threads(threads)
        passes = 0 if quick else PASSES[batch]
        costs = [timed(_encode, backbone, images[:batch], setting["precision"])[0] for _ in range(1 + passes)]
        cost = middle(costs[-max(passes, 1) :]).per(batch)
        cells.append({**setting, "batch": batch, "threads": threads, "cost": cost.figures()})
    return cells


@torch.inference_mode()
def _encode(backbone: Backbone, images: Tensor, precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return backbone(images).to(torch.float16)  # type: ignore[no-any-return]


def render(figures: Figures) -> str:
    """All combinations, then what one change away from the shipped setting costs."""
    cells, threads = figures["cells"], figures["threads"]
    columns = sorted({(cell["threads"], cell["batch"]) for cell in cells})
    keys = list(dict.fromkeys((cell["precision"], cell["layout"], cell["memory"]) for cell in cells))
    rows = [
        [
            f"{precision}, {layout}, memory {memory}",
            *(
                seconds(_find(cells, precision=precision, layout=layout, memory=memory, threads=count, batch=batch))
                for count, batch in columns
            ),
        ]
        for precision, layout, memory in keys
    ]
    header = ["wall / CPU seconds per image", *(f"batch {batch}, {_threads(count)}" for count, batch in columns)]
    shipped = {**SHIPPED, "threads": threads}
    base = _find(cells, **shipped)
    changes = []
    for cell in cells:
        changed = [f"{key}: {cell[key]}" for key, value in shipped.items() if cell[key] != value]
        if len(changed) == 1:
            changes.append([changed[0], seconds(cell["cost"]), ratio(cell["cost"], base)])
    intro = f"One change away from what is shipped (bf16, batch 4, channels last, memory kept, {_threads(threads)}):"
    first = ["shipped", seconds(base), "1 / 1"]
    second = table(["change", "wall / CPU seconds per image", "times the shipped wall / CPU"], [first, *changes])
    return f"{table(header, rows)}\n\n{intro}\n\n{second}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _find(cells: Sequence[Figures], **wanted: Any) -> Figures:
    return next(cell["cost"] for cell in cells if all(cell[key] == value for key, value in wanted.items()))
