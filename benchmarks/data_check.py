"""What ``icmoe-fl data check`` takes on many small files: minutes, and memory of all its processes together.

    python benchmarks/data_check.py

Makes 10,000 PNG images and masks of 64 x 64 pixels and checks them. The figures go into docs/data.md.
"""

import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image
from rich.console import Console

from icmoe.data.checking import check_data, num_processes

SIDE = 64
IMAGES_PER_PATIENT = 10
INTERVAL = 0.5
"""Seconds between samples of memory."""


def main(
    num_images: Annotated[int, typer.Option(help="Images to make; each has a mask.")] = 10_000,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one per processor core.")] = None,
) -> None:
    """Make images, check them, print what it took."""
    console = Console()
    with TemporaryDirectory() as folder:
        make_images(Path(folder), num_images)
        count = workers or num_processes()
        memory = PeakMemory()
        start = time.perf_counter()
        with memory:
            report = check_data(Path(folder), classes={"disc": 1}, num_workers=count)
        minutes = (time.perf_counter() - start) / 60
    console.print(
        f"{report.usable} of {report.found} images and their masks, {count} processes: {minutes:.2f} min, "
        f"{60e3 * minutes / num_images:.2f} ms an image; peak memory of all processes {memory.peak / 1e6:.0f} MB "
        f"(summed PSS), of it the parent {memory.parent / 1e6:.0f} MB"
    )
    for finding in report.findings[:5]:
        console.print(f"{finding.code}: {finding.message}")


def make_images(folder: Path, num_images: int) -> None:
    """Write smooth random grey with a disc, ten images a patient, and their manifest."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    lines = ["image,mask,patient,split,spacing"]
    for number in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        y, x = rng.integers(16, 48, 2)
        disc = (np.hypot(rows - y, columns - x) < 12).astype(np.uint8)
        Image.fromarray(disc).save(folder / f"{number}_mask.png")
        patient = number // IMAGES_PER_PATIENT
        split = ("train", "train", "train", "val", "test")[patient % 5]
        lines.append(f"{number}.png,{number}_mask.png,p{patient},{split},0.5")
    (folder / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")


class PeakMemory:
    """Samples memory of this process and its children, shared pages counted once."""

    def __init__(self) -> None:
        self.peak = self.parent = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(INTERVAL):
            total = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    pss = one.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended while we looked
                    continue
                total += pss
                self.parent = max(self.parent, pss if one == process else 0)
            self.peak = max(self.peak, total)


if __name__ == "__main__":
    typer.run(main)
