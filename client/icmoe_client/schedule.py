"""When a site trains: allowed hours of the day, and a pause by hand."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Self

from icmoe.errors import ConfigError

if TYPE_CHECKING:
    from icmoe_client.site_file import SiteConfig

_MINUTE = timedelta(minutes=1)
_HORIZON = timedelta(days=3)
"""Every window opens once a day; a change of the clock may swallow it on one of them."""


@dataclass(frozen=True)
class TrainingHours:
    """Windows of the local day in which training may start.

    Everything is judged by the wall clock at the instant in question, so a change to or from summer time needs no rule
    of its own: an hour that comes twice counts twice, one that is left out does not count.

    Attributes:
        windows: (first, end) minutes of the day; the end is outside. An end before the first is on the next day.
        zone: whose wall clock; ``None`` is the machine's own zone.
    """

    windows: tuple[tuple[int, int], ...]
    zone: tzinfo | None = None

    @classmethod
    def parse(cls, text: str, *, zone: tzinfo | None = None) -> Self:
        """Read ``"20:00-06:00"`` or several windows, ``"12:00-13:00, 20:00-06:00"``. ``24:00`` is an end only.

        Raises:
            ConfigError: if it is anything else.
        """
        return cls(tuple(_parse_window(part.strip(), whole=text) for part in text.split(",")), zone)

    def open_now(self, now: datetime) -> bool:
        """Whether training may start at an instant.

        Args:
            now: with a time zone, any.

        Raises:
            ValueError: if it has none.
        """
        local = _aware(now).astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        return any(
            first <= minute < end if first < end else minute >= first or minute < end for first, end in self.windows
        )

    def next_opening(self, now: datetime) -> datetime:
        """The first instant from now on at which training may start; ``now`` itself if it may.

        Returns:
            In UTC: local times before and after a change of the clock cannot be subtracted.

        Raises:
            ValueError: if ``now`` has no time zone.
            ConfigError: if no window opens, which only one inside a left-out hour can do.
        """
        if self.open_now(now):
            return now.astimezone(UTC)
        # Windows open at whole minutes. Stepping through them in UTC is exact on every day, also when clocks change.
        instant = now.astimezone(UTC).replace(second=0, microsecond=0)
        for step in range(1, _HORIZON // _MINUTE):
            if self.open_now(instant + step * _MINUTE):
                return instant + step * _MINUTE
        raise ConfigError("training_hours do not open within three days. Make the window longer.")


def pause(site: "SiteConfig") -> bool:
    """Let a site take no further round until ``resume``; also holds after a restart.

    Returns:
        Whether it was not paused before.
    """
    site.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _marker(site).touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True


def resume(site: "SiteConfig") -> bool:
    """End a pause.

    Returns:
        Whether the site was paused.
    """
    try:
        _marker(site).unlink()
    except FileNotFoundError:
        return False
    return True


def is_paused(site: "SiteConfig") -> bool:
    """Whether somebody paused the site."""
    return _marker(site).exists()


def _marker(site: "SiteConfig") -> Path:
    return site.state_dir / "paused"


def _aware(now: datetime) -> datetime:
    if now.tzinfo is None:
        raise ValueError("a time without a zone names no instant; use datetime.now(UTC)")
    return now


def _parse_window(text: str, *, whole: str) -> tuple[int, int]:
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)\s*-\s*(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", text)
    if found is None:
        raise ConfigError(
            f"training_hours are {whole!r}. Write them as 20:00-06:00, several windows with a comma between them."
        )
    first_hour, first_minute, end_hour, end_minute = (int(part or 0) for part in found.groups())
    first, end = first_hour * 60 + first_minute, end_hour * 60 + end_minute
    if first == end:
        raise ConfigError(
            f"training_hours are {whole!r}: the window {text} has no length. For all day leave the key out."
        )
    # 24:00 is kept as minute 0, so that a window until midnight reads like one past it.
    return first, end
