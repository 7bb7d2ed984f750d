"""What a person sees: the live view at 80 columns, and plain lines."""

from datetime import UTC, datetime, timedelta
from io import BytesIO, TextIOWrapper
from typing import Any

import pytest
from rich.console import Console

from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.lines import describe
from icmoe_server.operator.messages import ChildInfo, round_message, status_message
from icmoe_server.operator.scene import Scene, age, clean, duration
from icmoe_server.operator.view import draw, trend

from .conftest import line, status

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CHILDREN = (ChildInfo("superlink", 11, "running", 0), ChildInfo("gateway", None, "restarting", 2))


def round_event(server_round: int, **more: Any) -> pb.Event:
    return pb.Event(round=round_message(line(server_round, **more)))


def status_event(content: dict[str, Any], *, stop_asked: str = "") -> pb.Event:
    return pb.Event(status=status_message("cardiac", content, CHILDREN, stop_asked=stop_asked))


def hear(*events: pb.Event) -> Scene:
    scene = Scene()
    for event in events:
        scene = scene.after(event)
    return scene


def seen(scene: Scene, *, width: int = 80, encoding: str = "utf-8") -> str:
    """What a terminal of this encoding gets; a letter it has not is an error."""
    file = TextIOWrapper(BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, width=width)
    console.print(draw(scene, now=NOW, ascii_only=console.options.ascii_only))
    file.seek(0)
    return file.read()


def waiting() -> dict[str, Any]:
    content = status("waiting", 7, hospitalA="answered", hospitalB="missing", hospitalC="quarantined")
    content["reason"] = "waiting for hospitalB"
    content["roll_call"]["hospitalB"] |= {"since": (NOW - timedelta(minutes=12)).isoformat(), "reason": "offline"}
    content["roll_call"]["hospitalC"] |= {"since": None, "reason": "norm \x1b[2J100 times the median"}
    return content


def test_the_view_has_all_on_80_columns() -> None:
    missing = {"hospitalB": "2026-03-01T11:48:00+00:00"}
    scene = hear(
        *(round_event(n) for n in range(1, 6)),
        round_event(6, missing=missing, late=1, waited=31.0),
        status_event(waiting(), stop_asked="after_round"),
    )
    text = seen(scene)
    assert max(map(len, text.splitlines())) <= 80
    squeezed = " ".join(text.replace("\u00a0", " ").split())
    for words in (
        "cardiac waiting round 7 of 10 stops after this round",
        "6 of 10 rounds done, about 86 s left",
        "hospitalB missing 12 min 0.750 0.750",
        "hospitalB, now: missing for 12 min: offline",
        "hospitalB, round 6: missing since 2026-03-01T11:48:00+00:00",
        "adaptive.0 30 % adaptive.1 20 % basic.0 25 % semantic.0 25 %",
        "22 s, 0.4 MB up, 0.7 MB down, late replies dropped: 1, waited 31 s; 3.7 MB up in all",
        "superlink gateway (restarting, restarts: 2)",
    ):
        assert words in squeezed
    assert "\x1b[2J" not in text
    assert seen(scene, width=40)


def test_a_simple_terminal_gets_simple_letters() -> None:
    text = seen(hear(round_event(1), round_event(2), status_event(waiting())), encoding="ascii")
    assert text.isascii()
    assert "superlink   gateway (restarting, restarts: 2)" in text
    assert "+0.040" in text


def test_the_view_without_rounds_and_without_anything() -> None:
    assert "Waiting for the centre" in seen(Scene())
    text = seen(hear(status_event(waiting())))
    assert "Dice" not in text
    assert "rounds done" not in text
    assert "starting" in seen(hear(pb.Event(status=pb.RunStatus(run="r", state="starting"))))


def test_experts_that_differ_between_sites_show_their_range() -> None:
    shares = {"hospitalA": {"basic.0": 0.9, "adaptive.0": 0.1}, "hospitalB": {"basic.0": 0.5, "adaptive.0": 0.5}}
    text = seen(hear(round_event(1, expert_shares=shares), status_event(waiting()))).replace("\u00a0", " ")
    assert "adaptive.0 30 % (10-50)   basic.0 70 % (50-90)" in text


def test_many_troubles_leave_room() -> None:
    failed = {f"site{number:02}": "no disk space" for number in range(20)}
    text = seen(hear(round_event(1, asked=sorted(failed), failed=failed), status_event(status("training", 2))))
    assert text.count("no disk space") == 8
    assert "and 12 more" in text


def test_a_repeated_round_counts_once() -> None:
    scene = hear(round_event(1), round_event(2), round_event(2, seconds=9.0), status_event(status("training", 3)))
    assert [one.round for one in scene.rounds] == [1, 2]
    assert scene.dice("hospitalA") == [pytest.approx(0.54), pytest.approx(0.58)]
    assert scene.seconds_left() == pytest.approx(8 * (21.5 + 9) / 2)


def test_trend() -> None:
    assert trend([0.1, 0.5, 0.9]) == "▁▅█"
    assert trend([0.5]) == "▁"
    assert len(set(trend([0.800, 0.801, 0.802]))) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (12, "12 s"), (200, "3 min"), (9000, "2.5 h"), (400_000, "5 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ages_and_foreign_text() -> None:
    assert age("2026-03-01T11:59:00Z", NOW) == "60 s"
    assert age("2026-03-01T11:59:00", NOW) == "60 s"
    assert age("yesterday", NOW) == ""
    assert clean("a\x1b[31m\nb\u202eä") == "a [31m b ä"


def lines(*events: pb.Event) -> list[str]:
    scene, said = Scene(), []
    for event in events:
        said += list(describe(scene, event))
        scene = scene.after(event)
    return said


def test_a_line_for_each_round() -> None:
    failed = {"hospitalC": "out of memory"}
    first, second, last = lines(
        round_event(1),
        round_event(2, failed=failed, aggregated=False, val_dice={}),
        round_event(2, evaluate_only=True, scored_round=2),
    )
    assert first.startswith("round 1: 3 of 3 sites, validation Dice of round 0: mean 0.590 (hospitalA 0.540, ")
    assert first.endswith("), 0.7 MB up, 22 s")
    assert "2 of 3 sites, nothing scored" in second
    assert second.endswith("the model stays as it was; hospitalC: out of memory")
    assert last.startswith("round 2 is the last: validation Dice of round 2: mean 0.630")


def test_a_line_for_what_changes_and_none_for_what_repeats() -> None:
    calm = status("training", 7, hospitalA="asked", hospitalB="asked", hospitalC="asked")
    answered = status("training", 7, hospitalA="answered", hospitalB="answered", hospitalC="asked")
    said = lines(
        status_event(calm),
        status_event(answered),
        status_event(waiting()),
        status_event(waiting(), stop_asked="now"),
        status_event(calm),
    )
    assert said == [
        "cardiac: training, round 7 of 10",
        "superlink (process 11): running",
        "gateway: restarting, restarts: 2",
        "cardiac: waiting, round 7 of 10: waiting for hospitalB",
        "hospitalB: missing since 2026-03-01T11:48:00+00:00: offline",
        "hospitalC: quarantined: norm  [2J100 times the median",
        "an operator asked the run to stop now",
        "cardiac: training, round 7 of 10",
        "hospitalB: asked again",
        "hospitalC: asked again",
    ]
