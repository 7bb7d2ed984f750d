"""What a site books before it trains privately: which units, how much, and when it says no."""

from dataclasses import replace
from pathlib import Path

import pytest

from icmoe.config import RunConfig
from icmoe.data.manifest import Sample
from icmoe.errors import BudgetExhaustedError, PolicyError, PrivacyError
from icmoe_client.private_round import PrivateRound, epsilon_so_far, open_ledger, refuse_forgetful
from icmoe_client.site import Site
from icmoe_client.site_file import SitePolicy


def run_config(**privacy: object) -> RunConfig:
    given = {"noise_multiplier": 2.0, "unit": "patient"} | privacy
    return RunConfig.model_validate({"task": {"name": "discs", "classes": {"disc": 1}}, "privacy": given})


def sample(name: str, patient: str, *, split: str = "train", intensity: str = "") -> Sample:
    path = Path(f"/nowhere/{name}.png")
    return Sample(image=path, mask=path, patient=patient, split=split, site="a", intensity=intensity)  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Three patients, one of them with two images, and one to validate on. No file is there to be read."""
    samples = (sample("1", "p"), sample("2", "p"), sample("3", "q"), sample("4", "v", split="val"), sample("5", "r"))
    digests = tuple(f"{number:064x}" for number in range(len(samples)))
    return Site(name="a", samples=samples, state_dir=tmp_path, source_digests=digests, num_examples=4)


def book(site: Site, *, server_round: int = 1, run: RunConfig | None = None) -> PrivateRound:
    return PrivateRound.book(site, run or run_config(), server_round=server_round)


def test_units_are_patients_or_images(site: Site) -> None:
    by_patient, by_image = (
        book(site),
        book(replace(site, ledger=site.state_dir / "other"), run=run_config(unit="image")),
    )
    assert by_patient.unit_of == (0, 0, 1, 2)
    assert by_image.unit_of == (0, 1, 2, 3)
    assert by_patient.booking.spend.sample_rate == 1.0
    assert (by_patient.num_patients, by_patient.epsilon.unit) == (3, "patient")


@pytest.mark.parametrize("unit", ["patient", "image"])
def test_ledger_knows_the_same_image_under_another_window(site: Site, unit: str) -> None:
    run = run_config(unit=unit)
    first = book(site, run=run).booking.epsilon_after
    windowed = tuple(replace(one, intensity="window 40 400", patient=f"new {one.patient}") for one in site.samples)
    assert book(replace(site, samples=windowed), run=run).booking.epsilon_after > first


def test_ledger_goes_on_when_a_patient_joins(site: Site) -> None:
    first = book(site).booking.epsilon_after
    assert site.source_digests is not None
    grown = replace(
        site, samples=(*site.samples, sample("6", "s")), source_digests=(*site.source_digests, "f" * 64), num_examples=5
    )
    assert book(grown).booking.epsilon_after > first


def test_ledger_counts_a_repeated_round_again_but_not_in_a_simulation(site: Site) -> None:
    first, again = book(site).booking, book(site).booking
    assert again.epsilon_after > first.epsilon_after
    simulated = replace(site, simulated=True, ledger=site.state_dir / "simulated")
    assert book(simulated).booking == book(simulated).booking


def test_terms_that_promise_nothing_are_refused(site: Site) -> None:
    with pytest.raises(PolicyError, match="num_examples"):
        book(replace(site, num_examples=None))
    with pytest.raises(PolicyError, match="target_delta"):
        book(site, run=run_config(target_delta=0.4))
    assert open_ledger(site).entries() == ()


def test_ledger_refuses_beyond_the_budget(site: Site) -> None:
    limited = replace(site, policy=SitePolicy(max_epsilon=0.5))
    with pytest.raises(BudgetExhaustedError):
        book(limited)
    assert open_ledger(site).entries() == ()


def test_a_lost_ledger_is_noticed_by_what_the_receipts_say(site: Site) -> None:
    known = book(site).epsilon
    refuse_forgetful(site, [known])
    (site.state_dir / "ledger.sqlite").unlink()
    with pytest.raises(PrivacyError, match="privacy ledger knows of less"):
        refuse_forgetful(site, [known])
    privacy = run_config().privacy
    assert privacy is not None
    assert epsilon_so_far(site, privacy).value == 0.0


def test_an_image_that_can_no_longer_be_read_stops_the_round(site: Site) -> None:
    private = book(site)
    private.require_all(4)
    with pytest.raises(PrivacyError, match="can no longer be read"):
        private.require_all(3)
