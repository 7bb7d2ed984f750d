import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from icmoe.checkpoint import Checkpoint, load_checkpoint, round_folder
from icmoe.errors import RunError
from icmoe.exchange import Instruction
from icmoe.flower import pack_report
from icmoe.types import Array
from icmoe_server.books import Books
from icmoe_server.rollcall import RollCall
from icmoe_server.rounds import Rounds, describe_failures
from icmoe_server.status import StatusBoard


class Game:
    """Plays single rounds."""

    def __init__(self, centre: Any, *, start: Checkpoint | None = None) -> None:
        self.centre = centre
        start = start or centre.start()
        self.lines: list[dict[str, Any]] = []
        self.grid = centre.grid()
        run = centre.run()
        board = StatusBoard(centre.run_dir, num_rounds=run.federation.num_rounds, sites=centre.sites)
        self.rounds = Rounds(
            run=run,
            run_dir=centre.run_dir,
            books=Books(centre.run_dir, last_round=start.server_round),
            sites=centre.sites,
            roll_call=RollCall(
                self.grid,
                registered=lambda: self.grid.nodes,
                board=board,
                on_missing=run.federation.on_missing,
                deadline=run.federation.round_deadline,
            ),
            board=board,
            start=start,
            desk=None,
            on_round=self.lines.append,
        )

    def play(self, server_round: int, answer: Callable[..., Any] | None = None) -> dict[str, Any]:
        self.grid.answer = answer or self.centre.good
        self.grid.asked = []
        return self.rounds.train(server_round)

    @property
    def asked(self) -> list[tuple[str, str, int]]:
        return list(self.grid.asked)

    def tensors(self) -> dict[str, Array]:
        newest = max((self.centre.run_dir / "checkpoints").glob("round_*"))
        return dict(load_checkpoint(newest).arrays)


@pytest.fixture
def game(centre: Any) -> Game:
    return Game(centre)


def test_a_good_round_averages_and_is_written_down(game: Game, centre: Any) -> None:
    line = game.play(1)
    assert line["asked"] == line["answered"] == ["a", "b", "c"]
    assert line["failed"] == line["quarantined"] == {}
    assert line["scored_round"] == 0
    assert line["val_dice"] == dict.fromkeys("abc", 0.75)
    assert line["bytes_up"] == line["bytes_down"] == dict.fromkeys("abc", 28)
    for name, array in centre.tensors.items():
        np.testing.assert_allclose(game.tensors()[name], array + 0.3, rtol=1e-6)
    stored = load_checkpoint(round_folder(centre.run_dir, 1))
    assert stored.server_round == 1
    assert stored.backbone_digest == centre.backbone
    assert all(np.array_equal(stored.arrays[name], array) for name, array in game.tensors().items())
    assert json.loads((centre.run_dir / "rounds.jsonl").read_text())["round"] == 1


BAD_REPORTS: dict[str, dict[str, Any]] = {
    "round": {"server_round": 7},
    "run config": {"config_digest": "0" * 64},
    "backbone": {"backbone_digest": "0" * 64},
    "site 'a'": {"site": "a"},
    "examples": {"numbers": {"num_examples": 0.0}},
    "num_examples": {"numbers": {"num_examples": math.nan}},
    "train_loss": {"numbers": {"train_loss": math.inf}},
    "share of expert": {"expert_shares": {"basic.0": 1.5}},
    "dice": {"numbers": {"dice": math.nan}},
    "Dice": {"numbers": {"dice": 7.0}},
    "used": {"numbers": {"used": math.nan}},
    "found": {"numbers": {"found": math.inf}},
}


@pytest.mark.parametrize("told", BAD_REPORTS)
def test_a_bad_report_is_quarantined_and_the_round_goes_on(game: Game, centre: Any, told: str) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> RecordDict:
        changes = dict(BAD_REPORTS[told]) if site == "b" else {}
        content: RecordDict = centre.good(site, instruction, arrays, **changes)
        return content

    line = game.play(1, answer)
    assert line["answered"] == ["a", "c"]
    assert list(line["quarantined"]) == ["b"]
    assert told.lower() in line["quarantined"]["b"].lower()
    assert list(line["val_dice"]) == ["a", "c"]
    for name, array in centre.tensors.items():
        np.testing.assert_allclose(game.tensors()[name], array + 0.35, rtol=1e-6)


BAD_TENSORS: dict[str, Callable[[dict[str, Array]], dict[str, Array]]] = {
    "expected float32 (1,)": lambda t: {**t, "router.gate.weight": np.zeros((2, 2), np.float32)},
    "not finite": lambda t: {**t, "router.gate.weight": np.array([np.nan], np.float32)},
    "expected float32": lambda t: {**t, "router.gate.weight": np.array([0.5], np.float64)},
    "missing": lambda t: {name: array for name, array in t.items() if not name.startswith("router")},
    "unknown tensors": lambda t: {**t, "mask_decoder.secret": np.zeros(1, np.float32)},
    "L2 norm": lambda t: {**t, "router.gate.weight": np.array([1e6], np.float32)},
}


