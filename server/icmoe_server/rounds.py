"""The rounds: whom to ask, what to make of the answers.

Transport is Flower's; the loop over rounds is ours, because Flower's ``Strategy.start`` counts from 1, sends a message
once and goes on with whoever answered: a run could not resume, and a site that was away for a minute would be dropped.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from flwr.app import Message, MessageType

from icmoe.checkpoint import Checkpoint, save_checkpoint
from icmoe.config import RunConfig
from icmoe.errors import IcmoeError, RunError
from icmoe.exchange import Instruction, Job, SiteReport, Update, check_report, check_update
from icmoe.flower import pack_instruction, unpack_receipt, unpack_report, unpack_update
from icmoe.types import Arrays
from icmoe_server.books import Books, Record
from icmoe_server.optimizers import make_optimizer
from icmoe_server.outliers import check_norm, usual_norm
from icmoe_server.receipt_desk import ReceiptDesk
from icmoe_server.rollcall import Answers, Request, RollCall
from icmoe_server.status import StatusBoard

MAX_EMPTY_ROUNDS = 3
"""Rounds in a row below the quorum after which a run that continues without missing sites fails."""

logger = logging.getLogger(__name__)


class Rounds:
    """Ask sites, check replies, aggregate, write down.

    Args:
        run: the run config.
        run_dir: where checkpoints and books go.
        books: of this run.
        sites: expected sites.
        roll_call: exchanges messages with them.
        board: where people see how the sites stand.
        start: checkpoint the run continues from.
        desk: checks and keeps the receipts of registered sites; ``None`` in a simulation, whose sites write none.
        on_round: called with each finished line of ``rounds.jsonl``.
    """

    def __init__(
        self,
        *,
        run: RunConfig,
        run_dir: Path,
        books: Books,
        sites: Iterable[str],
        roll_call: RollCall,
        board: StatusBoard,
        start: Checkpoint,
        desk: ReceiptDesk | None,
        on_round: Callable[[Record], None],
    ) -> None:
        self._run = run
        self._run_json = run.model_dump_json()
        self._digest = run.digest()
        self._run_dir = run_dir
        self._books = books
        self._sites = sorted(sites)
        self._roll_call = roll_call
        self._board = board
        self._backbone_digest = start.backbone_digest
        self._arrays = dict(start.arrays)
        self._optimizer = make_optimizer(run.federation)
        self._optimizer.restore(start.strategy_state)
        self._desk = desk
        self._on_round = on_round
        self._empty_rounds = 0

    def train(self, server_round: int) -> Record:
        """One round: sampled sites train, the others score the received weights; then aggregate and write down.

        Returns:
            The round's line.

        Raises:
            RunError: if the quorum was missed and the run does not continue without it.
            StopWantedError: if an operator wants the run to stop now; the round then counts for nothing.
        """
        started = monotonic()
        chosen = self._sample(server_round)
        needed = self._run.federation.updates_needed(len(chosen))
        others = [site for site in self._sites if site not in chosen]
        self._board.stage("training", server_round=server_round)
        requests = {site: self._request("train", server_round, site) for site in chosen}
        requests |= {site: self._request("validate", server_round - 1, site) for site in others}
        answers = self._roll_call.ask(requests, quorum=needed)
        record = self._record(server_round, chosen, answers)
        updates = self._updates(record, answers, chosen, server_round)
        record["aggregated"] = len(updates) >= needed
        if record["aggregated"]:
            self._arrays = self._optimizer.step(server_round, list(updates.values()), self._arrays)
        record["seconds"] = monotonic() - started
        self._write_down(record, needed)
        return record

    def score(
        self, job: Job, server_round: int, arrays: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, SiteReport], Record]:
        """Let every site score ``arrays`` on its validation or test split.

        Returns:
            Reports by site, and a record of who is missing from them and why.
        """
        self._board.stage("scoring", server_round=server_round)
        needed = self._run.federation.updates_needed(len(self._sites))
        requests = {site: self._request(job, server_round, site, arrays) for site in self._sites}
        answers = self._roll_call.ask(requests, quorum=needed)
        record: Record = {"asked": self._sites, "failed": answers.failed, "quarantined": {}, "missing": answers.missing}
        reports = {}
        for site, message in answers.good.items():
            with self._quarantine(site, record):
                reports[site] = self._report(site, message, job, server_round)
        if self._desk is not None:
            self._desk.write(server_round)
            self._desk.settle(server_round)
        return reports, record

    def _sample(self, server_round: int) -> list[str]:
        """Sites asked this round; drawn from run seed and round, so that a resumed run draws the same."""
        count = self._run.simulation.num_asked(len(self._sites))
        rng = np.random.default_rng([self._run.train.seed, server_round])
        return sorted(self._sites[index] for index in rng.permutation(len(self._sites))[:count])

    def _request(self, job: Job, server_round: int, site: str, arrays: Arrays | None = None) -> Request:
        countersigned = self._desk.countersigned(site) if self._desk is not None else ""
        instruction = Instruction(job, self._run_json, self._digest, server_round, site, countersigned)
        content = pack_instruction(instruction, self._arrays if arrays is None else arrays)
        return Request(MessageType.TRAIN if job == "train" else MessageType.EVALUATE, content)

    def _updates(self, record: Record, answers: Answers, chosen: list[str], server_round: int) -> dict[str, Update]:
        """Good updates by site; scores of the others and what was wrong go into the record."""
        checked: dict[str, tuple[Update, float]] = {}
        for site, message in answers.good.items():
            with self._quarantine(site, record):
                if site in chosen:
                    checked[site] = self._update(site, message, server_round)
                else:
                    _note_validation(record, site, self._report(site, message, "validate", server_round - 1))
        usual = usual_norm([*(norm for _, norm in checked.values()), *self._books.recent_norms()])
        for site, (_, norm) in checked.items():
            with self._quarantine(site, record):
                check_norm(norm, usual=usual, max_ratio=self._run.federation.max_update_ratio)
                record["update_norm"][site] = norm
        updates = {site: checked[site][0] for site in record["update_norm"]}
        _note_updates(record, updates)
        return updates

    @contextmanager
    def _quarantine(self, site: str, record: Record) -> Iterator[None]:
        """A reply that fails its check counts for nothing, and people see why."""
        try:
            yield
        except IcmoeError as error:
            logger.warning("quarantined the reply of %s: %s", site, error)
            record["quarantined"][site] = str(error)
            self._board.note(site, "quarantined", str(error))

    def _update(self, site: str, message: Message, server_round: int) -> tuple[Update, float]:
        """A checked update and the L2 norm of its change."""
        update = unpack_update(message.content)
        self._check_report(site, update.report, server_round)
        norm = check_update(
            update,
            reference=self._arrays,
            communication=self._run.federation.communication,
            max_update_norm=self._run.federation.max_update_norm,
        )
        self._take_receipt(site, message, "train", update.report, update.arrays)
        return update, norm

    def _report(self, site: str, message: Message, job: Job, server_round: int) -> SiteReport:
        report = self._check_report(site, unpack_report(message.content), server_round)
        self._take_receipt(site, message, job, report, None)
        return report

    def _take_receipt(self, site: str, message: Message, job: Job, report: SiteReport, arrays: Arrays | None) -> None:
        if self._desk is not None:
            self._desk.take(unpack_receipt(message.content), site=site, job=job, report=report, arrays=arrays)

    def _check_report(self, site: str, report: SiteReport, server_round: int) -> SiteReport:
        check_report(
            report,
            site=site,
            server_round=server_round,
            config_digest=self._digest,
            backbone_digest=self._backbone_digest,
            num_classes=len(self._run.task.classes),
        )
        return report

    def _record(self, server_round: int, chosen: list[str], answers: Answers) -> Record:
        names = ("quarantined", "val_dice", "train_loss", "num_examples", "used", "found", "skipped")
        more = ("empty_masks", "bytes_up", "update_norm", "expert_shares", "epsilon")
        sent = sum(array.nbytes for array in self._arrays.values())
        return {
            "round": server_round,
            "asked": chosen,
            "answered": [],
            "failed": {site: reason for site, reason in answers.failed.items() if site in chosen},
            "missing": {site: since for site, since in answers.missing.items() if site in chosen},
            "late": answers.num_late,
            "waited": round(answers.seconds_waited, 1),
            "scored_round": server_round - 1,
            "bytes_down": dict.fromkeys(chosen, sent),
            **{name: {} for name in (*names, *more)},
        }

    def _write_down(self, record: Record, needed: int) -> None:
        """The line, then the checkpoint; a kill in between only repeats the round.

        Raises:
            RunError: if the quorum was missed and that ends the run.
        """
        if self._desk is not None:
            self._desk.write(record["round"])
        self._empty_rounds = 0 if record["aggregated"] else self._empty_rounds + 1
        continues = self._run.federation.on_missing == "continue" and self._empty_rounds < MAX_EMPTY_ROUNDS
        if not record["aggregated"] and not continues:
            raise RunError(
                f"round {record['round']}: {len(record['answered'])} of the {needed} sites that "
                f"federation.quorum wants gave a usable update. {describe_failures(record)}. The rounds before are "
                "kept: put it right and start again to go on, or lower federation.quorum in a new run."
            )
        self._books.add(record)
        checkpoint = Checkpoint(
            server_round=record["round"],
            config_digest=self._digest,
            backbone_digest=self._backbone_digest,
            arrays=self._arrays,
            strategy_state=self._optimizer.state(),
        )
        save_checkpoint(self._run_dir, checkpoint)
        if self._desk is not None:
            self._desk.settle(record["round"])
        self._on_round(record)


def _note_updates(record: Record, updates: Mapping[str, Update]) -> None:
    record["answered"] = list(updates)
    for site, update in updates.items():
        numbers: Mapping[str, Any] = update.report.numbers
        _note_validation(record, site, update.report)
        # With differential privacy, and below a site's smallest count, most of these do not leave it.
        record["train_loss"][site] = numbers.get("train_loss")
        for name in ("num_examples", "used", "found", "skipped", "empty_masks"):
            record[name][site] = int(numbers[name]) if name in numbers else None
        record["bytes_up"][site] = update.num_bytes
        record["expert_shares"][site] = dict(update.report.expert_shares)
        record["epsilon"][site] = numbers.get("epsilon")


def _note_validation(record: Record, site: str, report: SiteReport) -> None:
    if "dice" in report.numbers:
        record["val_dice"][site] = report.numbers["dice"]


def failure_reasons(record: Record) -> dict[str, str]:
    """Why sites that were asked count for nothing, by site."""
    missing = {site: f"missing since {since}" for site, since in record.get("missing", {}).items()}
    return {**record["failed"], **record["quarantined"], **missing}


def describe_failures(record: Record) -> str:
    """One line of site and reason."""
    return "; ".join(f"{site}: {reason}" for site, reason in failure_reasons(record).items()) or "none were asked"
