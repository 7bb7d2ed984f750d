"""The site's log: what is on disk when, and what a kill, a backup and a new key do to it."""

import multiprocessing
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from icmoe.audit import verify_log
from icmoe.errors import ConfigError, PrivacyError, RunError
from icmoe.exchange import SiteReport
from icmoe.receipts import Countersignature, Receipt
from icmoe_client.egress_log import COUNTERSIGNED, EgressLog
from icmoe_client.site_keys import make_receipt_key
from icmoe_server.receipts import ReceiptBook

REPORT = SiteReport("oslo", 1, "c" * 64, "b" * 64, {"dice": 0.5})
TENSORS = {"router.gate.weight": np.ones(3, np.float32)}


def make_log(folder: Path) -> EgressLog:
    key = folder / "receipt.key"
    if not key.exists():
        make_receipt_key(key)
    return EgressLog(folder / "egress.jsonl", key=key, site="oslo")


def send(log: EgressLog) -> Receipt:
    return log.append(REPORT, TENSORS, run="demo", job="train", patients=None, images=None, epsilon=None)


def countersign(folder: Path, receipt: Receipt) -> Countersignature:
    book = ReceiptBook(folder / "run", key=folder / "receipts.key", heads=folder / "heads.json")
    accepted = book.accept(
        receipt.to_json(), site="oslo", public_key=receipt.key, job="train", report=REPORT, arrays=TENSORS
    )
    book.write(1, [accepted])
    return accepted.countersignature


def test_egress_log_chains_its_lines(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    first, second = send(log), send(log)
    assert (first.number, second.number, second.previous) == (1, 2, first.sha256)
    assert log.head() == second
    assert (tmp_path / "egress.jsonl").stat().st_mode & 0o777 == 0o600
    assert second.num_bytes == 12
    assert second.norm == pytest.approx(3**0.5)


def test_egress_log_survives_a_kill_at_every_byte_of_a_line(tmp_path: Path) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    send(log)
    before = path.read_bytes()
    send(log)
    line = path.read_bytes()[len(before) :]
    for length in range(0, len(line), 37):
        path.write_bytes(before + line[:length])
        receipt = send(make_log(tmp_path))
        audit = verify_log(path)
        assert audit.problems == ()
        assert receipt.number == (2 if length == 0 else 3)
        assert len(audit.notes) == (length > 0)


def test_egress_log_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "egress.jsonl").write_bytes(b'{"backb\x00\xff')
    assert send(make_log(tmp_path)).number == 2
    assert len(verify_log(tmp_path / "egress.jsonl").notes) == 1


def test_egress_log_sends_nothing_behind_a_damaged_line(tmp_path: Path) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    send(log)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dice":0.5', b'"dice":0.9'))
    with pytest.raises(PrivacyError, match="audit verify"):
        send(log)
    path.write_bytes(content + b"x" * 2**20 + b"y")
    with pytest.raises(PrivacyError, match="no line of ours"):
        send(log)


def test_egress_log_that_cannot_be_used_sends_nothing(tmp_path: Path) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    path.mkdir()
    with pytest.raises(RunError, match=r"cannot read .* Nothing was sent"):
        send(log)


@pytest.mark.parametrize("torn", [b"", b"{"])
def test_egress_log_on_a_full_disk_sends_nothing(tmp_path: Path, torn: bytes) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    send(log)
    path.write_bytes(path.read_bytes() + torn)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        with pytest.raises(RunError, match=r"cannot write .* Nothing was sent"):
            send(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    send(log)
    audit = verify_log(path)
    assert (len(audit.receipts), len(audit.notes), audit.problems) == (2, 1, ())


def test_egress_log_of_two_processes_stays_one_chain(tmp_path: Path) -> None:
    make_log(tmp_path)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_send_many, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    audit = verify_log(tmp_path / "egress.jsonl")
    assert audit.problems == ()
    assert len(audit.receipts) == 20


def _send_many(folder: Path) -> None:
    log = make_log(folder)
    for _ in range(10):
        send(log)


def test_egress_log_keeps_what_the_centre_countersigned(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    signed = countersign(tmp_path, send(log))
    log.acknowledge(signed)
    log.acknowledge(signed)
    assert make_log(tmp_path).countersigned() == signed
    with pytest.raises(PrivacyError, match="signature is wrong"):
        log.acknowledge(signed.model_copy(update={"number": 2}))
    (tmp_path / "receipts.key").unlink()
    (tmp_path / "heads.json").unlink()
    (tmp_path / "run").rename(tmp_path / "old")
    with pytest.raises(PrivacyError, match="another key"):
        log.acknowledge(countersign(tmp_path, send(log)))
    (tmp_path / COUNTERSIGNED).write_text("{}")
    with pytest.raises(PrivacyError, match="cannot read"):
        send(log)


def test_egress_log_from_a_backup_sends_nothing_until_an_operator_confirms(tmp_path: Path) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    send(log)
    backup = path.read_bytes()
    send(log)
    signed = countersign(tmp_path, send(log))
    path.write_bytes(backup)
    with pytest.raises(PrivacyError, match="privacy confirm"):
        log.acknowledge(signed)
    with pytest.raises(PrivacyError, match="privacy confirm"):
        send(log)
    restored = log.go_on_after_loss()
    assert (restored.number, restored.lost_from, restored.previous) == (4, 2, signed.sha256)
    log.acknowledge(signed)
    after = send(log)
    assert countersign(tmp_path, after).number == 5
    audit = verify_log(path)
    assert audit.problems == ()
    assert "numbers 2 to 3 lost" in audit.notes[0].what
    with pytest.raises(ConfigError, match="nothing to confirm"):
        log.go_on_after_loss()


def test_egress_log_that_went_another_way_than_the_centre_saw(tmp_path: Path) -> None:
    log, path = make_log(tmp_path), tmp_path / "egress.jsonl"
    send(log)
    backup = path.read_bytes()
    signed = countersign(tmp_path, send(log))
    path.write_bytes(backup)
    for _ in range(2):
        log.append(REPORT, None, run="demo", job="test", patients=None, images=None, epsilon=None)
    with pytest.raises(PrivacyError, match="privacy confirm"):
        log.acknowledge(signed)
    log.go_on_after_loss()
    log.acknowledge(signed)
    assert countersign(tmp_path, send(log)).number == 5
    assert verify_log(path).problems == ()


def test_egress_log_refuses_the_log_of_another_site(tmp_path: Path) -> None:
    send(make_log(tmp_path))
    bergen = EgressLog(tmp_path / "egress.jsonl", key=tmp_path / "receipt.key", site="bergen")
    with pytest.raises(PrivacyError, match="damaged"):
        send(bergen)
