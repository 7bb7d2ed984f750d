"""Training hours, also on the days when clocks change; the pause by hand."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from icmoe.errors import ConfigError
from icmoe_client.schedule import TrainingHours, is_paused, pause, resume
from icmoe_client.site_file import SiteConfig

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = (UTC, BERLIN, ZoneInfo("America/New_York"), ZoneInfo("Australia/Lord_Howe"), ZoneInfo("Asia/Kolkata"))
MINUTES = st.integers(0, 1439)


def berlin(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("hours", "clock", "is_open"),
    [
        ("20:00-06:00", "19:59", False),
        ("20:00-06:00", "20:00", True),
        ("20:00-06:00", "23:59", True),
        ("20:00-06:00", "00:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("09:00-17:00", "09:00", True),
        ("09:00-17:00", "17:00", False),
        ("20:00-24:00", "23:59", True),
        ("20:00-24:00", "00:00", False),
        ("00:00-00:01", "00:00", True),
        ("12:00-13:00, 20:00-06:00", "12:30", True),
        ("12:00-13:00, 20:00-06:00", "13:30", False),
        ("12:00-13:00,20:00-06:00", "03:00", True),
    ],
)
def test_open_now(hours: str, clock: str, is_open: bool) -> None:
    assert TrainingHours.parse(hours, zone=BERLIN).open_now(berlin(f"2026-01-15T{clock}")) is is_open


@pytest.mark.parametrize(
    "text", ["", "20-06", "20:00", "20:00-25:00", "24:00-06:00", "20:60-06:00", "6:00-8:00", "20:00-06:00,", "always"]
)
def test_refuses_other_forms(text: str) -> None:
    with pytest.raises(ConfigError, match="Write them as 20:00-06:00"):
        TrainingHours.parse(text)


@pytest.mark.parametrize("text", ["08:00-08:00", "00:00-24:00"])
def test_refuses_a_window_without_length(text: str) -> None:
    with pytest.raises(ConfigError, match="leave the key out"):
        TrainingHours.parse(text)


@pytest.mark.parametrize(
    ("hours", "now", "opening"),
    [
        ("20:00-06:00", "2026-01-15T12:00:30", "2026-01-15T20:00:00+01:00"),
        ("20:00-06:00", "2026-01-15T21:17:30", "2026-01-15T21:17:30+01:00"),
        ("09:00-17:00", "2026-12-31T17:00:00", "2027-01-01T09:00:00+01:00"),
        # 29 March 2026: 02:00 becomes 03:00.
        ("02:30-06:00", "2026-03-29T01:00:00", "2026-03-29T03:00:00+02:00"),
        ("02:15-02:45", "2026-03-29T01:00:00", "2026-03-30T02:15:00+02:00"),
        ("20:00-06:00", "2026-03-29T12:00:00", "2026-03-29T20:00:00+02:00"),
        # 25 October 2026: 03:00 becomes 02:00.
        ("02:30-06:00", "2026-10-25T01:00:00", "2026-10-25T02:30:00+02:00"),
    ],
)
def test_next_opening(hours: str, now: str, opening: str) -> None:
    found = TrainingHours.parse(hours, zone=BERLIN).next_opening(berlin(now))
    assert found.astimezone(BERLIN).isoformat() == opening


def test_an_hour_that_comes_twice_counts_twice() -> None:
    hours = TrainingHours.parse("02:30-02:45", zone=BERLIN)
    first = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert [hours.open_now(first + timedelta(minutes=m)) for m in (0, 15, 60, 75)] == [True, False, True, False]
    assert hours.next_opening(first + timedelta(minutes=15)) == first + timedelta(minutes=60)


@given(
    zone=st.sampled_from(ZONES),
    windows=st.lists(st.tuples(MINUTES, MINUTES).filter(lambda w: w[0] != w[1]), min_size=1, max_size=3),
    now=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31), timezones=st.just(UTC)),
)
@example(zone=BERLIN, windows=[(120, 180)], now=datetime(2026, 3, 28, 2, 0, tzinfo=UTC))
@example(zone=BERLIN, windows=[(121, 120)], now=datetime(2026, 10, 25, 0, 0, 59, tzinfo=UTC))
def test_next_opening_is_the_first(zone: ZoneInfo, windows: list[tuple[int, int]], now: datetime) -> None:
    text = ", ".join(f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}" for a, b in windows)
    hours = TrainingHours.parse(text, zone=zone)
    opening = hours.next_opening(now)
    assert opening >= now
    assert hours.open_now(opening)
    assert (opening == now) == hours.open_now(now)
    waited = int((opening - now).total_seconds())
    assert not any(hours.open_now(now + timedelta(seconds=s)) for s in range(0, waited, 59))
    # The obvious twin: the minutes of the day, one by one.
    local = opening.astimezone(zone)
    allowed = {m % 1440 for a, b in windows for m in range(a, b if a < b else b + 1440)}
    assert local.hour * 60 + local.minute in allowed


def test_uses_the_zone_of_the_machine() -> None:
    local = datetime.now().astimezone()
    clock = f"{local:%H:%M}-{local + timedelta(minutes=2):%H:%M}"
    assert TrainingHours.parse(clock).open_now(local.astimezone(ZoneInfo("Asia/Kolkata")))


def test_refuses_a_time_without_a_zone() -> None:
    with pytest.raises(ValueError, match="zone"):
        TrainingHours.parse("20:00-06:00").open_now(datetime(2026, 1, 1))


def test_pause(tmp_path: Path) -> None:
    site = SiteConfig(
        name="a", server="h:1", ca_certificate=None, flower_key=tmp_path, receipt_key=tmp_path, data=tmp_path,
        state_dir=tmp_path / "state",
    )  # fmt: skip
    assert not is_paused(site)
    assert (pause(site), pause(site), is_paused(site)) == (True, False, True)
    assert (resume(site), resume(site), is_paused(site)) == (True, False, False)