@pytest.mark.parametrize("told", BAD_TENSORS)
def test_bad_tensors_are_quarantined(game: Game, centre: Any, told: str) -> None:
    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> RecordDict:
        if site != "b":
            content: RecordDict = centre.good(site, instruction, arrays)
            return content
        return pack_report(centre.report_of(site, instruction), BAD_TENSORS[told](centre.moved(arrays, 0.2)))

    line = game.play(1, answer)
    assert line["answered"] == ["a", "c"]
    assert told in line["quarantined"]["b"]


class TestChangesOutOfProportion:
    """Below the absolute limit, and a hundred times what the other sites send."""

    def attack(self, centre: Any, times: float) -> Callable[..., RecordDict]:
        def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> RecordDict:
            step = 0.1 * (times if site == "b" else 1.0)
            return pack_report(centre.report_of(site, instruction), centre.moved(arrays, step))

        return answer

    def test_among_three_sites_it_is_seen_at_once(self, game: Game, centre: Any) -> None:
        line = game.play(1, self.attack(centre, 100))
        assert line["answered"] == ["a", "c"]
        assert "100 times the usual" in line["quarantined"]["b"]
        assert "federation.max_update_ratio allows 30 times" in line["quarantined"]["b"]
        assert line["update_norm"] == pytest.approx(dict.fromkeys("ac", 0.1 * 7**0.5), rel=1e-4)
        assert list(line["val_dice"]) == ["a", "c"]
        for name, array in centre.tensors.items():
            np.testing.assert_allclose(game.tensors()[name], array + 0.1, rtol=1e-6)

    def test_of_two_sites_as_well_once_there_was_a_round(self, centre: Any) -> None:
        centre.sites = ("a", "b")
        Game(centre).play(1, self.attack(centre, 1))
        # The norms of earlier rounds are read back by a run that goes on.
        again = Game(centre, start=load_checkpoint(round_folder(centre.run_dir, 1)))
        assert list(again.play(2, self.attack(centre, 100))["quarantined"]) == ["b"]

    def test_in_the_first_round_of_two_sites_nobody_can_say(self, centre: Any) -> None:
        """A site that hardly moves must not be able to have an honest one thrown out."""
        centre.sites = ("a", "b")
        line = Game(centre).play(1, self.attack(centre, 0.001))
        assert line["answered"] == ["a", "b"]

    def test_the_run_may_allow_more(self, centre: Any) -> None:
        centre.changes["federation"] = {"max_update_ratio": 200.0}
        assert Game(centre).play(1, self.attack(centre, 100))["quarantined"] == {}

    def test_sites_of_very_different_size_are_left_alone(self, game: Game, centre: Any) -> None:
        assert game.play(1, self.attack(centre, 20))["quarantined"] == {}
        assert game.play(2, self.attack(centre, 0.05))["quarantined"] == {}


def test_a_reply_that_is_none_of_ours_is_quarantined(game: Game, centre: Any) -> None:
    line = game.play(1, lambda site, *rest: RecordDict() if site == "b" else centre.good(site, *rest))
    assert "no tensors" in line["quarantined"]["b"]


def test_errors_are_told_apart_by_the_message_they_answer(game: Game, centre: Any) -> None:
    """The fake grid gives all errors one sender and turns the order round, as Flower may."""

    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> Any:
        return {"a": RuntimeError("disk of a"), "b": None}.get(site, centre.good(site, instruction, arrays))

    line = game.play(1, answer)
    assert line["failed"] == {"a": "disk of a", "b": "no answer before the round's deadline"}
    assert line["answered"] == ["c"]


