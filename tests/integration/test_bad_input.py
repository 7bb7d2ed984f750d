"""What users get wrong: each has an exit code and a message that says what to do, no traceback, and nothing is lost."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icmoe.checkpoint import Checkpoint, save_checkpoint

Main = Callable[..., tuple[int, str]]


@pytest.fixture
def data(discs: Path, tmp_path: Path) -> Path:
    """A copy of the discs that a test may spoil."""
    return shutil.copytree(discs, tmp_path / "data")


@pytest.fixture
def simulate(run_main: Main, config: Path, data: Path, tmp_path: Path) -> Main:
    """Run ``simulate`` on the tiny config and the copied data, with more options; flags given again win."""

    def run(*options: object, expect: int) -> str:
        out = tmp_path / "out"
        code, output = run_main("simulate", config, "--data", data, "--out", out, *options)
        assert code == expect, output
        assert "Traceback" not in output
        return " ".join(output.split())

    return run  # type: ignore[return-value]


class TestConfig:
    def test_unknown_key(self, simulate: Any, tmp_path: Path) -> None:
        output = simulate("--set", "model.num_expert=3", expect=2)
        assert "model.num_expert: unknown key" in output
        assert "experts" in output  # of the keys that are allowed
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("train.batch_size=many", "train.batch_size"),
            ("train.batch_size=0", "greater than or equal to 1"),
            ("federation.strategy=fedbest", "fedadam"),
            ("model.image_size=100", "model.image_size"),
            ("federation.communication.dtype=float64", "float16"),
            ("simulation.partition=iid", "num_sites"),
            ("federation.num_rounds=.nan", "federation.num_rounds"),
        ],
    )
    def test_wrong_type_or_range(self, simulate: Any, change: str, told: str) -> None:
        output = simulate("--set", change, expect=2)
        assert told in output

    @pytest.mark.parametrize("change", ["train.batch_size", "=3", "task.name.more=1", "train.views=[1"])
    def test_bad_set(self, simulate: Any, change: str) -> None:
        assert "--set" in simulate("--set", change, expect=2)

    def test_missing_config(self, run_main: Main, tmp_path: Path) -> None:
        code, output = run_main("simulate", tmp_path / "none.yaml", "--data", tmp_path)
        assert code == 2
        assert "none.yaml" in output
        assert "configs/run" in output

    def test_config_that_is_no_yaml(self, run_main: Main, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_bytes(b"task: {name: [")
        code, output = run_main("simulate", tmp_path / "bad.yaml", "--data", tmp_path)
        assert code == 2
        assert "not valid YAML" in output

    @pytest.mark.parametrize(("value", "told"), [("locally", "local and pooled"), ("local,all", "'all'")])
    def test_bad_reference(self, simulate: Any, value: str, told: str) -> None:
        assert told in simulate("--reference", value, expect=2)

    @pytest.mark.parametrize("value", ["0,0", "a", "0,,1", "-1", "1.5"])
    def test_bad_seeds(self, simulate: Any, value: str) -> None:
        assert "--seeds takes" in simulate(f"--seeds={value}", expect=2)

    def test_more_replies_asked_for_than_there_are_sites(self, simulate: Any) -> None:
        """Such a run would never change the model, and say that all went well."""
        output = simulate("--set", "federation.quorum=4", expect=2)
        assert "quorum" in output

    def test_data_is_needed(self, run_main: Main, config: Path, tmp_path: Path) -> None:
        code, output = run_main("simulate", config, "--out", tmp_path / "out")
        assert code == 2
        assert "--data DIR" in output


class TestData:
    def test_no_folder_and_no_manifest(self, simulate: Any, data: Path, tmp_path: Path) -> None:
        assert "does not exist" in simulate("--data", tmp_path / "nowhere", expect=3)
        (data / "manifest.csv").unlink()
        assert "image, mask, patient, split" in simulate(expect=3)

    def test_image_missing(self, simulate: Any, data: Path) -> None:
        (data / "b1.png").unlink()
        assert "b1.png does not exist" in simulate(expect=3)

    @pytest.mark.parametrize("name", ["b1.png", "b1_mask.png"])
    def test_file_truncated(self, simulate: Any, data: Path, tmp_path: Path, name: str) -> None:
        content = (data / name).read_bytes()
        (data / name).write_bytes(content[: len(content) // 2])
        output = simulate(expect=3)
        assert name in output
        assert "truncated or damaged" in output
        assert not (tmp_path / "out").exists()

    def test_image_of_another_size_than_its_mask(self, simulate: Any, data: Path) -> None:
        Image.fromarray(np.zeros((32, 64), np.uint8)).save(data / "c2_mask.png")
        output = simulate(expect=3)
        assert "c2_mask.png" in output
        assert "must have the same size" in output

    def test_mask_value_without_a_class(self, simulate: Any, data: Path) -> None:
        Image.fromarray(np.full((64, 64), 7, np.uint8)).save(data / "a0_mask.png")
        output = simulate(expect=3)
        assert "a0_mask.png holds values without a class: 7" in output
        assert "classes" in output

    def test_patient_in_two_splits(self, simulate: Any, data: Path) -> None:
        table = (data / "manifest.csv").read_text()
        (data / "manifest.csv").write_text(table.replace("a4_mask.png,4,test,a", "a4_mask.png,0,test,a"))
        assert "patient 0 of site a is in the splits train, test" in simulate(expect=3)

    def test_site_without_training_images(self, simulate: Any, data: Path) -> None:
        lines = (data / "manifest.csv").read_text().splitlines()
        kept = [line for line in lines if not line.endswith(",train,b")]
        (data / "manifest.csv").write_text("\n".join(kept) + "\n")
        assert "site b has no image with split train" in simulate(expect=3)

    def test_too_many_sites_for_the_patients(self, simulate: Any) -> None:
        output = simulate("--set", "simulation.partition=iid", "--set", "simulation.num_sites=50", expect=2)
        assert "Choose 1 to 9" in output


class TestBackbone:
    def test_needs_a_checkpoint(self, simulate: Any) -> None:
        output = simulate("--set", "model.backbone=sam_vit_b", expect=2)
        assert "sam_vit_b needs a checkpoint file" in output
        assert "--checkpoint" in output

    def test_points_nowhere(self, simulate: Any, tmp_path: Path) -> None:
        output = simulate("--set", "model.backbone=sam_vit_b", "--checkpoint", tmp_path / "no.pth", expect=2)
        assert "no.pth is not a file" in output

    def test_wrong_file(self, simulate: Any, tmp_path: Path) -> None:
        (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
        output = simulate("--set", "model.backbone=sam_vit_b", "--checkpoint", tmp_path / "junk.pth", expect=2)
        assert "junk.pth has sha256" in output
        assert "--trust-checkpoint" in output  # not the name of a Python argument

    def test_wrong_file_for_the_bundled_one(self, simulate: Any, tmp_path: Path) -> None:
        (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
        options = ("--checkpoint", tmp_path / "junk.pth")
        assert "has sha256" in simulate(*options, expect=2)
        assert "not a readable torch checkpoint" in simulate(*options, "--trust-checkpoint", expect=2)


@pytest.fixture
def old_run(tmp_path: Path, config: Path) -> Path:
    """What a run leaves behind that ended early, as far as the command line looks at it."""
    out = tmp_path / "out"
    save_checkpoint(out, Checkpoint(0, "c" * 64, "b" * 64, {"router.x": np.ones(2, np.float32)}, {}))
    (out / "config.sha256").write_text("c" * 64 + "\n")
    (out / "config.yaml").write_text(config.read_text())
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOutputFolder:
    def test_a_run_is_not_written_over(self, simulate: Any, old_run: Path) -> None:
        before = files_of(old_run)
        output = simulate(expect=2)
        assert "--resume" in output
        assert "--overwrite" in output
        assert files_of(old_run) == before

    def test_overwrite_and_resume_contradict(self, simulate: Any, old_run: Path) -> None:
        before = files_of(old_run)
        assert "contradict" in simulate("--overwrite", "--resume", expect=2)
        assert files_of(old_run) == before

    def test_another_config_cannot_resume(self, simulate: Any, old_run: Path) -> None:
        before = files_of(old_run)
        output = simulate("--resume", "--set", "train.seed=5", expect=2)
        assert "another config" in output
        assert "config.yaml" in output
        assert files_of(old_run) == before

    def test_overwrite_leaves_what_is_no_run(self, simulate: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        assert "holds no run of ours" in simulate("--overwrite", expect=2)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"

    @pytest.mark.parametrize(
        "options",
        [
            ("--data", "nowhere"),
            ("--seeds", "a"),
            ("--set", "model.backbone=sam_vit_b"),
            ("--set", "model.logit_stride=3"),
        ],
        ids=["data", "seeds", "backbone", "model"],
    )
    def test_overwrite_removes_nothing_before_the_new_run_can_start(
        self, simulate: Any, old_run: Path, options: tuple[str, str]
    ) -> None:
        before = files_of(old_run)
        code = 3 if options[0] == "--data" else 2
        simulate("--overwrite", *options, expect=code)
        assert files_of(old_run) == before

    def test_nothing_to_resume(self, simulate: Any) -> None:
        assert "without --resume" in simulate("--resume", expect=2)

    def test_out_is_a_file(self, simulate: Any, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        for options in ((), ("--overwrite",), ("--resume",)):
            simulate(*options, expect=2)
        assert (tmp_path / "out").read_text() == "a file"

    def test_one_run_and_several_seeds_do_not_resume_each_other(
        self, simulate: Any, old_run: Path, tmp_path: Path
    ) -> None:
        """The wrong way round, the summary of seeds would replace the results of the one run."""
        nowhere = ("--data", tmp_path / "nowhere")  # exit code 3 where the folder is accepted
        before = files_of(old_run)
        assert "--seeds" in simulate("--resume", "--seeds", "0,1", *nowhere, expect=2)
        assert files_of(old_run) == before

        old_run.rename(tmp_path / "seed_0")
        old_run.mkdir()
        (tmp_path / "seed_0").rename(old_run / "seed_0")
        assert "--seeds" in simulate("--resume", expect=2)

    def test_report_of_no_run(self, run_main: Main, tmp_path: Path) -> None:
        code, output = run_main("report", tmp_path)
        assert code == 6
        assert "results.json" in output
        assert "Traceback" not in output


class TestCache:
    def test_info_and_purge(self, run_main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path))
        entry = tmp_path / "features" / "ab" / f"ab{'0' * 62}.safetensors"
        entry.parent.mkdir(parents=True)
        entry.write_bytes(b"x" * 100)
        (tmp_path / "features" / "mine.txt").write_text("not an entry")
        (tmp_path / "features").chmod(0o700)
        for verb, expected in (("info", 1), ("purge", 1), ("info", 0)):
            code, output = run_main("cache", verb, "--json")
            assert code == 0
            told = json.loads(output)
            assert told == {
                "entries": expected,
                "bytes": 100 * expected,
                "limit_bytes": 20 * 10**9,
                "root": str(tmp_path / "features"),
            }
        assert (tmp_path / "features" / "mine.txt").exists()
        code, output = run_main("cache", "info")
        assert "holds 0 entries" in output

    def test_bad_limit(self, run_main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_CACHE_LIMIT_GB", "much")
        code, output = run_main("cache", "info")
        assert code == 2
        assert "ICMOE_CACHE_LIMIT_GB is 'much'" in output

    def test_limit_too_small_for_the_images(self, simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_CACHE_LIMIT_GB", "0.0001")
        assert "ICMOE_CACHE_LIMIT_GB" in simulate("--set", "model.detail_size=512", expect=3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full_before_encoding(
    simulate: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ICMOE_CACHE_DIR", str(small_disk))
    output = simulate(expect=6)
    assert "is full" in output
    assert "ICMOE_CACHE_DIR" in output
    assert not (tmp_path / "out").exists()


def test_disk_full_while_encoding(
    simulate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, discs: Path, data: Path
) -> None:
    """The file system says so in the middle of an entry; a limit on file size does the same everywhere."""
    import resource
    import signal

    monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "cache"))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, old[1]))
    try:
        output = simulate(expect=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "is full" in output
    assert "start again" in output
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
