"""Verifies an egress log: alone, and against what the centre countersigned.

From the log alone every edited, missing, moved, extra or repeated line shows, but not a cut tail: what is left
is whole. A cut tail shows against the centre's countersignatures.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from icmoe.errors import ConfigError
from icmoe.receipts import NOTHING_BEFORE, AnyLine, Countersignature, Receipt, RestoredLine, TornLine, parse_line

RECEIPTS = "receipts.jsonl"


@dataclass(frozen=True)
class Problem:
    """Something that should not be, or in a note something a reader should know.

    Attributes:
        line: of the file, from 1; ``None`` where it is about what the file lacks.
        what: in words.
    """

    line: int | None
    what: str

    def __str__(self) -> str:
        return self.what if self.line is None else f"line {self.line}: {self.what}"


@dataclass(frozen=True)
class Audit:
    """What a log holds and what is wrong with it.

    Attributes:
        lines: whole and genuine ones by their place in the file, from 1.
        problems: empty for a log that holds.
        notes: events that the log itself records.
    """

    lines: dict[int, AnyLine]
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]

    @property
    def receipts(self) -> list[Receipt]:
        """Messages that left, or were about to."""
        return [line for line in self.lines.values() if isinstance(line, Receipt)]

    @property
    def keys(self) -> list[str]:
        """Public keys that signed, in order."""
        return list(dict.fromkeys(line.key for line in self.lines.values()))

    @property
    def sites(self) -> list[str]:
        """Names in the lines; one, in a log that holds."""
        return list(dict.fromkeys(line.site for line in self.lines.values()))


@dataclass(frozen=True)
class Witness:
    """A line as the centre keeps it.

    Attributes:
        receipt: as received.
        countersignature: the centre's.
    """

    receipt: Receipt
    countersignature: Countersignature


def verify_log(path: Path, *, keys: Collection[str] = (), against: Sequence[Witness] | None = None) -> Audit:
    """Look at every line.

    Args:
        path: of an egress log.
        keys: public keys of the site, hexadecimal; without any, all lines must be signed by that of the first.
        against: lines that the centre countersigned.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the egress log {path}: {error.strerror}.") from error
    *whole, rest = content.split(b"\n")
    lines: dict[int, AnyLine] = {}
    problems: list[Problem] = []
    edited: dict[int, int | None] = {}
    for place, text in enumerate(whole, start=1):
        line = parse_line(text)
        if line is None:
            edited[place] = None
            problems.append(Problem(place, "is no line of an egress log, or was edited"))
        elif not line.is_genuine():
            edited[place] = line.number
            problems.append(Problem(place, f"was edited: the signature of number {line.number} does not fit it"))
        else:
            lines[place] = line
    if rest:
        problems.append(Problem(len(whole) + 1, _unfinished(parse_line(rest) is not None)))
    problems += _check_keys(lines, keys)
    problems += _check_order(lines, edited)
    problems += _check_chain(lines)
    if against is not None:
        problems += _check_against(lines, against)
    problems.sort(key=lambda problem: (problem.line is None, problem.line or 0))
    return Audit(lines, tuple(problems), tuple(_notes(lines)))


def read_witnesses(run_dir: Path, *, site: str | None = None) -> list[Witness]:
    """Lines that the centre countersigned in a run.

    Args:
        run_dir: with ``checkpoints/round_NNN/receipts.jsonl``.
        site: whose; ``None`` reads those of all sites.

    Returns:
        Ordered by number.

    Raises:
        ConfigError: if there is none, one cannot be read, or a signature in it is wrong.
    """
    found: list[Witness] = []
    for path in witness_files(run_dir):
        found += _read_witness_file(path)
    mine = {one.countersignature.sha256: one for one in found if site in (None, one.receipt.site)}
    if not mine:
        whose = "a site" if site is None else site
        raise ConfigError(
            f"{run_dir} holds no countersigned receipt of {whose}. --against takes the centre's run directory."
        )
    return sorted(mine.values(), key=lambda one: one.receipt.number)


def witness_files(run_dir: Path) -> list[Path]:
    """Files with countersigned receipts, those of rounds that are not finished included."""
    folder = run_dir / "checkpoints"
    return [*sorted(folder.glob(f"round_*/{RECEIPTS}")), *sorted(folder.glob(f".round_*.{RECEIPTS}"))]


def _read_witness_file(path: Path) -> Iterator[Witness]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            witness = Witness(
                Receipt.model_validate_json(json.dumps(record["receipt"])),
                Countersignature.model_validate_json(json.dumps(record["countersignature"])),
            )
            fits = witness.receipt.sha256 == witness.countersignature.sha256
            if not (fits and witness.receipt.is_genuine() and witness.countersignature.is_genuine()):
                raise ConfigError(
                    f"a signature in {path} is wrong: the file was changed. Ask the centre for a whole copy."
                )
            yield witness
    except (OSError, KeyError, TypeError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}; ask the centre for a whole copy.") from error


