import json
import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from icmoe.checkpoint import load_checkpoint, round_folder
from icmoe.errors import BackboneError, IcmoeError, RunError
from icmoe.exchange import Instruction
from icmoe.types import Array
from icmoe_server.app import Plan, find_sites, run_federation


class KilledError(Exception):
    """Stands for kill -9 in the middle of a run."""


def play(centre: Any, *, answer: Any = None, killed_after: int | None = None) -> dict[str, Any]:
    def on_round(record: dict[str, Any]) -> None:
        if record["round"] == killed_after:
            raise KilledError

    if not (centre.run_dir / "checkpoints").exists():
        centre.start()
    plan = Plan(run=centre.run(), run_dir=centre.run_dir, sites=centre.sites, on_round=on_round)
    run_federation(plan, centre.grid(answer or centre.good))
    return dict(json.loads((centre.run_dir / "results.json").read_text()))


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_results_of_a_whole_run(centre: Any) -> None:
    results = play(centre)
    assert results["mean_dice"] == 0.75
    assert results["worst_site"] == {"name": "a", "dice": 0.75}
    assert results["best_round"] == 1  # all the same: the earliest
    assert results["bytes_up_per_round_per_site"] == 28
    assert results["trainable_params"] == 7
    assert results["backbone_sha256_before"] == results["backbone_sha256_after"] == centre.backbone
    lines = [json.loads(line) for line in (centre.run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 3]
    assert lines[-1]["evaluate_only"]
    assert lines[-1]["scored_round"] == 3


def test_the_best_round_is_chosen_and_tested(centre: Any) -> None:
    """The aggregate of round 2 scores best; it is scored at the beginning of round 3."""
    tested: list[tuple[str, float]] = []

    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        scored = instruction.server_round - (instruction.job == "train")
        if instruction.job == "test":
            tested.append((site, float(arrays["router.gate.weight"][0])))
        return centre.good(site, instruction, arrays, numbers={"dice": {2: 0.9}.get(scored, 0.5)})

    results = play(centre, answer=answer)
    assert results["best_round"] == 2
    assert results["mean_dice"] == 0.9
    assert results["final"]["mean_dice"] == 0.5
    assert (centre.run_dir / "best").resolve().name == "round_002"
    best = load_checkpoint(round_folder(centre.run_dir, 2)).arrays["router.gate.weight"][0]
    assert [value for _, value in tested[:3]] == [pytest.approx(best)] * 3


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum"])
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_run_resumes_to_the_same_numbers(centre: Any, tmp_path: Any, strategy: str, killed_after: int) -> None:
    centre.changes["federation"] = {"strategy": strategy}
    steady = type(centre)(tmp_path / "steady", changes=centre.changes)
    expected = play(steady)
    with pytest.raises(KilledError):
        play(centre, killed_after=killed_after)
    assert not (centre.run_dir / "results.json").exists()
    assert without_seconds(play(centre)) == without_seconds(expected)
    for server_round in range(4):
        one, other = (load_checkpoint(round_folder(c.run_dir, server_round)) for c in (centre, steady))
        for kind in ("arrays", "strategy_state"):
            assert set(getattr(one, kind)) == set(getattr(other, kind))
            for name, array in getattr(one, kind).items():
                assert np.array_equal(array, getattr(other, kind)[name])


def test_lines_of_a_killed_round_are_dropped(centre: Any) -> None:
    with pytest.raises(KilledError):
        play(centre, killed_after=2)
    path = centre.run_dir / "rounds.jsonl"
    ahead = {"round": 3, "scored_round": 2, "val_dice": {"a": 1.0}, "answered": ["a"]}
    path.write_text(path.read_text() + json.dumps(ahead) + "\n")
    play(centre)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 3]
    assert lines[2]["answered"] == ["a", "b", "c"]


def test_a_run_in_which_nobody_succeeded_fails(centre: Any) -> None:
    centre.changes["federation"] = {"num_rounds": 2}
    with pytest.raises(RunError, match=r"usable update.*c: out of memory"):
        play(centre, answer=lambda *_: RuntimeError("out of memory"))
    assert not (centre.run_dir / "results.json").exists()


def test_a_site_missing_from_the_test_is_left_out_of_the_mean(centre: Any) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        failed = instruction.job == "test" and site == "b"
        return RuntimeError("gone") if failed else centre.good(site, instruction, arrays)

    assert list(play(centre, answer=answer)["sites"]) == ["a", "c"]


def test_nobody_can_be_tested(centre: Any) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        return RuntimeError("gone") if instruction.job == "test" else centre.good(site, instruction, arrays)

    with pytest.raises(RunError, match=r"no site could score the test split: a: gone"):
        play(centre, answer=answer)


def test_another_backbone_in_the_end_is_an_error(centre: Any) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        changes = {"backbone_digest": "0" * 64} if instruction.job == "test" else {}
        return centre.good(site, instruction, arrays, **changes)

    with pytest.raises(IcmoeError) as caught:
        play(centre, answer=answer)
    assert isinstance(caught.value, BackboneError | RunError)


@pytest.mark.parametrize(
    "changes",
    [{"numbers": {"dice": math.nan}}, {"numbers": {"hd95": math.inf}}, {"dice_per_class": [0.5, 0.5]}, {"site": "a"}],
    ids=["nan", "infinite", "classes", "lying site"],
)
def test_one_bad_test_report_does_not_cost_the_run(centre: Any, changes: dict[str, Any]) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        wrong = dict(changes) if instruction.job == "test" and site == "c" else {}
        return centre.good(site, instruction, arrays, **wrong)

    results = play(centre, answer=answer)
    assert list(results["sites"]) == ["a", "b"]


def test_without_validation_images_the_last_round_counts(centre: Any, caplog: pytest.LogCaptureFixture) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        content = centre.good(site, instruction, arrays)
        if instruction.job != "test":
            del content["metrics"]["dice"]
        return content

    results = play(centre, answer=answer)
    assert results["best_round"] == 3
    assert "no site has validation images" in caplog.text


def test_classes_absent_everywhere_are_null(centre: Any) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        return centre.good(site, instruction, arrays, dice_per_class=[math.nan])

    results = play(centre, answer=answer)
    assert results["sites"]["a"]["dice_per_class"] == {"disc": None}


class TestFindSites:
    def test_names_give_nodes(self, centre: Any) -> None:
        grid = centre.grid()
        assert find_sites(grid, ("b", "a")) == {"b": 22, "a": 11}

    def test_missing_sites_are_named(self, centre: Any) -> None:
        with pytest.raises(RunError, match=r"did not answer within 0 s: x, z"):
            find_sites(centre.grid(), ("a", "z", "x"), timeout=0.0)

    def test_a_late_site_is_waited_for(self, centre: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        grid = centre.grid()
        real, calls = grid.send_and_receive, []

        def late(messages: list[Message], *, timeout: float | None = None) -> Any:
            calls.append(len(messages))
            return [] if len(calls) == 1 else real(messages)

        monkeypatch.setattr(grid, "send_and_receive", late)
        assert set(find_sites(grid, ("a", "b", "c"), timeout=30.0)) == {"a", "b", "c"}
        assert calls == [3, 3]
