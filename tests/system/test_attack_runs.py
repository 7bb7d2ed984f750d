"""A centre that was taken over: it sends other code, or asks more than a hospital allows. Refused, the data unread."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from opened_files import OpenedFiles

from icmoe.flower_engine import app_digest, flower_environment, supernode_command
from icmoe_client.site_file import load_site
from icmoe_server.centre import Centre
from icmoe_server.registry import SiteRegistry, read_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """\
task: {name: discs, classes: {disc: 1}}
model: {backbone: lite_medsam, width: 16, residual_rank: 2}
train: {local_epochs: 3, batch_size: 2, basic_every: 2}
federation: {num_rounds: 2, sites: [a, b], quorum: 1, on_missing: continue, round_deadline: 300}
"""
STRICT = {"max_local_epochs": 1, "allowed_backbones": ["medsam_vit_b"]}
ANSWERED = ("failed", "answered")
MARKER = "foreign-code-ran-here"
FOREIGN_PROJECT = """\
[project]
name = "foreign"
version = "1.0.0"
description = "Not the app of any icmoe-fl"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "icmoe-fl"

[tool.flwr.app.components]
serverapp = "foreign.server:app"
clientapp = "foreign.client:app"
"""
FOREIGN_SERVER = """\
import json
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()
OUT = Path({out!r})


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.5)
    messages = [Message(RecordDict(), node, "train") for node in nodes]
    asked = dict(zip(grid.push_messages(messages), nodes))
    told = {{}}
    while len(told) < 2:
        for reply in grid.pull_messages(list(asked)):
            node = asked.pop(reply.metadata.reply_to_message_id)
            told[node] = reply.error.reason if reply.has_error() else "obeyed"
        time.sleep(0.5)
    OUT.with_suffix(".tmp").write_text(json.dumps(told))
    OUT.with_suffix(".tmp").rename(OUT)
"""
FOREIGN_CLIENT = f"""\
import os
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

Path(os.environ["FLWR_HOME"], "{MARKER}").touch()
app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


@pytest.fixture(scope="module")
def told(federation: Any) -> Iterator[dict[str, Any]]:
    """One run: a is a real hospital, strict in round 1; b a light one; c runs Flower as it comes, without our guard."""
    federation.config.write_text(CONFIG)
    site_file, go = federation.root / "sites" / "a.yaml", federation.root / "go"
    set_policy(site_file, STRICT)
    files = OpenedFiles(federation.root / "data" / "a")
    centre = federation.start_centre()
    federation.wait_for(
        "the registration", lambda: all(f"{site} may take part" in centre.output for site in "abc"), seconds=120
    )
    others = [start_fake(federation, "b", go=go), start_unguarded(federation, "c")]
    told: dict[str, Any] = {}
    try:
        hospital = federation.start_site("a")
        federation.wait_for("the end of the checks of a", lambda: hospital.find("flower-supernode"))
        told["read by the checks"] = files.since_last_time()
        federation.wait_for("the answer of a", lambda: standing(federation, "a").get("state") in ANSWERED)
        told["standing"] = standing(federation, "a")
        told["status"] = federation.run("server", "status", "--dir", federation.centre)
        told["read by the forbidden run"] = files.since_last_time()

        told["foreign replies"] = run_foreign_app(federation)
        told["read by the foreign app"] = files.since_last_time()

        set_policy(site_file, {})
        go.touch()
        federation.wait_for("both rounds", lambda: len(federation.rounds()) >= 2)
        told["read by the allowed run"] = files.since_last_time()
        told["output"] = hospital.output
        yield told
    finally:
        files.close()
        for process in others:
            kill(process)


def set_policy(site_file: Path, policy: dict[str, Any]) -> None:
    content = yaml.safe_load(site_file.read_text())
    site_file.write_text(yaml.safe_dump({**content, "policy": policy}))


def standing(federation: Any, site: str) -> dict[str, Any]:
    return dict(federation.status().get("roll_call", {}).get(site, {}))


def start_fake(federation: Any, site: str, *, go: Path) -> "subprocess.Popen[bytes]":
    plan = federation.root / f"{site}.plan.json"
    about = {"run_dir": str(federation.run_dir), "step": 0.01, "claims": site, "rounds": {"1": "hold"}}
    plan.write_text(json.dumps({**about, "scores": "honest", "go": str(go)}))
    program = Path(__file__).with_name("fake_hospital.py")
    command = [sys.executable, str(program), str(federation.root / "sites" / f"{site}.yaml"), str(plan)]
    return logged(federation, site, command, dict(os.environ))


