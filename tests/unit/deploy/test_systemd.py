"""The systemd units: hardened, and patient enough with the lock that a killed site leaves behind."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[3] / "deploy" / "systemd"
CENTRE, SITE = UNITS / "icmoe-fl-centre.service", UNITS / "icmoe-fl-site@.service"
KEY_LOCK_SECONDS = 60
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def value(unit: Path, key: str) -> str:
    found = re.findall(rf"^{key}=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{unit.name} lacks {key}"
    return str(found[-1])


@pytest.mark.parametrize("unit", [CENTRE, SITE], ids=lambda path: path.name)
def test_the_unit_is_no_root_and_can_gain_nothing(unit: Path) -> None:
    assert value(unit, "User") == "icmoe-fl"
    assert value(unit, "CapabilityBoundingSet") == ""
    assert value(unit, "StateDirectoryMode") == "0700"
    assert value(unit, "UMask") == "0077"
    assert value(unit, "ProtectSystem") == "strict"
    for key in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
        assert value(unit, key) == "yes", key


def test_a_site_outlasts_the_lock_on_its_key_but_gives_up_some_day() -> None:
    seconds, tries = int(value(SITE, "RestartSec")), int(value(SITE, "StartLimitBurst"))

    assert value(SITE, "Restart") == "on-failure"
    assert seconds * (tries - 1) >= 1.5 * KEY_LOCK_SECONDS
    assert value(SITE, "StartLimitIntervalSec") == "1d"
    assert seconds * tries < 24 * 3600


def test_what_needs_a_person_is_not_repeated() -> None:
    assert value(SITE, "RestartPreventExitStatus").split() == ["2", "3", "4"]
    assert value(CENTRE, "RestartPreventExitStatus").split() == ["2", "6"]


@needs_systemd
@pytest.mark.parametrize("unit", [CENTRE, SITE], ids=lambda path: path.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name.replace("@.", "@hospitalA.")
    # The program and its documentation are not installed on a machine that runs tests.
    text = unit.read_text(encoding="utf-8").replace("/opt/icmoe-fl/bin/icmoe-fl", "/bin/true")
    copy.write_text(text, encoding="utf-8")

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.stderr == ""
    assert done.returncode == 0
