"""``icmoe-fl site init`` against a real TLS server: keys, pinned authority, enrolment, a second call."""

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from typer.testing import CliRunner

from icmoe.commands.site import site_app
from icmoe.enrolment import Enrolment
from icmoe.errors import ConfigError, ConnectError, RunError, TlsError
from icmoe_client.site_file import load_site
from icmoe_client.site_init import Initialised, init_site
from icmoe_client.site_keys import flower_public_key, make_flower_key, make_receipt_key, receipt_public_key

Init = Callable[..., Initialised]


@pytest.fixture
def server(authority: Any, serve: Callable[..., int]) -> str:
    return f"127.0.0.1:{serve(authority.issue('127.0.0.1'))}"


@pytest.fixture
def init(tmp_path: Path, server: str, authority: Any) -> Init:
    """Make hospitalA into ``site/``; arguments can be changed."""

    def run(**changes: Any) -> Initialised:
        usual = {"server": server, "data": tmp_path / "data", "ca_sha256": authority.sha256, "ca_file": None}
        return init_site(tmp_path / "site", name="hospitalA", **(usual | changes))

    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_makes_everything(init: Init, tmp_path: Path, authority: Any, server: str) -> None:
    done = init()
    site = load_site(tmp_path / "site" / "hospitalA.yaml", name="hospitalA")
    assert site == done.site
    assert (site.server, site.data) == (server, tmp_path / "data")
    assert site.ca_certificate is not None
    assert site.ca_certificate.read_bytes() == authority.file.read_bytes()
    assert [mode(key) for key in (site.flower_key, site.receipt_key)] == [0o600, 0o600]
    assert [mode(folder) for folder in (site.state_dir, site.flower_key.parent)] == [0o700, 0o700]
    assert done.enrolment == Enrolment.read(done.enrolment_file)
    assert done.enrolment.flower_public_key == flower_public_key(site.flower_key)
    assert done.enrolment.receipt_public_key == receipt_public_key(site.receipt_key)
    assert len(done.made) == 5
    assert not done.kept


def test_nothing_private_travels(init: Init) -> None:
    done = init()
    text = done.enrolment_file.read_text()
    assert "PRIVATE" not in text
    assert set(done.enrolment.model_dump()) == {
        "site", "flower_public_key", "receipt_public_key", "icmoe_version", "flwr_version", "created",
    }  # fmt: skip


def test_a_wide_umask_opens_nothing(init: Init, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; os.umask(0)\n"
        "from icmoe_client import site_keys\n"
        "site_keys.make_flower_key(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "key")], check=True)
    assert mode(tmp_path / "key") == 0o600


def test_ssh_keygen_reads_the_flower_key(init: Init) -> None:
    site = init().site
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", site.flower_key], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[:2] == flower_public_key(site.flower_key).split()


def test_second_call_keeps_all_and_shows_the_enrolment(init: Init, tmp_path: Path) -> None:
    first = init()
    before = contents(tmp_path)
    again = init_site(tmp_path / "site", name="hospitalA", server=None, data=None, ca_sha256=None, ca_file=None)
    assert contents(tmp_path) == before
    assert again.enrolment == first.enrolment
    assert again.made == ()
    assert set(again.kept) == set(first.made)


@pytest.mark.parametrize("lost", ["ca.crt", "flower.key", "receipt.key"])
def test_makes_what_is_missing(lost: str, init: Init, tmp_path: Path) -> None:
    first = init()
    path = tmp_path / "site" / "hospitalA" / lost
    path.unlink()
    again = init()
    assert path in again.made
    assert again.enrolment.fingerprint == flower_public_key_fingerprint(again)
    same_keys = again.enrolment.model_dump(exclude={"created"}) == first.enrolment.model_dump(exclude={"created"})
    assert same_keys is (lost == "ca.crt")
    assert Enrolment.read(again.enrolment_file) == again.enrolment


def flower_public_key_fingerprint(done: Initialised) -> str:
    return Enrolment.model_validate(
        done.enrolment.model_dump() | {"flower_public_key": flower_public_key(done.site.flower_key)}
    ).fingerprint


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"server": "other.example.org:1"}, r"names the server 127.*, not other\.example\.org:1\. Change it there"),
        ({"data": Path("/elsewhere")}, r"names the data folder .*, not /elsewhere\. Change it there"),
    ],
)
def test_second_call_does_not_look_as_if_it_changed(changes: dict[str, Any], sentence: str, init: Init) -> None:
    init()
    with pytest.raises(ConfigError, match=sentence):
        init(**changes)


