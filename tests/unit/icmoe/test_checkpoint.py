import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from icmoe.checkpoint import (
    ADAPTERS,
    MANIFEST,
    STRATEGY,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    round_folder,
    save_checkpoint,
    write_json,
    write_lines,
    write_text,
)
from icmoe.errors import CheckpointError, RunError
from icmoe.types import Array

BEST = "best"


def state(server_round: int, *, size: int = 4, strategy: bool = False) -> Checkpoint:
    arrays: dict[str, Array] = {
        "router.gate.weight": np.full((size, 2), server_round, np.float32),
        "router.b": np.ones(1, np.float16),
    }
    return Checkpoint(
        server_round=server_round,
        config_digest="c" * 64,
        backbone_digest="b" * 64,
        arrays=arrays,
        strategy_state={"moment.router.b": np.zeros(1, np.float32)} if strategy else {},
    )


def same(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.server_round, one.config_digest, one.backbone_digest) == (
        other.server_round,
        other.config_digest,
        other.backbone_digest,
    )
    for mine, theirs in ((one.arrays, other.arrays), (one.strategy_state, other.strategy_state)):
        assert set(mine) == set(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert np.array_equal(mine[name], theirs[name])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow past ``num_bytes``: the same error path as a full disk, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestRoundTrip:
    @pytest.mark.parametrize("strategy", [False, True])
    def test_a_checkpoint_comes_back(self, tmp_path: Path, strategy: bool) -> None:
        folder = save_checkpoint(tmp_path, state(7, strategy=strategy))
        assert folder == round_folder(tmp_path, 7) == tmp_path / "checkpoints" / "round_007"
        same(load_checkpoint(folder), state(7, strategy=strategy))
        assert leftovers(tmp_path) == []

    def test_tensors_that_are_not_contiguous(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3).T
        folder = save_checkpoint(tmp_path, Checkpoint(1, "c", "b", {"router.x": array}, {}))
        assert np.array_equal(load_checkpoint(folder).arrays["router.x"], array)

    def test_the_latest_is_the_highest_round(self, tmp_path: Path) -> None:
        for server_round in (0, 2, 10, 9):
            save_checkpoint(tmp_path, state(server_round))
        assert latest_checkpoint(tmp_path).server_round == 10

    def test_the_latest_is_the_highest_round_beyond_a_thousand(self, tmp_path: Path) -> None:
        for server_round in (998, 999, 1000, 1001):
            save_checkpoint(tmp_path, state(server_round))
        assert latest_checkpoint(tmp_path).server_round == 1001

    def test_a_round_may_be_saved_again(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, state(1, size=2, strategy=True))
        save_checkpoint(tmp_path, state(1, size=6))
        same(latest_checkpoint(tmp_path), state(1, size=6))

    def test_best_is_a_round_and_moves(self, tmp_path: Path) -> None:
        for server_round in (1, 2):
            save_checkpoint(tmp_path, state(server_round))
            mark_best(tmp_path, server_round)
            same(load_checkpoint(tmp_path / BEST), state(server_round))
        assert leftovers(tmp_path) == []


class TestDamage:
    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint; start the run without --resume"):
            latest_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(tmp_path)

    @pytest.mark.parametrize("name", [ADAPTERS, STRATEGY, MANIFEST])
    @pytest.mark.parametrize("keep", [0, 5, 40, -3])
    def test_a_truncated_file(self, tmp_path: Path, name: str, keep: int) -> None:
        folder = save_checkpoint(tmp_path, state(1, strategy=True))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=r"round_001 cannot be read.*earlier round"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("name", [ADAPTERS, MANIFEST])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        folder = save_checkpoint(tmp_path, state(1))
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(folder)

    @pytest.mark.parametrize(
        "text", ["[]", "{}", "null", '{"server_round": 1, "other": 2}', "\ufeff{", '{"server_round":']
    )
    def test_a_manifest_of_something_else(self, tmp_path: Path, text: str) -> None:
        folder = save_checkpoint(tmp_path, state(1))
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(folder)


class TestFullDisk:
    def test_an_older_checkpoint_survives_and_nothing_is_left_behind(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, state(1))
        with small_disk(10_000), pytest.raises(RunError, match=r"round_002.*Free some space and use --resume"):
            save_checkpoint(tmp_path, state(2, size=10_000))
        same(latest_checkpoint(tmp_path), state(1))
        assert leftovers(tmp_path) == []

    def test_the_same_round_survives(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, state(1))
        with small_disk(10_000), pytest.raises(RunError, match="round_001"):
            save_checkpoint(tmp_path, state(1, size=10_000))
        same(latest_checkpoint(tmp_path), state(1))

    def test_something_in_the_way_of_best(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, state(1))
        (tmp_path / BEST).mkdir()
        with pytest.raises(RunError, match="best"):
            mark_best(tmp_path, 1)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("in the way", encoding="utf-8")
        with pytest.raises(RunError, match="cannot write the checkpoint"):
            save_checkpoint(tmp_path, state(1))

    def test_a_text_stays_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        write_text(path, "old")
        with small_disk(10_000), pytest.raises(OSError, match="large"):
            write_text(path, "new" * 10_000)
        assert path.read_text(encoding="utf-8") == "old"
        assert leftovers(tmp_path) == []


KILLER = """
import json, os, resource, signal, sys
from pathlib import Path
import numpy as np
from icmoe.checkpoint import Checkpoint, mark_best, save_checkpoint

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.symlink"}

def state(server_round):
    arrays = {"router.gate.weight": np.full((4000, 2), server_round, np.float32)}
    return Checkpoint(server_round, "c", "b", arrays, {})

def prepare(run_dir):
    save_checkpoint(run_dir, state(1))
    mark_best(run_dir, 1)
    if action != "save":
        save_checkpoint(run_dir, state(2))

def act(run_dir):
    if action == "best":
        mark_best(run_dir, 2)
    else:
        save_checkpoint(run_dir, state(2))

def die_before(number):
    left = [number]
    def hook(event, _):
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def die_in_the_middle_of_a_write():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

def killed(run_dir, how):
    prepare(run_dir)
    child = os.fork()
    if child == 0:
        how()
        act(run_dir)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

root, action = Path(sys.argv[1]), sys.argv[2]
if action != "best":  # a link has no middle
    assert killed(root / "write", die_in_the_middle_of_a_write)
number = 1
while killed(root / str(number), lambda: die_before(number)):
    number += 1
print(json.dumps(number - 1))
"""


class TestKill:
    """A process that really dies, before each of its file operations and in the middle of a write."""

    def runs(self, folder: Path, action: str) -> list[Path]:
        done = subprocess.run(
            [sys.executable, "-c", KILLER, str(folder), action], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) >= (3 if action == "best" else 5)
        return sorted(folder.iterdir())

    def test_saving_a_round_never_loses_the_one_before(self, tmp_path: Path) -> None:
        rounds = [latest_checkpoint(run).server_round for run in self.runs(tmp_path, "save")]
        assert set(rounds) == {1, 2}

    def test_saving_a_round_again_never_loses_the_one_before(self, tmp_path: Path) -> None:
        rounds = [latest_checkpoint(run).server_round for run in self.runs(tmp_path, "again")]
        assert set(rounds) <= {1, 2}

    def test_there_is_always_a_best(self, tmp_path: Path) -> None:
        rounds = [load_checkpoint(run / BEST).server_round for run in self.runs(tmp_path, "best")]
        assert set(rounds) == {1, 2}


class TestText:
    def test_json_refuses_nan(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "results.json", {"dice": float("nan")})
        with pytest.raises(ValueError, match="JSON compliant"):
            write_lines(tmp_path / "rounds.jsonl", [{"dice": float("nan")}])
        assert list(tmp_path.iterdir()) == []

    def test_one_record_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "rounds.jsonl"
        write_lines(path, [{"a": 1}, {"b": "x\ny"}])
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"a": 1}, {"b": "x\ny"}]
