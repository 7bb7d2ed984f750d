"""The ServerApp: find the sites, run the rounds, score the end. The same app runs in the simulation and at a centre."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from icmoe.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    round_folder,
    write_json,
)
from icmoe.config import RunConfig
from icmoe.errors import BackboneError, IcmoeError, RunError
from icmoe.exchange import SiteReport
from icmoe.flower import unpack_site_name
from icmoe_server.books import Books, Record, summarise_test
from icmoe_server.receipt_desk import ReceiptDesk
from icmoe_server.rollcall import RollCall, StopWantedError
from icmoe_server.rounds import Rounds, describe_failures, failure_reasons
from icmoe_server.status import StatusBoard

NODES_TIMEOUT = 300.0
"""Seconds for all sites of a simulation to say their name; their processes load torch first."""
logger = logging.getLogger(__name__)

Registered = Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Plan:
    """What the ServerApp needs to know.

    Attributes:
        run: the run config.
        run_dir: holds at least the checkpoint of round 0.
        sites: expected sites by name.
        registered: gives site name -> node id by registered key. ``None`` asks the nodes for their names instead, which
            is right only where nobody has a reason to lie: in a simulation.
        desk: takes the receipts of registered sites; ``None`` in a simulation.
        on_round: called with each finished line of ``rounds.jsonl``.
    """

    run: RunConfig
    run_dir: Path
    sites: tuple[str, ...]
    registered: Registered | None = None
    desk: ReceiptDesk | None = None
    on_round: Callable[[Record], None] = lambda record: None


def make_server_app(plan: Plan) -> ServerApp:
    """Build the app. It continues from the run directory's latest checkpoint and ends with ``results.json``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_federation(plan, grid)

    return app


def run_federation(plan: Plan, grid: Grid) -> None:
    """All remaining rounds, the last validation and the test. ``status.json`` says how it ended.

    Raises:
        RunError: if too few sites gave a usable update.
        CheckpointError: if the run directory's checkpoint is damaged.
    """
    board = StatusBoard(plan.run_dir, num_rounds=plan.run.federation.num_rounds, sites=plan.sites)
    try:
        _run_rounds(plan, grid, board)
    except StopWantedError:
        board.stopped()
    except IcmoeError as error:
        board.stage("failed", reason=str(error))
        raise


def _run_rounds(plan: Plan, grid: Grid, board: StatusBoard) -> None:
    started = time.monotonic()
    start = latest_checkpoint(plan.run_dir)
    board.stage("starting", server_round=start.server_round)
    books = Books(plan.run_dir, last_round=start.server_round)
    federation = plan.run.federation
    rounds = Rounds(
        run=plan.run,
        run_dir=plan.run_dir,
        books=books,
        sites=plan.sites,
        roll_call=RollCall(
            grid,
            registered=plan.registered or _by_name(grid, plan.sites),
            board=board,
            on_missing=federation.on_missing,
            deadline=federation.round_deadline,
        ),
        board=board,
        start=start,
        desk=plan.desk,
        on_round=plan.on_round,
    )
    for server_round in range(start.server_round + 1, federation.num_rounds + 1):
        rounds.train(server_round)
        if board.stop_wanted():
            raise StopWantedError
    if not books.num_aggregated():
        raise RunError(f"in no round did enough sites give a usable update: {describe_failures(books.records[-1])}")
    _finish(plan, rounds, books, seconds=time.monotonic() - started)
    board.stage("finished", server_round=federation.num_rounds)


def _by_name(grid: Grid, sites: tuple[str, ...]) -> Registered:
    nodes = find_sites(grid, sites)
    return lambda: nodes


def find_sites(grid: Grid, expected: tuple[str, ...], *, timeout: float = NODES_TIMEOUT) -> dict[str, int]:
    """Ask every node for its name until all expected sites are there.

    Returns:
        Site name -> node id.

    Raises:
        RunError: naming the sites that did not turn up in time.
    """
    deadline = time.monotonic() + timeout
    found: dict[str, int] = {}
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in found.values()]
        messages = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        for message in grid.send_and_receive(messages, timeout=max(1.0, deadline - time.monotonic())):
            if not message.has_error():
                found[unpack_site_name(message.content)] = message.metadata.src_node_id
        missing = sorted(set(expected) - set(found))
        if not missing:
            return {site: found[site] for site in expected}
        if time.monotonic() > deadline:
            raise RunError(f"these expected sites did not answer within {timeout:.0f} s: {', '.join(missing)}")
        time.sleep(0.2)


def _finish(plan: Plan, rounds: Rounds, books: Books, *, seconds: float) -> None:
    num_rounds = plan.run.federation.num_rounds
    final = load_checkpoint(round_folder(plan.run_dir, num_rounds))
    reports, failures = rounds.score("validate", num_rounds, final.arrays)
    val_dice = {site: report.numbers["dice"] for site, report in reports.items() if "dice" in report.numbers}
    books.add(
        {
            "round": num_rounds,
            "evaluate_only": True,
            "scored_round": num_rounds,
            "answered": list(reports),
            "val_dice": val_dice,
            **failures,
        }
    )
    best_round = books.best_round()
    if best_round is None:
        logger.warning("no site has validation images: the last round counts as the best")
        best_round = num_rounds
        mark_best(plan.run_dir, best_round)
    best = load_checkpoint(round_folder(plan.run_dir, best_round))
    tested, test_failures = rounds.score("test", best_round, best.arrays)
    last = tested if best_round == num_rounds else rounds.score("test", num_rounds, final.arrays)[0]
    if not tested:
        raise RunError(f"no site could score the test split: {describe_failures(test_failures)}")
    results = _results(plan, books, best, tested, last, seconds)
    write_json(plan.run_dir / "results.json", {**results, "not_scored": failure_reasons(test_failures)})


def _results(
    plan: Plan,
    books: Books,
    best: Checkpoint,
    tested: dict[str, SiteReport],
    last: dict[str, SiteReport],
    seconds: float,
) -> Record:
    class_names = list(plan.run.task.classes)
    after = {report.backbone_digest for report in tested.values()}
    if after != {best.backbone_digest}:
        raise BackboneError("the frozen backbone's digest after training is not the one before")
    trained = [record for record in books.records if record.get("bytes_up")]
    summary = summarise_test(last, class_names)
    return {
        "task": plan.run.task.name,
        "backbone": plan.run.model.backbone,
        "trainable_params": max(int(report.numbers["trainable_params"]) for report in tested.values()),
        "bytes_up_per_round_per_site": max(max(record["bytes_up"].values()) for record in trained),
        "backbone_sha256_before": best.backbone_digest,
        "backbone_sha256_after": after.pop(),
        **summarise_test(tested, class_names),
        "best_round": best.server_round,
        "num_rounds": plan.run.federation.num_rounds,
        "empty_masks": trained[-1]["empty_masks"],
        "final": {"mean_dice": summary["mean_dice"], "worst_site": summary["worst_site"]},
        "seconds": seconds,
        "epsilon": {site: _last_epsilon(trained, site) for site in sorted(tested)},
    }


def _last_epsilon(records: list[Record], site: str) -> float | None:
    """What a site's data had spent after the last round it took part in; ``None`` without differential privacy."""
    return next((record["epsilon"][site] for record in reversed(records) if site in record["epsilon"]), None)
