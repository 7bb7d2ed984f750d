from pathlib import Path
from typing import Any

import pytest

from icmoe import seeds as seeds_module
from icmoe.config import RunConfig
from icmoe.seeds import simulate_seeds, summarise_seeds
from icmoe.simulation import SimulationRequest


def results(mean: float | None, **more: Any) -> dict[str, Any]:
    scores = {
        "mean_dice": mean,
        "worst_site": {"name": "a", "dice": mean},
        "sites": {"a": {"dice": mean}, "b": {"dice": 0.5}},
    }
    about = {"task": "discs", "backbone": "lite_medsam", "trainable_params": 7, "num_rounds": 3}
    return {**scores, **about, "bytes_up_per_round_per_site": 28, "seconds": 2.0, "cpu_seconds": 3.0, **more}


def test_mean_and_sample_deviation() -> None:
    summary = summarise_seeds([results(0.8), results(0.9)])
    assert summary["mean_dice"] == pytest.approx({"mean": 0.85, "std": 0.0707107}, rel=1e-4)
    assert summary["worst_site"] == summary["sites"]["a"]["dice"] == summary["mean_dice"]
    assert summary["sites"]["b"]["dice"] == {"mean": 0.5, "std": 0.0}
    assert (summary["seconds"], summary["cpu_seconds"]) == (4.0, 6.0)
    assert summary["trainable_params"] == 7
    assert "reference" not in summary


def test_one_seed_has_no_deviation_and_nothing_scored_is_null() -> None:
    assert summarise_seeds([results(0.8)])["mean_dice"] == {"mean": 0.8, "std": 0.0}
    assert summarise_seeds([results(None), results(0.6)])["mean_dice"] == {"mean": 0.6, "std": 0.0}
    assert summarise_seeds([results(None)])["mean_dice"] is None


def test_a_site_that_one_seed_could_not_test_is_averaged_over_the_others() -> None:
    without = results(0.9)
    del without["sites"]["b"]
    for runs in ([results(0.8), without], [without, results(0.8)]):
        assert summarise_seeds(runs)["sites"]["b"]["dice"] == {"mean": 0.5, "std": 0.0}


def test_references_are_summarised_alike() -> None:
    runs = [results(0.8, reference={"local": results(0.7)}), results(0.9, reference={"local": results(0.9)})]
    assert summarise_seeds(runs)["reference"]["local"]["mean_dice"]["mean"] == pytest.approx(0.8)


class Silent:
    def stage(self, text: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def round_done(self, record: Any) -> None: ...


def test_each_seed_has_its_folder_and_finished_ones_are_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[SimulationRequest] = []

    def simulate(request: SimulationRequest, watcher: Any) -> dict[str, Any]:
        asked.append(request)
        return results(0.5 + request.run.train.seed / 10)

    monkeypatch.setattr(seeds_module, "simulate", simulate)
    monkeypatch.setattr(seeds_module, "write_report", lambda run_dir: run_dir)
    (tmp_path / "seed_4").mkdir()
    (tmp_path / "seed_4" / "config.sha256").write_text("digest")
    run = RunConfig.model_validate({"task": {"name": "discs", "classes": {"disc": 1}}, "train": {"batch_size": 3}})
    request = SimulationRequest(run=run, data=tmp_path, out=tmp_path, resume=True)
    summary = simulate_seeds(request, [4, 2], Silent())
    assert [(r.out.name, r.run.train.seed, r.resume) for r in asked] == [("seed_4", 4, True), ("seed_2", 2, False)]
    assert {r.run.train.batch_size for r in asked} == {3}
    assert summary["runs"] == ["seed_4", "seed_2"]
    assert summary["mean_dice"]["mean"] == pytest.approx(0.8)
    assert (tmp_path / "results.json").exists()
