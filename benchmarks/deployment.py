"""What a centre takes, and what a round costs beyond training, across real processes and real TLS on this machine.

    python benchmarks/deployment.py

Two centres, one after the other: one with 8 hospitals for its memory, one with 3 for the time of a round. Their
hospitals are real SuperNodes, but do not train. The table goes into docs/performance.md.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
from light_site import BACKBONE_VARIABLE, KEY_VARIABLE, WORK_VARIABLE, write_command
from performance.document import table

from icmoe.checkpoint import latest_checkpoint
from icmoe.errors import RunError
from icmoe.flower_engine import flower_environment, supernode_command

CONFIG = """\
task: {{name: light, classes: {{disc: 1}}}}
model: {{backbone: lite_medsam}}
federation: {{num_rounds: {num_rounds}, sites: [{sites}]}}
"""
PATIENCE = 300.0
INTERVAL = 0.5
"""Seconds between samples of memory."""
NAMES = ("superlink", "superexec", "gateway", "serverapp")
"""Processes of a centre beside the supervisor; each is in its command line."""


@dataclass
class Deployment:
    """A centre and light hospitals in a folder of their own.

    Attributes:
        root: the folder.
        sites: names.
        num_rounds: of the run.
    """

    root: Path
    sites: tuple[str, ...]
    num_rounds: int
    port: int = field(default_factory=lambda: _free_port())
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def centre(self) -> Path:
        """The centre's folder."""
        return self.root / "centre"

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.centre / "runs" / "light"

    def start(self) -> psutil.Process:
        """Enrol all, bring all up; the centre's process."""
        address = f"127.0.0.1:{self.port}"
        _icmoe("server", "init", "--dir", self.centre, "--advertise", address, "--bind", address)
        settings = self.centre / "centre.yaml"
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace("superlink_port: 9620", f"superlink_port: {_free_port()}"), encoding="utf-8")
        for site in self.sites:
            keys = ("--ca-file", self.centre / "pki" / "ca.crt", "--dir", self.root / "sites")
            _icmoe("site", "init", site, "--server", address, *keys, "--data", self.root)
            _icmoe("sites", "add", self.root / "sites" / f"{site}.enrolment.json", "--dir", self.centre)
        config = self.root / "light.yaml"
        config.write_text(CONFIG.format(num_rounds=self.num_rounds, sites=", ".join(self.sites)), encoding="utf-8")
        centre = self._start("centre", _command("server", "start", "--dir", self.centre, "--config", config), None)
        _wait("the first model", lambda: any((self.run_dir / "checkpoints").glob("round_*")))
        backbone = latest_checkpoint(self.run_dir).backbone_digest
        for site in self.sites:
            self._start_site(site, backbone)
        return psutil.Process(centre.pid)

    def _start_site(self, site: str, backbone: str) -> None:
        home = self.root / site
        commands = write_command(home / "bin")
        work = {BACKBONE_VARIABLE: backbone, WORK_VARIABLE: str(self.root / f"{site}.work")}
        work[KEY_VARIABLE] = str(self.root / "sites" / site / "receipt.key")
        environment = flower_environment(home / "flwr", **work)
        environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
        command = supernode_command(
            server=f"127.0.0.1:{self.port}",
            ca_certificate=self.centre / "pki" / "ca.crt",
            key=self.root / "sites" / site / "flower.key",
            site=site,
            port=_free_port(),
        )
        self._start(site, command, environment)

    def _start(self, name: str, command: list[str], environment: dict[str, str] | None) -> "subprocess.Popen[bytes]":
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.processes.append(process)
        return process

    def rounds(self) -> list[dict[str, Any]]:
        """Finished rounds, the last validation left out."""
        path = self.run_dir / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if not record.get("evaluate_only")]

    def is_up(self) -> bool:
        """Whether the centre runs.

        Raises:
            RunError: if it ended by itself before its run was over.
        """
        code = self.processes[0].poll()
        if code:
            log = (self.root / "centre.log").read_text(encoding="utf-8")
            raise RunError(f"the centre ended with exit code {code}: {log[-500:]}")
        return code is None

    def work(self, server_round: int) -> float:
        """Seconds that the slowest ClientApp worked in a round."""
        lines = [line for site in self.sites for line in (self.root / f"{site}.work").read_text().splitlines()]
        return max(float(line.split()[1]) for line in lines if int(line.split()[0]) == server_round)

    def end(self, processes: list["subprocess.Popen[bytes]"]) -> None:
        """Kill processes with all their children."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for one in [*parent.children(recursive=True), parent]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait(30)


@contextlib.contextmanager
def deployment(num_sites: int, *, num_rounds: int) -> Iterator[tuple[Deployment, psutil.Process]]:
    """A running deployment; killed in the end."""
    with TemporaryDirectory(prefix="fl") as folder:
        made = Deployment(Path(folder), tuple(f"site{number}" for number in range(num_sites)), num_rounds)
        try:
            yield made, made.start()
        finally:
            made.end(made.processes)


def measure_memory(num_sites: int) -> tuple[dict[str, int], dict[str, int]]:
    """PSS of the centre's processes, in bytes by name.

    Returns:
        The sample with the largest sum while three rounds ran, and one right after all SuperNodes of this machine had
        ended: pages shared with them count in full in that one, as they do where hospitals are elsewhere.
    """
    most: dict[str, int] = {}
    with deployment(num_sites, num_rounds=1000) as (made, centre):
        # The process that builds the first model, once, has torch; it is gone when the first round begins.
        _wait("the first round", lambda: len(made.rounds()) >= 1 or not made.is_up())
        deadline = time.monotonic() + PATIENCE
        while len(made.rounds()) < 4 and made.is_up():
            sample = pss(centre)
            most = max(most, sample, key=lambda found: sum(found.values()))
            if time.monotonic() > deadline:
                raise RunError(f"three rounds took more than {PATIENCE:.0f} s; see the logs of {centre}")
            time.sleep(INTERVAL)
        made.end(made.processes[1:])
        return most, pss(centre)


def pss(centre: psutil.Process) -> dict[str, int]:
    """Memory by process; what is shared counts once."""
    found: dict[str, int] = {}
    for process in [centre, *centre.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # ended while we looked
            words = " ".join(process.cmdline())
            name = "supervisor" if process == centre else next((name for name in NAMES if name in words), "others")
            found[name] = found.get(name, 0) + process.memory_full_info().pss
    return found


def measure_rounds(num_sites: int, *, num_rounds: int) -> list[float]:
    """Seconds of each round but the first beyond the work of its slowest ClientApp."""
    with deployment(num_sites, num_rounds=num_rounds) as (made, _):
        _wait("the rounds", lambda: len(made.rounds()) >= num_rounds or not made.is_up())
        return [record["seconds"] - made.work(record["round"]) for record in made.rounds()[1:]]


def main(
    memory_sites: Annotated[int, typer.Option(help="Hospitals of the centre whose memory is measured.")] = 8,
    round_sites: Annotated[int, typer.Option(help="Hospitals of the centre whose rounds are timed.")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed, without the first.")] = 5,
) -> None:
    """Measure memory of a centre and the time of a round beyond training; takes about 4 minutes."""
    most, alone = measure_memory(memory_sites)
    rows = [[name, _mb(most.get(name, 0)), _mb(alone.get(name, 0))] for name in ("supervisor", *NAMES, "others")]
    rows.append(["together", _mb(sum(most.values())), _mb(sum(alone.values()))])
    typer.echo(table([f"PSS with {memory_sites} sites", "peak of three rounds", "after the SuperNodes ended"], rows))
    beyond = measure_rounds(round_sites, num_rounds=rounds + 1)
    middle = f"{median(beyond):.1f} ({min(beyond):.1f} to {max(beyond):.1f})"
    header = [f"a round of {round_sites} sites beyond the work of its ClientApps", "seconds"]
    typer.echo("\n" + table(header, [["median (range)", middle]]))
    typer.echo(f"\nload average {os.getloadavg()[0]:.1f} at the end")


def _command(*words: object) -> list[str]:
    return [str(Path(sys.executable).with_name("icmoe-fl")), *map(str, words)]


def _icmoe(*words: object) -> None:
    done = subprocess.run(_command(*words), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"icmoe-fl {words[0]} {words[1]} failed: {done.stderr.strip()}")


def _wait(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise RunError(f"{what} did not come within {PATIENCE:.0f} s")
        time.sleep(INTERVAL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


if __name__ == "__main__":
    typer.run(main)
