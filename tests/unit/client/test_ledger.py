"""The privacy ledger in its file: killed, filled up, edited, used by several processes at once."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from icmoe.errors import BudgetExhaustedError, PrivacyError
from icmoe.privacy.accounting import Spend, epsilon
from icmoe_client.ledger import Booking, Ledger

DELTA = 1e-5
ROUND = Spend(4.0, 4 / 13, 8)
PATIENTS = {f"p{n}": frozenset({f"id{n}", f"file{n}a", f"file{n}b"}) for n in range(13)}


def book(ledger: Ledger, **changes: Any) -> Booking:
    usual: dict[str, Any] = {"run": "a" * 64, "server_round": 1, "unit": "patient", "spend": ROUND, "units": PATIENTS}
    return ledger.book(**(usual | {"delta": DELTA, "max_epsilon": None} | changes))


def after(rounds: int) -> float:
    return epsilon([ROUND] * rounds, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger(path)


def test_ledger_is_made_for_its_owner_alone(ledger: Ledger, path: Path) -> None:
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert (ledger.entries(), ledger.head()) == ((), (0, "0" * 64))
    assert ledger.epsilon(PATIENTS, delta=DELTA) == 0.0


def test_ledger_adds_rounds_up(ledger: Ledger) -> None:
    bookings = [book(ledger, server_round=number) for number in (1, 2, 3)]
    assert [one.epsilon_after for one in bookings] == pytest.approx([after(1), after(2), after(3)])
    assert ledger.epsilon(PATIENTS, delta=DELTA) == pytest.approx(after(3))
    assert 0.8 * after(3) < ledger.epsilon(PATIENTS, delta=DELTA, accountant="prv") < after(3)
    assert ledger.standing(PATIENTS, delta=DELTA).spends == (ROUND,) * 3
    # The data are kept once, not with every booking.
    assert ledger.head()[0] == 4


def test_ledger_goes_on_in_a_new_run_config_or_installation(path: Path) -> None:
    book(Ledger(path))
    book(Ledger(path), run="b" * 64, spend=Spend(2.0, 0.2, 5))
    moved = path.with_name("reinstalled.sqlite")
    shutil.copy(path, moved)
    # The same images under other names in another order.
    renamed = {f"x{name}": tokens for name, tokens in reversed(PATIENTS.items())}
    third = book(Ledger(moved), run="c" * 64, units=renamed)
    assert third.epsilon_after == pytest.approx(epsilon([ROUND, Spend(2.0, 0.2, 5), ROUND], delta=DELTA))


def test_ledger_knows_data_that_grew_by_a_patient(ledger: Ledger) -> None:
    book(ledger)
    new = {"new": frozenset({"id99", "file99"})}
    grown = PATIENTS | new
    assert book(ledger, units=grown).epsilon_after == pytest.approx(after(2))
    assert ledger.epsilon(new, delta=DELTA) == pytest.approx(after(1))
    assert ledger.epsilon({"other": frozenset({"id100"})}, delta=DELTA) == 0.0
    # One who left keeps what was spent, and so do those who stayed.
    assert ledger.epsilon({"p0": PATIENTS["p0"]}, delta=DELTA) == pytest.approx(after(2))
    assert ledger.highest(delta=DELTA) == pytest.approx(after(2))


@pytest.mark.parametrize("tokens", [{"id0", "exported anew"}, {"pseudonym anew", "file0a"}])
def test_ledger_knows_a_patient_by_id_or_by_file(ledger: Ledger, tokens: set[str]) -> None:
    book(ledger)
    assert ledger.epsilon({"somebody": frozenset(tokens)}, delta=DELTA) == pytest.approx(after(1))


def test_ledger_follows_a_patient_whose_id_and_files_changed_one_after_the_other(ledger: Ledger) -> None:
    for tokens in ({"id", "file"}, {"new id", "file"}, {"new id", "new file"}):
        book(ledger, units={"one": frozenset(tokens)})
    assert ledger.epsilon({"one": frozenset({"new file"})}, delta=DELTA) == pytest.approx(after(3))
    assert ledger.epsilon({"one": frozenset({"id"})}, delta=DELTA) == pytest.approx(after(3))


def test_ledger_refuses_to_mix_patients_and_images(ledger: Ledger) -> None:
    book(ledger)
    images = {token: frozenset({token}) for tokens in PATIENTS.values() for token in tokens if "file" in token}
    for attempt in (book, lambda ledger, **given: ledger.check(spend=ROUND, delta=DELTA, max_epsilon=None, **given)):
        with pytest.raises(PrivacyError, match=r"privacy.unit: patient; the run asks for image"):
            attempt(ledger, unit="image", units=images)
    assert len(ledger.entries()) == 1
    book(ledger, unit="image", units={"other": frozenset({"a file of nobody"})})


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ({}, "no unit"),
        ({"p": frozenset()}, "no unit"),
        ({"p": frozenset({"a", "same"}), "q": frozenset({"b", "same"})}, "share an image"),
    ],
)
def test_ledger_refuses_units_that_cannot_be_told_apart(
    ledger: Ledger, units: dict[str, frozenset[str]], reason: str
) -> None:
    with pytest.raises(PrivacyError, match=reason):
        book(ledger, units=units)
    assert ledger.head()[0] == 0


def test_ledger_refuses_what_would_pass_the_budget_and_writes_nothing(ledger: Ledger) -> None:
    limit = (after(2) + after(3)) / 2
    first = book(ledger, max_epsilon=limit)
    book(ledger, max_epsilon=limit)
    head = ledger.head()
    words = (
        rf"allows epsilon {limit:g} .* has spent {after(2):.3f}; 8 more steps .* would reach {after(3):.3f}\. \d such"
    )
    with pytest.raises(BudgetExhaustedError, match=words):
        ledger.check(unit="patient", spend=ROUND, units=PATIENTS, delta=DELTA, max_epsilon=limit)
    with pytest.raises(BudgetExhaustedError, match=words):
        book(ledger, max_epsilon=limit)
    assert ledger.head() == head
    # What the message says still fits does fit, and one step more does not.
    with pytest.raises(BudgetExhaustedError, match="still fit") as refused:
        book(ledger, max_epsilon=limit)
    fit = int(str(refused.value).split(" such steps")[0].rsplit(" ", 1)[-1])
    with pytest.raises(BudgetExhaustedError):
        book(ledger, max_epsilon=limit, spend=Spend(4.0, 4 / 13, fit + 1))
    book(ledger, max_epsilon=limit, spend=Spend(4.0, 4 / 13, fit))
    assert first.number < ledger.entries()[-1].number


def test_ledger_checks_without_booking(ledger: Ledger) -> None:
    for _ in range(2):
        given = ledger.check(unit="patient", spend=ROUND, units=PATIENTS, delta=DELTA, max_epsilon=5.0)
        assert given == pytest.approx(after(1))
    assert ledger.head()[0] == 0


def test_ledger_notes_what_left(ledger: Ledger) -> None:
    first, second = book(ledger), book(ledger, server_round=2)
    ledger.release(second)
    assert [(one.number, one.server_round, one.released) for one in ledger.entries()] == [
        (first.number, 1, False),
        (second.number, 2, True),
    ]
    assert ledger.epsilon(PATIENTS, delta=DELTA) == pytest.approx(after(2))
    with pytest.raises(PrivacyError, match=r"line 99 .* no booking"):
        ledger.release(Booking(99, ROUND, 1.0))


def test_ledger_keeps_no_name_of_a_unit(ledger: Ledger, path: Path) -> None:
    book(ledger, units={"Jane Doe": frozenset({"token-of-jane"})})
    assert b"token-of-jane" in path.read_bytes()
    assert b"Doe" not in path.read_bytes()


def test_ledger_takes_an_operators_word_upwards_only(ledger: Ledger) -> None:
    book(ledger)
    with pytest.raises(PrivacyError, match=rf"says {after(1):.4f} .* cannot lower it"):
        ledger.confirm(epsilon=after(1) / 2, delta=DELTA, reason="I would like more budget")
    ledger.confirm(epsilon=2.5, delta=DELTA, reason="backup of May restored")
    assert ledger.epsilon(PATIENTS, delta=DELTA) == 2.5
    book(ledger)
    assert ledger.epsilon(PATIENTS, delta=DELTA) == pytest.approx(2.5 + after(1))
    standing = ledger.standing(PATIENTS, delta=DELTA)
    assert (standing.confirmed, standing.spends, standing.delta) == (2.5, (ROUND,), 2 * DELTA)
    # The lost lines may have known data that these do not know.
    assert ledger.epsilon({"unheard of": frozenset({"id100"})}, delta=DELTA) == 2.5
    with pytest.raises(BudgetExhaustedError, match=r"0 such steps"):
        book(ledger, max_epsilon=2.6)
    with pytest.raises(PrivacyError, match="cannot lower"):
        ledger.confirm(epsilon=2.5, delta=DELTA, reason="twice")
    assert [one.reason for one in ledger.confirmations()] == ["backup of May restored"]


@pytest.mark.parametrize(("number", "reason"), [(0.0, "why"), (float("inf"), "why"), (float("nan"), "why"), (1.0, " ")])
def test_ledger_takes_no_empty_word(ledger: Ledger, number: float, reason: str) -> None:
    with pytest.raises(PrivacyError, match="a confirmation needs"):
        ledger.confirm(epsilon=number, delta=DELTA, reason=reason)


# --- killed -------------------------------------------------------------------------------------------------------


def start(work: Callable[[], None]) -> int:
    """Run in a process of its own, forked so that it need not import torch again; gives its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def in_child(work: Callable[[], None]) -> int:
    """The same, and its exit status."""
    return os.waitpid(start(work), 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ledger_of_five_rounds_killed_three_times_is_never_too_low(path: Path) -> None:
    after(1)  # imports Opacus here, once
    steps_taken = path.with_name("steps")
    path.parent.mkdir()

    def rounds(first: int, *, dies_in: int, when: str) -> Callable[[], None]:
        def work() -> None:
            ledger = Ledger(path)
            for number in range(first, 6):
                booking = book(ledger, server_round=number)
                if number == dies_in and when == "before training":
                    die()
                with steps_taken.open("a") as file:
                    file.write(f"{number}\n")
                if number == dies_in and when == "before release":
                    die()
                ledger.release(booking)
                if number == dies_in and when == "after release":
                    die()

        return work

    deaths = [(1, 2, "before training"), (2, 3, "before release"), (3, 4, "after release")]
    for first, dies_in, when in deaths:
        assert in_child(rounds(first, dies_in=dies_in, when=when)) == signal.SIGKILL
    assert in_child(rounds(5, dies_in=0, when="")) == 0

    taken = [int(line) for line in steps_taken.read_text().split()]
    entries = Ledger(path).entries()
    assert [entry.server_round for entry in entries] == [1, 2, 2, 3, 3, 4, 5]
    assert taken == [1, 2, 3, 3, 4, 5]
    assert [entry.released for entry in entries] == [True, False, True, False, True, True, True]
    # Six rounds were trained, the seventh was booked and never used: higher by exactly that one.
    assert Ledger(path).epsilon(PATIENTS, delta=DELTA) == pytest.approx(after(len(taken) + 1))
    assert after(len(taken) + 1) > after(5)


HOSPITAL = """
import sys, time
from pathlib import Path
from icmoe.privacy.accounting import Spend
from icmoe_client.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 6):
    booking = ledger.book(
        run="r", server_round=number, unit="patient", spend=Spend(4.0, 4 / 13, 8), units={"p": frozenset({"id"})},
        delta=1e-5, max_epsilon=None,
    )
    for step in ("booked", "trained"):
        print(step, number, flush=True)
        if sys.argv[3] == f"{step} {number}":
            time.sleep(600)
    ledger.release(booking)
"""


@pytest.mark.slow
def test_ledger_of_whole_programs_killed_three_times_is_never_too_low(path: Path) -> None:
    said: list[str] = []

    def hospital(first: int, *, killed_at: str) -> None:
        command = [sys.executable, "-c", HOSPITAL, str(path), str(first), killed_at]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                if said[-1] == killed_at:
                    process.kill()
        assert process.returncode == (-signal.SIGKILL if killed_at != "never" else 0)

    for first, killed_at in ((1, "booked 2"), (2, "trained 3"), (3, "trained 5"), (5, "never")):
        hospital(first, killed_at=killed_at)
    trained = sum(line.startswith("trained") for line in said)
    assert trained == 7
    # Round 2 was booked once in vain.
    assert Ledger(path).epsilon({"p": frozenset({"id"})}, delta=DELTA) == pytest.approx(after(trained + 1))


@pytest.mark.slow
def test_ledger_killed_while_it_books_holds_the_booking_whole_or_not_at_all(path: Path) -> None:
    after(1)
    Ledger(path)

    def forever() -> None:
        ledger = Ledger(path)
        while True:
            book(ledger, units=PATIENTS | {"more": frozenset({os.urandom(8).hex()})})

    for hundredths in (1, 4, 9, 16, 25):
        child = start(forever)
        time.sleep(hundredths / 100)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        entries = Ledger(path).entries()
        assert Ledger(path).epsilon(PATIENTS, delta=DELTA) == pytest.approx(after(len(entries)))
    assert entries


@pytest.mark.slow
def test_ledger_of_processes_that_book_at_once_stays_within_the_budget(path: Path) -> None:
    limit = (after(20) + after(21)) / 2

    begin = time.monotonic() + 0.3

    def greedy() -> None:
        time.sleep(max(0.0, begin - time.monotonic()))
        ledger = Ledger(path)  # made by whoever comes first
        for number in range(10):
            try:
                book(ledger, server_round=number + 1, max_epsilon=limit)
            except BudgetExhaustedError:
                return

    children = [start(greedy) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    entries = Ledger(path).entries()
    assert len(entries) == 20
    assert [entry.epsilon_after for entry in entries] == pytest.approx([after(n) for n in range(1, 21)])


# --- a disk that takes nothing --------------------------------------------------------------------------------------


def test_ledger_on_a_disk_that_takes_no_more_books_nothing(ledger: Ledger, path: Path) -> None:
    book(ledger)
    head = ledger.head()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, path.stat().st_size))
        big = {f"p{n}": frozenset({f"id{n}" * 100}) for n in range(1000)}
        with pytest.raises(PrivacyError, match=r"cannot be written: .*Nothing was booked and nothing trained"):
            book(ledger, units=big)

    assert in_child(fill) == 0
    assert ledger.head() == head


SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} none {folder}
exec {python} {script} {folder} {case}
"""
ON_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from icmoe.errors import PrivacyError
from icmoe_client.ledger import Ledger
folder, case = Path(sys.argv[1]), sys.argv[2]
ledger = Ledger(folder / "ledger.sqlite")
if case == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
else:
    try:
        (folder / "other").write_bytes(bytes(10_000_000))
    except OSError:
        pass
try:
    ledger.confirm(epsilon=1.0, delta=1e-5, reason="x" * 20000)
except PrivacyError as error:
    print(error)
print(Ledger(folder / "ledger.sqlite").head()[0])
"""


@pytest.mark.parametrize(("case", "why"), [("full", "the disk is full"), ("read-only", "it may not be written to")])
def test_ledger_on_a_small_disk_says_what_is_wrong(tmp_path: Path, case: str, why: str) -> None:
    folder, script = tmp_path / "disk", tmp_path / "script.py"
    folder.mkdir()
    script.write_text(ON_SMALL_DISK)
    command = SMALL_DISK.format(size="64k", folder=folder, python=sys.executable, script=script, case=case)
    own_mounts = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run([*own_mounts, "sh", "-c", command], capture_output=True, text=True)
    if "permission denied" in done.stderr.lower() and "mount" in done.stderr:
        pytest.skip("this machine lets nobody mount a small disk")
    message, _, lines = done.stdout.strip().rpartition("\n")
    assert why in message, done.stderr
    assert str(folder) not in message
    assert lines == "0"


