import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from icmoe.errors import ConfigError, RunError
from icmoe_server.centre import Centre, CentreConfig, init_centre, renew_certificates
from icmoe_server.centre_config import DEFAULT_BIND, DEFAULT_SUPERLINK_PORT
from icmoe_server.pki import ca_fingerprint, certificate_names
from icmoe_server.registry import SiteRegistry

ADVERTISE = "fl.example.org:8443"
INIT = """
import sys
from pathlib import Path
from icmoe.errors import ConfigError
from icmoe_server.centre import init_centre
print("ready", flush=True)
sys.stdin.readline()
try:
    init_centre(Path(sys.argv[1]), advertise="fl.example.org:8443")
except ConfigError:
    sys.exit(2)
"""


@pytest.fixture
def made(tmp_path: Path) -> Centre:
    return init_centre(tmp_path / "centre", advertise=ADVERTISE)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_init_makes(made: Centre) -> None:
    assert Centre.load(made.root) == made
    assert made.config == CentreConfig(advertise=ADVERTISE)
    assert (made.config.bind, made.config.superlink_port) == (DEFAULT_BIND, DEFAULT_SUPERLINK_PORT)
    assert len(made.superexec_secret.read_bytes()) == 32
    assert SiteRegistry(made.registry).sites() == ()
    assert certificate_names(made.server_cert) == ("fl.example.org", "localhost", "127.0.0.1")
    for folder in (made.state, made.flwr_home, made.logs, made.runs):
        assert folder.is_dir()


def test_only_the_owner_looks_inside(made: Centre) -> None:
    for path in (made.root, *made.root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert not list(made.root.rglob(".*"))


def test_an_empty_folder_that_others_could_read_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    tmp_path.chmod(0o755)
    assert stat.S_IMODE(init_centre(tmp_path, advertise=ADVERTISE).root.stat().st_mode) == 0o700


def test_all_values_come_back(tmp_path: Path) -> None:
    made = init_centre(
        tmp_path / "c", advertise="[2001:db8::1]:443", bind="[::]:9000", sans=["10.0.0.5", "fl"], superlink_port=9999
    )
    assert Centre.load(made.root).config == CentreConfig(
        advertise="[2001:db8::1]:443", bind="[::]:9000", superlink_port=9999
    )
    assert certificate_names(made.server_cert) == ("2001:db8::1", "10.0.0.5", "fl", "localhost", "127.0.0.1")


def test_a_second_init_changes_nothing(made: Centre) -> None:
    before = contents(made.root)
    with pytest.raises(ConfigError, match="is a centre already"):
        init_centre(made.root, advertise="other.example.org:1")
    assert contents(made.root) == before


def test_a_centre_that_lost_its_config_keeps_its_authority(made: Centre) -> None:
    made.config_file.unlink()
    before = contents(made.root)
    with pytest.raises(ConfigError, match=r"restore its centre.yaml from a backup"):
        init_centre(made.root, advertise=ADVERTISE)
    assert contents(made.root) == before


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    mode = tmp_path.stat().st_mode
    with pytest.raises(ConfigError, match=r"is not empty: it holds thesis.tex"):
        init_centre(tmp_path, advertise=ADVERTISE)
    assert tmp_path.stat().st_mode == mode
    with pytest.raises(ConfigError, match="is a file"):
        init_centre(tmp_path / "thesis.tex", advertise=ADVERTISE)


def test_of_two_inits_at_once_one_wins(tmp_path: Path) -> None:
    folder = tmp_path / "centre"
    both = [
        subprocess.Popen([sys.executable, "-c", INIT, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in both:
        one.communicate()
    assert sorted(one.returncode for one in both) == [0, 2]
    Centre.load(folder)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights, also where tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_an_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with nobody(), pytest.raises(RunError, match=r"cannot write the centre folder .* Choose a --dir"):
        init_centre(tmp_path / "centre", advertise=ADVERTISE)
    tmp_path.chmod(0o700)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="Not a directory"):
        init_centre(tmp_path / "file" / "centre", advertise=ADVERTISE)


def test_a_centre_of_another_user(made: Centre) -> None:
    if os.geteuid() != 0:
        made.root.chmod(0o000)
    with nobody(), pytest.raises(ConfigError, match="Run as the user who made the centre"):
        Centre.load(made.root)
    made.root.chmod(0o700)


@pytest.mark.parametrize("bytes_left", [0, 100, 400, 800])
def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path, bytes_left: int) -> None:
    root, limits = tmp_path / "centre", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot write the centre folder"):
            init_centre(root, advertise=ADVERTISE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(root.iterdir()) == []
    init_centre(root, advertise=ADVERTISE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advertise": "fl.example.org"}, r"advertise: .*host:port"),
        ({"advertise": "0.0.0.0:8443"}, r"advertise: .*under which hospitals reach it"),
        ({"advertise": "[::]:8443"}, r"advertise: .*under which hospitals reach it"),
        ({"bind": "8443"}, r"bind: .*host:port"),
        ({"superlink_port": 0}, r"superlink_port: "),
        ({"superlink_port": 8443}, r"both want port 8443"),
        ({"sans": ["a b"]}, r"'a b' is no host name"),
        ({"sans": ["*"]}, r"is no host name"),
    ],
)
def test_wrong_values_make_no_folder(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        init_centre(tmp_path / "centre", **{"advertise": ADVERTISE, **changes})
    assert not (tmp_path / "centre").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"centre.yaml is not valid"),
        ("- a", r"centre.yaml is not valid"),
        ("advertise: [", r"is not valid YAML"),
        ("bind: 0.0.0.0:1", r"advertise: Field required"),
        (f"advertise: {ADVERTISE}\nbnid: x:1", r"bnid: unknown key. Allowed here: advertise, bind, operator"),
        (f"advertise: {ADVERTISE}\noperator: {{tpc: x:1}}", r"operator.tpc: unknown key. Allowed here: socket, tcp"),
        (f"advertise: {ADVERTISE}\noperator: {{tcp: x}}", r"operator.tcp: .*host:port"),
        ("advertise: \xff", r"is not valid YAML"),
    ],
)
def test_a_wrong_config_names_the_key(made: Centre, text: str, message: str) -> None:
    made.config_file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        Centre.load(made.root)


