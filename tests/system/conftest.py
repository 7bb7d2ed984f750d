"""A real federation on loopback: a centre and three hospitals, each with its own folder, through the command line."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

SITES = ("a", "b", "c")
SIDE = 64
DISCS = """\
task: {name: discs, classes: {disc: 1}}
model: {backbone: lite_medsam, width: 16, residual_rank: 2}
train: {local_epochs: 1, batch_size: 2, basic_every: 2}
federation: {num_rounds: 3, sites: [a, b, c], round_deadline: 600}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_discs(folder: Path, sites: Sequence[str] = SITES) -> None:
    """A manifest for the whole federation in ``folder`` and one for each site in ``folder/SITE``; same pixels."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    header = "image,mask,patient,split,site"
    everything = [header]
    for site in sites:
        (folder / site).mkdir(parents=True)
        lines = []
        for index, split in enumerate(["train"] * 3 + ["val", "test"]):
            row, column = rng.integers(20, 44, 2)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < rng.integers(8, 16) ** 2
            pixels = (60 + 100 * disc + rng.normal(0, 8, disc.shape)).clip(0, 255)
            image, mask = f"{site}{index}.png", f"{site}{index}_mask.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / site / image)
            Image.fromarray(disc.astype(np.uint8)).save(folder / site / mask)
            lines.append((image, mask, f"{site}-{index},{split},{site}"))
        (folder / site / "manifest.csv").write_text("\n".join([header, *(",".join(line) for line in lines)]) + "\n")
        everything += [f"{site}/{image},{site}/{mask},{rest}" for image, mask, rest in lines]
    (folder / "manifest.csv").write_text("\n".join(everything) + "\n")


@dataclass
class Running:
    """A command under way."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The command and everything below it."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def find(self, text: str) -> psutil.Process | None:
        """The first process below the command whose command line holds ``text``."""
        for process in self.tree():
            try:
                if text in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def loaded(self, library: str) -> list[str]:
        """Command lines of the processes that have a library in memory."""
        found = []
        for process in self.tree():
            # One that ended meanwhile has nothing in memory.
            with contextlib.suppress(psutil.Error):
                if any(library in Path(mapped.path).name for mapped in process.memory_maps()):
                    found.append(" ".join(process.cmdline()))
        return found

    def kill_all(self) -> None:
        """As a power cut does."""
        processes = self.tree()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)


@dataclass
class Federation:
    """Folders and commands of a centre and its hospitals.

    ``write_data`` makes, in the folder it is given, a manifest of all sites and a folder with a manifest for each.
    """

    root: Path
    name: str = "discs"
    sites: Sequence[str] = SITES
    settings: str = DISCS
    write_data: Callable[[Path], None] = write_discs
    port: int = field(default_factory=free_port)
    started: list[Running] = field(default_factory=list)

    @property
    def centre(self) -> Path:
        return self.root / "centre"

    @property
    def run_dir(self) -> Path:
        return self.centre / "runs" / self.name

    @property
    def config(self) -> Path:
        return self.root / f"{self.name}.yaml"

    def environment(self) -> dict[str, str]:
        cache = str(self.root / "cache")
        return {**os.environ, "OMP_NUM_THREADS": "1", "ICMOE_CACHE_DIR": cache, "COLUMNS": "200"}

    def run(self, *arguments: object, exit_code: int = 0) -> str:
        command = [str(Path(sys.executable).with_name("icmoe-fl")), *map(str, arguments)]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == exit_code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *arguments: object) -> Running:
        log = self.root / f"{name}-{len(self.started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("icmoe-fl"), *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        running = Running(process, log)
        self.started.append(running)
        return running

    def set_up(self) -> None:
        """First day of a study: centre made, three hospitals enrolled, their data checked."""
        self.write_data(self.root / "data")
        self.config.write_text(self.settings)
        address = f"127.0.0.1:{self.port}"
        self.run("server", "init", "--dir", self.centre, "--advertise", address, "--bind", address)
        settings = self.centre / "centre.yaml"
        settings.write_text(settings.read_text().replace("superlink_port: 9620", f"superlink_port: {free_port()}"))
        data = self.root / "data"
        checks = [
            self.start(f"check-{site}", "data", "check", data / site, "--config", self.config, "--accept")
            for site in self.sites
        ]
        for site in self.sites:
            self.enrol(site)
        for check in checks:
            assert check.process.wait(300) == 0, check.output

    def enrol(self, site: str) -> None:
        """A hospital makes its keys, the centre takes them."""
        address, data = f"127.0.0.1:{self.port}", self.root / "data" / site
        authority = self.centre / "pki" / "ca.crt"
        folder = self.root / "sites"
        self.run("site", "init", site, "--server", address, "--ca-file", authority, "--data", data, "--dir", folder)
        self.run("sites", "add", folder / f"{site}.enrolment.json", "--dir", self.centre)

    def weights(self, server_round: int, run_dir: Path | None = None) -> dict[str, Any]:
        """Tensors of a checkpoint, of this run or of another."""
        folder = (run_dir or self.run_dir) / "checkpoints" / f"round_{server_round:03d}"
        return dict(load_file(folder / "adapters.safetensors"))

    def results(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "results.json").read_text()))

    def start_centre(self) -> Running:
        return self.start("centre", "server", "start", "--dir", self.centre, "--config", self.config)

    def start_site(self, site: str) -> Running:
        return self.start(site, "client", "--site", site, "--config", self.root / "sites" / f"{site}.yaml")

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run_dir / "status.json").read_text()))
        except FileNotFoundError:
            return {}

    def rounds(self) -> list[dict[str, Any]]:
        path = self.run_dir / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, what: str, holds: Callable[[], object], *, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {running.log.name}\n{running.output[-2000:]}" for running in self.started)
                pytest.fail(f"{what} did not come within {seconds:.0f} s; status {self.status()}\n{logs}")
            time.sleep(0.2)

    def end(self) -> None:
        for running in self.started:
            running.kill_all()


@pytest.fixture(scope="module")
def new_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Federation]]:
    """Set one up, nothing running yet; whatever a test starts is killed in the end."""
    made: list[Federation] = []

    def make(**settings: Any) -> Federation:
        # The path of a Unix socket may have 107 bytes.
        made.append(Federation(tmp_path_factory.mktemp("fl"), **settings))
        made[-1].set_up()
        return made[-1]

    try:
        yield make
    finally:
        for federation in made:
            federation.end()


@pytest.fixture(scope="module")
def federation(new_federation: Callable[..., Federation]) -> Federation:
    """Three hospitals with drawn discs: quick, where images are not the point."""
    return new_federation()