def test_ledger_in_an_impossible_place_is_an_error_without_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivacyError, match="cannot be made") as refused:
        Ledger(tmp_path / "file" / "ledger.sqlite")
    assert str(tmp_path) not in str(refused.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(PrivacyError, match="cannot be opened"):
        Ledger(tmp_path / "folder")


def test_ledger_that_vanished_is_not_begun_anew(ledger: Ledger, path: Path) -> None:
    path.unlink()
    with pytest.raises(PrivacyError, match="cannot be"):
        book(ledger)
    assert not path.exists()


# --- other hands ----------------------------------------------------------------------------------------------------


def edit(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        triggers = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")]
        for name in ("no_update", "no_delete"):
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for trigger in triggers:
            connection.execute(trigger)
        connection.commit()


@pytest.fixture
def used(ledger: Ledger, path: Path) -> Path:
    """Lines: data, booking, release, booking, booking."""
    ledger.release(book(ledger))
    book(ledger)
    book(ledger)
    return path


@pytest.mark.parametrize("statement", ["DELETE FROM lines", "UPDATE lines SET content = '{}' WHERE number = 2"])
def test_ledger_lets_nobody_change_a_line_by_accident(used: Path, statement: str) -> None:
    with closing(sqlite3.connect(used)) as connection, pytest.raises(sqlite3.IntegrityError, match="only added"):
        connection.execute(statement)


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        (["UPDATE lines SET content = replace(content, '_steps\":8', '_steps\":1') WHERE number = 2"], "line 2"),
        (["UPDATE lines SET sha256 = 'no digest' WHERE number = 5"], "line 5"),
        (["UPDATE lines SET content = x'00' WHERE number = 3"], "line 3"),
        (["DELETE FROM lines WHERE number = 1"], "line 1 is missing"),
        (["DELETE FROM lines WHERE number = 3"], "line 3 is missing"),
        (["DELETE FROM lines WHERE number = 3", "UPDATE lines SET number = number - 1 WHERE number > 3"], "line 3"),
        (["DELETE FROM lines WHERE number = 5"], "lines after line 4 are missing"),
        (["DELETE FROM lines"], "lines after line 0 are missing"),
        (
            [
                "UPDATE lines SET number = 99 WHERE number = 2",
                "UPDATE lines SET number = 2 WHERE number = 4",
                "UPDATE lines SET number = 4 WHERE number = 99",
            ],
            "line 2",
        ),
        (["INSERT INTO lines (content, sha256) SELECT content, sha256 FROM lines WHERE number = 2"], "line 6"),
    ],
)  # fmt: skip
def test_ledger_edited_by_other_hands_is_found_when_opened(used: Path, statements: list[str], what: str) -> None:
    open_before = Ledger(used)
    edit(used, *statements)
    with pytest.raises(PrivacyError, match=f"damaged: .*{what}.*"):
        Ledger(used)
    with pytest.raises(PrivacyError, match="damaged"):
        book(open_before)