def test_three_rounds_without_a_good_reply_end_the_run(game: Game, centre: Any) -> None:
    def answer(*_: Any) -> Exception:
        return RuntimeError("out of memory")

    game.play(1, answer)
    game.play(2, answer)
    with pytest.raises(RunError, match=r"round 3: 0 of the 1 sites.*a: out of memory"):
        game.play(3, answer)
    lines = (centre.run_dir / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 2  # the third is to be asked again
    for name, array in centre.tensors.items():
        assert np.array_equal(game.tensors()[name], array)


def test_one_good_round_in_between_is_enough_to_go_on(game: Game, centre: Any) -> None:
    def nobody(*_: Any) -> Exception:
        return RuntimeError("no")

    for server_round, answer in enumerate([nobody, nobody, centre.good, nobody, nobody, centre.good], start=1):
        game.play(server_round, answer)
    assert len(game.lines) == 6


def without_c(centre: Any) -> Callable[..., Any]:
    return lambda site, *rest: RuntimeError("disk full") if site == "c" else centre.good(site, *rest)


class TestQuorum:
    def test_by_default_all_sites_must_answer(self, centre: Any) -> None:
        centre.changes["federation"] = {"quorum": None, "on_missing": "wait"}
        game = Game(centre)
        with pytest.raises(RunError, match=r"round 1: 2 of the 3 sites that federation\.quorum wants.*c: disk full"):
            game.play(1, without_c(centre))
        assert not (centre.run_dir / "rounds.jsonl").exists()

    def test_below_it_a_run_that_continues_keeps_its_model(self, centre: Any) -> None:
        centre.changes["federation"] = {"quorum": 3}
        game = Game(centre)
        line = game.play(1, without_c(centre))
        assert line["answered"] == ["a", "b"]
        assert not line["aggregated"]
        for name, array in centre.tensors.items():
            assert np.array_equal(game.tensors()[name], array)
        assert game.play(2)["aggregated"]
        assert not np.array_equal(game.tensors()["router.gate.weight"], centre.tensors["router.gate.weight"])

    def test_at_it_the_round_counts_and_the_line_says_who_is_not_in_it(self, centre: Any) -> None:
        centre.changes["federation"] = {"quorum": 2, "on_missing": "wait"}
        line = Game(centre).play(1, without_c(centre))
        assert line["aggregated"]
        assert line["failed"] == {"c": "disk full"}


class TestSampling:
    def ask(self, centre: Any, seed: int = 0) -> list[list[tuple[str, str, int]]]:
        centre.changes |= {"simulation": {"fraction_train": 0.67}, "train": {"seed": seed}}
        game, asked = Game(centre), []
        for server_round in range(1, 9):
            game.play(server_round)
            asked.append(game.asked)
        return asked

    def test_is_the_same_again_and_another_with_another_seed(self, centre: Any) -> None:
        assert self.ask(centre) == self.ask(centre)
        assert self.ask(centre) != self.ask(centre, seed=1)

    def test_sites_that_do_not_train_score_what_the_others_got(self, centre: Any) -> None:
        rounds = self.ask(centre)
        for server_round, asked in enumerate(rounds, start=1):
            assert sorted(site for site, _, _ in asked) == ["a", "b", "c"]
            told = {(job, scored) for _, job, scored in asked}
            assert told == {("train", server_round), ("validate", server_round - 1)}
            assert sum(job == "train" for _, job, _ in asked) == 2
        assert {site for asked in rounds for site, job, _ in asked if job == "train"} == {"a", "b", "c"}

    def test_a_resumed_run_asks_the_same_sites(self, centre: Any) -> None:
        whole = self.ask(centre)
        resumed = Game(centre, start=load_checkpoint(round_folder(centre.run_dir, 5)))
        resumed.play(6)
        assert resumed.asked == whole[5]

    def test_a_validating_site_stands_in_the_line_with_its_score_only(self, centre: Any) -> None:
        centre.changes |= {"simulation": {"fraction_train": 0.67}}
        game = Game(centre)
        line = game.play(1)
        assert set(line["val_dice"]) == {"a", "b", "c"}
        assert set(line["bytes_up"]) == set(line["asked"]) == set(line["answered"])
        assert len(line["asked"]) == 2

    @pytest.mark.parametrize(
        "changes",
        [{"numbers": {"dice": math.nan}}, {"site": "a"}, {"server_round": 9}, {"backbone_digest": "0" * 64}],
        ids=["nan", "lying site", "other round", "other backbone"],
    )
    def test_a_bad_score_is_quarantined_too(self, centre: Any, changes: dict[str, Any]) -> None:
        centre.changes |= {"simulation": {"fraction_train": 0.34}}
        centre.sites = ("b", "c", "d")
        game = Game(centre)

        def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> RecordDict:
            wrong = dict(changes) if instruction.job == "validate" else {}
            content: RecordDict = centre.good(site, instruction, arrays, **wrong)
            return content

        line = game.play(1, answer)
        assert len(line["quarantined"]) == 2
        assert list(line["val_dice"]) == line["asked"]


def test_round_numbers_go_on_after_a_resume(centre: Any) -> None:
    first = Game(centre)
    first.play(1)
    first.play(2)
    resumed = Game(centre, start=load_checkpoint(round_folder(centre.run_dir, 2)))
    line = resumed.play(3)
    assert line["round"] == 3
    assert {server_round for _, _, server_round in resumed.asked} == {3}
    first.play(3)
    assert all(np.array_equal(first.tensors()[name], array) for name, array in resumed.tensors().items())


def test_fp16_replies_are_averaged_in_float32(centre: Any) -> None:
    centre.changes["federation"] = {"communication": {"dtype": "float16"}}
    game = Game(centre)

    def answer(site: str, instruction: Instruction, arrays: dict[str, Array]) -> RecordDict:
        half = {name: array.astype(np.float16) for name, array in centre.moved(arrays, 0.5).items()}
        return pack_report(centre.report_of(site, instruction), half)

    line = game.play(1, answer)
    assert line["bytes_up"] == dict.fromkeys("abc", 14)
    assert {array.dtype for array in game.tensors().values()} == {np.dtype(np.float32)}


def test_failures_read_as_one_line() -> None:
    record = {"failed": {"a": "x"}, "quarantined": {"b": "y"}, "missing": {"c": "noon"}}
    assert describe_failures(record) == "a: x; b: y; c: missing since noon"
    assert describe_failures({"failed": {}, "quarantined": {}}) == "none were asked"
