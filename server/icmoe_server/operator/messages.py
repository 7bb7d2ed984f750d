"""Lines of ``rounds.jsonl`` and ``status.json`` as messages, and back for scripts.

What another version wrote may lack keys or hold ``null``: such a field is left empty, never an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icmoe_server.operator import operator_pb2 as pb

Record = dict[str, Any]

_SITE_NUMBERS = ("val_dice", "train_loss", "epsilon")
_SITE_COUNTS = ("bytes_up", "bytes_down")
_SITE_TEXTS = ("failed", "quarantined", "refused", "missing")


@dataclass(frozen=True)
class ChildInfo:
    """A process of the centre.

    Args:
        name: such as ``superlink``.
        pid: ``None`` while there is none.
        state: ``running``, or a word for why it does not run.
        restarts: how often it was started again.
    """

    name: str
    pid: int | None
    state: str
    restarts: int


def round_message(record: Mapping[str, Any]) -> pb.RoundRecord:
    """Line of ``rounds.jsonl`` as a message; keys it has no field for stay behind."""
    shares = {site: pb.ExpertShares(shares=_numbers(of)) for site, of in _mapping(record, "expert_shares").items()}
    by_site: dict[str, Any] = {name: _numbers(_mapping(record, name)) for name in _SITE_NUMBERS}
    for name in _SITE_COUNTS:
        by_site[name] = {site: int(count) for site, count in _numbers(_mapping(record, name)).items()}
    for name in _SITE_TEXTS:
        by_site[name] = {site: str(text or "") for site, text in _mapping(record, name).items()}
    return pb.RoundRecord(
        round=_whole(record.get("round")),
        evaluate_only=bool(record.get("evaluate_only")),
        scored_round=_whole(record.get("scored_round")),
        asked=[str(site) for site in record.get("asked") or ()],
        answered=[str(site) for site in record.get("answered") or ()],
        expert_shares=shares,
        aggregated=bool(record.get("aggregated")),
        late=_whole(record.get("late")),
        seconds=float(record.get("seconds") or 0),
        waited=float(record.get("waited") or 0),
        **by_site,
    )


def status_message(
    run: str, status: Mapping[str, Any], children: Iterable[ChildInfo], *, stop_asked: str
) -> pb.RunStatus:
    """Status of a run as a message.

    Args:
        run: name of the run.
        status: content of ``status.json``; empty while the run has not said anything, which reads as ``starting``.
        children: processes of the centre.
        stop_asked: ``after_round``, ``now`` or empty.
    """
    roll_call = _mapping(status, "roll_call")
    return pb.RunStatus(
        run=run,
        state=str(status.get("state") or "starting"),
        round=_whole(status.get("round")),
        num_rounds=_whole(status.get("num_rounds")),
        reason=str(status.get("reason") or ""),
        updated=str(status.get("updated") or ""),
        roll_call=[_site_message(site, of) for site, of in sorted(roll_call.items()) if isinstance(of, Mapping)],
        children=[pb.ChildProcess(name=c.name, pid=c.pid or 0, state=c.state, restarts=c.restarts) for c in children],
        stop_asked=stop_asked,
    )


def round_record(message: pb.RoundRecord) -> Record:
    """A round for scripts, under the keys of ``rounds.jsonl``."""
    return {
        "round": message.round,
        "evaluate_only": message.evaluate_only,
        "scored_round": message.scored_round,
        "asked": list(message.asked),
        "answered": list(message.answered),
        **{name: _plain(getattr(message, name)) for name in (*_SITE_TEXTS, *_SITE_NUMBERS, *_SITE_COUNTS)},
        "expert_shares": {site: _plain(of.shares) for site, of in sorted(message.expert_shares.items())},
        "aggregated": message.aggregated,
        "late": message.late,
        "seconds": message.seconds,
        "waited": message.waited,
    }


def status_record(message: pb.RunStatus) -> Record:
    """A status for scripts, under the keys of ``status.json``, with the run's name and the centre's processes."""
    return {
        "run": message.run,
        "state": message.state,
        "round": message.round,
        "num_rounds": message.num_rounds,
        "reason": message.reason or None,
        "updated": message.updated or None,
        "stop_asked": message.stop_asked or None,
        "roll_call": {
            one.site: {"state": one.state, "since": one.since or None, "reason": one.reason or None}
            for one in message.roll_call
        },
        "children": [
            {"name": one.name, "pid": one.pid or None, "state": one.state, "restarts": one.restarts}
            for one in message.children
        ],
    }


def _site_message(site: str, of: Mapping[str, Any]) -> pb.SiteState:
    return pb.SiteState(
        site=site,
        state=str(of.get("state") or ""),
        since=str(of.get("since") or ""),
        reason=str(of.get("reason") or ""),
    )


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items()))
