"""Tables of measured figures, and their places in docs/performance.md."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from icmoe.checkpoint import write_text
from icmoe.errors import ConfigError

DOC = Path(__file__).parents[2] / "docs" / "performance.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table; the first column is text, the others are figures."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def seconds(cost: Mapping[str, float]) -> str:
    """Wall and CPU seconds of a ``Cost``'s figures."""
    return f"{number(cost['wall'])} / {number(cost['cpu'])}"


def number(value: float) -> str:
    """Three significant digits, never in exponents."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.5f}"


def ratio(part: Mapping[str, float], whole: Mapping[str, float]) -> str:
    """How many times ``part`` costs ``whole``, wall and CPU."""
    return f"{number(part['wall'] / whole['wall'])} / {number(part['cpu'] / whole['cpu'])}"


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, CPUs this process may use, memory, versions, how busy it is."""
    return {
        "processor": _processor(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def conditions(found: Mapping[str, Any], *, data: str, took: float) -> str:
    """One line above a table."""
    return (
        f"{found['num_cpus']} CPUs ({found['processor']}), {found['memory_gb']} GB, torch {found['torch']}; "
        f"data: {data}; load average {found['load']} before, measuring took {took:.0f} s."
    )


def write_section(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a section.

    Raises:
        ConfigError: as ``around_section``.
    """
    before, after = around_section(document, name)
    write_text(document, f"{before}\n{text}\n{after}")


def around_section(document: Path, name: str) -> tuple[str, str]:
    """Read what stands before and after a section, markers included.

    Raises:
        ConfigError: if the document or the section's markers are missing.
    """
    start, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
    try:
        before, _, rest = document.read_text(encoding="utf-8").partition(start)
    except OSError as error:
        raise ConfigError(f"cannot read {document}: {error.strerror}. Give the document as --doc.") from error
    _, found, after = rest.partition(end)
    if not found:
        raise ConfigError(f"{document} lacks the lines '{start}' and '{end}'; put them where the table belongs.")
    return before + start, end + after


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
