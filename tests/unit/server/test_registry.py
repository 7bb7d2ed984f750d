import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from icmoe.enrolment import Enrolment, now
from icmoe.errors import AuthError, ConfigError, RunError
from icmoe_server.registry import NodeStatus, SiteRegistry, read_nodes

PROCESSES, SITES_EACH = 4, 6
ADD_MANY = """
import sys
from pathlib import Path
from icmoe.enrolment import Enrolment
from icmoe_server.registry import SiteRegistry
registry = SiteRegistry(Path(sys.argv[1]))
enrolments = [Enrolment.read(Path(path)) for path in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
for enrolment in enrolments:
    registry.add(enrolment)
registry.revoke(enrolments[0].site)
"""


def enrolment(site: str, number: int, *, receipt: int | None = None) -> Enrolment:
    """Of a site with the keys of a number."""
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    return Enrolment(
        site=site,
        flower_public_key=key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        receipt_public_key=f"{receipt or number:064x}",
        icmoe_version="0.1.0",
        flwr_version="1.41.0",
        created=now(),
    )


@pytest.fixture
def registry(tmp_path: Path) -> SiteRegistry:
    made = SiteRegistry(tmp_path / "sites.json")
    made.create()
    return made


def test_sites_are_added_in_order_and_found_by_name(registry: SiteRegistry) -> None:
    for number, name in enumerate(("b", "a"), start=1):
        registry.add(enrolment(name, number))
    assert [site.name for site in registry.sites()] == ["b", "a"]
    assert registry.active()["a"].fingerprint == enrolment("a", 2).fingerprint
    assert registry.active()["a"].flower_public_key == enrolment("a", 2).flower_public_key


def test_the_same_enrolment_twice_changes_nothing(registry: SiteRegistry, tmp_path: Path) -> None:
    first = registry.add(enrolment("a", 1))
    before = (tmp_path / "sites.json").stat().st_ino
    assert registry.add(enrolment("a", 1)) == first
    assert (tmp_path / "sites.json").stat().st_ino == before


@pytest.mark.parametrize("receipt", [None, 99])
def test_a_key_has_one_name(registry: SiteRegistry, receipt: int | None) -> None:
    registry.add(enrolment("a", 1))
    with pytest.raises(AuthError, match="Flower key already belongs to the site 'a'"):
        registry.add(enrolment("b", 1, receipt=receipt))
    with pytest.raises(AuthError, match="receipt key already belongs to the site 'a'"):
        registry.add(enrolment("b", 2, receipt=1))
    assert len(registry.sites()) == 1


@pytest.mark.parametrize("name", ["hospitalA", "hospitala"])
@pytest.mark.parametrize("receipt", [None, 1])
def test_a_name_that_is_taken_gets_no_other_key(registry: SiteRegistry, name: str, receipt: int | None) -> None:
    registry.add(enrolment("hospitalA", 1))
    with pytest.raises(AuthError, match=r"already (takes part with another key|belongs to the site)"):
        registry.add(enrolment(name, 2, receipt=receipt))
    with pytest.raises(AuthError, match="already takes part with another key"):
        registry.add(enrolment("hospitalA", 1, receipt=5))
    assert registry.active()["hospitalA"].fingerprint == enrolment("hospitalA", 1).fingerprint


def test_a_revoked_key_never_comes_back(registry: SiteRegistry) -> None:
    registry.add(enrolment("a", 1))
    revoked = registry.revoke("a")
    assert revoked.revoked is not None
    assert registry.active() == {}
    returning = (enrolment("a", 1), enrolment("b", 1), enrolment("a", 1, receipt=2), enrolment("a", 3, receipt=1))
    for again in returning:
        with pytest.raises(AuthError, match=r"was revoked on .* can never come back"):
            registry.add(again)
    assert registry.sites() == (revoked,)


def test_a_revoked_site_returns_with_new_keys(registry: SiteRegistry) -> None:
    registry.add(enrolment("a", 1))
    registry.revoke("a")
    new = registry.add(enrolment("a", 2))
    assert registry.active() == {"a": new}
    assert registry.add(enrolment("a", 2)) == new
    registry.revoke("a")
    assert [site.revoked is None for site in registry.sites()] == [False, False]
    for number in (1, 2):
        with pytest.raises(AuthError, match="can never come back"):
            registry.add(enrolment("a", number))


def test_who_is_not_there_cannot_be_revoked(registry: SiteRegistry) -> None:
    with pytest.raises(ConfigError, match=r"no site 'a' takes part. These do: none yet"):
        registry.revoke("a")
    registry.add(enrolment("b", 1))
    with pytest.raises(ConfigError, match="These do: b"):
        registry.revoke("a")
    registry.revoke("b")
    with pytest.raises(ConfigError, match=r"was revoked on .* already"):
        registry.revoke("b")


@pytest.mark.slow
def test_processes_at_the_same_time_lose_nothing(registry: SiteRegistry, tmp_path: Path) -> None:
    names = [[f"site-{process}-{index}" for index in range(SITES_EACH)] for process in range(PROCESSES)]
    for number, name in enumerate((name for row in names for name in row), start=1):
        enrolment(name, number).write(tmp_path / f"{name}.json")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", ADD_MANY, tmp_path / "sites.json", *(tmp_path / f"{name}.json" for name in row)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for row in names
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:  # all at once: communicate() would wait for each in turn
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * PROCESSES
    assert {site.name for site in registry.sites()} == {name for row in names for name in row}
    assert {site.name for site in registry.sites() if site.revoked} == {row[0] for row in names}


def test_an_absent_registry_is_not_an_empty_one(tmp_path: Path) -> None:
    registry = SiteRegistry(tmp_path / "sites.json")
    for use in (registry.sites, registry.active, lambda: registry.add(enrolment("a", 1)), lambda: registry.revoke("a")):
        with pytest.raises(ConfigError, match="Restore it from a backup"):
            use()
    assert not (tmp_path / "sites.json").exists()


def damage(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content["sites"][0].update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [{"name": "../a"}, {"flower_public_key": "AAAA"}, {"revoked": "no"}, {"added": None}, {"receipt_public_key": "x"}],
)
def test_a_damaged_registry_is_refused(registry: SiteRegistry, tmp_path: Path, changes: dict[str, Any]) -> None:
    registry.add(enrolment("a", 1))
    damage(tmp_path / "sites.json", **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        registry.active()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2, "sites": []}', '{"sites": [], "more": 1}'])
def test_what_is_no_registry_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sites.json").write_text(content)
    with pytest.raises(ConfigError, match="is damaged; restore it"):
        SiteRegistry(tmp_path / "sites.json").sites()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    registry = SiteRegistry(tmp_path / "gone" / "sites.json")
    with pytest.raises(RunError, match="Nothing was changed"):
        registry.revoke("a")


def test_the_file_is_private(registry: SiteRegistry, tmp_path: Path) -> None:
    registry.add(enrolment("a", 1))
    assert (tmp_path / "sites.json").stat().st_mode & 0o777 == 0o600


def test_what_the_supervisor_saw(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    assert read_nodes(path) == {}
    path.write_text(json.dumps({"ab": {"node_id": "7", "last_seen": None, "online": True}}))
    assert read_nodes(path) == {"ab": NodeStatus(node_id="7", online=True)}
    path.write_text('{"ab"')
    with pytest.raises(ConfigError, match="a running centre writes it again"):
        read_nodes(path)
