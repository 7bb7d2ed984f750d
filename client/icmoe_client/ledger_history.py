"""What the lines of a privacy ledger say about units: which is which, and what each has spent.

The rule of overlap. A unit (patient or image) is a set of tokens: a hash of the patient's id, the sha256 of
its image files. Two units are the same when they share a token, or a chain of units seen here links them: a patient
with a new pseudonym is known by the files, one whose files were exported anew by the id. A unit has spent what all
bookings spent whose data held it. Epsilon of some data is that of its unit that spent most. So one patient more is no
new data set: the others keep what they spent, and the new one starts at nothing. Who changed id and all files at once
cannot be recognised.

Patients and images are not mixed. An image's epsilon says nothing of a patient with many images, and changing one
image of a patient is, for a patient's epsilon, a removal and an addition. So data booked by one kind of unit are
refused for the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from icmoe.errors import PrivacyError
from icmoe.privacy.accounting import Accountant, Spend, affordable_steps, epsilon
from icmoe.privacy.config import Unit
from icmoe_client.ledger_lines import Line

Units = Mapping[str, frozenset[str]]
"""Unit -> tokens. Names of units are not kept; tokens are, so they must tell nobody who a patient is."""
Tokens = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Entry:
    """A booking as it stands in the ledger.

    Attributes:
        number: its line.
        time: UTC, ISO 8601.
        run: digest of the run.
        server_round: from 1.
        unit: what epsilon protects.
        spend: the steps planned.
        num_units: units of the data.
        delta: what ``epsilon_after`` is stated for.
        epsilon_after: of these data after these steps, by RDP.
        released: whether its update left. Counts the same either way.
        data: line of the data.
    """

    number: int
    time: str
    run: str
    server_round: int
    unit: Unit
    spend: Spend
    num_units: int
    delta: float
    epsilon_after: float
    released: bool
    data: int


@dataclass(frozen=True)
class Confirmation:
    """An operator's word: everything before this line spent at most this, at this delta, whatever the lines say."""

    number: int
    time: str
    epsilon: float
    delta: float
    reason: str


@dataclass(frozen=True)
class Standing:
    """What a unit has spent.

    Attributes:
        epsilon: of all of it, by RDP.
        spends: steps booked, those since the last confirmation only.
        confirmed: epsilon confirmed by an operator, added to that of ``spends``; 0 without a confirmation.
        delta: what ``epsilon`` is stated for: deltas add up as epsilons do when one was confirmed.
    """

    epsilon: float
    spends: tuple[Spend, ...]
    confirmed: float
    delta: float


