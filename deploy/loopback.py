"""A centre and three hospitals on this machine, as real processes over real TLS: what `make loopback` runs.

Every step is the command that a person would give, and is printed. Ends with the run's report; Ctrl-C ends everything,
and the same command goes on where it was.
"""

import csv
import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from icmoe.data.demo import write_demo_data
from icmoe.processes import Child

ROOT = Path("runs/loopback")
CONFIG = Path("configs/run/demo.yaml")
COMMAND = str(Path(sys.executable).with_name("icmoe-fl"))
NAME = "demo"
NUM_SITES = 3


def main() -> None:
    """Set up what is missing, start four processes, watch."""
    sites = write_data(write_demo_data(ROOT / "demo"), ROOT / "data")
    centre, folder = ROOT / "centre", ROOT / "sites"
    if not (centre / "centre.yaml").exists():
        address = f"127.0.0.1:{free_port()}"
        run("server", "init", "--dir", centre, "--advertise", address, "--bind", address)
        use_free_superlink_port(centre / "centre.yaml")
        for site in sites:
            data, authority = ROOT / "data" / site, centre / "pki" / "ca.crt"
            run("site", "init", site, "--server", address, "--ca-file", authority, "--data", data, "--dir", folder)
            run("sites", "add", folder / f"{site}.enrolment.json", "--dir", centre)
            run("data", "check", data, "--config", CONFIG, "--accept")
    settings = ["--set", f"federation.sites=[{','.join(sites)}]", "--set", "simulation.embedded_data=false"]
    with ExitStack() as ends:
        server = ("server", "start", "--dir", centre, "--config", CONFIG, "--name", NAME, *settings)
        centre_process = start(ends, "centre", *server)
        for site in sites:
            start(ends, site, "client", "--site", site, "--config", folder / f"{site}.yaml")
        wait_until_up(centre, centre_process)
        run("server", "watch", "--dir", centre)
        # It writes the report after the last round.
        while centre_process.wait(1.0) is None:
            pass
    print(f"\nReport: {centre / 'runs' / NAME / 'report.html'}")


def write_data(demo: Path, folder: Path) -> list[str]:
    """Give every site a folder of its own with its own manifest; images are linked, not copied.

    Returns:
        The sites.
    """
    with (demo / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sites = sorted({row["site"] for row in rows})
    for site in sites:
        own = [row for row in rows if row["site"] == site]
        for name in (row[column] for row in own for column in ("image", "mask")):
            link = folder / site / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                os.link(demo / name, link)
        if not (folder / site / "manifest.csv").exists():
            with (folder / site / "manifest.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(own)
    return sites


def run(*arguments: object) -> None:
    """Give a command and wait for its end; its failure ends this."""
    command = [COMMAND, *map(str, arguments)]
    print(f"\n$ icmoe-fl {shlex.join(command[1:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def wait_until_up(centre: Path, process: Child) -> None:
    """The centre first makes its model and its processes; its failure ends this."""
    asked = [COMMAND, "server", "status", "--dir", str(centre)]
    while subprocess.run(asked, check=False, capture_output=True).returncode:
        if process.wait(1.0) is not None:
            sys.exit("\n".join(process.last_lines))


def start(ends: ExitStack, name: str, *arguments: object) -> Child:
    """Start a command that stays; it ends with this process."""
    command = [COMMAND, *map(str, arguments)]
    log = ROOT / "logs" / f"{name}.log"
    print(f"$ icmoe-fl {shlex.join(command[1:])}   (log: {log})", flush=True)
    # Three sites that each take all processors only get in each other's way.
    threads = str(max(1, len(os.sched_getaffinity(0)) // NUM_SITES))
    child = Child(name, command, environment={"OMP_NUM_THREADS": threads, **os.environ}, log=log)
    ends.callback(child.end)
    return child


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def use_free_superlink_port(settings: Path) -> None:
    """Another centre on this machine may use the usual one."""
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("superlink_port: 9620", f"superlink_port: {free_port()}"), encoding="utf-8")


if __name__ == "__main__":
    main()
