"""An egress log that somebody changed, and the commands that say so."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from icmoe.audit import Audit, read_witnesses, verify_log
from icmoe.commands.audit import audit_app
from icmoe.errors import ConfigError, PrivacyError
from icmoe.exchange import SiteReport
from icmoe.receipts import Epsilon, TornLine, parse_line
from icmoe.types import Array
from icmoe_client.egress_log import EgressLog
from icmoe_client.site_keys import make_receipt_key, receipt_public_key
from icmoe_server.receipts import ReceiptBook

NUM_LINES = 12
TENSORS: dict[str, Array] = {
    "experts.basic.0.up.weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "router.gate.weight": np.array([0.25], np.float32),
}
runner = CliRunner()


def report(server_round: int) -> SiteReport:
    return SiteReport(
        site="oslo",
        server_round=server_round,
        config_digest="c" * 64,
        backbone_digest="b" * 64,
        numbers={"num_examples": 40.0, "dice": 0.75, "train_loss": 1e-07},
        expert_shares={"basic.0": 1.0},
        dice_per_class=(0.5, float("nan")),
    )


class Oslo:
    """A site with a log, and a centre that countersigns what it gets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.key = folder, folder / "egress.jsonl", folder / "receipt.key"
        self.run_dir = folder / "run"
        folder.mkdir(exist_ok=True)
        make_receipt_key(self.key)
        self.log = EgressLog(self.path, key=self.key, site="oslo")
        self.book = ReceiptBook(self.run_dir, key=folder / "pki" / "receipts.key", heads=folder / "heads.json")

    def send(self, server_round: int, *, arrives: bool = True) -> None:
        epsilon = Epsilon(value=0.3 * server_round, delta=1e-5, accountant="rdp", unit="patient")
        receipt = self.log.append(
            report(server_round), TENSORS, run="demo", job="train", patients=13, images=40, epsilon=epsilon
        )
        if arrives:
            public = receipt_public_key(self.key)
            accepted = self.book.accept(
                receipt.to_json(),
                site="oslo",
                public_key=public,
                job="train",
                report=report(server_round),
                arrays=TENSORS,
            )
            self.book.write(server_round, [accepted])

    def lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)

    def write(self, *lines: bytes) -> Audit:
        self.path.write_bytes(b"".join(lines))
        return verify_log(self.path)

    def against_centre(self) -> Audit:
        return verify_log(self.path, against=read_witnesses(self.run_dir, site="oslo"))


@pytest.fixture
def oslo(tmp_path: Path) -> Oslo:
    """Twelve messages that all arrived."""
    site = Oslo(tmp_path)
    for server_round in range(1, NUM_LINES + 1):
        site.send(server_round)
    return site


def places(audit: Audit) -> set[int | None]:
    return {problem.line for problem in audit.problems}


def test_audit_of_an_honest_log_finds_nothing(oslo: Oslo) -> None:
    audit = oslo.against_centre()
    assert audit.problems == audit.notes == ()
    assert [receipt.number for receipt in audit.receipts] == list(range(1, NUM_LINES + 1))
    assert audit.keys == [receipt_public_key(oslo.key)]


def test_audit_finds_200_random_changes_from_the_log_alone(oslo: Oslo) -> None:
    lines = oslo.lines()
    rng = random.Random(7)
    for trial in range(200):
        place = rng.randrange(NUM_LINES)
        other = rng.choice([one for one in range(NUM_LINES) if one != place])
        text = bytearray(lines[place])
        position = rng.randrange(len(text))
        match trial % 5:
            case 0:
                text[position] = rng.choice([byte for byte in range(256) if byte != text[position]])
                audit = oslo.write(*lines[:place], bytes(text), *lines[place + 1 :])
                assert place + 1 in places(audit), (trial, position)
            case 1:
                del text[position]
                audit = oslo.write(*lines[:place], bytes(text), *lines[place + 1 :])
                assert place + 1 in places(audit), (trial, position)
            case 2:
                text.insert(position, rng.randrange(256))
                audit = oslo.write(*lines[:place], bytes(text), *lines[place + 1 :])
                # A newline put in front of a line is found as a line of its own.
                assert {place + 1, place + 2} & places(audit), (trial, position)
            case 3:
                place = min(place, NUM_LINES - 2)
                audit = oslo.write(*lines[:place], *lines[place + 1 :])
                assert [str(one) for one in audit.problems] == [
                    f"line {place + 1}: number {place + 1} is missing before it"
                ]
            case _:
                changed = list(lines)
                changed[place], changed[other] = changed[other], changed[place]
                audit = oslo.write(*changed)
                assert {place + 1, other + 1} <= places(audit), (trial, place, other)
                assert any("moved" in problem.what for problem in audit.problems)


def test_audit_finds_single_bits_of_the_last_line(oslo: Oslo) -> None:
    """No later line vouches for the last one: its signature and its one form must."""
    *before, last = oslo.lines()
    before = before[-1:]
    for position in [*range(0, len(last), 4), len(last) - 1]:
        text = bytearray(last)
        text[position] ^= 1
        oslo.path.write_bytes(b"".join([*before, bytes(text)]))
        assert 2 in places(verify_log(oslo.path)), (position, chr(last[position]))


def test_audit_tells_repeated_extra_and_replaced_lines_apart(oslo: Oslo, tmp_path: Path) -> None:
    lines = oslo.lines()
    assert str(oslo.write(*lines[:5], lines[2], *lines[5:]).problems[0]) == "line 6: repeats line 3"
    foreign = Oslo(tmp_path / "other")
    foreign.send(1)
    found = oslo.write(*lines[:5], *foreign.lines(), *lines[5:]).problems
    assert {problem.line for problem in found} == {6}
    assert "another key" in found[0].what
    assert oslo.write(*lines[:5], b"\n", *lines[5:]).problems[0].line == 6
    whole_other_way = lines[0].replace(b'","', b'", "', 1)
    assert oslo.write(whole_other_way, *lines[1:]).problems[0].line == 1


