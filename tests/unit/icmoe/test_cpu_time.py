import subprocess
import sys

import pytest

from icmoe import cpu_time
from icmoe.cpu_time import CpuMeter

# The child of the child does the work, as Ray's workers are grandchildren of the run.
BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass"
GRANDCHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}])"


OWN = """
import time
from icmoe.cpu_time import CpuMeter
with CpuMeter() as meter:
    end = time.process_time() + 0.2
    while time.process_time() < end: pass
    time.sleep(0.3)
    print(meter.seconds())
"""


def test_own_time_counts_and_sleep_does_not() -> None:
    # In a process of its own: in this one, threads and children that other tests left would count as well.
    done = subprocess.run([sys.executable, "-c", OWN], check=True, capture_output=True, text=True)
    assert 0.2 <= float(done.stdout) < 0.45


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
