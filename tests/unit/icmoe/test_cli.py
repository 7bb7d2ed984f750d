"""What the command line does before any heavy work; whole runs are in tests/integration."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from icmoe import __version__, cli
from icmoe.errors import (
    BackboneError,
    ConfigError,
    ConnectError,
    DataError,
    ExchangeError,
    IcmoeError,
    PolicyError,
    RunError,
)

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run ``icmoe-fl`` inside this process: (exit code, what it printed)."""

    def leave(exit_code: int) -> None:
        raise SystemExit(exit_code)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["icmoe-fl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    monkeypatch.setattr(cli, "_leave", leave)
    monkeypatch.setenv("COLUMNS", "200")
    return run


def test_version(run_main: Main) -> None:
    assert run_main("--version") == (0, f"{__version__}\n")


def test_help_is_quick() -> None:
    """No heavy import on the way to the help text, which a user reads first."""
    program = "import sys\nimport icmoe.cli\nprint(*(m for m in ('torch', 'monai', 'flwr', 'ray') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("arguments", [("simulate",), ("train",), ("simulate", "x.yaml", "--rounds", "3")])
def test_wrong_use(run_main: Main, arguments: tuple[str, ...]) -> None:
    code, output = run_main(*arguments)
    assert code == 2
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (BackboneError, 2),
        (DataError, 3),
        (PolicyError, 4),
        (ConnectError, 5),
        (ExchangeError, 6),
        (RunError, 6),
    ],
)
def test_an_error_of_ours_is_a_message_and_a_code(
    run_main: Main, monkeypatch: pytest.MonkeyPatch, error: type[IcmoeError], code: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("cut [bold]here[/bold], give --data")

    monkeypatch.setattr("icmoe.config.load_run_config", fail)
    assert run_main("simulate", "x.yaml") == (code, f"{error.__name__}: cut [bold]here[/bold], give --data\n")


def test_ctrl_c_says_how_to_go_on(run_main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer turns Ctrl-C into an exit of its own, on which threads of Flower would be waited for."""

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("icmoe.config.load_run_config", stop)
    code, output = run_main("simulate", "x.yaml")
    assert code == 130
    assert "Stopped" in output


@pytest.mark.slow
def test_leave_takes_children_and_threads_with_it() -> None:
    """As after Ctrl-C: a thread that never ends, a child that ignores SIGTERM, and its child."""
    child = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    program = (
        "import subprocess, sys, threading, time\n"
        "from icmoe.cli import _leave\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print(child.pid, flush=True)\n"
        "_leave(130)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert time.monotonic() - started < 30
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while still_runs(pid):  # killed, but a busy kernel takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.05)


def still_runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestOutputFolder:
    """Where the folder is accepted, the missing manifest is what is left to complain about: exit code 3."""

    @pytest.fixture
    def ask(self, run_main: Main, tmp_path: Path) -> Main:
        config = tmp_path / "discs.yaml"
        config.write_text("task: {name: discs, classes: {disc: 1}}")

        def run(folder: object, *options: object) -> tuple[int, str]:
            return run_main("simulate", config, "--data", tmp_path / "nowhere", "--out", folder, *options)

        return run

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.sha256").write_text("digest")
        return folder

    def test_a_new_or_empty_folder_is_fine(self, ask: Main, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert ask(tmp_path / "new")[0] == 3
        assert ask(tmp_path / "empty")[0] == 3
        assert ask(tmp_path / "empty", "--overwrite")[0] == 3

    def test_resume_needs_a_run(self, ask: Main, run_dir: Path, tmp_path: Path) -> None:
        assert ask(run_dir, "--resume")[0] == 3
        code, output = ask(tmp_path / "new", "--resume")
        assert code == 2
        assert "without --resume" in output

    def test_a_run_is_kept_unless_asked_otherwise(self, ask: Main, run_dir: Path) -> None:
        code, output = ask(run_dir)
        assert code == 2
        assert "--overwrite" in output

    def test_a_folder_with_seeds_is_a_run(self, ask: Main, tmp_path: Path) -> None:
        (tmp_path / "seeds" / "seed_3").mkdir(parents=True)
        (tmp_path / "seeds" / "seed_3" / "config.sha256").write_text("digest")
        assert ask(tmp_path / "seeds", "--resume", "--seeds", "3")[0] == 3
        assert ask(tmp_path / "seeds")[0] == 2

    @pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)])
    def test_a_file_is_no_folder(self, ask: Main, tmp_path: Path, options: tuple[str, ...]) -> None:
        (tmp_path / "out").write_text("a file")
        code, output = ask(tmp_path / "out", *options)
        assert code == 2
        assert "out" in output


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), ("pooled,local", ("local", "pooled")), (" local ,", ("local",))]
)
def test_references(text: str, expected: tuple[str, ...]) -> None:
    assert cli._choices(text, cli.REFERENCES, option="--reference") == expected


def test_seeds() -> None:
    assert cli._seed_list("0, 3,1") == [0, 3, 1]


def test_data_given_wins_over_embedded_data(tmp_path: Path) -> None:
    assert cli._find_data(tmp_path, embedded=True, task="brain") == tmp_path


def test_a_home_without_rights_is_a_message(run_main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "file"))
    code, output = run_main("cache", "info")
    assert code == 6
    assert "ICMOE_CACHE_DIR" in output
    assert os.fspath(tmp_path) in output