@pytest.mark.parametrize("what", ["TRIGGER no_delete", "TABLE lines"])
def test_ledger_without_its_triggers_or_table_is_found(used: Path, what: str) -> None:
    with closing(sqlite3.connect(used)) as connection:
        connection.execute(f"DROP {what}")
    with pytest.raises(PrivacyError, match="not as this program makes it"):
        Ledger(used)


@pytest.mark.parametrize("content", [b"", b"no database at all", b"SQLite format 3\0" + bytes(4080)])
def test_ledger_file_of_something_else_is_not_taken_for_a_new_one(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(PrivacyError, match="damaged"):
        Ledger(path)
    assert path.read_bytes() == content


def test_ledger_cut_short_is_found(used: Path) -> None:
    used.write_bytes(used.read_bytes()[:-4096])
    with pytest.raises(PrivacyError, match="damaged"):
        Ledger(used)


def test_ledger_of_a_later_version_is_not_read_wrongly(ledger: Ledger, path: Path) -> None:
    from icmoe_client.ledger_lines import add_line, read_lines, writing

    book(ledger)
    with writing(path) as connection:
        add_line(connection, read_lines(connection), {"kind": "something new"})
    with pytest.raises(PrivacyError, match="another version"):
        ledger.epsilon(PATIENTS, delta=DELTA)


def test_ledger_head_is_the_hash_of_all_lines(used: Path) -> None:
    number, digest = Ledger(used).head()
    with closing(sqlite3.connect(used)) as connection:
        rows = connection.execute("SELECT content, sha256 FROM lines ORDER BY number").fetchall()
    assert (number, digest) == (5, rows[-1][1])
    assert [json.loads(content)["kind"] for content, _ in rows] == ["data", "booking", "release", "booking", "booking"]
