"""Differential privacy between real processes: what is booked, what leaves, what is signed, and when a site says no."""

import json
import re
import shutil
import signal
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import ConfigRecord, RecordDict
from opened_files import OpenedFiles
from safetensors.numpy import load, load_file, save
from wiretap import Sent, Wiretap, read

from icmoe.audit import RECEIPTS
from icmoe.flower import unpack_arrays
from icmoe.receipts import Receipt, parse_line
from icmoe_client.egress import METRICS
from icmoe_client.egress_log import LOG
from icmoe_client.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("a", "b", "c")
ROUNDS = 3
SETTINGS = f"""\
task: {{name: discs, classes: {{disc: 1}}}}
model: {{backbone: lite_medsam, width: 16, residual_rank: 2}}
train: {{local_epochs: 1, batch_size: 2, basic_every: 2}}
federation: {{num_rounds: {ROUNDS}, sites: [a, b, c], quorum: 2, on_missing: continue, round_deadline: 600}}
privacy: {{noise_multiplier: 2.0, target_delta: 1.0e-5}}
"""
DELTA = 1e-5
# Nothing but numbers that the receipts tell as well, and the hospital's own limit.
REFUSAL = (
    r"BudgetExhaustedError: this site allows epsilon 3 at delta 1e-05 and has spent [\d.]+; \d+ more steps with noise "
    r"multiplier 2 would reach [\d.]+. \d+ such steps still fit. Ask for more noise or fewer local epochs, or go on "
    r"without this site."
)
LEDGER = "ledger.sqlite"


@pytest.fixture(scope="module")
def private(new_federation: Any) -> Any:
    return new_federation(settings=SETTINGS)


def change_site(federation: Any, site: str, *, policy: dict[str, Any], **changes: Any) -> None:
    path = federation.root / "sites" / f"{site}.yaml"
    content = yaml.safe_load(path.read_text())
    content |= changes
    content["policy"] |= policy
    path.write_text(yaml.safe_dump(content))


def tap(federation: Any) -> Wiretap:
    """On the line of all sites, with the key that they trust."""
    pki = federation.centre / "pki"
    listen = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listen.load_cert_chain(pki / "server.crt", pki / "server.key")
    trust = ssl.create_default_context(cafile=pki / "ca.crt")
    return Wiretap(("127.0.0.1", federation.port), listen, trust)


def live(federation: Any, site: str) -> Path:
    return Path(federation.root / "sites" / site / "state")


def state(federation: Any, site: str) -> Path:
    """What a site had at the end of the run, before its ledger was lost."""
    return Path(federation.root / "saved" / site)


@pytest.fixture(scope="module")
def finished(private: Any) -> dict[str, Any]:
    """Three rounds, the budget of b enough for the first; then a loses its ledger and is asked again."""
    told: dict[str, Any] = {}
    for site in SITES:
        change_site(private, site, policy={"require_dp": True}, num_examples=3)
    change_site(private, "b", policy={"max_epsilon": 3.0})
    watches = {site: OpenedFiles(private.root / "data" / site) for site in ("a", "b")}
    with tap(private) as line:
        for site in SITES:
            change_site(private, site, policy={}, server=f"127.0.0.1:{line.port}")
        centre = private.start_centre()
        sites = {site: private.start_site(site) for site in SITES}
        private.wait_for("round 1", lambda: len(private.rounds()) >= 1, seconds=600)
        told["read in round 1"] = {site: watch.since_last_time() for site, watch in watches.items()}
        assert centre.process.wait(600) == 0, centre.output
        end(sites.values())
        told["read afterwards"] = {site: watch.since_last_time() for site, watch in watches.items()}
    told["requests"] = list(line.requests())
    told["sent"] = read(told["requests"])
    for watch in watches.values():
        watch.close()
    for site in SITES:
        change_site(private, site, policy={}, server=f"127.0.0.1:{private.port}")
    for site in SITES:
        state(private, site).mkdir(parents=True)
        for name in (LOG, LEDGER):
            shutil.copy(live(private, site) / name, state(private, site) / name)
    site_file = private.root / "sites" / "a.yaml"
    told["shown"] = json.loads(private.run("privacy", "show", "--site", "a", "--config", site_file, "--json"))
    told["refusal"] = lose_ledger(private)
    told["spent"] = f"{Ledger(state(private, 'a') / LEDGER).highest(delta=DELTA) + 1e-6:.6f}"
    confirm = ("privacy", "confirm", "--site", "a", "--config", site_file, "--reason", "the disk was lost", "--yes")
    told["too little"] = private.run(*confirm, "--epsilon", "0.1", exit_code=2)
    private.run(*confirm, "--epsilon", told["spent"])
    return told


