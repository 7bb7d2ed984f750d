"""Ask sites and wait for them: who is there, who answered, who failed and why, who is missing since when.

Flower's own ``Strategy.start`` sends each message once. A site that loses power in the middle of a round would be out
of that round, and a run that wants all its sites would end. Here it is asked again as soon as it is back, until the
round's deadline; so a round that lost and regained a site has the same result as one that did not.

Flower calls a message lost only if somebody looks while its site is offline. A site may be back before that, as Flower
forgets a dead session after a minute, or a look may take long; so one that has connected anew since it was asked is
asked again as well, and the first answer counts.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from icmoe.errors import RunError
from icmoe_server.status import StatusBoard

OnMissing = Literal["wait", "continue", "stop"]

# Flower's error codes of a reply that a site never gave: 3 and 4 its bytes are gone, 5 the node went offline, 8 its
# process was killed. Only these are worth asking again; an exception of the site's app would only come back.
LOST = {3: "the message was lost", 4: "the reply was lost", 5: "went offline", 8: "its process was killed"}
MAX_ASKS = 5
"""Times a site is asked in one exchange; a machine that runs out of memory each time must not hold up the rest."""
FIRST_POLL, LAST_POLL = 0.02, 1.0
"""Seconds between looks for replies: quick at first, for simulations; each wait is a quarter longer than the last."""
SAY_EVERY = 60.0
"""Seconds between reminders of who is missing."""

logger = logging.getLogger(__name__)


class StopWantedError(Exception):
    """An operator wants the run to stop now. Not an error: the run ends in order."""


@dataclass(frozen=True)
class Presence:
    """A site that is online: its node, and when it connected."""

    node: int
    connected: str


@dataclass(frozen=True)
class Request:
    """What a site is asked."""

    message_type: str
    content: RecordDict


@dataclass
class Answers:
    """What came of an exchange.

    Attributes:
        good: replies by site, in site order; their content is still to be checked.
        failed: sites that answered with an error, or not in time, with the reason.
        missing: sites that were not there, with the time since when.
        num_late: replies to earlier rounds that came meanwhile and were dropped.
        seconds_waited: time in which only missing sites were waited for.
    """

    good: dict[str, Message] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    num_late: int = 0
    seconds_waited: float = 0.0


class RollCall:
    """Exchanges messages with expected sites.

    Args:
        grid: Flower's.
        registered: gives site name -> node id of the sites that may take part; read again at every look, so that a
            site registered or revoked meanwhile is noticed.
        board: where people see the roll-call.
        on_missing: what to do when an expected site is not there: ``wait`` for it until the deadline, ``continue``
            without it as soon as the quorum answered, ``stop`` the run.
        deadline: seconds an exchange may take.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        registered: Callable[[], Mapping[str, int]],
        board: StatusBoard,
        on_missing: OnMissing,
        deadline: float,
    ) -> None:
        self._grid = grid
        self._registered = registered
        self._board = board
        self._on_missing = on_missing
        self._deadline = deadline
        self._abandoned: set[str] = set()

    def ask(self, requests: Mapping[str, Request], *, quorum: int) -> Answers:
        """Send every site its request, again where it was lost, and collect the answers.

        Args:
            requests: by site.
            quorum: answers that are enough to ``continue`` without missing sites.

        Raises:
            RunError: if a site is missing and ``on_missing`` is ``stop``.
            StopWantedError: if an operator wants the run to stop now.
        """
        exchange = _Exchange(self._grid, requests, self._board, self._deadline)
        poll, told = FIRST_POLL, time.monotonic()
        while True:
            exchange.send(self._online(requests))
            self._abandoned |= exchange.collect()
            exchange.answers.num_late += self._drop_late()
            if exchange.is_over() or self._goes_on_without(exchange, quorum):
                break
            self._obey_operator(exchange)
            if exchange.missing and time.monotonic() - told > SAY_EVERY:
                told = time.monotonic()
                logger.warning("waiting for %s", _describe_missing(exchange))
            time.sleep(poll)
            if not exchange.outstanding:
                exchange.answers.seconds_waited += poll
            poll = min(LAST_POLL, poll * 1.25)
        self._abandoned |= set(exchange.outstanding)
        return exchange.close()

    def _online(self, requests: Mapping[str, Request]) -> dict[str, Presence]:
        registered = self._registered()
        connected = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        nodes = {
            site: Presence(node, connected[node])
            for site, node in registered.items()
            if site in requests and node in connected
        }
        for site in requests:
            if site not in registered:
                self._board.note(site, "missing", "no key of this name is registered")
        return nodes

    def _goes_on_without(self, exchange: "_Exchange", quorum: int) -> bool:
        if not exchange.missing:
            return False
        if self._on_missing == "stop":
            raise RunError(
                f"federation.on_missing is stop, and {_describe_missing(exchange)}. The last finished round is kept; "
                "start again when the sites are back."
            )
        return self._on_missing == "continue" and not exchange.outstanding and len(exchange.answers.good) >= quorum

    def _obey_operator(self, exchange: "_Exchange") -> None:
        if self._board.stop_wanted() == "now":
            self._abandoned |= set(exchange.outstanding)
            raise StopWantedError

    def _drop_late(self) -> int:
        """Fetch and forget replies to messages of earlier exchanges; returns how many."""
        if not self._abandoned:
            return 0
        late = {message.metadata.reply_to_message_id for message in self._grid.pull_messages(self._abandoned)}
        self._abandoned -= late
        if late:
            logger.warning("dropped %d late replies", len(late))
        return len(late)


