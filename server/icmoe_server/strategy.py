"""The round, in Flower's terms: whom to ask, what to make of the answers.

Composed around Flower's ``Strategy.start``, which counts rounds from 1; a resumed run adds its offset here.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from icmoe.checkpoint import Checkpoint, save_checkpoint
from icmoe.config import RunConfig
from icmoe.errors import IcmoeError, RunError
from icmoe.exchange import Instruction, Job, SiteReport, Update, check_report, check_update
from icmoe.flower import pack_arrays, pack_instruction, unpack_report, unpack_update
from icmoe_server.books import Books, Record
from icmoe_server.optimizers import make_optimizer

MAX_EMPTY_ROUNDS = 3
"""Rounds in a row without enough good replies after which the run fails instead of asking on."""

logger = logging.getLogger(__name__)


@dataclass
class RoundState:
    """One round while its replies come in."""

    server_round: int
    started: float
    sites_by_message: list[tuple[Message, str]]
    asked: list[str]
    record: Record = field(default_factory=dict)


class FederationStrategy(Strategy):
    """Ask sites, check replies, aggregate, write down.

    Args:
        run: the run config.
        run_dir: where checkpoints and books go.
        books: of this run.
        nodes: site name -> Flower node id.
        start: checkpoint the run continues from.
        on_round: called with each finished line of ``rounds.jsonl``.
    """

    def __init__(
        self,
        *,
        run: RunConfig,
        run_dir: Path,
        books: Books,
        nodes: Mapping[str, int],
        start: Checkpoint,
        on_round: Callable[[Record], None],
    ) -> None:
        self._run = run
        self._run_json = run.model_dump_json()
        self._digest = run.digest()
        self._run_dir = run_dir
        self._books = books
        self._nodes = dict(sorted(nodes.items()))
        self._offset = start.server_round
        self._backbone_digest = start.backbone_digest
        self._arrays = dict(start.arrays)
        self._optimizer = make_optimizer(run.federation)
        self._optimizer.restore(start.strategy_state)
        self._on_round = on_round
        self._round: RoundState | None = None
        self._empty_rounds = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled sites to train and the others to score the received weights."""
        absolute = server_round + self._offset
        chosen = self._sample(absolute)
        messages = [(self._message("train", absolute, site), site) for site in chosen] + [
            (self._message("validate", absolute - 1, site), site) for site in self._nodes if site not in chosen
        ]
        self._round = RoundState(absolute, monotonic(), messages, chosen)
        return [message for message, _ in messages]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, aggregate the good ones in site order, write the round's line.

        Raises:
            RunError: after ``MAX_EMPTY_ROUNDS`` rounds in a row without enough good replies.
        """
        state = self._round
        if state is None:
            raise RunError("replies came before a round was configured")
        record = self._empty_record(state)
        updates: dict[str, Update] = {}
        for site, message in sort_replies(replies, state.sites_by_message, record, asked=state.asked).items():
            try:
                if site in state.asked:
                    updates[site] = self._accept(site, unpack_update(message.content), state.server_round)
                else:
                    report = self._check_scores(site, unpack_report(message.content), state.server_round - 1)
                    self._note_validation(record, site, report)
            except IcmoeError as error:
                logger.warning("round %d: quarantined the reply of %s: %s", state.server_round, site, error)
                record["quarantined"][site] = str(error)
        self._note_updates(record, updates)
        record["aggregated"] = len(updates) >= self._run.federation.min_replies
        if record["aggregated"]:
            self._arrays = self._optimizer.step(state.server_round, list(updates.values()), self._arrays)
            self._empty_rounds = 0
        else:
            self._empty_rounds += 1
        record["seconds"] = monotonic() - state.started
        state.record = record
        if self._empty_rounds >= MAX_EMPTY_ROUNDS:
            self._books.add(record)
            raise RunError(
                f"fewer than federation.min_replies = {self._run.federation.min_replies} sites gave a usable update in "
                f"{MAX_EMPTY_ROUNDS} rounds in a row; last reasons: {describe_failures(record)}"
            )
        return pack_arrays(self._arrays), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: sites score what they receive before they train."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def summary(self) -> None:
        """Log what is about to happen."""
        logger.info("%s over %d sites", self._run.federation.strategy, len(self._nodes))

    def finish_round(self, server_round: int, arrays: ArrayRecord) -> None:
        """Flower's ``evaluate_fn``: write the line, then the checkpoint. A kill in between only repeats the round."""
        if server_round == 0 or self._round is None:
            return
        self._books.add(self._round.record)
        save_checkpoint(
            self._run_dir,
            Checkpoint(
                server_round=self._round.server_round,
                config_digest=self._digest,
                backbone_digest=self._backbone_digest,
                arrays=self._arrays,
                strategy_state=self._optimizer.state(),
            ),
        )
        self._on_round(self._round.record)

    def score(
        self, grid: Grid, job: Job, server_round: int, arrays: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, SiteReport], Record]:
        """Let every site score ``arrays`` on its validation or test split.

        Returns:
            Reports by site, and a record of who failed and why.
        """
        messages = [(self._message(job, server_round, site, arrays), site) for site in self._nodes]
        replies = grid.send_and_receive(
            [message for message, _ in messages], timeout=self._run.federation.round_timeout
        )
        record: Record = {"asked": list(self._nodes), "failed": {}, "quarantined": {}}
        reports = {}
        for site, message in sort_replies(replies, messages, record, asked=list(self._nodes)).items():
            try:
                reports[site] = self._check_scores(site, unpack_report(message.content), server_round)
            except IcmoeError as error:
                record["quarantined"][site] = str(error)
        return reports, record

    def _sample(self, server_round: int) -> list[str]:
        """Sites asked this round; drawn from run seed and round, so that a resumed run draws the same."""
        names = list(self._nodes)
        count = self._run.simulation.num_asked(len(names))
        rng = np.random.default_rng([self._run.train.seed, server_round])
        return sorted(names[index] for index in rng.permutation(len(names))[:count])

    def _message(
        self, job: Job, server_round: int, site: str, arrays: Mapping[str, np.ndarray] | None = None
    ) -> Message:
        instruction = Instruction(job, self._run_json, self._digest, server_round)
        return Message(
            pack_instruction(instruction, self._arrays if arrays is None else arrays),
            dst_node_id=self._nodes[site],
            message_type=MessageType.TRAIN if job == "train" else MessageType.EVALUATE,
        )

    def _accept(self, site: str, update: Update, server_round: int) -> Update:
        self._check_scores(site, update.report, server_round)
        check_update(
            update,
            reference=self._arrays,
            communication=self._run.federation.communication,
            max_update_norm=self._run.federation.max_update_norm,
        )
        return update

    def _check_scores(self, site: str, report: SiteReport, server_round: int) -> SiteReport:
        check_report(
            report,
            site=site,
            server_round=server_round,
            config_digest=self._digest,
            backbone_digest=self._backbone_digest,
            num_classes=len(self._run.task.classes),
        )
        return report

    def _empty_record(self, state: RoundState) -> Record:
        names = ("failed", "quarantined", "val_dice", "train_loss", "num_examples", "used", "found", "skipped")
        more = ("empty_masks", "bytes_up", "bytes_down", "expert_shares", "epsilon")
        sent = sum(array.nbytes for array in self._arrays.values())
        record: Record = {"round": state.server_round, "asked": state.asked, "answered": []}
        record |= {"scored_round": state.server_round - 1, **{name: {} for name in (*names, *more)}}
        record["bytes_down"] = dict.fromkeys(state.asked, sent)
        return record

    def _note_updates(self, record: Record, updates: Mapping[str, Update]) -> None:
        record["answered"] = list(updates)
        for site, update in updates.items():
            numbers: Mapping[str, Any] = update.report.numbers
            self._note_validation(record, site, update.report)
            record["train_loss"][site] = numbers["train_loss"]
            for name in ("num_examples", "used", "found", "skipped", "empty_masks"):
                record[name][site] = int(numbers.get(name, 0))
            record["bytes_up"][site] = update.num_bytes
            record["expert_shares"][site] = dict(update.report.expert_shares)
            record["epsilon"][site] = None

    @staticmethod
    def _note_validation(record: Record, site: str, report: SiteReport) -> None:
        if "dice" in report.numbers:
            record["val_dice"][site] = report.numbers["dice"]


def sort_replies(
    replies: Iterable[Message], sent: Iterable[tuple[Message, str]], record: Record, *, asked: list[str]
) -> dict[str, Message]:
    """Good replies by site in site order; failures of asked sites go to ``record["failed"]``.

    Replies are told apart by the message they answer: an offline node's error comes from the SuperLink's own id.
    """
    site_of = {message.metadata.message_id: site for message, site in sent}
    good: dict[str, Message] = {}
    for message in replies:
        site = site_of.pop(message.metadata.reply_to_message_id, None)
        if site is None:
            continue
        if message.has_error():
            record["failed"][site] = message.error.reason
        else:
            good[site] = message
    for site in site_of.values():
        record["failed"][site] = "no answer before the round's timeout"
    record["failed"] = {site: record["failed"][site] for site in sorted(record["failed"]) if site in asked}
    return dict(sorted(good.items()))


def describe_failures(record: Record) -> str:
    """One line of site and reason."""
    reasons = {**record["failed"], **record["quarantined"]}
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items()) or "none were asked"