def lose_ledger(federation: Any) -> str:
    """The reason that the centre gets from a site whose ledger is gone."""
    (live(federation, "a") / LEDGER).unlink()
    config = federation.root / "again.yaml"
    config.write_text(SETTINGS.replace(f"num_rounds: {ROUNDS}", "num_rounds: 1"))
    status = federation.centre / "runs" / "again" / "status.json"
    sites = [federation.start_site(site) for site in ("a", "c")]
    centre = federation.start("centre", "server", "start", "--dir", federation.centre, "--config", config)

    def reason() -> str:
        standing = json.loads(status.read_text())["roll_call"].get("a") if status.exists() else None
        return str(standing["reason"]) if standing and standing["state"] == "failed" else ""

    federation.wait_for("the refusal of a", reason)
    found = reason()
    end([centre, *sites])
    return found


def end(commands: Iterable[Any]) -> None:
    for running in commands:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(60)


def receipts(federation: Any, site: str) -> list[Receipt]:
    lines = [parse_line(line) for line in (state(federation, site) / LOG).read_bytes().splitlines()]
    assert all(isinstance(line, Receipt) for line in lines)
    return [line for line in lines if isinstance(line, Receipt)]


def test_ledger_refuses_beyond_the_budget_and_the_others_go_on(private: Any, finished: dict[str, Any]) -> None:
    *rounds, scored = private.rounds()
    assert [line["answered"] for line in rounds] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]
    for line in rounds[1:]:
        assert line["failed"]["b"].startswith("BudgetExhaustedError")
    assert scored["evaluate_only"]
    assert {site: len(Ledger(state(private, site) / LEDGER).entries()) for site in SITES} == {
        "a": 3,
        "b": 1,
        "c": 3,
    }


def test_ledger_is_what_the_centre_and_the_receipts_say(private: Any, finished: dict[str, Any]) -> None:
    last = private.rounds()[ROUNDS - 1]["epsilon"]
    for site in ("a", "c"):
        booked = Ledger(state(private, site) / LEDGER).highest(delta=DELTA)
        assert last[site] == pytest.approx(booked)
        assert private.results()["epsilon"][site] == pytest.approx(booked)
        trained = [receipt for receipt in receipts(private, site) if receipt.job == "train"]
        assert [receipt.epsilon.value for receipt in trained if receipt.epsilon][-1] == pytest.approx(booked)
    assert finished["shown"]["epsilon_rdp"] == pytest.approx(last["a"])


def test_ledger_that_is_exhausted_keeps_the_data_unread(finished: dict[str, Any]) -> None:
    """From the second round on, by the kernel's word; a site that trains does open them each time."""

    def opened(told: str, site: str) -> set[str]:
        files = {f"{site}{index}{kind}.png" for index in range(3) for kind in ("", "_mask")}
        return files & set(finished[told][site])

    assert opened("read in round 1", "b")
    assert opened("read afterwards", "a")
    assert opened("read afterwards", "b") == set()
    # The final test of the model, which a budget does not speak of.
    assert "b4_mask.png" in finished["read afterwards"]["b"]


def test_egress_of_a_whole_run_is_reports_and_receipts_and_nothing_else(private: Any, finished: dict[str, Any]) -> None:
    """Every request that the three sites sent, taken off the line."""
    sent: Sent = finished["sent"]
    assert sent.num_unread == 0
    assert sent.runtimes == {0.0}
    start = load_file(private.run_dir / "checkpoints" / "round_000" / "adapters.safetensors")
    carried: dict[str, list[str]] = {site: [] for site in SITES}
    num_updates = num_refusals = 0
    for message in sent.messages.values():
        if message.has_error():
            assert re.fullmatch(REFUSAL, str(message.error.reason))
            num_refusals += 1
            continue
        content, about = message.content, message.content.config_records["about"]
        if set(about) == {"site"}:
            assert set(content) == {"about"}
            assert about["site"] in SITES
            continue
        assert set(content) <= {"about", "metrics", "arrays"}
        check_about(private, about)
        check_metrics(content)
        if "arrays" in content:
            check_arrays(content, start)
            num_updates += 1
        carried[str(about["site"])].append(str(about["receipt"]))
    for site, told in carried.items():
        assert sorted(told) == sorted((state(private, site) / LOG).read_text().splitlines())
    assert num_updates == 2 * ROUNDS + 1
    assert num_refusals == ROUNDS - 1


def check_about(federation: Any, about: ConfigRecord) -> None:
    assert set(about) == {"site", "server-round", "config-sha256", "backbone-sha256", "experts", "receipt"}
    assert about["site"] in SITES
    assert about["server-round"] in range(1, ROUNDS + 1)
    results = federation.results()
    assert about["backbone-sha256"] == results["backbone_sha256_before"]
    assert about["config-sha256"] == (federation.run_dir / "config.sha256").read_text().strip()
    assert about["experts"] == []