class _Exchange:
    """One round of asking, while it lasts."""

    def __init__(self, grid: Grid, requests: Mapping[str, Request], board: StatusBoard, deadline: float) -> None:
        self._grid = grid
        self._requests = requests
        self._board = board
        self._ends = time.monotonic() + deadline
        self._asks = dict.fromkeys(requests, 0)
        self._to_ask = set(requests)
        self._asked_at: dict[str, Presence] = {}
        self.outstanding: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.answers = Answers()

    def send(self, online: Mapping[str, Presence]) -> None:
        """Ask those who are there and were not asked yet, or not as they are now; note the others as missing."""
        for site in {*self.outstanding.values()} & set(online) - self._to_ask:
            if online[site] != self._asked_at[site] and self._asks[site] < MAX_ASKS:
                logger.warning("%s has connected anew since it was asked; it is asked again", site)
                self._to_ask.add(site)
        for site in sorted(self._to_ask - set(online)):
            if site not in self.missing:
                old = self._board.roll_call.get(site)
                known = (
                    old if old is not None and old.state == "missing" else self._board.note(site, "missing", "offline")
                )
                self.missing[site] = known.since
                logger.warning("%s is missing since %s", site, known.since)
        for site in sorted(self._to_ask & set(online)):
            if self.missing.pop(site, None) is not None:
                logger.warning("%s is back", site)
            request = self._requests[site]
            ttl = max(60.0, self._ends - time.monotonic())
            message = Message(request.content, online[site].node, request.message_type, ttl=ttl)
            (message_id,) = self._grid.push_messages([message])
            if not message_id:
                continue
            self.outstanding[message_id] = site
            self._asked_at[site] = online[site]
            self._asks[site] += 1
            self._to_ask.discard(site)
            self._board.note(site, "asked")

    def collect(self) -> set[str]:
        """Take the replies that have come; returns the messages that were asked besides and no longer matter."""
        if not self.outstanding:
            return set()
        for message in self._grid.pull_messages(set(self.outstanding)):
            site = self.outstanding.pop(message.metadata.reply_to_message_id, None)
            if site is not None:
                self._take(site, message)
        answered = {*self.answers.good, *self.answers.failed}
        besides = {message_id for message_id, site in self.outstanding.items() if site in answered}
        for message_id in besides:
            del self.outstanding[message_id]
        self._to_ask -= answered
        return besides

    def _take(self, site: str, message: Message) -> None:
        if site in self.answers.good or site in self.answers.failed:
            return
        if not message.has_error():
            self.answers.good[site] = message
            self._board.note(site, "answered")
        elif message.error.code in LOST and site in self.outstanding.values():
            logger.warning("%s %s; it was asked again already", site, LOST[message.error.code])
        elif message.error.code in LOST and self._asks[site] < MAX_ASKS:
            logger.warning("%s %s; it is asked again when it is back", site, LOST[message.error.code])
            self._to_ask.add(site)
        else:
            reason = message.error.reason or LOST.get(message.error.code, "no reason given")
            self.answers.failed[site] = reason
            self._board.note(site, "failed", reason)

    def is_over(self) -> bool:
        """Whether all have answered or time is up."""
        return not (self._to_ask or self.outstanding) or time.monotonic() >= self._ends

    def close(self) -> Answers:
        """Sort what is left; the answers in site order."""
        # Flower calls a message lost when it expires, which is at the deadline: such a site was to be asked again.
        for site in {*self.outstanding.values(), *(self._to_ask - set(self.missing))}:
            self.answers.failed[site] = "no answer before the round's deadline"
            self._board.note(site, "failed", self.answers.failed[site])
        self.answers.missing = dict(sorted(self.missing.items()))
        self.answers.good = dict(sorted(self.answers.good.items()))
        self.answers.failed = dict(sorted(self.answers.failed.items()))
        return self.answers


def _describe_missing(exchange: _Exchange) -> str:
    return ", ".join(f"{site} (missing since {since})" for site, since in sorted(exchange.missing.items()))
