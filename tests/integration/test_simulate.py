"""One small federation through the real command line: what a finished run leaves behind, and equal seeds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from icmoe.checkpoint import load_checkpoint
from icmoe.config import load_run_config

# A busy machine takes several times as long as a quiet one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SITES = ["a", "b", "c"]
MAX_BYTES_UP = 8_000_000


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise AssertionError(f"results.json holds {text}")

    return dict(json.loads((finished / "results.json").read_text(), parse_constant=refuse))


@pytest.fixture(scope="module")
def rounds(finished: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]


class TestRunDirectory:
    def test_holds_what_was_agreed(self, finished: Path) -> None:
        names = {path.name for path in finished.iterdir()}
        assert names == {
            "best",
            "checkpoints",
            "config.sha256",
            "config.yaml",
            "examples",
            "references",
            "report.html",
            "results.json",
            "rounds.jsonl",
            "status.json",
            "tensorboard",
        }
        assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
            "round_000",
            "round_001",
            "round_002",
            "round_003",
        ]
        for folder in (finished / "checkpoints").iterdir():
            assert {path.name for path in folder.iterdir()} == {"adapters.safetensors", "manifest.json"}

    def test_nothing_half_written_is_left(self, finished: Path) -> None:
        assert [path for path in finished.rglob("*") if path.name.startswith(".")] == []

    def test_config_reads_back_to_the_same_digest(self, finished: Path, config: Path) -> None:
        digest = (finished / "config.sha256").read_text().strip()
        assert load_run_config(finished / "config.yaml").digest() == digest == load_run_config(config).digest()

    def test_report_stands_alone(self, finished: Path) -> None:
        page = (finished / "report.html").read_text(encoding="utf-8")
        assert len(page) < 15_000_000
        assert "discs" in page
        assert 'src="http' not in page
        assert list((finished / "tensorboard").glob("events.*"))

    def test_examples_show_image_truth_prediction_and_winner(self, finished: Path) -> None:
        paths = sorted((finished / "examples").glob("*.npz"))
        assert len(paths) == 3  # one test image at each of three sites
        for path in paths:
            with np.load(path) as example:
                assert {example[name].shape for name in ("truth", "prediction", "winner")} == {(64, 64)}
                assert example["image"].shape[:2] == (64, 64)
                assert set(np.unique(example["prediction"])) <= {0, 1}
                assert example["winner"].max() < len(example["expert_names"]) == 4
                assert 0.0 <= example["dice"] <= 1.0

    def test_report_can_be_written_again(
        self, finished: Path, tmp_path: Path, run_main: Callable[..., tuple[int, str]]
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(finished, copy, symlinks=True)
        (copy / "report.html").unlink()
        code, output = run_main("report", copy)
        assert code == 0, output
        assert "discs" in (copy / "report.html").read_text(encoding="utf-8")


class TestResults:
    def test_keys(self, results: dict[str, Any]) -> None:
        assert set(results) == {
            "task",
            "backbone",
            "trainable_params",
            "bytes_up_per_round_per_site",
            "backbone_sha256_before",
            "backbone_sha256_after",
            "sites",
            "mean_dice",
            "worst_site",
            "best_round",
            "num_rounds",
            "empty_masks",
            "final",
            "not_scored",
            "seconds",
            "cpu_seconds",
            "epsilon",
            "intensity",
            "reference",
        }
        for scores in (results, *results["reference"].values()):
            assert list(scores["sites"]) == SITES
            for site in scores["sites"].values():
                assert set(site) == {"dice", "dice_per_class", "hd95", "hd95_unit", "num_test"}
                assert set(site["dice_per_class"]) == {"disc"}
                assert site["num_test"] == 1
                assert site["hd95_unit"] == "px"
            assert set(scores["worst_site"]) == {"name", "dice"}
        assert set(results["epsilon"]) == set(results["empty_masks"]) == set(SITES)
        assert results["not_scored"] == {}

    def test_backbone_did_not_change(self, finished: Path, results: dict[str, Any]) -> None:
        assert results["backbone_sha256_before"] == results["backbone_sha256_after"]
        assert load_checkpoint(finished / "best").backbone_digest == results["backbone_sha256_before"]

    def test_means(self, results: dict[str, Any]) -> None:
        for scores in (results, results["reference"]["local"], results["reference"]["pooled"]):
            dice = {name: site["dice"] for name, site in scores["sites"].items()}
            assert scores["mean_dice"] == pytest.approx(fmean(dice.values()))
            assert scores["worst_site"]["dice"] == min(dice.values())
            assert dice[scores["worst_site"]["name"]] == min(dice.values())

    def test_discs_are_learnt(self, results: dict[str, Any]) -> None:
        assert results["mean_dice"] > 0.9

    def test_time_is_counted(self, results: dict[str, Any]) -> None:
        assert results["seconds"] > 0
        # Torch is imported in four processes at least; the main process alone does not spend this much.
        assert results["cpu_seconds"] > 15

    def test_only_experts_and_router_travel(self, finished: Path, results: dict[str, Any]) -> None:
        best = load_file(finished / "best" / "adapters.safetensors")
        first = load_file(finished / "checkpoints" / "round_000" / "adapters.safetensors")
        assert {name.split(".")[0] for name in best} == {"experts", "router"}
        assert {name: array.shape for name, array in best.items()} == {n: a.shape for n, a in first.items()}
        assert not all(np.array_equal(best[name], first[name]) for name in best)
        assert results["trainable_params"] == sum(array.size for array in best.values()) <= 1_950_000
        assert results["bytes_up_per_round_per_site"] == sum(array.nbytes for array in best.values()) <= MAX_BYTES_UP

    def test_references_stand_in_their_columns(self, finished: Path, results: dict[str, Any]) -> None:
        assert set(results["reference"]) == {"local", "pooled"}
        output = (finished.parent / "output.txt").read_text()
        header = next(line for line in output.splitlines() if "federated" in line)
        assert header.index("federated") < header.index("local") < header.index("pooled")
        assert f"Report: {finished / 'report.html'}" in output
        assert "Traceback" not in output


class TestRounds:
    def test_a_line_a_round_and_a_last_validation(self, rounds: list[dict[str, Any]]) -> None:
        told = [(line["round"], line["scored_round"], line.get("evaluate_only", False)) for line in rounds]
        assert told == [(1, 0, False), (2, 1, False), (3, 2, False), (3, 3, True)]

    def test_fields(self, rounds: list[dict[str, Any]]) -> None:
        per_site = ("val_dice", "train_loss", "num_examples", "used", "found", "skipped", "empty_masks")
        for line in rounds[:3]:
            assert line["asked"] == line["answered"] == SITES
            assert line["failed"] == line["quarantined"] == {}
            assert line["seconds"] > 0
            for name in (*per_site, "bytes_up", "bytes_down", "expert_shares", "epsilon"):
                assert list(line[name]) == SITES, name
            assert set(line["num_examples"].values()) == set(line["used"].values()) == {3}
            for shares in line["expert_shares"].values():
                assert sum(shares.values()) == pytest.approx(1.0)

    def test_the_best_round_has_the_best_validation(
        self, rounds: list[dict[str, Any]], results: dict[str, Any], finished: Path
    ) -> None:
        means = {line["scored_round"]: fmean(line["val_dice"].values()) for line in rounds if line["scored_round"]}
        assert results["best_round"] == max(means, key=lambda scored: (means[scored], -scored))
        assert (finished / "best").resolve().name == f"round_{results['best_round']:03d}"


def test_the_same_seed_gives_the_same_results_and_seeds_are_summarised(
    finished: Path,
    icmoe_fl: Any,
    config: Path,
    discs: Path,
    results_of: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "seeds"
    done = icmoe_fl.run("simulate", config, "--data", discs, "--out", out, "--seeds", "0,1")
    assert done.process.returncode == 0, done.output
    assert results_of(out / "seed_0") == results_of(finished)
    for server_round in range(4):
        name = Path("checkpoints") / f"round_{server_round:03d}" / "adapters.safetensors"
        assert (out / "seed_0" / name).read_bytes() == (finished / name).read_bytes()
    first, second = (results_of(out / name) for name in ("seed_0", "seed_1"))
    assert first["mean_dice"] != second["mean_dice"]
    summary = json.loads((out / "results.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["runs"] == ["seed_0", "seed_1"]
    assert summary["mean_dice"]["mean"] == pytest.approx((first["mean_dice"] + second["mean_dice"]) / 2)
    assert (out / "report.html").exists()
    assert "±" in done.output
