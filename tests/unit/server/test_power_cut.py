"""A power cut between any two writes: whatever is on the disk then opens again, and the work goes on to the same end.

The work runs in a fork that the kernel kills right before its n-th write, for every n there is.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icmoe.checkpoint import latest_checkpoint
from icmoe.enrolment import Enrolment
from icmoe.errors import ConfigError
from icmoe_server.app import Plan, run_federation
from icmoe_server.centre import Centre, init_centre
from icmoe_server.registry import SiteRegistry
from icmoe_server.status import read_status

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.chmod"}
KILLED = -signal.SIGKILL


def is_write(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in WRITES


def run(work: Callable[[], object], folder: Path, *, cut_before: int | None = None) -> tuple[int, int]:
    """Do the work in a fork.

    Args:
        work: what to do.
        folder: writes below it count.
        cut_before: number of the write before which the power fails, from 0; ``None`` for no cut.

    Returns:
        How the fork ended, and how many writes it made.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work_in_fork(work, folder, cut_before, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        num_writes = len(pipe.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), num_writes


def _work_in_fork(work: Callable[[], object], folder: Path, cut_before: int | None, writing: int) -> None:
    num_writes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_writes
        if is_write(event, arguments) and str(folder) in str(arguments[0]):
            if num_writes == cut_before:
                os.kill(os.getpid(), signal.SIGKILL)
            num_writes += 1
            os.write(writing, b".")

    try:
        # The kernel lives on, so it loses nothing; and waiting for the disk 30,000 times takes a minute.
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
        sys.addaudithook(watch)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def cut_everywhere(work: Callable[[Path], object], tmp_path: Path, *, at_least: int) -> list[Path]:
    """Do the work once for each write in it, in a folder of its own; the folders as each power cut left them."""
    whole = tmp_path / "whole"
    ended, num_writes = run(lambda: work(whole), whole)
    assert ended == 0
    assert num_writes >= at_least
    folders = [tmp_path / f"cut{number}" for number in range(num_writes)]
    for number, folder in enumerate(folders):
        assert run(lambda folder=folder: work(folder), folder, cut_before=number) == (KILLED, number)  # type: ignore[misc]
    return folders


def rounds(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waited")} for line in lines]


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_end(centre: Any, tmp_path: Path) -> None:
    centre.changes = {"federation": {"num_rounds": 2, "strategy": "fedadam"}}
    centre.sites = ("a", "b")

    def work(run_dir: Path) -> None:
        centre.run_dir = run_dir
        if not any(run_dir.glob("checkpoints/round_*")):
            centre.start()
        grid = centre.grid()
        plan = Plan(run=centre.run(), run_dir=run_dir, sites=centre.sites, registered=lambda: grid.nodes)
        run_federation(plan, grid)

    folders = cut_everywhere(work, tmp_path, at_least=40)
    whole = latest_checkpoint(tmp_path / "whole")
    for folder in folders:
        assert run(lambda folder=folder: work(folder), folder)[0] == 0, folder  # type: ignore[misc]
        again = latest_checkpoint(folder)
        assert again.server_round == 2
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array)
        assert rounds(folder) == rounds(tmp_path / "whole"), folder
        assert (folder / "best").resolve().name == (tmp_path / "whole" / "best").resolve().name
        assert read_status(folder)["state"] == "finished"
        results = json.loads((folder / "results.json").read_text())
        assert results["num_rounds"] == 2
        assert not [path for path in folder.glob("checkpoints/round_*") if not (path / "manifest.json").exists()]


@pytest.mark.slow
def test_a_centre_is_whole_or_says_that_it_is_not(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        init_centre(folder, advertise="fl.example.org:8443", bind="127.0.0.1:8443", sans=(), superlink_port=9620)

    for folder in cut_everywhere(work, tmp_path, at_least=15):
        try:
            Centre.load(folder)
        except ConfigError:
            if not any(folder.glob("*")):
                work(folder)
                continue
            with pytest.raises(ConfigError, match="if an interrupted init left it, remove it"):
                work(folder)


@pytest.fixture
def enrolments() -> list[Enrolment]:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    made = []
    for site in ("a", "b"):
        flower = ec.generate_private_key(ec.SECP384R1()).public_key()
        receipt = ed25519.Ed25519PrivateKey.generate().public_key()
        made.append(
            Enrolment(
                site=site,
                flower_public_key=flower.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
                receipt_public_key=receipt.public_bytes(Encoding.Raw, PublicFormat.Raw).hex(),
                icmoe_version="1",
                flwr_version="1.41.0",
                created="2026-01-01T00:00:00+00:00",
            )
        )
    return made


@pytest.mark.slow
def test_the_registry_holds_the_sites_before_or_after_the_change(tmp_path: Path, enrolments: list[Enrolment]) -> None:
    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        registry = SiteRegistry(folder / "sites.json")
        if not (folder / "sites.json").exists():
            registry.create()
        for enrolment in enrolments:
            if enrolment.site not in {site.name for site in registry.sites()}:
                registry.add(enrolment)
        if "a" in registry.active():
            registry.revoke("a")

    for folder in cut_everywhere(work, tmp_path, at_least=8):
        assert run(lambda folder=folder: work(folder), folder)[0] == 0  # type: ignore[misc]
        registry = SiteRegistry(folder / "sites.json")
        assert [site.name for site in registry.sites()] == ["a", "b"]
        assert list(registry.active()) == ["b"]
