"""A warm process forks one per message, which writes, ends, obeys and dies as a fresh one would."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

SERVER = """
import json, os, random, sys, time
from pathlib import Path
from icmoe_client.warm_start import serve

def work():
    print(json.dumps([os.getppid(), random.random(), sys.argv[1:]]), flush=True)
    print("to stderr", file=sys.stderr)
    match sys.argv[1:]:
        case ["exit", code]: sys.exit(int(code))
        case ["say"]: sys.exit("in words")
        case ["raise"]: raise ValueError("broken")
        case ["wait"]: time.sleep(60)
        case ["gentle"]:
            import signal
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
            print("ready", flush=True)
            time.sleep(60)

serve(Path(sys.argv[1]), preload=lambda: time.sleep(float(sys.argv[2])), work=work)
"""
CLIENT = """
import sys
from pathlib import Path
from icmoe_client.warm_start import forward

folder = Path(sys.argv.pop(1))
forward(folder, cold=lambda: print("cold", sys.argv[1:]))
"""

Ask = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Deeper than the name of a socket may be long."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    return deep


@pytest.fixture
def warm(folder: Path) -> Iterator[psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", SERVER, folder, "0.3"])
    while not (folder / "warm.sock").exists():
        time.sleep(0.01)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


@pytest.fixture
def ask(folder: Path) -> Ask:
    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", CLIENT, str(folder), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_output_arguments_and_exit_code_are_those_of_the_fork(warm: psutil.Process, ask: Ask) -> None:
    asked = ask("exit", "3")
    output, errors = asked.communicate(timeout=20)
    assert asked.returncode == 3
    assert output.startswith(f"[{warm.pid}, ")
    assert output.endswith('["exit", "3"]]\n')
    assert errors == "to stderr\n"


def test_words_and_exceptions_are_failures(warm: psutil.Process, ask: Ask) -> None:
    said, raised = ask("say"), ask("raise")
    assert "in words" in said.communicate(timeout=20)[1]
    assert "ValueError: broken" in raised.communicate(timeout=20)[1]
    assert (said.returncode, raised.returncode) == (1, 1)


def test_two_forks_draw_other_random_numbers(warm: psutil.Process, ask: Ask) -> None:
    first, second = (ask("exit", "0").communicate(timeout=20)[0].split(",")[1] for _ in range(2))
    assert first != second


def test_the_fork_gets_the_signals(warm: psutil.Process, ask: Ask) -> None:
    asked = ask("gentle")
    assert asked.stdout is not None
    while asked.stdout.readline() != "ready\n":
        pass
    asked.send_signal(signal.SIGTERM)
    asked.communicate(timeout=20)
    assert asked.returncode == 7


def test_the_fork_dies_with_the_process_that_asked(warm: psutil.Process, ask: Ask) -> None:
    asked = ask("wait")
    assert asked.stdout is not None
    asked.stdout.readline()
    (fork,) = warm.children()
    asked.kill()
    asked.wait()
    fork.wait(10)
    assert not fork.is_running()
    asked.communicate()


def test_without_a_warm_process_the_work_is_done_at_once(folder: Path, ask: Ask) -> None:
    assert ask("a").communicate(timeout=20)[0] == "cold ['a']\n"


def test_a_dead_warm_process_is_as_none(warm: psutil.Process, folder: Path, ask: Ask) -> None:
    os.kill(warm.pid, signal.SIGKILL)
    warm.wait(10)
    assert (folder / "warm.sock").exists()
    assert ask("b").communicate(timeout=20)[0] == "cold ['b']\n"