class TestAuthority:
    def test_other_fingerprint(self, init: Init, tmp_path: Path, authority: Any) -> None:
        with pytest.raises(TlsError, match=rf"authority {authority.sha256}, but --ca-sha256 is {'0' * 64}.*man in the"):
            init(ca_sha256="0" * 64)
        assert not (tmp_path / "site").exists()

    def test_as_people_write_it(self, init: Init, authority: Any) -> None:
        text = authority.sha256.upper()
        assert init(ca_sha256="SHA256:" + ":".join(text[i : i + 2] for i in range(0, 64, 2))).made

    def test_not_a_fingerprint(self, init: Init) -> None:
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            init(ca_sha256="5d1f")

    def test_neither(self, init: Init) -> None:
        with pytest.raises(ConfigError, match=r"--ca-sha256 HEX.*--ca-file FILE"):
            init(ca_sha256=None)

    def test_fingerprint_of_the_servers_own(self, init: Init, authority: Any) -> None:
        chain = next(path for path in authority.folder.glob("*.crt") if path != authority.file)
        own = x509.load_pem_x509_certificates(chain.read_bytes())[0].fingerprint(hashes.SHA256()).hex()
        with pytest.raises(TlsError, match="the server's own certificate, which changes with every renewal"):
            init(ca_sha256=own)

    def test_server_without_a_chain(self, init: Init, authority: Any, serve: Callable[..., int]) -> None:
        port = serve(authority.issue("127.0.0.1", with_chain=False))
        with pytest.raises(TlsError, match=r"shows only its own certificate.*--ca-file"):
            init(server=f"127.0.0.1:{port}")

    def test_no_server(self, init: Init, tmp_path: Path) -> None:
        with pytest.raises(ConnectError, match="Nobody listens"):
            init(server="127.0.0.1:1")
        assert not (tmp_path / "site").exists()

    def test_file_needs_no_server(self, init: Init, authority: Any) -> None:
        site = init(server="127.0.0.1:1", ca_sha256=None, ca_file=authority.file).site
        assert site.ca_certificate is not None
        assert site.ca_certificate.read_bytes() == authority.file.read_bytes()

    def test_file_is_compared(self, init: Init, authority: Any) -> None:
        with pytest.raises(TlsError, match=rf"{authority.sha256}, but {'0' * 64} was given"):
            init(ca_sha256="0" * 64, ca_file=authority.file)

    def test_second_call_compares(self, init: Init, make_authority: Callable[[str], Any]) -> None:
        init()
        other = make_authority("other")
        with pytest.raises(TlsError, match="Nothing was changed"):
            init(ca_sha256=other.sha256)
        with pytest.raises(TlsError, match="Nothing was changed"):
            init(ca_sha256=None, ca_file=other.file)

    def test_file_is_no_certificate(self, init: Init, tmp_path: Path) -> None:
        (tmp_path / "x.crt").write_text("hello")
        with pytest.raises(ConfigError, match="no certificate in PEM form"):
            init(ca_file=tmp_path / "x.crt")


class TestKeys:
    def test_never_overwrites(self, tmp_path: Path) -> None:
        path = tmp_path / "flower.key"
        path.write_text("precious")
        with pytest.raises(RunError, match=r"cannot write .*File exists"):
            make_flower_key(path)
        assert contents(tmp_path) == {path: b"precious"}

    def test_open_to_others(self, tmp_path: Path) -> None:
        path = tmp_path / "flower.key"
        make_flower_key(path)
        path.chmod(0o640)
        with pytest.raises(ConfigError, match=r"others on this machine may read.*\nRun 'chmod 600"):
            flower_public_key(path)

    def test_kinds_are_not_mixed_up(self, tmp_path: Path) -> None:
        make_flower_key(tmp_path / "flower.key")
        make_receipt_key(tmp_path / "receipt.key")
        with pytest.raises(ConfigError, match="no unencrypted private key in OpenSSH format"):
            flower_public_key(tmp_path / "receipt.key")
        with pytest.raises(ConfigError, match="not an Ed25519 key"):
            receipt_public_key(tmp_path / "flower.key")

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (("-t", "ed25519", "-N", ""), "not an EC P-384 key"),
            (("-t", "ecdsa", "-b", "256", "-N", ""), "not an EC P-384 key"),
            (("-t", "ecdsa", "-b", "384", "-N", "secret"), "no unencrypted private key in OpenSSH format"),
        ],
    )
    def test_keys_of_ssh_keygen(self, arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", *arguments, "-f", tmp_path / "key"], check=True)
        with pytest.raises(ConfigError, match=sentence):
            flower_public_key(tmp_path / "key")

    def test_ed25519_of_ssh_keygen_signs_receipts(self, tmp_path: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
        assert len(receipt_public_key(tmp_path / "key")) == 64

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"No such file.*\nRun 'icmoe-fl site init'"):
            receipt_public_key(tmp_path / "key")


class TestCommand:
    def test_shows_what_to_do_next(self, tmp_path: Path, server: str, authority: Any) -> None:
        arguments = ["init", "hospitalA", "--dir", str(tmp_path / "site")]
        more = ["--server", server, "--ca-sha256", authority.sha256, "--data", str(tmp_path)]
        first = CliRunner().invoke(site_app, arguments + more, catch_exceptions=False)
        assert first.exit_code == 0
        assert "made  " in first.output
        assert "Send hospitalA.enrolment.json to the centre" in first.output
        again = CliRunner().invoke(site_app, arguments, catch_exceptions=False)
        assert "made  " not in again.output
        assert again.output.split("Enrolment of")[1] == first.output.split("Enrolment of")[1]

    def test_default_folder(self, tmp_path: Path, authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_SITE_DIR", str(tmp_path / "mine"))
        more = ["--server", "h:1", "--ca-file", str(authority.file), "--data", "x"]
        CliRunner().invoke(site_app, ["init", "a", *more], catch_exceptions=False)
        assert (tmp_path / "mine" / "a.yaml").is_file()

    def test_new_site_needs_server_and_data(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="needs --server HOST:PORT and --data DIR"):
            CliRunner().invoke(site_app, ["init", "a", "--dir", str(tmp_path)], catch_exceptions=False)

    def test_names_that_are_none(self, tmp_path: Path) -> None:
        more = ["--server", "h", "--ca-sha256", "0" * 64, "--data", "x", "--dir", str(tmp_path / "new")]
        with pytest.raises(ConfigError, match=r"(?s)name: .*server: .*host:port"):
            CliRunner().invoke(site_app, ["init", "a b", *more], catch_exceptions=False)
        assert not (tmp_path / "new").exists()
