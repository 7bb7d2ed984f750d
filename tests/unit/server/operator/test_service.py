"""A run directory that grows while it is watched, written by the centre's own books."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from icmoe.checkpoint import Checkpoint, save_checkpoint
from icmoe.errors import ConfigError, RunError
from icmoe_server.books import Books
from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.client import OperatorClient
from icmoe_server.operator.messages import ChildInfo
from icmoe_server.operator.operator_pb2_grpc import OperatorStub
from icmoe_server.operator.run_files import RunFiles

from .conftest import Run, line, make_centre, status

NUM_ROUNDS = 6
Serve = Callable[[Any, Run], grpc.Server]


@pytest.fixture
def client(tmp_path: Path, run: Run, serve: Serve) -> OperatorClient:
    centre = make_centre(tmp_path / "centre")
    serve(centre, run)
    return OperatorClient(centre.socket)


def train(run: Run, *, first: int, last: int) -> None:
    """Write what a ServerApp writes, with a status before and after each round."""
    books = Books(run.run_dir, last_round=first - 1)
    for server_round in range(first, last + 1):
        run.say(status("training", server_round, hospitalA="asked", hospitalB="asked"))
        save_checkpoint(run.run_dir, Checkpoint(server_round, "c", "b", {}, {}))
        books.add(line(server_round))
        run.say(status("training", server_round, hospitalA="answered", hospitalB="answered"))
        time.sleep(0.03)


def finish(run: Run) -> None:
    books = Books(run.run_dir, last_round=NUM_ROUNDS)
    books.add({**line(NUM_ROUNDS), "evaluate_only": True, "scored_round": NUM_ROUNDS})
    run.say(status("finished", NUM_ROUNDS))


def rounds(events: list[pb.Event]) -> list[tuple[int, bool]]:
    return [(e.round.round, e.round.evaluate_only) for e in events if e.WhichOneof("kind") == "round"]


def test_a_growing_run_arrives_whole_and_in_order(run: Run, client: OperatorClient) -> None:
    train(run, first=1, last=2)

    def go_on() -> None:
        train(run, first=3, last=NUM_ROUNDS)
        finish(run)

    writer = threading.Thread(target=go_on)
    with client:
        events = client.watch()
        received = [next(events), next(events), next(events)]
        assert [event.WhichOneof("kind") for event in received] == ["round", "round", "status"]
        writer.start()
        received += list(events)
    writer.join()
    assert rounds(received) == [(n, False) for n in range(1, NUM_ROUNDS + 1)] + [(NUM_ROUNDS, True)]
    assert received[-1].status.state == "finished"
    assert received[0].round.val_dice["hospitalB"] == pytest.approx(line(1)["val_dice"]["hospitalB"])


def test_a_repeated_round_is_sent_again_and_no_other(run: Run, client: OperatorClient) -> None:
    train(run, first=1, last=3)
    with client:
        events = client.watch()
        received = [next(events) for _ in range(4)]
        # The centre was killed in round 3 and goes on from round 2: the books drop line 3 and write it anew.
        again = Books(run.run_dir, last_round=2)
        again.add(line(3, seconds=99.0))
        run.say(status("stopped", 3))
        received += list(events)
    assert rounds(received) == [(1, False), (2, False), (3, False), (3, False)]
    assert [e.round.seconds for e in received if e.WhichOneof("kind") == "round"][-1] == 99.0


def test_the_roll_call_is_told_as_it_changes(run: Run, client: OperatorClient) -> None:
    with client:
        events = client.watch()
        assert next(events).status.state == "starting"
        for word in ("asked", "answered", "missing"):
            run.say(status("training", 1, hospitalA=word))
            event = next(events).status
            assert [(one.site, one.state) for one in event.roll_call] == [("hospitalA", word)]
        events.close()  # type: ignore[attr-defined]


def test_processes_that_restart_are_told(run: Run, client: OperatorClient) -> None:
    run.say(status("training", 1))
    with client:
        events = client.watch()
        assert [child.restarts for child in next(events).status.children] == [0, 0]
        run.children[0] = ChildInfo("superlink", 103, "running", 1)
        assert [(c.pid, c.restarts) for c in next(events).status.children] == [(103, 1), (102, 0)]


def test_leaving_frees_the_server(run: Run, client: OperatorClient) -> None:
    run.say(status("training", 1))
    before = {thread.ident for thread in threading.enumerate()}
    with client:
        for _ in range(40):  # more than may watch at once
            events = client.watch()
            next(events)
            events.close()  # type: ignore[attr-defined]
            time.sleep(0.03)
        assert client.status().state == "training"
    assert len({thread.ident for thread in threading.enumerate()} - before) <= 24


def test_stop_writes_the_file_and_now_stands(run: Run, client: OperatorClient) -> None:
    run.say(status("training", 4))
    with client:
        assert (client.stop(now=False).when, client.status().stop_asked) == (pb.AFTER_ROUND, "after_round")
        assert (run.run_dir / "stop").read_text() == "after_round"
        answer = client.stop(now=True)
        assert (answer.when, answer.round) == (pb.NOW, 4)
        assert client.stop(now=False).when == pb.NOW
        assert (run.run_dir / "stop").read_text() == "now"


def test_stop_of_an_ended_run_is_refused(run: Run, client: OperatorClient) -> None:
    run.say(status("finished", 10))
    with client, pytest.raises(ConfigError, match="ended already: finished"):
        client.stop(now=True)
    assert not (run.run_dir / "stop").exists()


def test_stop_wants_to_know_when(run: Run, client: OperatorClient, tmp_path: Path) -> None:
    run.say(status("training", 1))
    with grpc.insecure_channel(f"unix:{tmp_path / 'centre' / 'state' / 'operator.sock'}") as channel:
        stub = OperatorStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as refused:
            stub.Stop(pb.StopRequest(), timeout=5)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_stop_that_cannot_be_written_is_told(run: Run, client: OperatorClient) -> None:
    run.run_dir.parent.mkdir()
    run.run_dir.write_text("a file where the folder should be")
    with client, pytest.raises(RunError, match="cannot write"):
        client.stop(now=True)


def test_damaged_files_leave_the_last_good_content(run: Run) -> None:
    files = RunFiles(run.run_dir)
    assert (files.status(), files.rounds(), files.stop_asked()) == ({}, (), "")
    run.say(status("training", 2))
    (run.run_dir / "rounds.jsonl").write_text(f'{json.dumps({"round": 1})}\n{{"round": 2, "asked"')
    assert (files.status()["round"], files.rounds()) == (2, ({"round": 1},))
    (run.run_dir / "status.json").write_text('{"state": "trai')
    (run.run_dir / "rounds.jsonl").write_text(f"{json.dumps({'round': 1})}\n{json.dumps({'round': 2})}\n[]\n")
    assert files.status()["state"] == "training"
    assert files.rounds() == ({"round": 1}, {"round": 2})
    (run.run_dir / "rounds.jsonl").unlink()
    (run.run_dir / "stop").write_bytes(b"\xff tomorrow")
    assert (len(files.rounds()), files.stop_asked()) == (2, "")
