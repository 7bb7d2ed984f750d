"""Receipts at the centre: which are countersigned, and what a kill leaves of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from icmoe.audit import read_witnesses
from icmoe.checkpoint import Checkpoint, latest_checkpoint, round_folder, save_checkpoint
from icmoe.errors import ConfigError, ExchangeError, IncompatibleUpdateError
from icmoe.exchange import SiteReport
from icmoe.flower import pack_report, unpack_update
from icmoe.receipts import NOTHING_BEFORE, Receipt, describe_tensors, flat_metrics, public_half
from icmoe.types import Array
from icmoe_client.egress import EgressRules, release
from icmoe_server.receipts import Accepted, ReceiptBook

KEY = Ed25519PrivateKey.generate()
REPORT = SiteReport("oslo", 1, "c" * 64, "b" * 64, {"dice": 0.5}, {"basic.0": 1.0}, (0.5, float("nan")))
TENSORS: dict[str, Array] = {
    "experts.basic.0.up.weight": np.array([[1.0, 2.0]], np.float16),
    "router.gate.weight": np.array([0.25], np.float16),
}


def receipt(number: int = 1, previous: str = NOTHING_BEFORE, **changes: Any) -> Receipt:
    content: dict[str, Any] = {
        "number": number, "previous": previous, "time": "2026-01-31T08:00:00+00:00", "site": "oslo",
        "key": public_half(KEY), "run": "demo", "round": 1, "job": "train", "config": "c" * 64, "backbone": "b" * 64,
        "tensors": describe_tensors(TENSORS), "metrics": flat_metrics(REPORT), "patients": 3, "images": 9,
        "epsilon": None,
    }  # fmt: skip
    return Receipt(**{**content, **changes}).signed_by(KEY)


def make_book(folder: Path) -> ReceiptBook:
    return ReceiptBook(folder / "run", key=folder / "pki" / "receipts.key", heads=folder / "heads.json")


def accept(book: ReceiptBook, one: Receipt, *, report: SiteReport = REPORT, **changes: Any) -> Accepted:
    asked: dict[str, Any] = {"site": "oslo", "public_key": public_half(KEY), "job": "train", "arrays": TENSORS}
    return book.accept(one.to_json(), report=report, **{**asked, **changes})


def checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(server_round, "c" * 64, "b" * 64, TENSORS, {})


def test_a_receipt_that_fits_is_countersigned(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    one = receipt()
    signed = accept(book, one).countersignature
    assert (signed.site, signed.number, signed.sha256, signed.epsilon) == ("oslo", 1, one.sha256, None)
    assert signed.is_genuine()
    assert signed.key == book.public_key
    assert (tmp_path / "pki" / "receipts.key").stat().st_mode & 0o777 == 0o600
    assert make_book(tmp_path).public_key == book.public_key


def test_a_receipt_fits_what_flower_carried(tmp_path: Path) -> None:
    rules = EgressRules(allowed={name: (array.shape, "float16") for name, array in TENSORS.items()}, dp=False)
    numbers = {"num_examples": 7, "hd95_in_mm": 1.0, "train_loss": 0.1 + 0.2, "hd95": 1e-7}
    report, arrays = release(replace(REPORT, numbers=numbers), dict(TENSORS), rules=rules)
    assert arrays is not None
    one = receipt(metrics=flat_metrics(report), tensors=describe_tensors(arrays))
    arrived = unpack_update(pack_report(report, arrays))
    assert accept(make_book(tmp_path), one, report=arrived.report, arrays=arrived.arrays).note == ""


def test_egress_of_another_message_than_the_receipt_says_is_refused(tmp_path: Path) -> None:
    book, one = make_book(tmp_path), receipt()
    weight = "experts.basic.0.up.weight"
    for arrays in (
        {weight: TENSORS[weight]},
        {**TENSORS, "router.gate.bias": np.zeros(1, np.float16)},
        {**TENSORS, weight: TENSORS[weight] + np.float16(1)},
        {**TENSORS, weight: TENSORS[weight].astype(np.float32)},
        {**TENSORS, weight: TENSORS[weight].reshape(2)},
        {**TENSORS, weight: np.array([["x"]])},
        None,
    ):
        with pytest.raises(IncompatibleUpdateError, match="not that of this reply"):
            accept(book, one, arrays=arrays)
    for report in (
        replace(REPORT, numbers={"dice": 0.6}),
        replace(REPORT, dice_per_class=(0.5, 0.5)),
        replace(REPORT, server_round=2),
        replace(REPORT, config_digest="d" * 64),
        replace(REPORT, backbone_digest="d" * 64),
    ):
        with pytest.raises(IncompatibleUpdateError, match="not that of this reply"):
            accept(book, one, report=report)
    with pytest.raises(IncompatibleUpdateError, match="job"):
        accept(book, one, job="test")


def test_a_wrong_norm_or_a_tensor_said_twice_is_refused(tmp_path: Path) -> None:
    first, second = describe_tensors(TENSORS)
    for tensors in ((first.model_copy(update={"norm": 9.0}), second), (first, first, second)):
        with pytest.raises(IncompatibleUpdateError, match=r"norm|twice"):
            accept(make_book(tmp_path), receipt(tensors=tensors))


def test_a_receipt_of_another_site_or_key_is_refused(tmp_path: Path) -> None:
    book, one = make_book(tmp_path), receipt()
    with pytest.raises(IncompatibleUpdateError, match="'bergen' was asked"):
        accept(book, one, site="bergen")
    with pytest.raises(IncompatibleUpdateError, match="another key"):
        accept(book, one, public_key="0" * 64)
    with pytest.raises(IncompatibleUpdateError, match="signature"):
        accept(book, one.model_copy(update={"patients": 4}))


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[" * 100_000, "x" * 2**21, "\ud800", receipt().to_json() + " ",
        receipt().to_json().replace('"patients":3', '"patients":3.0'),
        receipt().to_json().replace('"patients":3', '"patients":3,"patients":3'),
        receipt().to_json().replace('"metrics":{', '"metrics":{"free text":1.0,'),
        receipt().to_json().replace('"dice":0.5', '"dice":NaN'),
        receipt().to_json().replace('"dice":0.5', '"dice":1e999'),
        receipt().to_json().replace('"run":"demo"', '"run":"John Smith"'),
        receipt().to_json().replace('"run":"demo"', '"run":"' + "1" * 65 + '"'),
    ],
)  # fmt: skip
def test_what_is_no_receipt_is_refused_in_words_without_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ExchangeError, match=r"malformed|canonical|at most") as refused:
        make_book(tmp_path).accept(
            text, site="oslo", public_key=public_half(KEY), job="train", report=REPORT, arrays=TENSORS
        )
    assert "Smith" not in str(refused.value)


def test_numbers_may_jump_but_not_go_back(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    first = receipt(5, "1" * 64)
    accepted = accept(book, first)
    assert accepted.note == "its log stood at number 5 when the centre first saw it"
    book.write(1, [accepted])
    assert accept(book, first).countersignature == accepted.countersignature
    with pytest.raises(IncompatibleUpdateError, match="number 5, and 5 was countersigned"):
        accept(book, receipt(5, "2" * 64))
    with pytest.raises(IncompatibleUpdateError, match="restored from a backup"):
        accept(book, receipt(4, "2" * 64))
    with pytest.raises(IncompatibleUpdateError, match="rewritten"):
        accept(book, receipt(6, "2" * 64))
    assert accept(book, receipt(6, first.sha256)).note == ""
    assert accept(book, receipt(8, "3" * 64)).note == "2 lines of its log before number 8 never came here"


def test_the_last_number_of_a_site_outlives_the_run(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    accepted = accept(book, receipt(7))
    book.write(1, [accepted])
    later = ReceiptBook(tmp_path / "next", key=tmp_path / "pki" / "receipts.key", heads=tmp_path / "heads.json")
    assert later.countersigned("oslo") == accepted.countersignature
    assert later.countersigned("bergen") is None


def test_receipts_lie_beside_the_checkpoint_of_their_round(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    book.write(1, [accept(book, receipt())])
    assert not round_folder(tmp_path / "run", 1).exists()
    save_checkpoint(tmp_path / "run", checkpoint(1))
    book.settle(1)
    file = round_folder(tmp_path / "run", 1) / "receipts.jsonl"
    assert len(file.read_text().splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["round_001"]
    book.write(1, [accept(book, receipt(3, "3" * 64))])
    book.settle(1)
    assert [json.loads(line)["receipt"]["number"] for line in file.read_text().splitlines()] == [1, 3]
    assert json.loads(file.read_text().splitlines()[1])["note"].startswith("1 line of its log")


@pytest.mark.parametrize("killed_after", ["write", "heads", "checkpoint", "settle"])
def test_a_centre_killed_between_two_writes_keeps_every_receipt(tmp_path: Path, killed_after: str) -> None:
    book = make_book(tmp_path)
    save_checkpoint(tmp_path / "run", checkpoint(0))
    first = receipt()
    book.write(1, [accept(book, first)])
    if killed_after == "write":
        (tmp_path / "heads.json").unlink()
    if killed_after in ("checkpoint", "settle"):
        save_checkpoint(tmp_path / "run", checkpoint(1))
    if killed_after == "settle":
        book.settle(1)
    again = make_book(tmp_path)
    assert latest_checkpoint(tmp_path / "run").server_round == (1 if killed_after in ("checkpoint", "settle") else 0)
    known = again.countersigned("oslo")
    assert known is not None
    assert known.sha256 == first.sha256
    again.write(1, [accept(again, receipt(2, first.sha256))])
    # The round is repeated, and its folder replaced.
    save_checkpoint(tmp_path / "run", checkpoint(1))
    again.settle(1)
    assert [one.receipt.number for one in read_witnesses(tmp_path / "run", site="oslo")] == [1, 2]
    assert (round_folder(tmp_path / "run", 1) / "receipts.jsonl").exists()


@pytest.mark.parametrize("name", ["heads.json", "pki/receipts.key"])
def test_a_damaged_file_of_the_centre_is_no_empty_one(tmp_path: Path, name: str) -> None:
    book = make_book(tmp_path)
    book.write(1, [accept(book, receipt())])
    (tmp_path / name).write_text("[1]")
    with pytest.raises(ConfigError, match="backup of the centre folder"):
        make_book(tmp_path)
