"""``icmoe-fl sites`` and ``icmoe-fl server init`` as people use them."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from icmoe.commands.server_init import init
from icmoe.commands.sites import sites_app
from icmoe.enrolment import Enrolment, grouped, now
from icmoe.errors import AuthError, ConfigError
from icmoe_server.centre import Centre
from icmoe_server.pki import ca_fingerprint

Run = Callable[..., Result]
ADVERTISE = "fl.example.org:8443"

app = typer.Typer()
app.add_typer(sites_app, name="sites")
app.command("init")(init)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ICMOE_CENTRE_DIR", str(tmp_path / "centre"))
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str | Path, answer: str = "") -> Result:
        result = CliRunner().invoke(app, [str(one) for one in arguments], input=answer, standalone_mode=False)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    run("init", "--advertise", ADVERTISE)
    return tmp_path / "centre"


def enrolment(folder: Path, site: str, number: int, *, flwr: str = "1.41.0") -> tuple[Path, Enrolment]:
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    made = Enrolment(
        site=site,
        flower_public_key=key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        receipt_public_key=f"{number:064x}",
        icmoe_version="0.1.0",
        flwr_version=flwr,
        created=now(),
    )
    path = folder / f"{site}.enrolment.json"
    made.write(path)
    return path, made


def test_init_ends_with_the_line_for_hospitals(run: Run, tmp_path: Path) -> None:
    shown = run("init", "--advertise", ADVERTISE, "--san", "10.0.0.5", "--bind", "127.0.0.1:9443").output
    centre = Centre.load(tmp_path / "centre")
    pinned = ca_fingerprint(centre.ca_cert)
    assert f"  icmoe-fl site init NAME --server {ADVERTISE} --ca-sha256 {pinned}\n" in shown
    assert centre.config.bind == "127.0.0.1:9443"


def test_init_needs_an_address(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--advertise HOST:PORT is needed"):
        run("init")
    assert not (tmp_path / "centre").exists()


def test_renewal_says_the_days(run: Run, folder: Path) -> None:
    shown = run("init", "--renew", "--san", "new.example.org").output
    assert "had 396 days left and now has 396" in shown
    assert "new.example.org" in shown
    with pytest.raises(ConfigError, match=r"change advertise and bind in centre.yaml"):
        run("init", "--renew", "--advertise", ADVERTISE)


def test_a_renewal_needs_a_centre(run: Run) -> None:
    with pytest.raises(ConfigError, match="is not a centre folder"):
        run("init", "--renew")


def test_add_says_what_to_compare_and_what_to_do_next(run: Run, folder: Path, tmp_path: Path) -> None:
    path, made = enrolment(tmp_path, "hospitalA", 1)
    shown = run("sites", "add", path).output
    assert f"  {grouped(made.fingerprint)}\n" in shown
    assert "icmoe-fl client --site hospitalA\n" in shown
    assert "flwr" not in shown
    assert run("sites", "add", path).output == shown


def test_add_warns_of_another_flower(run: Run, folder: Path, tmp_path: Path) -> None:
    path, _ = enrolment(tmp_path, "hospitalA", 1, flwr="1.40.2")
    assert "hospitalA has flwr 1.40.2, this centre 1." in run("sites", "add", path).output


def test_list_for_people_and_for_scripts(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "No hospital takes part yet" in run("sites", "list").output
    assert json.loads(run("sites", "list", "--json").output) == []
    made = {}
    for number, name in enumerate(("hospitalA", "hospitalB", "hospitalC"), start=1):
        path, made[name] = enrolment(tmp_path, name, number)
        run("sites", "add", path)
    run("sites", "revoke", "hospitalC", "--yes")
    seen = {
        made["hospitalA"].fingerprint: {"node_id": "77", "last_seen": "2026-01-31T08:00:00+00:00", "online": True},
        made["hospitalC"].fingerprint: {"node_id": "78", "last_seen": "2026-01-30T08:00:00+00:00", "online": True},
    }
    Centre.load(folder).nodes.write_text(json.dumps(seen))
    first, second, third = json.loads(run("sites", "list", "--json").output)
    assert first["online"] is True
    assert (first["name"], first["node_id"], first["last_seen"]) == ("hospitalA", "77", "2026-01-31T08:00:00+00:00")
    assert first["fingerprint"] == made["hospitalA"].fingerprint
    assert (second["online"], second["last_seen"], second["revoked"]) == (False, None, None)
    assert third["revoked"] is not None
    assert third["online"] is False
    rows = [line for line in run("sites", "list").output.splitlines() if "hospital" in line]
    assert ["online" in row for row in rows] == [True, False, False]
    assert [("offline" in row, "revoked" in row) for row in rows] == [(False, False), (True, False), (False, True)]


def test_nobody_is_online_when_the_centre_is_down(run: Run, folder: Path, tmp_path: Path) -> None:
    path, made = enrolment(tmp_path, "hospitalA", 1)
    run("sites", "add", path)
    nodes = Centre.load(folder).nodes
    last_seen = "2026-01-31T08:00:00+00:00"
    nodes.write_text(json.dumps({made.fingerprint: {"node_id": "77", "last_seen": last_seen, "online": True}}))
    assert json.loads(run("sites", "list", "--json").output)[0]["online"] is True
    an_hour_ago = time.time() - 3600
    os.utime(nodes, (an_hour_ago, an_hour_ago))
    (record,) = json.loads(run("sites", "list", "--json").output)
    assert (record["online"], record["last_seen"]) == (False, last_seen)


def test_revoke_asks(run: Run, folder: Path, tmp_path: Path) -> None:
    path, _ = enrolment(tmp_path, "hospitalA", 1)
    run("sites", "add", path)
    with pytest.raises(typer.Abort):
        run("sites", "revoke", "hospitalA", answer="n\n")
    with pytest.raises(typer.Abort):
        run("sites", "revoke", "hospitalA")
    assert json.loads(run("sites", "list", "--json").output)[0]["revoked"] is None
    assert "hospitalA is out since" in run("sites", "revoke", "hospitalA", answer="y\n").output
    with pytest.raises(AuthError, match="can never come back"):
        run("sites", "add", path)


def test_revoke_of_nobody_does_not_ask(run: Run, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no site 'hospitalA' takes part"):
        run("sites", "revoke", "hospitalA")
