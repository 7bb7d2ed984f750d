"""``server status|watch|stop`` against a service on the socket of a real centre folder."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from icmoe.commands.operator import status, stop, watch
from icmoe.errors import ConfigError, ConnectError, RunError
from icmoe_server.centre import Centre, init_centre
from icmoe_server.operator.messages import ChildInfo
from icmoe_server.operator.server import serve_operator
from icmoe_server.operator.service import OperatorService

runner = CliRunner()
app = typer.Typer()
for command in (status, watch, stop):
    app.command()(command)

LINE = {"round": 1, "asked": ["a"], "answered": ["a"], "scored_round": 0, "val_dice": {"a": 0.5}, "aggregated": True}


@pytest.fixture
def centre(tmp_path: Path) -> Iterator[Centre]:
    """Make a centre folder whose operator service answers."""
    made = init_centre(tmp_path / "centre", advertise="localhost:8443", bind="127.0.0.1:8443")
    service = OperatorService(made.runs / "demo", lambda: [ChildInfo("superlink", 7, "running", 0)], poll_seconds=0.02)
    say(made, "training")
    (made.runs / "demo" / "rounds.jsonl").write_text(json.dumps(LINE) + "\n")
    server = serve_operator(made, service)
    yield made
    server.stop(None).wait()


def say(centre: Centre, state: str, reason: str | None = None) -> None:
    folder = centre.runs / "demo"
    folder.mkdir(exist_ok=True)
    roll_call = {"a": {"state": "asked", "since": None, "reason": None}}
    content = {"state": state, "round": 2, "num_rounds": 3, "reason": reason, "updated": "", "roll_call": roll_call}
    (folder / "new").write_text(json.dumps(content))
    (folder / "new").replace(folder / "status.json")


def run(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_status(centre: Centre) -> None:
    shown = run("status", "--dir", centre.root)
    assert "demo  training  round 2 of 3" in shown.output
    record = json.loads(run("status", "--dir", centre.root, "--json").output)
    assert record["roll_call"] == {"a": {"state": "asked", "since": None, "reason": None}}
    assert record["children"] == [{"name": "superlink", "pid": 7, "state": "running", "restarts": 0}]


def test_the_folder_comes_from_the_environment(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICMOE_CENTRE_DIR", str(centre.root))
    assert "training" in run("status").output


def test_watch_prints_lines_until_the_run_ends(centre: Centre) -> None:
    later = threading.Timer(0.5, say, (centre, "finished"))
    later.start()
    shown = run("watch", "--dir", centre.root)
    assert shown.exit_code == 0
    said = shown.output.splitlines()
    assert said[0].startswith("round 1: 1 of 1 sites, validation Dice of round 0: mean 0.500 (a 0.500)")
    assert said[1:] == [
        "demo: training, round 2 of 3", "superlink (process 7): running", "demo: finished, round 2 of 3"
    ]  # fmt: skip


def test_watch_of_a_failed_run_fails(centre: Centre) -> None:
    say(centre, "failed", "site a is missing")
    shown = run("watch", "--dir", centre.root, "--json")
    records = [json.loads(text) for text in shown.output.splitlines()]
    assert [list(record) for record in records] == [["round"], ["status"]]
    assert isinstance(shown.exception, RunError)
    assert "site a is missing" in str(shown.exception)


@pytest.mark.slow
def test_watch_in_a_terminal_is_a_live_view(centre: Centre) -> None:
    """In a pseudo-terminal of 80 columns: it draws, redraws, and Ctrl-C leaves the run alone."""
    program = "from icmoe.commands.operator import watch; import typer; typer.run(watch)"
    main, terminal = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "LINES": "24",
        "TERM": "xterm",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, "-c", program, "--dir", str(centre.root)],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        # Tests that run in the background of a script inherit a Ctrl-C that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        os.close(terminal)
        text = _read_until(main, "round 2 of 3")
        say(centre, "scoring")
        text += _read_until(main, "scoring")
        process.send_signal(signal.SIGINT)
        text += _read_until(main, "the run goes on")
        assert process.wait(20) == 0
    os.close(main)
    assert "1 of 3 rounds done" in text
    assert not (centre.runs / "demo" / "stop").exists()


def _read_until(terminal: int, words: str) -> str:
    text, deadline = "", time.monotonic() + 60
    while words not in text:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, text
        text += os.read(terminal, 65536).decode(errors="replace")
    return text


def test_stop(centre: Centre) -> None:
    assert run("stop", "--dir", centre.root).output == "The run stops after round 2.\n"
    assert (centre.runs / "demo" / "stop").read_text() == "after_round"
    asked = run("stop", "--now", "--yes", "--json", "--dir", centre.root).output
    assert json.loads(asked) == {"when": "now", "round": 2}
    assert (centre.runs / "demo" / "stop").read_text() == "now"


def test_stop_now_asks_first(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run("stop", "--now", "--dir", centre.root)
    assert isinstance(refused.exception, ConfigError)
    assert "--yes" in str(refused.exception)
    monkeypatch.setattr("icmoe.commands.operator._is_terminal", lambda: True)
    unsure = runner.invoke(app, ["stop", "--now", "--dir", str(centre.root)], input="n\n")
    assert "Nothing was stopped" in unsure.output
    assert unsure.exit_code == 1
    assert not (centre.runs / "demo" / "stop").exists()
    sure = runner.invoke(app, ["stop", "--now", "--dir", str(centre.root)], input="y\n")
    assert "The run stops now" in sure.output


def test_no_centre_and_no_answer(tmp_path: Path) -> None:
    assert isinstance(run("status", "--dir", tmp_path / "none").exception, ConfigError)
    init_centre(tmp_path / "centre", advertise="localhost:8443")
    silent = run("status", "--dir", tmp_path / "centre").exception
    assert isinstance(silent, ConnectError)
    assert silent.exit_code == 5
    assert "icmoe-fl server start" in str(silent)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--address", "h:1"), "--ca, --cert, --key"),
        (("--cert", "x"), "belong to --address"),
        (("--address", "nonsense", "--ca", "x", "--cert", "x", "--key", "x"), "host:port"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], words: str) -> None:
    error = run("status", *arguments).exception
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_over_tcp_with_the_certificates_of_the_centre(tmp_path: Path) -> None:
    """What ``server init`` makes is enough for mutual TLS."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    made = init_centre(tmp_path / "centre", advertise="fl.example.org:8443")
    config = made.config.model_copy(update={"operator": made.config.operator.model_copy(update={"tcp": address})})
    made = Centre(made.root, config)
    server = serve_operator(made, OperatorService(made.runs / "demo", lambda: []))
    try:
        options = ("--ca", made.ca_cert, "--cert", made.operator_cert, "--key", made.operator_key)
        assert json.loads(run("status", "--json", "--address", address, *options).output)["state"] == "starting"
    finally:
        server.stop(None).wait()
