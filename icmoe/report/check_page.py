"""``check.html``: what a pre-flight check found, for a person at the site. It stays there: it shows pictures."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from icmoe.data.check_findings import Finding, Kind
from icmoe.data.check_report import CheckReport, SiteSummary
from icmoe.report.formats import DASH
from icmoe.report.pages import render, replace_text
from icmoe.report.pictures import draw_outlines

MAX_LINES_PER_KIND = 20
MAX_FILES_PER_LINE = 6
BAR_WIDTH = 10
BAR_HEIGHT = 90


@dataclass(frozen=True)
class Group:
    """All findings of one kind.

    Attributes:
        kind: severity, title and remedy.
        lines: the first findings.
        left_out: findings that are only counted.
        num_files: images concerned, over all findings.
    """

    kind: Kind
    lines: tuple[Finding, ...]
    left_out: int
    num_files: int


def write_check_page(report: CheckReport, path: Path) -> Path:
    """Write a self-contained page that loads nothing from anywhere.

    Args:
        report: of ``check_data``.
        path: of the page.

    Raises:
        RunError: if it cannot be written.
    """
    return replace_text(path, render("check.html.j2", _view(report)))


def list_files(files: Sequence[str], limit: int = MAX_FILES_PER_LINE) -> str:
    """The first files and the number of the others."""
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more


def group_findings(findings: Sequence[Finding]) -> list[Group]:
    """Findings by kind, in their order; of many only the first are written out."""
    by_code: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_code[finding.code].append(finding)
    return [
        Group(
            kind=members[0].kind,
            lines=tuple(members[:MAX_LINES_PER_KIND]),
            left_out=max(0, len(members) - MAX_LINES_PER_KIND),
            num_files=len({name for one in members for name in one.files}),
        )
        for members in by_code.values()
    ]


def describe_spread(spread: Sequence[float] | None) -> str:
    """Smallest, median and largest in one cell; a single number where all are equal."""
    if spread is None:
        return DASH
    low, middle, high = (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in spread)
    return middle if low == high else f"{low} / {middle} / {high}"


def _view(report: CheckReport) -> dict[str, Any]:
    said: dict[str, list[str]] = defaultdict(list)
    for finding in report.findings:
        for name in finding.files:
            said[name].append(finding.kind.title)
    return {
        "report": report,
        "groups": group_findings(report.findings),
        "histograms": [(site.site, _bars(site)) for site in report.sites],
        "bar_width": BAR_WIDTH,
        "bar_height": BAR_HEIGHT,
        "spread": describe_spread,
        "list_files": list_files,
        "pictures": [
            {
                "name": one.name,
                "site": one.site,
                "width": one.image.shape[1],
                "height": one.image.shape[0],
                "image": _png(one.image),
                "outline": draw_outlines(one.labels),
                "said": ", ".join(title for title in dict.fromkeys(said[one.name]) if title != "No spacing"),
            }
            for one in report.thumbnails
        ],
    }


def _bars(site: SiteSummary) -> list[tuple[int, float, float]]:
    """(x, y, height) of each bar; roots of the shares, or one peak at black would leave nothing else to see."""
    roots = np.sqrt(site.histogram)
    heights = roots / max(float(roots.max()), 1e-9) * BAR_HEIGHT
    return [(x * BAR_WIDTH, round(BAR_HEIGHT - h, 1), round(h, 1)) for x, h in enumerate(map(float, heights))]


def _png(image: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
