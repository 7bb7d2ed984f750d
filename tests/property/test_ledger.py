"""The ledger under random lives of a site: who is who, epsilon that never falls, bytes that change."""

from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.errors import PrivacyError
from icmoe.privacy.accounting import Spend, epsilon
from icmoe_client.ledger import Ledger
from icmoe_client.ledger_history import same_units

DELTA = 1e-5
SETTINGS = (Spend(4.0, 4 / 13, 8), Spend(2.0, 0.1, 3), Spend(10.0, 1.0, 1))
unit_sets = st.sets(st.frozensets(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=5)


@st.composite
def populations(draw: st.DrawFn) -> tuple[frozenset[str], ...]:
    """Units that share no token."""
    units: list[frozenset[str]] = []
    for unit in draw(unit_sets):
        if all(unit.isdisjoint(other) for other in units):
            units.append(unit)
    return tuple(units)


def obvious_same_units(
    data: dict[int, tuple[frozenset[str], ...]], tokens: tuple[frozenset[str], ...]
) -> list[frozenset[int]]:
    """Grow each unit by all units it touches until nothing changes, then look who holds any of it."""
    everyone = [*(unit for units in data.values() for unit in units), *tokens]

    def grown(unit: frozenset[str]) -> frozenset[str]:
        while True:
            more = unit.union(*(other for other in everyone if other & unit))
            if more == unit:
                return unit
            unit = more

    return [
        frozenset(number for number, units in data.items() if any(other & grown(unit) for other in units))
        for unit in tokens
    ]


@given(st.lists(populations(), max_size=6), populations())
def test_ledger_joins_units_as_the_obvious_way_does(
    past: list[tuple[frozenset[str], ...]], today: tuple[frozenset[str], ...]
) -> None:
    data = dict(enumerate(past, start=1))
    assert same_units(data, today) == obvious_same_units(data, today)


@settings(max_examples=40)
@given(st.lists(st.tuples(populations(), st.sampled_from(SETTINGS)), min_size=1, max_size=8))
def test_ledger_epsilon_never_falls_and_covers_every_booking_of_a_unit(
    life: list[tuple[tuple[frozenset[str], ...], Spend]],
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        before = dict.fromkeys("abcdefgh", 0.0)
        for number, (population, spend) in enumerate(life, start=1):
            units = {str(index): unit for index, unit in enumerate(population)}
            booking = Ledger(path).book(
                run="r", server_round=number, unit="patient", spend=spend, units=units, delta=DELTA, max_epsilon=None
            )
            again = Ledger(path)
            assert again.epsilon(units, delta=DELTA) == pytest.approx(booking.epsilon_after)
            now = {token: again.epsilon({"u": frozenset({token})}, delta=DELTA) for token in before}
            assert all(now[token] >= before[token] for token in before)
            before = now
        for token in before:
            # At the very least what was booked under this token alone.
            own = [spend for population, spend in life if any(token in unit for unit in population)]
            assert before[token] >= epsilon(own, delta=DELTA) - 1e-12
        assert max(before.values()) <= epsilon([spend for _, spend in life], delta=DELTA) + 1e-12


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    ledger = Ledger(path)
    for number, count in combinations(range(1, 5), 2):
        units = {str(index): frozenset({f"id{index}"}) for index in range(count)}
        booking = ledger.book(
            run="r", server_round=number, unit="patient", spend=SETTINGS[0], units=units, delta=DELTA, max_epsilon=None
        )
        ledger.release(booking)
    return path


@settings(max_examples=200)
@given(st.data())
def test_ledger_with_a_changed_byte_says_the_same_or_is_refused(written: Path, data: st.DataObject) -> None:
    original = written.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != original[place]))
    changed = written.with_name("changed.sqlite")
    changed.write_bytes(original[:place] + bytes([value]) + original[place + 1 :])
    try:
        found = Ledger(changed)
        same = (found.head(), found.entries()) == (Ledger(written).head(), Ledger(written).entries())
    except PrivacyError:
        return
    assert same
