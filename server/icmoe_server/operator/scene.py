"""What a watcher has heard so far, and what follows from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean

from icmoe_server.operator import operator_pb2 as pb

TROUBLE = frozenset({"failed", "missing", "refused", "quarantined"})
"""States of a site that a person should look at."""
_RECENT_ROUNDS = 5


@dataclass(frozen=True)
class Scene:
    """Status and rounds; never changes, so that a drawing thread may keep one.

    Args:
        status: the last one; ``None`` before the first.
        rounds: in order; what was only scored comes after the round it scored.
    """

    status: pb.RunStatus | None = None
    rounds: tuple[pb.RoundRecord, ...] = ()

    def after(self, event: pb.Event) -> "Scene":
        """Hear an event. A round that comes again replaces the one before."""
        if event.WhichOneof("kind") == "status":
            return replace(self, status=event.status)
        by_key = {(one.round, one.evaluate_only): one for one in (*self.rounds, event.round)}
        return replace(self, rounds=tuple(by_key[key] for key in sorted(by_key)))

    def sites(self) -> list[str]:
        """All sites that were heard of."""
        asked = {site for one in self.rounds for site in one.asked}
        return sorted(asked | {one.site for one in (self.status.roll_call if self.status else ())})

    def dice(self, site: str) -> list[float]:
        """Validation Dice of a site, a value per round whose weights it scored."""
        by_scored = {one.scored_round: one.val_dice[site] for one in self.rounds if site in one.val_dice}
        return [by_scored[scored] for scored in sorted(by_scored) if math.isfinite(by_scored[scored])]

    def last_trained(self) -> pb.RoundRecord | None:
        """The last finished round."""
        trained = [one for one in self.rounds if not one.evaluate_only]
        return trained[-1] if trained else None

    def seconds_left(self) -> float | None:
        """Rounds to come times the mean of the last few; ``None`` where there is nothing to go by."""
        recent = [one.seconds for one in self.rounds if not one.evaluate_only][-_RECENT_ROUNDS:]
        last = self.last_trained()
        if last is None or self.status is None or self.status.num_rounds <= last.round:
            return None
        return fmean(recent) * (self.status.num_rounds - last.round)

    def bytes_up(self) -> int:
        """What all sites sent in all rounds."""
        return sum(sum(one.bytes_up.values()) for one in self.rounds)


def troubles(record: pb.RoundRecord) -> dict[str, str]:
    """Sites whose work is not in a round, with the reason."""
    missing = {site: f"missing since {since or 'an unknown time'}" for site, since in record.missing.items()}
    told: Mapping[str, str] = {**missing, **record.refused, **record.quarantined, **record.failed}
    return {site: clean(told[site]) for site in sorted(told)}


def clean(text: str) -> str:
    """Text that others wrote, such as a site's reason, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def duration(seconds: float) -> str:
    """Such as "12 s", "3 min", "2.5 h", "4 d"."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def age(since: str, now: datetime) -> str:
    """Time since an ISO 8601 moment; empty where it is none."""
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        return ""
    return duration((now - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))).total_seconds())


def megabytes(count: int) -> str:
    """Bytes as MB (10^6), with a decimal below 100."""
    return f"{count / 1e6:.1f}" if count < 100e6 else f"{count / 1e6:.0f}"
