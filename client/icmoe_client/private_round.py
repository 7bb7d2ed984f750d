"""A round under differential privacy: booked before an image is read, trained as booked, nothing else."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from icmoe.config import RunConfig
from icmoe.data.manifest import Sample
from icmoe.data.sources import source_digest
from icmoe.errors import PolicyError, PrivacyError
from icmoe.privacy.accounting import Spend, round_of, solve_noise_multiplier
from icmoe.privacy.config import PrivacyConfig
from icmoe.receipts import Epsilon
from icmoe_client.ledger import Booking, Ledger
from icmoe_client.site import Site

_ROUNDING = 1e-6


@dataclass(frozen=True)
class PrivateRound:
    """Steps that stand in the ledger and may be taken.

    Attributes:
        privacy: of the run.
        booking: of these steps.
        unit_of: for each training image, the index of its unit.
        num_patients: in the training data.
    """

    privacy: PrivacyConfig
    booking: Booking
    unit_of: tuple[int, ...]
    num_patients: int
    _ledger: Ledger

    @classmethod
    def book(cls, site: Site, run: RunConfig, *, server_round: int) -> Self:
        """Write down the steps of a round before they are taken.

        Args:
            site: its training samples; their images are not read where the data check knows their digests.
            run: with a privacy section.
            server_round: from 1.

        Raises:
            BudgetExhaustedError: if the site's budget would be passed. Nothing is booked then.
            PolicyError: if the run's terms do not fit these data.
            PrivacyError: if the ledger cannot be trusted.
        """
        privacy = run.privacy
        if privacy is None:
            raise ValueError("the run has no privacy section")
        if site.num_examples is None:
            raise PolicyError(
                "runs with differential privacy need num_examples in this site's file, a fixed weight: the number of "
                "images itself tells of the data"
            )
        names, tokens = _units(site, privacy)
        units = dict(zip(names, tokens, strict=True))
        order = {name: index for index, name in enumerate(units)}
        if privacy.target_delta >= 1 / len(units):
            raise PolicyError(
                f"privacy.target_delta is {privacy.target_delta}; it must be below 1 / number of training "
                f"{privacy.unit}s of this site to promise anything"
            )
        ledger = open_ledger(site)
        booking = _booked_before(ledger, run, server_round) if site.simulated else None
        booking = booking or ledger.book(
            run=run.digest(),
            server_round=server_round,
            unit=privacy.unit,
            spend=planned_spend(run, privacy, num_units=len(units)),
            units=units,
            delta=privacy.target_delta,
            max_epsilon=site.policy.max_epsilon,
        )
        patients = {sample.patient for sample in _training(site)}
        return cls(privacy, booking, tuple(order[name] for name in names), len(patients), ledger)

    @property
    def epsilon(self) -> Epsilon:
        """Of these data after this round, by RDP."""
        return Epsilon(
            value=self.booking.epsilon_after,
            delta=self.privacy.target_delta,
            accountant="rdp",
            unit=self.privacy.unit,
        )

    def require_all(self, num_images: int) -> None:
        """Refuse to train when images that were booked cannot be read: the steps would not be those that were booked.

        Args:
            num_images: training images whose features are there.

        Raises:
            PrivacyError: in words that may leave.
        """
        if num_images != len(self.unit_of):
            raise PrivacyError(
                "some training images of this site can no longer be read, so this is not the data the round was "
                "booked for. Run 'icmoe-fl data check' at the site."
            )

    def release(self) -> None:
        """Note in the ledger that the update left."""
        self._ledger.release(self.booking)


def open_ledger(site: Site) -> Ledger:
    """The site's privacy ledger, made where there is none."""
    return Ledger(site.ledger or site.state_dir / "ledger.sqlite")


def epsilon_so_far(site: Site, privacy: PrivacyConfig) -> Epsilon:
    """What the site's data have spent, for messages of a run that train nothing."""
    value = open_ledger(site).highest(delta=privacy.target_delta)
    return Epsilon(value=value, delta=privacy.target_delta, accountant="rdp", unit=privacy.unit)


def refuse_forgetful(site: Site, known: Iterable[Epsilon]) -> None:
    """A ledger that knows of less than was spent is an old backup, or was removed.

    Args:
        site: whose ledger it is.
        known: what the site's own receipts say.

    Raises:
        PrivacyError: in words that may leave.
    """
    ledger = open_ledger(site)
    for epsilon in known:
        if ledger.highest(delta=epsilon.delta) < epsilon.value * (1 - _ROUNDING):
            raise PrivacyError(
                f"this site's receipts say that epsilon {epsilon.value:.3g} was spent, its privacy ledger knows of "
                "less, as after restoring an old backup. Nothing is done until an operator at the site has run "
                "'icmoe-fl privacy confirm'."
            )


def _booked_before(ledger: Ledger, run: RunConfig, server_round: int) -> Booking | None:
    """A simulation that repeats a round repeats its noise as well, so that nothing more is spent."""
    digest = run.digest()
    entries = (entry for entry in ledger.entries() if (entry.run, entry.server_round) == (digest, server_round))
    return next((Booking(entry.number, entry.spend, entry.epsilon_after) for entry in entries), None)


def planned_spend(run: RunConfig, privacy: PrivacyConfig, *, num_units: int) -> Spend:
    """Noise, sample rate and steps of one round; the noise is solved for all planned rounds where epsilon is given."""
    sample_rate, num_steps = round_of(
        num_units=num_units, batch_size=run.train.batch_size, local_epochs=run.train.local_epochs
    )
    if privacy.noise_multiplier is not None:
        return Spend(privacy.noise_multiplier, sample_rate, num_steps)
    if privacy.target_epsilon is None:
        raise ValueError("neither noise_multiplier nor target_epsilon")
    noise_multiplier = solve_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        delta=privacy.target_delta,
        sample_rate=sample_rate,
        num_steps=num_steps * run.federation.num_rounds,
    )
    return Spend(noise_multiplier, sample_rate, num_steps)


def _units(site: Site, privacy: PrivacyConfig) -> tuple[list[str], list[frozenset[str]]]:
    """Unit of each training image, and the tokens of that unit, by which the ledger knows it again.

    How grey is made of stored values is no part of a token: with another window it is the same image.
    """
    samples, sources = _training(site), _sources(site)
    if privacy.unit == "image":
        places = (f"{sample.axis} {sample.frame} {sample.slice}" if sample.axis else "" for sample in samples)
        names = [_hash(f"{source} {place}") for source, place in zip(sources, places, strict=True)]
        return names, [frozenset({name}) for name in names]
    names = [sample.patient for sample in samples]
    held: dict[str, set[str]] = {}
    for name, source in zip(names, sources, strict=True):
        # The manifest beside the ledger has the pseudonym in clear, so its hash needs no key.
        held.setdefault(name, {_hash(f"patient {name}")}).add(source)
    return names, [frozenset(held[name]) for name in names]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _training(site: Site) -> Sequence[Sample]:
    return [sample for sample in site.samples if sample.split == "train"]


def _sources(site: Site) -> list[str]:
    """Digest of the file or series of each training image."""
    if site.source_digests is None:
        return [source_digest(sample) for sample in _training(site)]
    pairs = zip(site.samples, site.source_digests, strict=True)
    return [digest for sample, digest in pairs if sample.split == "train"]
