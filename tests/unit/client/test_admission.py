"""May a SuperNode start? With real TLS servers that answer as Flower's SuperLink does."""

import datetime as dt
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from icmoe.errors import AuthError, ConfigError, ConnectError, NetworkError, TlsError
from icmoe_client import admission, network_checks
from icmoe_client.admission import Admission
from icmoe_client.registration import check_registration
from icmoe_client.site_file import SiteConfig
from icmoe_client.site_init import init_site
from icmoe_client.site_lock import only_client, other_client

KNOWN = (400, json.dumps({"code": 2003, "detail": "Invalid heartbeat interval."}))
UNKNOWN = (412, json.dumps({"code": 2004, "detail": "Failed to activate SuperNode."}))
UNSIGNED = (401, json.dumps({"detail": "Invalid SuperNode authentication"}))
AWAY = (503, "the SuperLink is not reachable; try again\n")

Serve = Callable[..., int]
MakeSite = Callable[[int], SiteConfig]


@pytest.fixture
def make_site(tmp_path: Path, authority: Any) -> MakeSite:
    def make(port: int) -> SiteConfig:
        server = f"127.0.0.1:{port}"
        return init_site(
            tmp_path / "site", name="hospitalA", server=server, data=tmp_path, ca_sha256=None, ca_file=authority.file
        ).site

    return make


@pytest.fixture
def site_with(make_site: MakeSite, authority: Any, serve: Serve) -> Callable[..., SiteConfig]:
    """A site whose centre gives these answers to signed calls."""
    return lambda *answers, **how: make_site(serve(authority.issue("127.0.0.1"), answers=list(answers), **how))


@contextmanager
def running_client(site: SiteConfig) -> Iterator[int]:
    """Another process that holds the site's folder; its process id."""
    program = (
        "import sys; from pathlib import Path\n"
        "from icmoe_client.site_file import load_site; from icmoe_client.site_lock import only_client\n"
        "with only_client(load_site(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    path = site.state_dir.parent.parent / "hospitalA.yaml"
    with subprocess.Popen([sys.executable, "-c", program, path], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process.pid


class TestRegistration:
    def test_known(self, site_with: Callable[..., SiteConfig]) -> None:
        assert check_registration(site_with(KNOWN)) == "The centre accepts the key of hospitalA."

    def test_known_and_at_work_here(self, site_with: Callable[..., SiteConfig]) -> None:
        site = site_with(KNOWN)
        with running_client(site) as pid:
            assert check_registration(site).endswith(f"in use: the client of this machine runs as process {pid}.")

    @pytest.mark.parametrize(
        ("answer", "error", "sentence"),
        [
            (UNKNOWN, AuthError, r"does not accept the key of hospitalA: it was not added yet, or was revoked\.\nSend"),
            (UNSIGNED, AuthError, r"refuses the signature of this site's calls\.\nAs a rule the centre's clock"),
            (AWAY, ConnectError, r"answers a signed call with HTTP 503, so the centre does not work.*\nWait"),
            ((200, ""), ConnectError, r"with HTTP 200"),
            ((400, '{"code": 7}'), ConnectError, r"with HTTP 400"),
        ],
    )
    def test_refused(
        self, answer: tuple[int, str], error: type[Exception], sentence: str, site_with: Callable[..., SiteConfig]
    ) -> None:
        with pytest.raises(error, match=sentence):
            check_registration(site_with(answer))

    def test_nobody_there(self, make_site: MakeSite) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectError, match=r"gives no answer to a signed call \(ConnectError\)"):
                check_registration(make_site(bound.getsockname()[1]))

    def test_loopback_takes_no_proxy(
        self, site_with: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        assert "accepts" in check_registration(site_with(KNOWN))


class TestAdmission:
    def test_free(self, site_with: Callable[..., SiteConfig]) -> None:
        assert Admission(site_with(KNOWN)).obstacle() == ""

    def test_centre_away_is_waited_for(self, make_site: MakeSite) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            assert Admission(make_site(port)).obstacle() == f"Nobody listens at 127.0.0.1:{port}."

    def test_superlink_away_is_waited_for(self, site_with: Callable[..., SiteConfig]) -> None:
        assert "HTTP 503" in Admission(site_with(status=503)).obstacle()

    def test_unknown_key_gets_a_little_time(
        self, site_with: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        door = Admission(site_with(UNKNOWN, AWAY, UNKNOWN, UNKNOWN, KNOWN, UNKNOWN))
        assert "was not added yet" in door.obstacle()
        monkeypatch.setattr(admission, "UNKNOWN_PATIENCE", 0.0)
        assert "HTTP 503" in door.obstacle()
        monkeypatch.setattr(admission, "UNKNOWN_PATIENCE", 60.0)
        assert "was not added yet" in door.obstacle()
        monkeypatch.setattr(admission, "UNKNOWN_PATIENCE", 0.0)
        with pytest.raises(AuthError, match="was revoked"):
            door.obstacle()
        assert door.obstacle() == ""

    def test_wrong_certificate_is_not_waited_for(self, make_site: MakeSite, authority: Any, serve: Serve) -> None:
        with pytest.raises(TlsError, match="has expired"):
            Admission(make_site(serve(authority.issue("127.0.0.1", until=-dt.timedelta(hours=1))))).obstacle()

    def test_wrong_clock_is_not_waited_for(self, site_with: Callable[..., SiteConfig]) -> None:
        with pytest.raises(NetworkError, match=r"clock is \d+ s behind") as caught:
            Admission(site_with(KNOWN, clock=dt.timedelta(minutes=10))).obstacle()
        assert not isinstance(caught.value, ConnectError)

    @pytest.mark.slow
    def test_slow_answer_is_no_wrong_clock(
        self, site_with: Callable[..., SiteConfig], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The date came 2.2 s after it was written, so the clock seems 0.05 to 1.05 s ahead: not beyond doubt."""
        monkeypatch.setattr(network_checks, "MAX_AHEAD", 0.0)
        site = site_with(KNOWN, delay=2.2, clock=dt.timedelta(seconds=0.55))
        assert Admission(site).obstacle() == ""


class TestLock:
    def test_second_client_is_refused(self, make_site: MakeSite) -> None:
        site = make_site(1)
        words = "the key of hospitalA is in use: its client runs on this machine already, as process {}"
        with running_client(site) as pid, pytest.raises(AuthError, match=words.format(pid)), only_client(site):
            pytest.fail("two clients")
        with only_client(site):
            assert other_client(site) is None
            assert (site.state_dir / "client.lock").read_text() == str(os.getpid())

    def test_folder_is_missing(self, make_site: MakeSite) -> None:
        site = make_site(1)
        site.state_dir.rmdir()
        with pytest.raises(ConfigError, match=r"there is no folder .*site init hospitalA"), only_client(site):
            pytest.fail("no folder")
        assert other_client(site) is None
