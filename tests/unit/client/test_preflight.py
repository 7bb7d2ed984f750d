"""The checks of ``client --check``, with real keys, images and servers."""

import csv
import datetime as dt
import io
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from icmoe.data.checked import write_checked
from icmoe.data.checking import check_data
from icmoe.errors import AuthError
from icmoe_client import network_checks, preflight
from icmoe_client.preflight import CheckResult, exit_code, may_start, print_checks, run_checks
from icmoe_client.site_file import SiteConfig, SitePolicy
from icmoe_client.site_init import init_site

NAMES = ["Site file and keys", "Versions", "Data", "Disk", "Memory"]
NAMES += ["Name look-up", "Connection", "Certificate", "Clock", "Registration"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images that passed the check."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "patient", "split"])
        for number, split in enumerate(("train", "train", "val", "test")):
            Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / f"{number}.png")
            mask = np.zeros((64, 64), np.uint8)
            mask[16:48, 16 + number : 48] = 255
            Image.fromarray(mask).save(folder / f"{number}_mask.png")
            writer.writerow([f"{number}.png", f"{number}_mask.png", f"p{number}", split])
    write_checked(check_data(folder, classes={"disc": 255}, num_workers=1), folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def make_site(tmp_path: Path, authority: Any, data: Path) -> Callable[[int], SiteConfig]:
    def make(port: int) -> SiteConfig:
        return init_site(
            tmp_path / "site",
            name="hospitalA",
            server=f"127.0.0.1:{port}",
            data=data,
            ca_sha256=None,
            ca_file=authority.file,
        ).site

    return make


@pytest.fixture
def site(make_site: Callable[[int], SiteConfig], authority: Any, serve: Callable[..., int]) -> SiteConfig:
    """A site that is ready."""
    return make_site(serve(authority.issue("127.0.0.1")))


def outcome(results: list[CheckResult], name: str) -> CheckResult:
    return next(result for result in results if result.name == name)


def test_ready(site: SiteConfig) -> None:
    results = run_checks(site, registration=lambda site: f"The centre knows {site.name}.")
    assert [result.name for result in results] == NAMES
    assert [result.ok for result in results] == [True] * len(NAMES), results
    assert exit_code(results) == 0
    assert outcome(results, "Data").sentence.startswith("4 images passed the check of")
    assert "2 of them for training" in outcome(results, "Data").sentence
    assert "which will need 9.2 MB" in outcome(results, "Disk").sentence
    assert "364 more days" in outcome(results, "Certificate").sentence
    assert outcome(results, "Registration").sentence == "The centre knows hospitalA."


def test_quick_leaves_torch_out(site: SiteConfig, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from icmoe_client.preflight import run_checks\n"
        "from icmoe_client.site_file import load_site\n"
        "results = run_checks(load_site(Path(sys.argv[1])), quick=True)\n"
        "print([result.ok for result in results], sorted({'torch', 'flwr'} & set(sys.modules)))"
    )
    path = tmp_path / "site" / "hospitalA.yaml"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True, True, True, None, True, True, True, True, None] []\n"


def quick(site: SiteConfig, **changes: Any) -> list[CheckResult]:
    return run_checks(site.model_copy(update=changes), quick=True)


