"""Peak memory of a simulation with few and many virtual sites.

Summed PSS (memory that processes share is counted once) of the driver, Ray and the workers, sampled twice a second from
outside. All sites have the same few images, so that their number is all that changes.
"""

import shutil
import time
from multiprocessing import get_context

import psutil

from icmoe.errors import RunError
from icmoe.simulation import SimulationRequest, simulate
from icmoe.types import Split

from .document import table
from .sites import RoundClock, Setup, encode_first, virtual_sites
from .stopwatch import Figures

SITE_COUNTS = (4, 16, 64)
PER_SITE: dict[Split, int] = {"train": 4, "val": 1, "test": 1}
INTERVAL = 0.5
"""Seconds between samples."""
GROUPS = ("driver", "workers", "rest of Ray")


def measure(setup: Setup) -> Figures:
    """Simulate one round at each number of sites."""
    runs = []
    for num_sites in SITE_COUNTS[:1] if setup.quick else SITE_COUNTS:
        request = SimulationRequest(
            run=setup.run("federation.num_rounds=1"),
            data=virtual_sites(setup, name=f"memory_{num_sites}", num_sites=num_sites, per_site=PER_SITE),
            out=setup.work / f"memory_{num_sites}",
        )
        shutil.rmtree(request.out, ignore_errors=True)
        encode_first(request)
        runs.append({"num_sites": num_sites, **_watch(request)})
        shutil.rmtree(request.out)
    return {"runs": runs}


def _watch(request: SimulationRequest) -> Figures:
    process = get_context("spawn").Process(target=_simulate, args=(request,))
    start = time.perf_counter()
    process.start()
    peak = dict.fromkeys(GROUPS, 0)
    most, together = dict(peak), 0
    while process.is_alive():
        sample = _sample(psutil.Process(process.pid))
        together = max(together, sum(sample.values()))
        most = {group: max(most[group], sample[group]) for group in GROUPS}
        process.join(INTERVAL)
    if process.exitcode != 0:
        raise RunError(f"the simulation of {request.data} ended with exit code {process.exitcode}; see above")
    return {"together": together, "peaks": most, "seconds": time.perf_counter() - start}


def _simulate(request: SimulationRequest) -> None:
    simulate(request, RoundClock())


def _sample(driver: psutil.Process) -> dict[str, int]:
    """PSS in bytes by group."""
    found = dict.fromkeys(GROUPS, 0)
    try:
        processes = [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            group = "driver" if process == driver else _group(process)
            found[group] += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended while we looked
            continue
    return found


def _group(process: psutil.Process) -> str:
    """Ray names its workers by what they run, its agents likewise; everything else below the driver is Ray's own."""
    command = process.cmdline()
    return "workers" if command and command[0].startswith(("ray::ClientApp", "ray::IDLE")) else "rest of Ray"


def render(figures: Figures) -> str:
    """One row per number of sites."""
    rows = [
        [
            f"{run['num_sites']} sites",
            _mb(run["together"]),
            *(_mb(run["peaks"][group]) for group in GROUPS),
            f"{run['seconds']:.0f} s",
        ]
        for run in figures["runs"]
    ]
    return table(["peak PSS", "together", *GROUPS, "whole simulation"], rows)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
