"""The privacy ledger: what was spent on a site's data, over all rounds, runs, configs and restarts, for ever.

Steps are booked before the first of them is taken, in one transaction that reaches the disk. A process that dies
afterwards leaves them booked, and its second try books again: the ledger may say too much, never too little. Which
unit of today is which of the past: ``icmoe_client.ledger_history``. How lines are kept: ``icmoe_client.ledger_lines``.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmoe.errors import BudgetExhaustedError, PrivacyError
from icmoe.privacy import accounting
from icmoe.privacy.accounting import Accountant, Spend
from icmoe.privacy.config import Unit
from icmoe_client.ledger_history import Confirmation, Entry, History, Standing, Tokens, Units, as_tokens
from icmoe_client.ledger_lines import START, Line, add_line, make_file, read_lines, reading, writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Booking:
    """Steps that may be taken now.

    Attributes:
        number: line in the ledger.
        spend: the steps.
        epsilon_after: of the data once they are taken, by RDP, everything before included.
    """

    number: int
    spend: Spend
    epsilon_after: float


class Ledger:
    """One site's ledger. Any number of processes may use it at once.

    Args:
        path: an sqlite file, made with its folder where there is none.

    Raises:
        PrivacyError: from every method: if the file cannot be used, or a line was changed, removed or moved by other
            hands. Texts name no file: they may go to the centre.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_file(path)
        self._lines()

    def book(
        self,
        *,
        run: str,
        server_round: int,
        unit: Unit,
        spend: Spend,
        units: Units,
        delta: float,
        max_epsilon: float | None,
    ) -> Booking:
        """Write down steps that are about to be taken. When this returns, they are on the disk.

        Args:
            run: digest of the run.
            server_round: from 1.
            unit: what epsilon protects.
            spend: the planned steps, at least one.
            units: all units of the training data.
            delta: what epsilon is stated for.
            max_epsilon: the site's budget; ``None`` sets no limit.

        Raises:
            BudgetExhaustedError: if they would pass the budget. Nothing is written then.
            PrivacyError: if the data were booked by the other kind of unit, or units cannot be told apart.
        """
        tokens = _checked(units, spend, delta)
        with writing(self._path) as connection:
            lines = read_lines(connection)
            history = History.read(lines)
            after = _admit(history, tokens, unit=unit, spend=spend, delta=delta, max_epsilon=max_epsilon)
            data = next((number for number, held in history.data.items() if held == tokens), None)
            if data is None:
                lines = add_line(connection, lines, {"kind": "data", "units": [sorted(unit) for unit in tokens]})
                data = lines[-1].number
            content = {"run": run, "round": server_round, "unit": unit, "data": data, "delta": delta}
            content |= {"noise_multiplier": spend.noise_multiplier, "sample_rate": spend.sample_rate}
            content |= {"num_steps": spend.num_steps, "epsilon_after": after}
            lines = add_line(connection, lines, _stamped("booking", content))
        logger.info("booked %d steps: epsilon %.4f (RDP) at delta %g", spend.num_steps, after, delta)
        return Booking(lines[-1].number, spend, after)

    def check(self, *, unit: Unit, spend: Spend, units: Units, delta: float, max_epsilon: float | None) -> float:
        """Say what ``book`` would say, and book nothing: before data are read, with the tokens known by then.

        Returns:
            Epsilon after these steps, of what is known of the units. The booking itself can only find more.

        Raises:
            BudgetExhaustedError: as ``book``.
            PrivacyError: as ``book``.
        """
        tokens = _checked(units, spend, delta)
        return _admit(self._history(), tokens, unit=unit, spend=spend, delta=delta, max_epsilon=max_epsilon)

    def release(self, booking: Booking) -> None:
        """Note that the update of a booking left. For people only: a booking without this line counts the same.

        Raises:
            PrivacyError: if there is no such booking.
        """
        with writing(self._path) as connection:
            lines = read_lines(connection)
            if booking.number not in {entry.number for entry in History.read(lines).entries}:
                raise PrivacyError(f"line {booking.number} of the site's privacy ledger is no booking.")
            add_line(connection, lines, _stamped("release", {"booking": booking.number}))

    def confirm(self, *, epsilon: float, delta: float, reason: str) -> None:
        """Take an operator's word that up to now more was spent than the lines say, as after a restored backup.

        It holds for all data of this ledger, also for those that the lost lines alone knew. From then on epsilon is
        this one plus that of later bookings, and their deltas add up too.

        Raises:
            PrivacyError: if it is less than the lines say for any unit, no number, or without a reason.
        """
        if not 0 < epsilon < float("inf") or not 0 < delta < 1 or not reason.strip():
            raise PrivacyError("a confirmation needs an epsilon above 0, a delta between 0 and 1, and a reason.")
        self.highest(delta=delta)  # imports Opacus before the ledger is locked
        with writing(self._path) as connection:
            lines = read_lines(connection)
            history = History.read(lines)
            known = history.epsilon(history.all_tokens(), delta=delta)
            if epsilon < known:
                raise PrivacyError(
                    f"the site's privacy ledger says {known:.4f} at delta {delta:g}; a confirmation cannot lower it to "
                    f"{epsilon:g}. Give {known:.4f} or more."
                )
            content = {"epsilon": epsilon, "delta": delta, "reason": reason.strip()}
            add_line(connection, lines, _stamped("confirmation", content))

    def epsilon(self, units: Units, *, delta: float, accountant: Accountant = "rdp") -> float:
        """Highest epsilon of these units so far, 0 if none was ever booked."""
        return self._history().epsilon(as_tokens(units), delta=delta, accountant=accountant)

    def standing(self, units: Units, *, delta: float) -> Standing:
        """What the unit that spent most of these has spent, to solve for noise or to plan rounds with."""
        return self._history().standing(as_tokens(units), delta=delta)

    def head(self) -> tuple[int, str]:
        """Number of lines, and sha256 of the last: 64 zeros where there is none."""
        lines = self._lines()
        return len(lines), lines[-1].sha256 if lines else START

    def entries(self) -> tuple[Entry, ...]:
        """All bookings, in order."""
        return self._history().entries

    def confirmations(self) -> tuple[Confirmation, ...]:
        """All confirmations, in order; the last one holds."""
        return self._history().confirmations

    def last_units(self) -> Units:
        """Units of the last booking, under invented names; empty where nothing was booked."""
        history = self._history()
        tokens = history.data[history.entries[-1].data] if history.entries else ()
        return {str(index): unit for index, unit in enumerate(tokens)}

    def highest(self, *, delta: float) -> float:
        """Highest epsilon of any unit that ever was in booked data, by RDP."""
        history = self._history()
        return history.epsilon(history.all_tokens(), delta=delta)

    def _history(self) -> History:
        return History.read(self._lines())

    def _lines(self) -> tuple[Line, ...]:
        with reading(self._path) as connection:
            return read_lines(connection)


def _checked(units: Units, spend: Spend, delta: float) -> Tokens:
    if spend.num_steps < 1:
        raise PrivacyError("a booking needs at least one step.")
    # Opacus is imported here, for seconds, rather than while the ledger is locked.
    accounting.epsilon((spend,), delta=delta)
    return as_tokens(units)


def _admit(
    history: History, tokens: Tokens, *, unit: Unit, spend: Spend, delta: float, max_epsilon: float | None
) -> float:
    history.refuse_other_unit(tokens, unit)
    after = history.epsilon(tokens, delta=delta, more=(spend,))
    if max_epsilon is not None and after > max_epsilon:
        fit = history.affordable_steps(tokens, spend, delta=delta, max_epsilon=max_epsilon)
        before = history.epsilon(tokens, delta=delta)
        raise BudgetExhaustedError(
            f"this site allows epsilon {max_epsilon:g} at delta {delta:g} and has spent {before:.3f}; "
            f"{spend.num_steps} more steps with noise multiplier {spend.noise_multiplier:g} would reach "
            f"{after:.3f}. {fit} such steps still fit. Ask for more noise or fewer local epochs, or "
            "go on without this site."
        )
    return after


def _stamped(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"), **content}
