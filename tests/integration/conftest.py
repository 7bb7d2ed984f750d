"""Tiny federations on real weights: three sites with five discs each, run through the real command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

SIDE = 64
CONFIG = """\
task: {name: discs, classes: {disc: 1}}
model: {backbone: lite_medsam, width: 16, residual_rank: 2}
train: {local_epochs: 1, batch_size: 2, basic_every: 2}
federation: {num_rounds: 3}
"""


@dataclass
class CommandLine:
    """Starts ``icmoe-fl`` as a user does and remembers every process, so that none outlives the tests."""

    cache: Path
    logs: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self, *arguments: object) -> "Running":
        log = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        environment = {**os.environ, "ICMOE_CACHE_DIR": str(self.cache), "COLUMNS": "300"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("icmoe-fl"), *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                # Tests that run in the background of a script inherit a Ctrl-C that is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        self.seen[process.pid] = psutil.Process(process.pid)
        self.started.append(process)
        return Running(process, log, self)

    def run(self, *arguments: object, timeout: float = 800.0) -> "Running":
        running = self.start(*arguments)
        try:
            running.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
            pytest.fail(f"not done after {timeout:.0f} s:\n{running.output}")
        return running

    def stop_all(self) -> None:
        for process in self.seen.values():
            if is_alive(process):
                process.kill()
        for started in self.started:
            started.wait(30)


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    log: Path
    owner: CommandLine

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, path: Path, *, timeout: float = 300.0) -> None:
        """Wait until a file of a running command appears."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, f"ended before {path.name} was there:\n{self.output}"
            assert time.monotonic() < deadline, f"{path.name} did not appear:\n{self.output}"
            time.sleep(0.02)

    def descendants(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.owner.seen |= {child.pid: child for child in found}
        return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def icmoe_fl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    command = CommandLine(cache=tmp_path_factory.mktemp("cache"), logs=tmp_path_factory.mktemp("logs"))
    yield command
    command.stop_all()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "discs.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites a, b and c: three images to train on, one to validate, one to test. Do not change it; copy it."""
    folder = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    lines = ["image,mask,patient,split,site"]
    for site in "abc":
        for index, split in enumerate(["train"] * 3 + ["val", "test"]):
            row, column = rng.integers(20, 44, 2)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < rng.integers(8, 16) ** 2
            pixels = (60 + 100 * disc + rng.normal(0, 8, disc.shape)).clip(0, 255)
            image, mask = f"{site}{index}.png", f"{site}{index}_mask.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / image)
            Image.fromarray(disc.astype(np.uint8)).save(folder / mask)
            lines.append(f"{image},{mask},{index},{split},{site}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON and refuse what only Python accepts."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path} holds {text}")

    return dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))


@pytest.fixture(scope="session")
def results_of() -> Callable[[Path], dict[str, Any]]:
    """Results of a run directory without what may differ between two equal runs."""

    def read(run_dir: Path) -> dict[str, Any]:
        results = read_json(run_dir / "results.json")
        return {key: value for key, value in results.items() if key not in ("seconds", "cpu_seconds", "reference")}

    return read


@pytest.fixture(scope="session")
def finished(icmoe_fl: CommandLine, config: Path, discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that many tests look at. Do not change it; copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    done = icmoe_fl.run("simulate", config, "--data", discs, "--out", out, "--reference", "local,pooled")
    (out.parent / "output.txt").write_text(done.output)
    assert done.process.returncode == 0, done.output
    return out


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], icmoe_fl: CommandLine
) -> Callable[..., tuple[int, str]]:
    """Run ``icmoe-fl`` inside this process: (exit code, what it printed). For what needs no process of its own."""
    from icmoe import cli

    def leave(exit_code: int) -> None:
        raise SystemExit(exit_code)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["icmoe-fl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        code = ended.value.code
        return int(code or 0), printed.out + printed.err

    monkeypatch.setattr(cli, "_leave", leave)
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(icmoe_fl.cache))
    return run