@dataclass(frozen=True)
class History:
    """All that was booked, read from the lines."""

    data: Mapping[int, Tokens]
    entries: tuple[Entry, ...]
    confirmations: tuple[Confirmation, ...]

    @classmethod
    def read(cls, lines: Sequence[Line]) -> Self:
        """Sort the lines by what they say.

        Raises:
            PrivacyError: if a line says what this program never wrote.
        """
        try:
            return cls._sorted(lines)
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError(
                "the site's privacy ledger was written by another version of icmoe-fl, or by other hands. Use the "
                "newest version that this site had."
            ) from error

    @classmethod
    def _sorted(cls, lines: Sequence[Line]) -> Self:
        by_kind: dict[str, list[Line]] = {"data": [], "booking": [], "release": [], "confirmation": []}
        for line in lines:
            by_kind[line.content["kind"]].append(line)
        data = {line.number: tuple(map(frozenset, line.content["units"])) for line in by_kind["data"]}
        released = {line.content["booking"] for line in by_kind["release"]}
        entries = [_entry(line.number, line.content, data=data, released=released) for line in by_kind["booking"]]
        return cls(data, tuple(entries), tuple(_confirmation(line) for line in by_kind["confirmation"]))

    def standing(self, tokens: Tokens, *, delta: float) -> Standing:
        """What that of these units spent that spent most."""
        confirmed = self.confirmations[-1] if self.confirmations else None
        ceiling = confirmed.epsilon if confirmed else 0.0
        worst = max(self._booked(tokens), key=lambda spends: epsilon(spends, delta=delta), default=())
        return Standing(
            epsilon=ceiling + epsilon(worst, delta=delta),
            spends=worst,
            confirmed=ceiling,
            delta=delta + (confirmed.delta if confirmed else 0.0),
        )

    def epsilon(
        self, tokens: Tokens, *, delta: float, accountant: Accountant = "rdp", more: tuple[Spend, ...] = ()
    ) -> float:
        """Highest epsilon of these units, with ``more`` steps on top."""
        ceiling = self.confirmations[-1].epsilon if self.confirmations else 0.0
        booked = [epsilon((*spends, *more), delta=delta, accountant=accountant) for spends in self._booked(tokens)]
        return ceiling + max(booked, default=0.0)

    def affordable_steps(self, tokens: Tokens, spend: Spend, *, delta: float, max_epsilon: float) -> int:
        """Steps like these that still fit."""
        ceiling = self.confirmations[-1].epsilon if self.confirmations else 0.0
        return min(
            affordable_steps(
                max_epsilon=max_epsilon - ceiling, delta=delta, noise_multiplier=spend.noise_multiplier,
                sample_rate=spend.sample_rate, spent=spends,
            )
            for spends in self._booked(tokens)
        )  # fmt: skip

    def refuse_other_unit(self, tokens: Tokens, unit: Unit) -> None:
        """Refuse data that were booked by the other kind of unit.

        Raises:
            PrivacyError: then.
        """
        held = frozenset[int]().union(*self._held(tokens))
        others = sorted({entry.unit for entry in self.entries if entry.data in held and entry.unit != unit})
        if others:
            raise PrivacyError(
                f"this site's data were trained on with privacy.unit: {others[0]}; the run asks for {unit}. What was "
                f"spent by one cannot be stated for the other. Set privacy.unit: {others[0]}."
            )

    def all_tokens(self) -> Tokens:
        """Every unit that ever was in booked data."""
        return tuple({unit for number in sorted({entry.data for entry in self.entries}) for unit in self.data[number]})

    def _held(self, tokens: Tokens) -> list[frozenset[int]]:
        """For each unit, lines of the data that held it."""
        return same_units(self.data, tokens)

    def _booked(self, tokens: Tokens) -> list[tuple[Spend, ...]]:
        """What these units spent since the last confirmation; one with a part of another's bookings is left out."""
        since = self.confirmations[-1].number if self.confirmations else 0
        held = set(self._held(tokens))
        counted = [entry for entry in self.entries if entry.number > since]
        booked = {frozenset(entry.number for entry in counted if entry.data in numbers) for numbers in held}
        most = [one for one in booked if not any(one < other for other in booked)]
        return [tuple(entry.spend for entry in counted if entry.number in one) for one in most]


def same_units(data: Mapping[int, Tokens], tokens: Tokens) -> list[frozenset[int]]:
    """For each of today's units the data, by number, that held the same unit.

    Args:
        data: units of the past.
        tokens: today's units.
    """
    find = _joined([*(unit for units in data.values() for unit in units), *tokens])
    holders: dict[str, set[int]] = {}
    for number, units in data.items():
        for unit in units:
            holders.setdefault(find(next(iter(unit))), set()).add(number)
    return [frozenset(holders.get(find(next(iter(unit))), ())) for unit in tokens]


def as_tokens(units: Units) -> Tokens:
    """Today's units, in an order that does not depend on their names.

    Raises:
        PrivacyError: if there is none, one has no token, or two share one.
    """
    if not units or not all(units.values()):
        raise PrivacyError("there is no unit of training data, or one that nothing tells apart: nothing can be booked.")
    if sum(map(len, units.values())) != len(frozenset[str]().union(*units.values())):
        raise PrivacyError(
            "two units of the training data share an image, so that epsilon would hold for neither. Take doubled "
            "images out of the manifest; 'icmoe-fl data check' lists them."
        )
    return tuple(sorted(units.values(), key=sorted))


def _joined(units: Iterable[frozenset[str]]) -> Callable[[str], str]:
    """Join units that share tokens; gives the name of a token's group."""
    parent: dict[str, str] = {}

    def find(token: str) -> str:
        parent.setdefault(token, token)
        while parent[token] != token:
            parent[token] = parent[parent[token]]
            token = parent[token]
        return token

    for unit in units:
        first = find(next(iter(unit)))
        for token in unit:
            parent[find(token)] = first
    return find


def _entry(number: int, content: Mapping[str, Any], *, data: Mapping[int, Tokens], released: set[int]) -> Entry:
    return Entry(
        number=number,
        time=content["time"],
        run=content["run"],
        server_round=content["round"],
        unit=content["unit"],
        spend=Spend(content["noise_multiplier"], content["sample_rate"], content["num_steps"]),
        num_units=len(data[content["data"]]),
        delta=content["delta"],
        epsilon_after=content["epsilon_after"],
        released=number in released,
        data=content["data"],
    )


def _confirmation(line: Line) -> Confirmation:
    content = line.content
    return Confirmation(line.number, content["time"], content["epsilon"], content["delta"], content["reason"])
