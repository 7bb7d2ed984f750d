"""Locks of folders: one holder, freed by its death."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from icmoe.errors import ConfigError
from icmoe.locks import hold, is_held

HOLDER = """
import sys, time
from pathlib import Path
from icmoe.locks import hold
with hold(Path(sys.argv[1]), otherwise="taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_only_one_may_hold_it(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    assert not is_held(lock)
    with hold(lock, otherwise="taken"):
        assert is_held(lock)
        with pytest.raises(ConfigError, match="taken"), hold(lock, otherwise="taken"):
            pass
    assert not is_held(lock)
    with hold(lock, otherwise="taken"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_held(lock)
        holder.kill()
    assert not is_held(lock)


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        started = time.monotonic()
        with pytest.raises(ConfigError), hold(lock, otherwise="taken", patience=0.5):
            pass
        assert time.monotonic() - started >= 0.5
        holder.terminate()
        with hold(lock, otherwise="taken", patience=20):
            assert is_held(lock)
