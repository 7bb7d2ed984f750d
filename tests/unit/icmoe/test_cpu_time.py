import subprocess
import sys
import time

import pytest

from icmoe import cpu_time
from icmoe.cpu_time import CpuMeter

# The child of the child does the work, as Ray's workers are grandchildren of the run.
BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"
GRANDCHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}])"


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_own_time_counts_and_sleep_does_not() -> None:
    with CpuMeter() as meter:
        burn(0.2)
        time.sleep(0.3)
        assert 0.2 <= meter.seconds() < 0.45


def test_time_of_descendants_counts_after_their_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "INTERVAL", 0.02)
    with CpuMeter() as meter:
        subprocess.run([sys.executable, "-c", GRANDCHILD.format(BURN.format(0.4))], check=True)
        assert meter.seconds() > 0.3


def test_its_thread_ends() -> None:
    meter = CpuMeter()
    with meter:
        assert meter._thread.is_alive()
    assert not meter._thread.is_alive()
