"""The parts of the supervisor that need no Flower; the rest runs in tests/system."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icmoe.config import RunConfig
from icmoe.errors import ConfigError, RunError
from icmoe.locks import hold
from icmoe_server.children import Kept
from icmoe_server.status import StatusBoard, note_failure, read_status, server_app_lock
from icmoe_server.supervisor import MAX_FAILURES, StartRequest, Supervisor, prepare_run


def request(tmp_path: Path, **federation: Any) -> StartRequest:
    task = {"name": "discs", "classes": {"disc": 1}}
    run = RunConfig.model_validate({"task": task, "federation": federation})
    centre: Any = SimpleNamespace(
        flwr_home=tmp_path / "home", root=tmp_path, logs=tmp_path / "logs", lock=tmp_path / "lock"
    )
    return StartRequest(
        centre=centre,
        run=run,
        config=tmp_path / "run.yaml",
        overrides=(),
        run_dir=tmp_path / "runs" / "run",
        checkpoint=None,
        verify_checkpoint=True,
        say=lambda line: None,
    )


def keep_until(kept: Kept, restarts: int, *, seconds: float = 20.0) -> float:
    started = time.monotonic()
    while kept.restarts < restarts:
        kept.keep()
        assert time.monotonic() - started < seconds
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.mark.slow
def test_a_child_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('gone')"]
    kept = Kept("short", lambda: command, environment={}, log=tmp_path / "short.log")
    kept.start()
    assert keep_until(kept, 1) >= 0.5
    assert keep_until(kept, 2) >= 1.0
    kept.end()
    assert kept.info.state == "restarting"
    assert "gone" in (tmp_path / "short.log").read_text()


@pytest.mark.slow
def test_a_child_is_ended_with_all_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
    kept = Kept(
        "family",
        lambda: [sys.executable, "-c", f"{script} print('up', flush=True); time.sleep(99)"],
        environment={},
        log=tmp_path / "family.log",
    )
    kept.start()
    assert kept.info.state == "running"
    started = time.monotonic()
    while "up" not in ((tmp_path / "family.log").read_text() if (tmp_path / "family.log").exists() else ""):
        assert time.monotonic() - started < 20
        time.sleep(0.02)
    kept.end()
    assert kept.info.pid is None


def test_one_supervisor_per_centre(tmp_path: Path) -> None:
    supervisor = Supervisor(request(tmp_path))
    with hold(tmp_path / "lock", otherwise="taken"), pytest.raises(ConfigError, match="runs already"):
        supervisor.run()
    with pytest.raises(ConfigError, match="whom to expect"):
        supervisor.run()


def test_a_dead_server_app_is_noticed_once_it_was_seen(tmp_path: Path) -> None:
    asked = request(tmp_path)
    supervisor = Supervisor(asked)
    assert not supervisor._server_app_died()
    with hold(server_app_lock(asked.run_dir), otherwise="taken"):
        assert not supervisor._server_app_died()
    assert supervisor._server_app_died()
    assert not supervisor._server_app_died()


def test_a_run_without_expected_sites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"whom to expect.*federation\.sites"):
        prepare_run(request(tmp_path))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    asked = request(tmp_path, sites=["a"])
    asked.run_dir.mkdir(parents=True)
    (asked.run_dir / "config.sha256").write_text("0" * 64)
    with pytest.raises(ConfigError, match="another config"):
        prepare_run(asked)


def test_a_wrong_backbone_is_reported_by_the_process_that_builds(tmp_path: Path) -> None:
    asked = request(tmp_path, sites=["a"])
    asked.config.write_text("task: {name: discs}\n")
    with pytest.raises(ConfigError, match=r"classes"):
        prepare_run(asked)


@pytest.mark.parametrize(("state", "kept"), [("failed", False), ("stopped", False), ("finished", True)])
def test_a_stopped_run_goes_on_and_a_finished_one_stays_so(tmp_path: Path, state: Any, kept: bool) -> None:
    asked = request(tmp_path, sites=["a"])
    (asked.run_dir / "checkpoints" / "round_000").mkdir(parents=True)
    (asked.run_dir / "config.sha256").write_text(asked.run.digest())
    StatusBoard(asked.run_dir, num_rounds=3, sites=("a",)).stage(state)
    prepare_run(asked)
    assert bool(read_status(asked.run_dir)) == kept


def test_a_run_that_breaks_again_and_again_fails(tmp_path: Path) -> None:
    supervisor = Supervisor(request(tmp_path, sites=["a"]))
    for _ in range(MAX_FAILURES - 1):
        supervisor._note_failure(2, "out of memory")
    supervisor._note_failure(3, "out of memory")  # a round in between: trying again helps
    for _ in range(MAX_FAILURES - 2):
        supervisor._note_failure(3, "out of memory")
    with pytest.raises(RunError, match=r"broke 5 times in a row in round 3: out of memory"):
        supervisor._note_failure(3, "out of memory")


def test_a_failure_of_the_supervisor_is_what_watchers_read(tmp_path: Path) -> None:
    StatusBoard(tmp_path, num_rounds=3, sites=("a",)).stage("training", server_round=2)
    note_failure(tmp_path, "broke")
    assert {key: read_status(tmp_path)[key] for key in ("state", "round", "reason")} == {
        "state": "failed",
        "round": 2,
        "reason": "broke",
    }
