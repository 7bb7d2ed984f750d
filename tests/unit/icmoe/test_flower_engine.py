import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icmoe import flower_engine
from icmoe.errors import ConfigError
from icmoe.flower_engine import (
    app_digest,
    build_app,
    check_flower,
    flower_environment,
    public_key_bytes,
    superlink_command,
)


def test_the_app_is_the_same_bytes_in_every_process() -> None:
    script = "from icmoe.flower_engine import app_digest; print(app_digest())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == app_digest() == hashlib.sha256(build_app()).hexdigest()


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_flower()
    monkeypatch.setattr(flower_engine, "version", lambda name: "1.42.0")
    with pytest.raises(ConfigError, match=r"flwr 1\.42\.0 is installed.*flwr>=1\.41\.0,<1\.42'"):
        check_flower()


def test_flower_is_quiet_and_its_loopback_takes_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet.example.org")
    environment = flower_environment(tmp_path, EXTRA="1")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert set(environment["NO_PROXY"].split(",")) == {"intranet.example.org", "127.0.0.1", "localhost"}
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["EXTRA"] == "1"


def test_the_superlink_listens_on_loopback_and_wants_keys(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("certificate", "key", "ca_certificate", "database", "secret")}
    command = superlink_command(port=9620, **files)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(command)
    assert command[command.index("--isolation") + 1] == "process"


@pytest.mark.parametrize("key", ["", "nonsense", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMh1"])
def test_what_is_no_ec_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        public_key_bytes(key)