def check_metrics(content: RecordDict) -> None:
    metrics = dict(content.metric_records["metrics"])
    assert metrics.pop("expert-shares") == []
    assert metrics.pop("dice-per-class") == []
    for name, value in metrics.items():
        rule = METRICS[name.replace("-", "_")]
        assert rule.leaves != "without_dp"
        assert isinstance(value, float)
        assert rule.low <= value <= rule.high
    assert metrics.get("num-examples", 3.0) == 3.0


def check_arrays(content: RecordDict, start: dict[str, Any]) -> None:
    record = content.array_records["arrays"]
    arrays = unpack_arrays(record)
    assert {name: (one.shape, one.dtype) for name, one in arrays.items()} == {
        name: (one.shape, one.dtype) for name, one in start.items()
    }
    assert all(np.isfinite(array).all() for array in arrays.values())
    for packed in record.values():
        assert (packed.dtype, packed.stype) == ("uint8", "numpy.ndarray")
        # Nothing beside the tensors in their container.
        bundle = packed.numpy().tobytes()
        assert save(load(bundle)) == bundle


HEADERS = {
    "accept": r"application/protobuf",
    "accept-encoding": r"identity|[a-z, ]+",
    "connection": r"keep-alive",
    "content-length": r"\d+",
    "content-type": r"application/protobuf",
    "flwr-component-name": r"SuperNode",
    "flwr-package-name": r"flwr",
    "flwr-package-version": r"[\d.]+",
    "flwr-public-key": r"[\w+/=]{288}",
    "flwr-signature": r"[\w+/=]{130,150}",
    "flwr-timestamp": r"[\d:.T+-]+",
    "host": r"127\.0\.0\.1:\d+",
    "user-agent": r"python-httpx/[\d.]+",
}


def test_egress_in_headers_is_of_the_protocol(finished: dict[str, Any]) -> None:
    values: dict[str, set[str]] = {}
    for request in finished["requests"]:
        assert len(dict(request.headers)) == len(request.headers)
        for name, value in request.headers:
            assert re.fullmatch(HEADERS[name], value), name
            values.setdefault(name, set()).add(value)
    assert len(values.pop("flwr-public-key")) == len(SITES)
    for name in ("content-length", "flwr-signature", "flwr-timestamp"):
        values.pop(name)
    assert all(len(told) <= 2 for told in values.values()), values


def test_egress_that_the_centre_wrote_down_tells_nothing_exact_of_the_training(
    private: Any, finished: dict[str, Any]
) -> None:
    for site in SITES:
        for receipt in receipts(private, site):
            assert receipt.patients is receipt.images is None
    for line in private.rounds()[:ROUNDS]:
        assert set(line["train_loss"].values()) == {None}
        assert set(line["used"].values()) == {None}
        assert all(shares == {} for shares in line["expert_shares"].values())


def test_audit_of_every_site_holds_against_the_centre(private: Any, finished: dict[str, Any]) -> None:
    for site in SITES:
        log = state(private, site) / LOG
        output = private.run("audit", "verify", log, "--against", private.run_dir)
        assert str(len(receipts(private, site))) in output
    kept = (private.run_dir / "checkpoints" / "round_001" / RECEIPTS).read_text().splitlines()
    assert {json.loads(line)["receipt"]["site"] for line in kept} >= set(SITES)


def test_audit_finds_a_cut_tail_and_an_edit(private: Any, finished: dict[str, Any], tmp_path: Path) -> None:
    whole = (state(private, "a") / LOG).read_bytes().splitlines(keepends=True)
    cut, edited = tmp_path / "cut.jsonl", tmp_path / "edited.jsonl"
    cut.write_bytes(b"".join(whole[:-1]))
    edited.write_bytes(b"".join([whole[0].replace(b'"round":1', b'"round":2'), *whole[1:]]))
    private.run("audit", "verify", cut)
    assert "is gone" in private.run("audit", "verify", cut, "--against", private.run_dir, exit_code=4)
    assert "line 1" in private.run("audit", "verify", edited, exit_code=4)


def test_a_lost_ledger_is_refused_until_what_was_spent_is_confirmed(private: Any, finished: dict[str, Any]) -> None:
    """The site's own receipts, and the centre's signature, know of more than an empty ledger does."""
    assert "privacy ledger knows of less" in finished["refusal"]
    assert "less was not spent" in finished["too little"]
    assert Ledger(live(private, "a") / LEDGER).highest(delta=DELTA) == pytest.approx(float(finished["spent"]))
