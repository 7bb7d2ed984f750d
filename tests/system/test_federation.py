"""A centre and three hospitals as real processes over real TLS, on real images."""

import csv
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.shared_data, pytest.mark.timeout(900)]

LABS = ("lab_a_256", "lab_b_360", "lab_c_696")
TAKE = {"train": 8, "val": 2, "test": 2}
SETTINGS = """\
task: {name: nuclei in fluorescence microscopy, classes: {nucleus: 255}}
model: {backbone: lite_medsam}
train: {local_epochs: 1, batch_size: 2, learning_rate: 3.0e-3, views: [identity]}
federation: {num_rounds: 3, sites: [lab_a_256, lab_b_360, lab_c_696]}
"""


def write_nuclei(source: Path, folder: Path) -> None:
    """A few real images of each laboratory: one manifest for all, and one for each."""
    columns = ("image", "mask", "patient", "split", "site")
    with (source / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    taken: Counter[tuple[str, str]] = Counter()
    for lab in LABS:
        shutil.copytree(source / lab, folder / lab)
        (folder / lab / "manifest.csv").write_text(",".join(columns) + "\n")
    everything = (folder / "manifest.csv").open("w")
    everything.write(",".join(columns) + "\n")
    for row in rows:
        key = (row["site"], row["split"])
        taken[key] += 1
        if row["site"] not in LABS or taken[key] > TAKE[row["split"]]:
            continue
        everything.write(",".join(row[name] for name in columns) + "\n")
        with (folder / row["site"] / "manifest.csv").open("a") as own:
            own.write(",".join(row[name].removeprefix(f"{row['site']}/") for name in columns) + "\n")
    everything.close()


@pytest.fixture(scope="module")
def nuclei(new_federation: Callable[..., Any], test_data: Callable[[str], Path]) -> Any:
    source = test_data("nuclei_fluorescence")
    return new_federation(
        name="nuclei", sites=LABS, settings=SETTINGS, write_data=lambda folder: write_nuclei(source, folder)
    )


@pytest.fixture(scope="module")
def finished(nuclei: Any) -> dict[str, Any]:
    """The whole run once, with a look at it in round 2."""
    told: dict[str, Any] = {}
    sites = {site: nuclei.start_site(site) for site in LABS}
    centre = nuclei.start_centre()
    nuclei.wait_for("round 2", lambda: nuclei.status().get("round") == 2)
    told["torch in the centre"] = centre.loaded("torch")
    told["python in the centre"] = centre.loaded("libc.so")
    told["status"] = nuclei.run("server", "status", "--dir", nuclei.centre)
    told["centre exit"] = centre.process.wait(600)
    told["centre output"] = centre.output
    for site in sites.values():
        site.process.send_signal(signal.SIGTERM)
    told["site exits"] = [site.process.wait(60) for site in sites.values()]
    return told


def test_three_labs_finish_three_rounds(nuclei: Any, finished: dict[str, Any]) -> None:
    assert finished["centre exit"] == 0, finished["centre output"]
    rounds = nuclei.rounds()
    assert [line["round"] for line in rounds] == [1, 2, 3, 3]
    assert all(line["answered"] == list(LABS) for line in rounds)
    assert set(nuclei.results()["sites"]) == set(LABS)
    assert (nuclei.run_dir / "report.html").stat().st_size > 10_000
    assert finished["site exits"] == [0, 0, 0]
    print("seconds a round:", [round(line["seconds"], 1) for line in rounds[:3]])


def test_weights_are_those_of_a_simulation_with_the_same_seed(nuclei: Any, finished: dict[str, Any]) -> None:
    out = nuclei.root / "simulated"
    nuclei.run("simulate", nuclei.config, "--data", nuclei.root / "data", "--out", out)
    real, simulated, start = nuclei.weights(3), nuclei.weights(3, out), nuclei.weights(0, out)
    assert set(real) == set(simulated)
    difference = max(float(np.abs(real[name] - simulated[name]).max()) for name in real)
    print(f"greatest difference to the simulation: {difference:.1e}")
    assert difference <= 1e-4
    assert max(float(np.abs(real[name] - start[name]).max()) for name in real) > 1e-3


def test_only_experts_and_router_travelled(nuclei: Any, finished: dict[str, Any]) -> None:
    assert all(name.startswith(("experts.", "router.")) for name in nuclei.weights(3))
    assert nuclei.results()["backbone_sha256_before"] == nuclei.results()["backbone_sha256_after"]


def test_no_process_of_the_centre_imports_torch(finished: dict[str, Any]) -> None:
    assert finished["torch in the centre"] == []
    assert len(finished["python in the centre"]) >= 5


def test_status_shows_the_roll_call(finished: dict[str, Any]) -> None:
    assert "round 2 of 3" in finished["status"]
    for word in ("superlink", "superexec", "gateway", *LABS):
        assert word in finished["status"]


def test_a_finished_run_is_not_started_again(nuclei: Any, finished: dict[str, Any]) -> None:
    before = (nuclei.run_dir / "results.json").read_bytes()
    output = nuclei.run("server", "start", "--dir", nuclei.centre, "--config", nuclei.config)
    assert "finished" in output
    assert (nuclei.run_dir / "results.json").read_bytes() == before


def test_a_revoked_key_is_refused_in_words(nuclei: Any, finished: dict[str, Any]) -> None:
    """Cut off means an AuthError, exit code 5, after the minute that a dead session would explain."""
    site = LABS[0]
    nuclei.run("sites", "revoke", site, "--dir", nuclei.centre, "--yes")
    config = nuclei.root / "again.yaml"
    config.write_text(SETTINGS.replace("num_rounds: 3", "num_rounds: 1"))
    centre = nuclei.start("centre", "server", "start", "--dir", nuclei.centre, "--config", config)
    nuclei.wait_for("the centre", lambda: f"{site} was cut off" in centre.output)
    started = time.monotonic()
    client = nuclei.start_site(site)
    assert client.process.wait(300) == 5, client.output
    print(f"refused after {time.monotonic() - started:.0f} s")
    assert f"does not accept the key of {site}" in client.output
    assert "Traceback" not in client.output
    centre.process.send_signal(signal.SIGTERM)
    assert centre.process.wait(60) == 130
