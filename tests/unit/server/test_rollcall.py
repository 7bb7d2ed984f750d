import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict

from icmoe.errors import RunError
from icmoe.exchange import Instruction
from icmoe.flower import pack_instruction, reply
from icmoe_server.rollcall import MAX_ASKS, Answers, Request, RollCall, StopWantedError
from icmoe_server.status import StatusBoard


class LostError(Exception):
    """What Flower says of a site whose process is gone."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.code = code


class Call:
    """A roll-call of one exchange."""

    def __init__(self, centre: Any, *, on_missing: Any = "wait", deadline: float = 5.0) -> None:
        centre.run_dir.mkdir(parents=True)
        self.centre = centre
        self.grid = centre.grid()
        self.registered = dict(self.grid.nodes)
        self.board = StatusBoard(centre.run_dir, num_rounds=3, sites=centre.sites)
        self.roll_call = RollCall(
            self.grid, registered=lambda: self.registered, board=self.board, on_missing=on_missing, deadline=deadline
        )

    def ask(self, answer: Callable[..., Any] | None = None, *, quorum: int = 3, server_round: int = 1) -> Answers:
        self.grid.answer = answer or self.centre.good
        run = self.centre.run()
        requests = {}
        for site in self.centre.sites:
            instruction = Instruction("train", run.model_dump_json(), run.digest(), server_round, site)
            requests[site] = Request(MessageType.TRAIN, pack_instruction(instruction, self.centre.tensors))
        return self.roll_call.ask(requests, quorum=quorum)

    def status(self) -> Any:
        return json.loads((self.centre.run_dir / "status.json").read_text())


def after(seconds: float, do: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, do)
    timer.start()
    return timer


def test_all_answer(centre: Any) -> None:
    call = Call(centre)
    answers = call.ask()
    assert list(answers.good) == ["a", "b", "c"]
    assert answers.failed == answers.missing == {}
    assert {site: how["state"] for site, how in call.status()["roll_call"].items()} == dict.fromkeys("abc", "answered")


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_site_that_was_lost_is_asked_again(centre: Any, code: int) -> None:
    tries: list[str] = []

    def answer(site: str, *rest: Any) -> Any:
        tries.append(site)
        return LostError(code) if tries.count(site) == 1 and site == "b" else centre.good(site, *rest)

    assert list(Call(centre).ask(answer).good) == ["a", "b", "c"]
    assert tries == ["a", "b", "c", "b"]


def test_a_site_that_connected_anew_unseen_is_asked_again_and_its_first_answer_counts(centre: Any) -> None:
    """Its process was killed with the message, and a new one was there before anybody had looked."""
    tries: list[str] = []
    call = Call(centre)

    def answer(site: str, *rest: Any) -> Any:
        tries.append(site)
        return None if tries.count(site) == 1 and site == "b" else centre.good(site, *rest)

    after(0.2, lambda: call.grid.num_connections.update("b"))
    answers = call.ask(answer)
    assert list(answers.good) == ["a", "b", "c"]
    assert tries == ["a", "b", "c", "b"]
    assert answers.num_late == 0
    asked = Message(RecordDict(), dst_node_id=22, message_type=MessageType.TRAIN)
    asked.metadata.__dict__["_message_id"] = "message-1"
    call.grid.replies["message-1"] = reply(asked, RecordDict())
    assert call.ask(server_round=2).num_late == 1


def test_a_site_that_connects_anew_all_the_time_does_not_hold_up_the_rest(centre: Any) -> None:
    call = Call(centre, deadline=0.5)
    call.grid.get_nodes = lambda nodes=call.grid.get_nodes: call.grid.num_connections.update("b") or nodes()
    tries: list[str] = []
    answers = call.ask(lambda site, *rest: tries.append(site) if site == "b" else centre.good(site, *rest))
    assert tries == ["b"] * MAX_ASKS
    assert list(answers.failed) == ["b"]


def test_an_error_of_the_site_itself_is_not_asked_again(centre: Any) -> None:
    answers = Call(centre).ask(
        lambda site, *rest: RuntimeError("no images") if site == "b" else centre.good(site, *rest)
    )
    assert answers.failed == {"b": "no images"}


def test_a_site_that_dies_each_time_does_not_hold_up_the_rest(centre: Any) -> None:
    answers = Call(centre).ask(lambda site, *rest: LostError(8) if site == "b" else centre.good(site, *rest))
    assert answers.failed == {"b": "its process was killed"}
    assert list(answers.good) == ["a", "c"]


def test_a_message_lost_at_the_deadline_leaves_its_site_in_the_roll_call(centre: Any) -> None:
    """Flower calls an expired message lost, and it expires at the deadline: too late to ask again."""
    call = Call(centre, deadline=0.0)
    answers = call.ask(lambda site, *rest: LostError(3) if site == "b" else centre.good(site, *rest))
    assert answers.failed == {"b": "no answer before the round's deadline"}
    assert call.status()["roll_call"]["b"]["state"] == "failed"


class TestMissing:
    def test_is_waited_for_and_asked_when_it_is_back(self, centre: Any) -> None:
        call = Call(centre)
        call.grid.offline.add("b")
        after(0.3, lambda: call.grid.offline.discard("b"))
        answers = call.ask()
        assert list(answers.good) == ["a", "b", "c"]
        assert answers.missing == {}
        assert answers.seconds_waited > 0.1

    def test_is_reported_with_the_time_since_when(self, centre: Any) -> None:
        call = Call(centre, deadline=0.2)
        call.grid.offline.add("b")
        first = call.ask().missing["b"]
        assert call.status()["roll_call"]["b"] == {"state": "missing", "since": first, "reason": "offline"}
        time.sleep(1.1)
        assert call.ask(server_round=2).missing["b"] == first

    def test_who_is_not_registered_is_told_from_who_is_offline(self, centre: Any) -> None:
        call = Call(centre, deadline=0.2)
        del call.registered["c"]
        assert list(call.ask().missing) == ["c"]
        assert "registered" in call.status()["roll_call"]["c"]["reason"]

    def test_continue_goes_on_with_the_quorum(self, centre: Any) -> None:
        call = Call(centre, on_missing="continue", deadline=60.0)
        call.grid.offline.add("b")
        answers = call.ask(quorum=2)
        assert list(answers.good) == ["a", "c"]
        assert list(answers.missing) == ["b"]

    def test_continue_waits_for_the_quorum(self, centre: Any) -> None:
        call = Call(centre, on_missing="continue")
        call.grid.offline |= {"a", "b"}
        after(0.3, lambda: call.grid.offline.discard("a"))
        assert list(call.ask(quorum=2).good) == ["a", "c"]

    def test_stop_stops(self, centre: Any) -> None:
        call = Call(centre, on_missing="stop")
        call.grid.offline.add("b")
        with pytest.raises(RunError, match=r"on_missing is stop, and b \(missing since 20"):
            call.ask()


class TestLate:
    def test_silence_ends_with_the_deadline(self, centre: Any) -> None:
        answers = Call(centre, deadline=0.2).ask(lambda site, *rest: None if site == "b" else centre.good(site, *rest))
        assert answers.failed == {"b": "no answer before the round's deadline"}

    def test_a_late_reply_is_dropped_and_counted(self, centre: Any) -> None:
        call = Call(centre, deadline=0.2)
        messages: dict[str, Any] = {}
        deliver = call.grid._deliver

        def remember(message: Any) -> Any:
            reply = deliver(message)
            messages.setdefault(call.grid.site_of[message.metadata.dst_node_id], message)
            return reply

        call.grid._deliver = remember
        call.ask(lambda site, *rest: None if site == "b" else centre.good(site, *rest))
        late = messages["b"]
        call.grid.replies[late.metadata.message_id] = deliver_reply(call, late)
        answers = call.ask(server_round=2)
        assert answers.num_late == 1
        assert list(answers.good) == ["a", "b", "c"]
        assert answers.good["b"].metadata.reply_to_message_id != late.metadata.message_id


def deliver_reply(call: Call, message: Any) -> Any:
    """What the site would have sent in time."""
    call.grid.answer = call.centre.good
    message_id = message.metadata.message_id
    reply = type(call.grid)._deliver(call.grid, message)
    message.metadata.__dict__["_message_id"] = message_id
    assert reply is not None
    reply.metadata.__dict__["_reply_to_message_id"] = message_id
    return reply


def test_an_operator_can_stop_the_waiting(centre: Any) -> None:
    call = Call(centre, deadline=60.0)
    call.grid.offline.add("b")
    after(0.2, lambda: (centre.run_dir / "stop").write_text("now"))
    with pytest.raises(StopWantedError):
        call.ask()


def test_stopping_after_the_round_lets_it_end(centre: Any) -> None:
    call = Call(centre)
    (centre.run_dir / "stop").write_text("after_round\n")
    assert list(call.ask().good) == ["a", "b", "c"]
    assert call.board.stop_wanted() == "after_round"


def test_asks_are_bounded(centre: Any) -> None:
    call = Call(centre)
    call.ask(lambda site, *rest: LostError(5) if site == "a" else centre.good(site, *rest))
    assert sum(site == "a" for site, *_ in call.grid.asked) == MAX_ASKS
