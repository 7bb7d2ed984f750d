"""``icmoe-fl privacy``, on a ledger that was used."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from icmoe.commands.privacy import privacy_app
from icmoe.errors import ConfigError, PrivacyError
from icmoe.privacy.accounting import Spend, affordable_steps, epsilon
from icmoe_client.ledger import Ledger
from icmoe_client.site_keys import make_receipt_key

ROUND = Spend(4.0, 4 / 13, 8)
PATIENTS = {f"p{n}": frozenset({f"id{n}"}) for n in range(13)}


def run(*arguments: str) -> str:
    done = CliRunner().invoke(privacy_app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "oslo.yaml"
    site: dict[str, Any] = {
        "name": "oslo", "server": "fl.example.org:8443", "ca_certificate": None, "flower_key": "flower.key",
        "receipt_key": "receipt.key", "data": "data", "state_dir": "state", "policy": {"max_epsilon": 3.0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(site))
    make_receipt_key(tmp_path / "receipt.key")
    return path


@pytest.fixture
def ledger(site_file: Path) -> Ledger:
    """Two rounds, the second of which never left."""
    ledger = Ledger(site_file.parent / "state" / "ledger.sqlite")
    for number in (1, 2):
        booking = ledger.book(
            run="0123456789abcdef", server_round=number, unit="patient", spend=ROUND, units=PATIENTS, delta=1e-5,
            max_epsilon=3.0,
        )  # fmt: skip
        if number == 1:
            ledger.release(booking)
    return ledger


def test_ledger_show_tells_bookings_epsilon_and_what_is_left(site_file: Path, ledger: Ledger, tmp_path: Path) -> None:
    page = tmp_path / "ledger.html"
    text = run("show", "--site", "oslo", "--config", str(site_file), "--html", str(page))
    spent = epsilon([ROUND] * 2, delta=1e-5)
    prv = epsilon([ROUND] * 2, delta=1e-5, accountant="prv")
    assert f"epsilon at delta 1e-05: {spent:.4f} (RDP, enforced), {prv:.4f} (PRV)" in text
    assert f"left of the budget of 3: {3 - spent:.4f}" in text
    assert [line.split()[-1] for line in text.splitlines() if "012345" in line] == ["yes", "no"]
    html = page.read_text()
    assert "never left" in html
    assert f"{spent:.4f}" in html
    assert "<svg" in html
    assert "budget" in html
    assert not any(mark in html for mark in ("http://", "https://", "<script"))


def test_ledger_show_as_json(site_file: Path, ledger: Ledger) -> None:
    found = json.loads(run("show", "--site", "oslo", "--config", str(site_file), "--json"))
    assert [one["released"] for one in found["bookings"]] == [True, False]
    assert found["epsilon_rdp"] == found["highest"] == pytest.approx(found["bookings"][-1]["epsilon_after"])
    assert found["epsilon_rdp"] + found["left"] == pytest.approx(3.0)
    assert (found["lines"], found["head"]) == ledger.head()


def test_ledger_show_makes_none(site_file: Path) -> None:
    assert "Nothing was booked for oslo yet" in run("show", "--site", "oslo", "--config", str(site_file))
    assert not (site_file.parent / "state").exists()


def test_ledger_confirm_holds_from_then_on(site_file: Path, ledger: Ledger) -> None:
    arguments = ("--site", "oslo", "--config", str(site_file), "--yes")
    with pytest.raises(PrivacyError, match="cannot lower"):
        run("confirm", *arguments, "--epsilon", "0.1", "--reason", "no")
    run("confirm", *arguments, "--epsilon", "2.5", "--reason", "backup of May restored")
    found = json.loads(run("show", "--site", "oslo", "--config", str(site_file), "--json"))
    assert (found["epsilon_rdp"], found["left"], found["delta"]) == (2.5, 0.5, 2e-5)
    text = run("show", "--site", "oslo", "--config", str(site_file))
    assert "epsilon 2.5 confirmed, because: backup of May restored" in text


@pytest.mark.slow
def test_plan_without_a_site_counts_rounds_that_fit() -> None:
    arguments = ("plan", "--patients", "13", "--batch-size", "4", "--epsilon", "3")
    found = json.loads(run(*arguments, "--json"))
    assert (found["steps_per_round"], found["sample_rate"]) == (8, 4 / 13)
    for one in found["by_noise"]:
        noise, rounds = one["noise_multiplier"], one["rounds"]
        assert one["epsilon"] <= 3.0 < epsilon([Spend(noise, 4 / 13, 8 * (rounds + 1))], delta=1e-5)
    ten = next(one for one in found["by_rounds"] if one["rounds"] == 10)
    assert ten["noise_multiplier"] == pytest.approx(4.3006, abs=2e-4)
    assert "rounds that fit" in run(*arguments, "--noise-multiplier", "4.0")


@pytest.mark.slow
def test_plan_of_a_site_counts_what_was_spent(site_file: Path, ledger: Ledger) -> None:
    found = json.loads(run("plan", "--site", "oslo", "--config", str(site_file), "--noise-multiplier", "4.0", "--json"))
    fit = affordable_steps(max_epsilon=3.0, delta=1e-5, noise_multiplier=4.0, sample_rate=4 / 13, spent=(ROUND, ROUND))
    assert (found["units"], found["epsilon"]) == (13, 3.0)
    assert found["by_noise"][0]["rounds"] == fit // 8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--patients", "13"), "budget above 0"),
        (("--epsilon", "3"), "number of units is not known"),
        (("--epsilon", "3", "--patients", "13", "--images", "40"), "not both"),
        (("--epsilon", "3", "--patients", "13", "--noise-multiplier", "0"), "must be above 0"),
        (("--epsilon", "3", "--patients", "13", "--delta", "0.1"), "no promise for 13 units"),
        (("--epsilon", "3", "--patients", "13", "--delta", "2"), "between 0 and 1"),
        (("--epsilon", "3", "--patients", "13", "--config", "x.yaml"), "give its name"),
    ],
)
def test_plan_explains_what_is_missing(arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run("plan", *arguments)
