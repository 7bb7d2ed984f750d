"""The page of a site's privacy ledger, for its privacy officer. It stays there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icmoe.report.figures import LINE_COLOURS, LINE_DASHES, LineChart, Series, line_chart
from icmoe.report.pages import render, replace_text


@dataclass(frozen=True)
class PrivacyBooks:
    """What ``icmoe-fl privacy show`` found.

    Attributes:
        site: name.
        epsilon_rdp: of the data of the last booking.
        epsilon_prv: the same by PRV; None where it is not computed.
        highest: epsilon of any unit that ever was in booked data, by RDP.
        delta: what all of these are stated for.
        max_epsilon: the site's budget, None without one.
        left: what is left of it, never below 0; None without one.
        bookings: line, time, run, round, unit, units, noise_multiplier, sample_rate, num_steps, epsilon_after and
            released of each.
        confirmations: line, time, epsilon, delta and reason of each.
        lines: of the ledger.
        head: sha256 of the last line.
    """

    site: str
    epsilon_rdp: float
    epsilon_prv: float | None
    highest: float
    delta: float
    max_epsilon: float | None
    left: float | None
    bookings: Sequence[Mapping[str, Any]]
    confirmations: Sequence[Mapping[str, Any]]
    lines: int
    head: str


def write_privacy_page(books: PrivacyBooks, path: Path) -> Path:
    """Write a self-contained page that loads nothing from anywhere.

    Raises:
        RunError: if it cannot be written.
    """
    return replace_text(path, render("privacy.html.j2", {"books": books, "chart": epsilon_chart(books)}))


def epsilon_chart(books: PrivacyBooks) -> LineChart | None:
    """Epsilon after each booking, against the budget; None without a booking."""
    if not books.bookings:
        return None
    points = [(float(index), float(one["epsilon_after"])) for index, one in enumerate(books.bookings, start=1)]
    series = [Series("epsilon (RDP)", points, LINE_COLOURS[0], LINE_DASHES[0])]
    if books.max_epsilon is not None:
        limit = [(x, books.max_epsilon) for x, _ in points]
        series.append(Series("budget", limit, LINE_COLOURS[1], LINE_DASHES[1]))
    return line_chart(
        series,
        title="Epsilon after each booking",
        description="Line chart of epsilon after each booked round, with the budget. The values are in the table.",
        x_label="booking",
        y_label="epsilon",
    )
