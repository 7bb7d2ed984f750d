"""A centre and three hospitals as real processes over real TLS, with a SuperLink and a hospital killed on the way."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SITES = ("a", "b", "c")


def adapters(run_dir: Path, server_round: int) -> dict[str, Any]:
    return dict(load_file(run_dir / "checkpoints" / f"round_{server_round:03d}" / "adapters.safetensors"))


@pytest.fixture(scope="module")
def finished(federation: Any) -> dict[str, Any]:
    """The whole story once: round 1 loses its SuperLink, round 2 a hospital's power, round 3 is quiet."""
    told: dict[str, Any] = {}
    centre = federation.start_centre()
    sites = {site: federation.start_site(site) for site in SITES}

    def in_round(number: int) -> bool:
        status = federation.status()
        asked = [how["state"] == "asked" for how in status.get("roll_call", {}).values()]
        return status.get("round") == number and status.get("state") == "training" and any(asked)

    federation.wait_for("round 1", lambda: in_round(1))
    superlink = centre.find("flower-superlink")
    assert superlink is not None
    superlink.kill()
    federation.wait_for("the end of round 1", lambda: len(federation.rounds()) >= 1)
    told["superlink again"] = centre.find("flower-superlink")

    federation.wait_for("round 2", lambda: in_round(2))
    federation.wait_for("work at a", lambda: sites["a"].find("flwr-clientapp"))
    sites["a"].kill_all()
    sites["a"] = federation.start_site("a")
    federation.wait_for("the end of round 2", lambda: len(federation.rounds()) >= 2)

    federation.wait_for("work in round 3", lambda: in_round(3) and sites["b"].find("flwr-clientapp"))
    told["torch in the centre"] = [
        process.cmdline()
        for process in centre.tree()
        if any("torch" in Path(mapped.path).name for mapped in process.memory_maps())
    ]
    told["status"] = federation.run("server", "status", "--dir", federation.centre)
    told["centre exit"] = centre.process.wait(300)
    told["centre output"] = centre.output
    for site in sites.values():
        site.process.send_signal(signal.SIGTERM)
    told["site exits"] = [site.process.wait(60) for site in sites.values()]
    told["site output"] = sites["a"].output
    return told


def test_kill_of_superlink_and_site_loses_no_site_and_counts_no_round_twice(
    federation: Any, finished: dict[str, Any]
) -> None:
    assert finished["centre exit"] == 0, finished["centre output"]
    rounds = federation.rounds()
    assert [line["round"] for line in rounds] == [1, 2, 3, 3]
    for line in rounds[:3]:
        assert line["answered"] == list(SITES)
        assert line["failed"] == line["missing"] == line["quarantined"] == {}
    assert set(finished_results(federation)["sites"]) == set(SITES)
    assert finished_results(federation)["not_scored"] == {}
    assert isinstance(finished["superlink again"], psutil.Process)
    assert (federation.run_dir / "report.html").stat().st_size > 10_000


def finished_results(federation: Any) -> dict[str, Any]:
    import json

    return dict(json.loads((federation.run_dir / "results.json").read_text()))


def test_weights_are_those_of_a_simulation_with_the_same_seed(federation: Any, finished: dict[str, Any]) -> None:
    out = federation.root / "simulated"
    federation.run("simulate", federation.config, "--data", federation.root / "data", "--out", out)
    real, simulated = adapters(federation.run_dir, 3), adapters(out, 3)
    assert set(real) == set(simulated)
    assert max(float(np.abs(real[name] - simulated[name]).max()) for name in real) <= 1e-4
    start = adapters(out, 0)
    assert max(float(np.abs(real[name] - start[name]).max()) for name in real) > 1e-3


def test_only_experts_and_router_travelled(federation: Any, finished: dict[str, Any]) -> None:
    assert all(name.startswith(("experts.", "router.")) for name in adapters(federation.run_dir, 3))
    results = finished_results(federation)
    assert results["backbone_sha256_before"] == results["backbone_sha256_after"]


def test_no_process_of_the_centre_imports_torch(finished: dict[str, Any]) -> None:
    assert finished["torch in the centre"] == []


def test_status_shows_the_roll_call(finished: dict[str, Any]) -> None:
    assert "round 3 of 3" in finished["status"]
    for process in ("superlink", "superexec", "gateway"):
        assert process in finished["status"]


def test_a_killed_hospital_waits_out_its_dead_session_and_says_so(finished: dict[str, Any]) -> None:
    assert "after a crash" in finished["site output"]
    assert finished["site exits"] == [0, 0, 0]


def test_a_finished_run_is_not_started_again(federation: Any, finished: dict[str, Any]) -> None:
    before = (federation.run_dir / "results.json").read_bytes()
    output = federation.run("server", "start", "--dir", federation.centre, "--config", federation.config)
    assert "finished" in output
    assert (federation.run_dir / "results.json").read_bytes() == before


def test_an_unregistered_key_is_refused_in_words(federation: Any, finished: dict[str, Any]) -> None:
    """Whoever was never enrolled gets no further than the check of its own data and an AuthError, exit code 5."""
    site = federation.root / "sites" / "a.yaml"
    federation.run("sites", "revoke", "a", "--dir", federation.centre, "--yes")
    config = federation.root / "again.yaml"
    config.write_text(federation.config.read_text().replace("num_rounds: 3", "num_rounds: 1"))
    centre = federation.start("centre", "server", "start", "--dir", federation.centre, "--config", config)
    federation.wait_for("the centre", lambda: "a was cut off" in centre.output)
    started = time.monotonic()
    client = federation.start("a", "client", "--site", "a", "--config", site)
    assert client.process.wait(300) == 5, client.output
    assert time.monotonic() - started > 60
    assert "does not accept the key of a" in client.output
    assert "Traceback" not in client.output
    centre.process.send_signal(signal.SIGTERM)
    assert centre.process.wait(60) == 130
