"""The offline installer refuses a damaged copy, before it installs anything."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[3] / "deploy" / "wheelhouse" / "install.sh"


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    shutil.copy(INSTALL, folder)
    (folder / "a.whl").write_bytes(b"wheel")
    digest = hashlib.sha256(b"wheel").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  a.whl\n", encoding="utf-8")
    return folder


def install(wheelhouse: Path, target: Path, *, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(wheelhouse / "install.sh"), str(target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHON": python},
    )


def test_a_damaged_wheel_is_refused(wheelhouse: Path, tmp_path: Path) -> None:
    (wheelhouse / "a.whl").write_bytes(b"whee")

    done = install(wheelhouse, tmp_path / "env")

    assert done.returncode == 2
    assert "the copy is damaged" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_folder_that_is_there_is_not_touched(wheelhouse: Path, tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()

    done = install(wheelhouse, tmp_path / "env")

    assert done.returncode == 2
    assert "name another folder" in done.stderr


def test_a_missing_python_is_named(wheelhouse: Path, tmp_path: Path) -> None:
    done = install(wheelhouse, tmp_path / "env", python="/nowhere/python3.11")

    assert done.returncode == 2
    assert "/nowhere/python3.11 is not there" in done.stderr


def test_nothing_comes_from_a_registry() -> None:
    (line,) = [line for line in INSTALL.read_text(encoding="utf-8").splitlines() if "pip install" in line]

    assert "--no-index" in line