def test_after_a_failure_the_rest_is_not_tried(make_site: Callable[[int], SiteConfig]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        results = quick(make_site(bound.getsockname()[1]))
    assert [result.ok for result in results[5:]] == [True, False, None, None, None]
    assert outcome(results, "Connection").remedy.startswith("Ask the centre")
    assert outcome(results, "Clock").sentence == "Not tried after this failure."
    assert exit_code(results) == 5
    assert may_start(results)


@pytest.mark.parametrize(
    ("issue", "sentence"),
    [
        ({"until": dt.timedelta(hours=-1)}, "has expired"),
        ({"since": dt.timedelta(hours=1)}, "is not yet valid"),
        ({"names": ("fl.example.org",)}, "is not for 127.0.0.1 but for fl.example.org"),
        ({"stranger": True}, "comes from an unknown authority: CN=stranger"),
    ],
)
def test_certificates(
    issue: dict[str, Any],
    sentence: str,
    make_site: Callable[[int], SiteConfig],
    authority: Any,
    make_authority: Callable[[str], Any],
    serve: Callable[..., int],
) -> None:
    validity = {key: value for key, value in issue.items() if key in ("since", "until")}
    issuer = make_authority("stranger") if "stranger" in issue else authority
    results = quick(make_site(serve(issuer.issue(*issue.get("names", ("127.0.0.1",)), **validity))))
    failed = outcome(results, "Certificate")
    assert sentence in failed.sentence
    assert failed.remedy
    assert exit_code(results) == 5
    assert not may_start(results)


def test_certificate_that_ends_soon(
    make_site: Callable[[int], SiteConfig], authority: Any, serve: Callable[..., int]
) -> None:
    results = quick(make_site(serve(authority.issue("127.0.0.1", until=dt.timedelta(days=9, hours=1)))))
    warned = outcome(results, "Certificate")
    assert warned.ok
    assert "9 more days" in warned.sentence
    assert "--renew" in warned.remedy


@pytest.mark.parametrize(
    ("centre", "ok", "sentence"),
    [
        (600, False, "This machine's clock is 600 s behind the centre's"),
        (-600, False, "This machine's clock is 600 s ahead of the centre's"),
        (-8, False, "ahead of the centre's, and the centre refuses signed calls above 4 s ahead"),
        (290, True, "This machine's clock is 290 s behind"),
        (0, True, "The centre answers. This machine's clock is"),
        (None, True, "It does not tell its time"),
    ],
)
def test_clock(
    centre: int | None,
    ok: bool,
    sentence: str,
    make_site: Callable[[int], SiteConfig],
    authority: Any,
    serve: Callable[..., int],
) -> None:
    clock = None if centre is None else dt.timedelta(seconds=centre)
    results = quick(make_site(serve(authority.issue("127.0.0.1"), clock=clock)))
    found = outcome(results, "Clock")
    assert found.ok is ok
    # The date has whole seconds, and this takes a moment.
    told = found.sentence.replace("599 s", "600 s").replace("601 s", "600 s")
    assert sentence in told.replace("289 s", "290 s").replace("291 s", "290 s")
    assert (found.exit_code, "NTP" in found.remedy) == ((0, False) if ok else (5, True))
    assert may_start(results) is ok


def test_centre_that_does_not_work(
    make_site: Callable[[int], SiteConfig], authority: Any, serve: Callable[..., int]
) -> None:
    results = quick(make_site(serve(authority.issue("127.0.0.1"), status=503)))
    assert "HTTP 503" in outcome(results, "Clock").sentence
    assert exit_code(results) == 5
    assert may_start(results)


def test_not_registered(site: SiteConfig) -> None:
    def refuse(site: SiteConfig) -> str:
        raise AuthError(f"the centre does not know the key of {site.name}.\nSend the enrolment.")

    results = run_checks(site, quick=True, registration=refuse)
    assert results[-1] == CheckResult(
        "Registration", False, "The centre does not know the key of hospitalA.", "Send the enrolment.", 5
    )
    assert not may_start(results)


def test_proxy_that_cannot_be_used(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy:1080")
    results = quick(site, server="fl.example.org:8443")
    assert [result.ok for result in results[5:]] == [False, None, None, None, None]
    assert not may_start(results)


class TestOwnFiles:
    def test_key_is_missing(self, site: SiteConfig) -> None:
        site.flower_key.unlink()
        failed = quick(site)[0]
        assert (failed.ok, failed.exit_code) == (False, 2)
        assert failed.remedy.startswith("Run 'icmoe-fl site init'")

    def test_folder_is_open(self, site: SiteConfig) -> None:
        site.state_dir.chmod(0o755)
        assert quick(site)[0].remedy == f"Run 'chmod 700 {site.state_dir}'."

    def test_folder_is_missing(self, site: SiteConfig) -> None:
        site.state_dir.rmdir()
        assert "there is no folder" in quick(site)[0].sentence.lower()

    def test_certificate_is_missing(self, site: SiteConfig) -> None:
        results = quick(site, ca_certificate=site.state_dir / "none.crt")
        assert "cannot be read as a certificate" in results[0].sentence
        assert exit_code(results) == 2


class TestData:
    def test_never_checked(self, site: SiteConfig, tmp_path: Path) -> None:
        results = quick(site, data=tmp_path)
        assert "was never checked" in outcome(results, "Data").sentence
        assert exit_code(results) == 3
        assert not may_start(results)
        assert outcome(results, "Certificate").ok

    def test_too_few_for_the_policy(self, site: SiteConfig) -> None:
        results = quick(site, policy=SitePolicy(min_train_images=3))
        assert "fewer than 3 usable training images" in outcome(results, "Data").sentence

    def test_no_room_for_the_cache(self, site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_CACHE_LIMIT_GB", "0.001")
        failed = preflight._attempt("Disk", lambda: preflight.check_disk(site, quick=False))
        assert "needs 9.2 MB, but may hold 1.0 MB" in failed.sentence
        assert failed.remedy == "Raise ICMOE_CACHE_LIMIT_GB."

    def test_full_disk(self, site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "MIN_FREE_DISK", 10**18)
        failed = outcome(quick(site), "Disk")
        assert "are free for" in failed.sentence
        assert (failed.exit_code, failed.remedy[:5]) == (6, "Free ")


class TestMemory:
    def test_too_little(self, site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "MIN_FREE_MEMORY", 10**18)
        assert preflight._attempt("Memory", lambda: preflight.check_memory(site)).exit_code == 6

    def test_gpu_that_is_not_there(self, site: SiteConfig) -> None:
        wanted = site.model_copy(update={"device": "cuda:99"})
        failed = preflight._attempt("Memory", lambda: preflight.check_memory(wanted))
        assert "the site file says device: cuda:99, but torch" in failed.sentence.lower()
        assert (failed.exit_code, "device: auto" in failed.remedy) == (2, True)


def test_print() -> None:
    out = io.StringIO()
    results = [
        CheckResult("Data", True, "All [bold]fine[/]."),
        CheckResult("Clock", False, "It is off.", "Set it.", 5),
        CheckResult("Registration", None, "Not tried."),
    ]
    assert print_checks(results, Console(file=out, width=80)) == 5
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == [
        "Data          ok      All [bold]fine[/].",
        "Clock         FAILED  It is off.",
        "                      Set it.",
        "Registration  -       Not tried.",
    ]


def test_limits_are_inside_flowers() -> None:
    """Flower refuses from 5 s ahead and 305 s behind; the date of the answer is known to about a second."""
    assert network_checks.MAX_AHEAD + 1 <= 5
    assert network_checks.MAX_BEHIND + 1 <= 305