def start_unguarded(federation: Any, site: str) -> "subprocess.Popen[bytes]":
    config = load_site(federation.root / "sites" / f"{site}.yaml")
    assert config.ca_certificate is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = supernode_command(
        server=config.server, ca_certificate=config.ca_certificate, key=config.flower_key, site=site, port=port
    )
    return logged(federation, site, command, flower_environment(config.state_dir / "flwr_home"))


def logged(federation: Any, site: str, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    with (federation.root / f"light-{site}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """It and what it started."""
    if process.poll() is None:
        top = psutil.Process(process.pid)
        for one in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)


def run_foreign_app(federation: Any) -> dict[str, str]:
    """Start a run of other code beside ours, as whoever owns the centre's machine can; replies of a and c."""
    from flwr.cli.build import build_fab_from_files
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    out = federation.root / "foreign.json"
    files = {
        "pyproject.toml": FOREIGN_PROJECT,
        "foreign/__init__.py": '"""Foreign."""\n',
        "foreign/server.py": FOREIGN_SERVER.format(out=str(out)),
        "foreign/client.py": FOREIGN_CLIENT,
    }
    app, _ = build_fab_from_files({name: text.encode() for name, text in files.items()})
    digest = hashlib.sha256(app).hexdigest()
    assert digest != app_digest()
    centre = Centre.load(federation.centre)
    control = ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{centre.config.superlink_port}",
        insecure=False,
        root_certificates=centre.ca_cert.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        assert control.StartRun(StartRunRequest(fab=Fab(hash_str=digest, content=app))).HasField("run_id")
    finally:
        control.close()
    federation.wait_for("the replies to the foreign app", out.exists, seconds=120)
    replies = json.loads(out.read_text())
    nodes, sites = read_nodes(centre.nodes), SiteRegistry(centre.registry).active()
    by_node = {nodes[site.fingerprint].node_id: name for name, site in sites.items()}
    return {by_node[node]: told for node, told in replies.items()}


def home(federation: Any, site: str) -> Path:
    folder = load_site(federation.root / "sites" / f"{site}.yaml").state_dir / "flwr_home"
    assert folder.is_dir()
    return folder


def test_attack_by_run_beyond_the_policy_is_refused_in_words(federation: Any, told: dict[str, Any]) -> None:
    assert told["standing"]["state"] == "failed"
    reason = told["standing"]["reason"]
    assert reason == (
        "PolicyError: this site's policy refuses the run: train.local_epochs is 3, at most 1 are allowed; "
        "model.backbone is lite_medsam, allowed are medsam_vit_b. Change the run, or ask the site."
    )
    assert "a, now: failed" in told["status"]
    assert "train.local_epochs is 3, at most 1 are allowed" in " ".join(told["status"].split())
    assert federation.rounds()[0]["failed"] == {"a": reason}


def test_attack_by_run_beyond_the_policy_leaves_the_round_to_the_others(federation: Any, told: dict[str, Any]) -> None:
    line = federation.rounds()[0]
    assert line["answered"] == ["b"]
    assert line["aggregated"]


def test_attack_by_foreign_code_is_refused_where_flower_would_run_it(federation: Any, told: dict[str, Any]) -> None:
    """The same app does run at c, which has a registered key as well but not our guard."""
    assert told["foreign replies"]["c"] == "obeyed"
    assert (home(federation, "c") / MARKER).exists()
    assert "is not on this site's allow-list; nothing was read" in told["foreign replies"]["a"]
    assert "PolicyError" in told["foreign replies"]["a"]


def test_attack_by_foreign_code_leaves_nothing_of_it_at_the_site(federation: Any, told: dict[str, Any]) -> None:
    assert not (home(federation, "a") / MARKER).exists()
    assert list(home(federation, "c").rglob("foreign/client.py")) != []
    assert list((federation.root / "sites" / "a").rglob("foreign*")) == []


def test_attack_is_refused_before_any_file_of_the_data_is_opened(told: dict[str, Any]) -> None:
    """The watch does see what the checks and an allowed round open."""
    assert told["read by the forbidden run"] == set()
    assert told["read by the foreign app"] == set()
    assert "manifest.csv" in told["read by the checks"]
    assert {"manifest.csv", "a0.png", "a0_mask.png"} <= told["read by the allowed run"]


def test_a_site_that_refused_takes_part_in_what_it_allows(federation: Any, told: dict[str, Any]) -> None:
    line = federation.rounds()[1]
    assert line["answered"] == ["a", "b"]
    assert line["failed"] == line["quarantined"] == {}
    assert line["used"]["a"] == 3
    assert "Traceback" not in told["output"]