def test_audit_tells_an_edited_line_and_a_missing_one_beside_it_apart(oslo: Oslo) -> None:
    lines = oslo.lines()
    edited = lines[6].replace(b'"dice":0.75', b'"dice":0.95')
    assert [str(one) for one in oslo.write(*lines[:6], edited, *lines[8:]).problems] == [
        "line 7: was edited: the signature of number 7 does not fit it",
        "line 8: number 8 is missing before it",
    ]
    assert [str(one) for one in oslo.write(*lines[:6], b"{}\n", *lines[7:]).problems] == [
        "line 7: is no line of an egress log, or was edited"
    ]


def test_audit_shows_a_line_rewritten_with_the_sites_own_key(oslo: Oslo, tmp_path: Path) -> None:
    lines = oslo.lines()
    forger = Oslo.__new__(Oslo)
    forger.path = tmp_path / "forged.jsonl"
    forger.path.write_bytes(b"".join(lines[:4]))
    forger.log = EgressLog(forger.path, key=oslo.key, site="oslo")
    forger.send(99, arrives=False)
    audit = oslo.write(*lines[:4], forger.lines()[4], *lines[5:])
    assert [str(one) for one in audit.problems] == ["line 6: names another line before it: number 5 was replaced"]
    oslo.write(*forger.lines())
    assert verify_log(oslo.path).problems == ()
    said = [str(problem) for problem in oslo.against_centre().problems]
    assert said[0].startswith("line 5: is not the number 5 that the centre countersigned")
    assert len(said) == NUM_LINES - 4


def test_audit_finds_cut_tails_only_against_the_centre(oslo: Oslo) -> None:
    lines = oslo.lines()
    for kept in range(NUM_LINES):
        assert oslo.write(*lines[:kept]).problems == ()
        found = oslo.against_centre().problems
        assert len(found) == NUM_LINES - kept
        assert f"number {kept + 1}, which the centre countersigned" in found[0].what
        assert f"the log ends at {kept}" in found[0].what


def test_audit_of_a_torn_line_says_so_before_and_after_it_is_set_aside(oslo: Oslo) -> None:
    lines = oslo.lines()
    torn = lines[-1][:100]
    assert "ends in the middle" in oslo.write(*lines, torn).problems[0].what
    oslo.send(NUM_LINES + 1)
    audit = oslo.against_centre()
    assert audit.problems == ()
    assert [note.line for note in audit.notes] == [NUM_LINES + 1]
    kept = parse_line(oslo.lines()[NUM_LINES].rstrip(b"\n"))
    assert isinstance(kept, TornLine)
    assert kept.fragment.encode("latin-1") == torn


def test_audit_takes_two_keys_of_a_site_that_enrolled_again(oslo: Oslo) -> None:
    old = receipt_public_key(oslo.key)
    oslo.key.unlink()
    make_receipt_key(oslo.key)
    oslo.log = EgressLog(oslo.path, key=oslo.key, site="oslo")
    oslo.send(13)
    assert [problem.line for problem in verify_log(oslo.path).problems] == [13]
    assert verify_log(oslo.path, keys=[old, receipt_public_key(oslo.key)]).problems == ()


def test_audit_verify_command(oslo: Oslo) -> None:
    public = receipt_public_key(oslo.key)
    done = runner.invoke(audit_app, ["verify", str(oslo.path), "--against", str(oslo.run_dir), "--key", public])
    assert (done.exit_code, done.output) == (0, "The log holds: 12 messages, 12 lines, numbers 1 to 12.\n")
    key_file = oslo.folder / "oslo.pub"
    key_file.write_text("0" * 64 + "\n")
    done = runner.invoke(audit_app, ["verify", str(oslo.path), "--key", str(key_file), "--json"])
    assert isinstance(done.exception, PrivacyError)
    assert len(json.loads(done.output)["problems"]) == NUM_LINES
    oslo.write(*oslo.lines()[1:])
    done = runner.invoke(audit_app, ["verify", str(oslo.path)])
    assert "line 1: number 1 is missing before it" in done.output
    assert "does not hold: 1 problem." in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "nowhere.jsonl"], "cannot read the egress log"),
        (["verify", "LOG", "--against", "."], "holds no countersigned receipt of oslo"),
        (["verify", "LOG", "--key", "abc"], "64 hexadecimal digits"),
    ],
)
def test_audit_command_refuses_what_it_cannot_read(oslo: Oslo, arguments: list[str], words: str) -> None:
    given = [str(oslo.path) if argument == "LOG" else argument for argument in arguments]
    done = runner.invoke(audit_app, given)
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


def test_audit_refuses_a_changed_witness(oslo: Oslo) -> None:
    file = next((oslo.run_dir / "checkpoints").glob(".round_003.*"))
    file.write_text(file.read_text().replace('"round": 3', '"round": 4', 1))
    with pytest.raises(ConfigError, match="the file was changed"):
        read_witnesses(oslo.run_dir)


def test_audit_show_reads_the_log_to_a_person(oslo: Oslo) -> None:
    page = oslo.folder / "egress.html"
    oslo.path.write_bytes(oslo.path.read_bytes() + b'{"<b>torn')
    oslo.send(13)
    done = runner.invoke(audit_app, ["show", str(oslo.path), "--html", str(page)], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "3.9 (delta 1e-05, patient)" in done.output
    assert "Note: line 13: a process was killed" in done.output
    html = page.read_text()
    assert "the log holds" in html
    assert "experts.basic.0.up.weight" in html
    assert "<b>" not in html
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