def test_a_folder_that_is_no_centre(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"is not a centre folder. Make one with 'icmoe-fl server init"):
            Centre.load(root)


@pytest.mark.parametrize("name", ["pki/ca.crt", "pki/server.crt", "pki/server.key", "secrets/superexec", "sites.json"])
def test_what_is_lost_is_named(made: Centre, name: str) -> None:
    (made.root / name).unlink()
    with pytest.raises(ConfigError, match=f"lacks {name}; restore it"):
        Centre.load(made.root)


def test_a_centre_runs_without_the_key_of_its_authority(made: Centre) -> None:
    (made.pki / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*ca.key"):
        renew_certificates(Centre.load(made.root))


def test_paths_are_absolute(made: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.root.parent)
    centre = Centre.load(Path("centre"))
    assert centre == made
    assert centre.ca_cert.is_absolute()
    assert centre.socket == made.root / "state" / "operator.sock"
    text = made.config_file.read_text()
    for given, socket in (("run/op.sock", made.root / "run" / "op.sock"), ("/run/op.sock", Path("/run/op.sock"))):
        made.config_file.write_text(text.replace("socket: null", f"socket: {given}"))
        assert Centre.load(made.root).socket == socket


def test_a_renewal_keeps_all_but_the_certificates(made: Centre) -> None:
    before, pinned = contents(made.root), ca_fingerprint(made.ca_cert)
    made.config_file.write_text(made.config_file.read_text().replace("fl.example.org", "new.example.org"))
    names = renew_certificates(Centre.load(made.root), sans=["10.0.0.5"])
    after = contents(made.root)
    assert names == ("fl.example.org", "localhost", "127.0.0.1", "new.example.org", "10.0.0.5")
    assert {name for name in after if after[name] != before.get(name)} == {
        "centre.yaml",
        "pki/server.crt",
        "pki/operator.crt",
    }
    assert set(after) == set(before)
    assert ca_fingerprint(made.ca_cert) == pinned
