"""Geometry of the page's line charts. The template draws them as SVG, so text is escaped there and follows the theme.

A chart is laid out 460 units wide: about the width of a phone, so that its text is never shrunk below reading size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 112, 12, 40
MAX_COLOURED = 7
LABEL_GAP = 14
LABEL_CHARACTERS = 15

# Okabe and Ito's palette without its yellow, which is too faint for a line on white
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
LINE_DASHES = ("", "6 3", "2 3", "8 3 2 3", "", "6 3", "2 3")
INK = "var(--ink)"
FAINT = "var(--faint)"

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """One line: its points by x, None where nothing was measured."""

    name: str
    points: Points
    colour: str
    dash: str = ""
    width: float = 1.8
    labelled: bool = True


@dataclass(frozen=True)
class Curve:
    """A series as drawn. Positions in chart units; ``label_y`` is None where the end carries no label."""

    series: Series
    path: str
    dots: tuple[tuple[float, float], ...]
    label: str
    label_y: float | None

    @property
    def end(self) -> tuple[float, float]:
        """Where the line ends."""
        return self.dots[-1]


@dataclass(frozen=True)
class LineChart:
    """A chart ready to draw; ``x_ticks`` and ``y_ticks`` are (position, text)."""

    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]
    marker: tuple[float, str] | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    marker: tuple[float, str] | None = None,
) -> LineChart | None:
    """Lay out a line chart.

    Args:
        series: lines, the later ones drawn above the earlier.
        title: heading of the figure.
        description: what a reader who cannot see it is told.
        x_label: meaning of x, whole numbers.
        y_label: meaning and unit of y.
        marker: (x, text) of a vertical line.

    Returns:
        The chart, or None if no series holds a finite value.
    """
    series = [line for line in series if any(_finite(y) for _, y in line.points)]
    if not series:
        return None
    xs = [x for line in series for x, y in line.points if _finite(y)]
    y_ticks = nice_ticks([y for line in series for _, y in line.points if y is not None and _finite(y)])
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def to_x(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(LEFT + share * (WIDTH - RIGHT - LEFT), 1)

    def to_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP), 1)

    drawn = [[(to_x(x), to_y(y)) if y is not None and _finite(y) else None for x, y in line.points] for line in series]
    ends = {index: _dots(points)[-1][1] for index, points in enumerate(drawn) if series[index].labelled}
    label_ys = spread_labels(ends)
    return LineChart(
        title=title,
        description=description,
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple((to_x(x), f"{x}") for x in whole_ticks(x_low, x_high)),
        y_ticks=tuple((to_y(y), f"{y:.10g}") for y in y_ticks),
        curves=tuple(
            Curve(line, _path(points), _dots(points), _shorten(line.name), label_ys.get(index))
            for index, (line, points) in enumerate(zip(series, drawn, strict=True))
        ),
        marker=(to_x(marker[0]), marker[1]) if marker is not None and x_low <= marker[0] <= x_high else None,
    )


def site_series(values: Mapping[str, Points]) -> list[Series]:
    """Give each site a colour and a dash, and add the bold mean over sites.

    With more than seven sites colours could not be told apart: all lines are faint then, and only the sites with the
    lowest and the highest last value are named.
    """
    measured = {site: points for site, points in values.items() if any(_finite(y) for _, y in points)}
    if len(measured) <= MAX_COLOURED:
        lines = [
            Series(site, points, LINE_COLOURS[index], LINE_DASHES[index])
            for index, (site, points) in enumerate(measured.items())
        ]
    else:
        last = {site: [y for _, y in points if y is not None and _finite(y)][-1] for site, points in measured.items()}
        lowest, highest = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        named = {highest: Series(highest, measured[highest], LINE_COLOURS[0])}
        named[lowest] = Series(lowest, measured[lowest], LINE_COLOURS[1], LINE_DASHES[1])
        faint = [site for site in measured if site not in named]
        lines = [Series(site, measured[site], FAINT, width=0.8, labelled=False) for site in faint]
        lines += named.values()
    if len(measured) > 1:
        # below the sites, else it would hide them where they agree
        lines.insert(0, Series("mean", mean_points(measured.values()), INK, width=4.0))
    return lines


def mean_points(lines: Iterable[Points]) -> Points:
    """Mean over the lines that have a value at x, for every x."""
    by_x: dict[float, list[float]] = {}
    for points in lines:
        for x, y in points:
            if y is not None and _finite(y):
                by_x.setdefault(x, []).append(y)
    return [(x, sum(by_x[x]) / len(by_x[x])) for x in sorted(by_x)]


def nice_ticks(values: Sequence[float], *, count: int = 5) -> list[float]:
    """About ``count`` round values that enclose ``values``, at least two."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * count >= span)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(index * step, 10) for index in range(first, last + 1)]


def whole_ticks(low: float, high: float, *, count: int = 8) -> list[int]:
    """At most about ``count`` whole numbers between ``low`` and ``high``."""
    first, last = math.ceil(low), math.floor(high)
    step = max(1, math.ceil((last - first) / count))
    return list(range(first, last + 1, step))


def spread_labels(wanted: Mapping[int, float]) -> dict[int, float]:
    """Move labels apart so that no two overlap, keeping their order and staying inside the chart."""
    placed: dict[int, float] = {}
    floor = float(TOP)
    for index, y in sorted(wanted.items(), key=lambda item: item[1]):
        placed[index] = max(y, floor)
        floor = placed[index] + LABEL_GAP
    ceiling = float(HEIGHT - BOTTOM)
    for index in reversed(placed):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - LABEL_GAP
    return placed


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shorten(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"


def _dots(points: Sequence[tuple[float, float] | None]) -> tuple[tuple[float, float], ...]:
    return tuple(point for point in points if point is not None)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    parts, pen_down = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if pen_down else 'M'}{point[0]} {point[1]}")
        pen_down = point is not None
    return " ".join(parts)