def _unfinished(is_line: bool) -> str:
    if is_line:
        return "lacks the end of its line: the last byte of the log was cut off"
    return (
        "ends in the middle: the process that wrote it was killed, or the end was cut off. The site's next message "
        "sets it aside and says so"
    )


def _check_keys(lines: dict[int, AnyLine], keys: Collection[str]) -> Iterator[Problem]:
    allowed, site = set(keys), None
    for place, line in lines.items():
        if not allowed:
            allowed = {line.key}
        if line.key not in allowed:
            hint = "" if keys else ". If the site made new keys, give all of them with --key"
            yield Problem(place, f"is signed by another key, {line.key[:16]}...{hint}")
        site = site or line.site
        if line.site != site:
            yield Problem(place, f"is of the site {line.site}, the first one of {site}")


def _check_order(lines: dict[int, AnyLine], edited: dict[int, int | None]) -> Iterator[Problem]:
    """Numbers must follow each other; an edited line accounts for its number, or in between for any one."""
    present = {line.number for line in lines.values()} | {number for number in edited.values() if number is not None}
    first: dict[int, int] = {}
    last_number, last_place, missed = 0, 0, set[int]()
    for place, line in lines.items():
        number = line.number
        if number in first:
            same = line.sha256 == lines[first[number]].sha256
            other = "repeats" if same else f"has number {number}, and so has"
            yield Problem(place, f"{other} line {first[number]}")
            last_place = place
            continue
        first[number] = place
        lost_from = line.lost_from if isinstance(line, RestoredLine) else number
        gone = [one for one in range(last_number + 1, min(number, lost_from)) if one not in present | missed]
        missed |= set(gone)
        unread = sum(edited.get(one, 0) is None for one in range(last_place + 1, place))
        if len(gone) > unread:
            yield Problem(place, f"{_numbers(gone)} {'is' if len(gone) == 1 else 'are'} missing before it")
        elif number < last_number or (last_number + 1 not in (number, lost_from) and place == last_place + 1):
            yield Problem(
                place, f"number {number} stands after number {last_number}: lines were moved, or one was added"
            )
        last_number, last_place = number, place


def _check_chain(lines: dict[int, AnyLine]) -> Iterator[Problem]:
    """A genuine line names its forerunner's digest; only who holds the site's key could have replaced that one."""
    by_number: dict[int, AnyLine] = {}
    for line in lines.values():
        by_number.setdefault(line.number, line)
    for place, line in lines.items():
        before = by_number.get(line.number - 1)
        expected = NOTHING_BEFORE if line.number == 1 else before.sha256 if before is not None else line.previous
        if line.previous != expected:
            yield Problem(place, f"names another line before it: number {line.number - 1} was replaced")


def _check_against(lines: dict[int, AnyLine], witnesses: Sequence[Witness]) -> Iterator[Problem]:
    held = {line.sha256 for line in lines.values()}
    places = {line.number: place for place, line in lines.items()}
    end = max(places, default=0)
    restored = [range(line.lost_from, line.number) for line in lines.values() if isinstance(line, RestoredLine)]
    if centre_keys := sorted({one.countersignature.key for one in witnesses})[1:]:
        yield Problem(None, f"the centre countersigned with {len(centre_keys) + 1} different keys")
    for one in witnesses:
        number, signed = one.receipt.number, one.countersignature
        if signed.sha256 in held or any(number in lost for lost in restored):
            continue
        if number > end:
            yield Problem(
                None,
                f"number {number}, which the centre countersigned at {signed.time}, is gone: the log ends at {end}",
            )
        else:
            what = f"is not the number {number} that the centre countersigned at {signed.time}"
            place = places.get(number)
            missing = f"number {number}, which the centre countersigned at {signed.time}, is not in the log"
            yield Problem(place, missing if place is None else what)


def _notes(lines: dict[int, AnyLine]) -> Iterator[Problem]:
    for place, line in lines.items():
        if isinstance(line, TornLine):
            yield Problem(
                place,
                f"a process was killed while it wrote this line; {len(line.fragment)} bytes were kept, and its message "
                f"did not leave (noted {line.time})",
            )
        elif isinstance(line, RestoredLine):
            lost = list(range(line.lost_from, line.number))
            which = f"{_numbers(lost)} lost" if lost else "the log had gone another way than the centre's"
            yield Problem(
                place, f"an operator confirmed that the log was restored from a backup: {which} ({line.time})"
            )


def _numbers(numbers: Sequence[int]) -> str:
    """``number 7`` or ``numbers 7 to 9``; these are consecutive but for lines that stand elsewhere."""
    return f"number {numbers[0]}" if len(numbers) == 1 else f"numbers {numbers[0]} to {numbers[-1]}"
