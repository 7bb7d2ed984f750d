"""How numbers are written in the page; a dash stands for what is not known."""

import math
from collections.abc import Callable
from urllib.parse import quote

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def format_score(value: float | None) -> str:
    """Three decimals, a dash where unknown."""
    return f"{value:.3f}" if value is not None and _known(value) else DASH


def format_difference(value: float | None) -> str:
    """Three decimals with a sign, a dash where unknown."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", MINUS) if value is not None and _known(value) else DASH


def format_count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if value is not None and _known(value) else DASH


def format_megabytes(value: float | None) -> str:
    """Bytes in MB of a million bytes."""
    return f"{value / 1e6:,.3f} MB" if value is not None and _known(value) else DASH


def format_seconds(value: float | None) -> str:
    """Seconds as a person says them."""
    if value is None or not _known(value):
        return DASH
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"


FORMATS: dict[str, Callable[..., str]] = {
    "score": format_score,
    "signed": format_difference,
    "number": format_count,
    "megabytes": format_megabytes,
    "duration": format_seconds,
    "path_url": lambda text: quote(text, safe=""),
}
