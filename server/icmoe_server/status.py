"""What the ServerApp tells people while it runs: ``status.json``; what it is told: its folders, the ``stop`` file."""

import contextlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from icmoe.checkpoint import write_json

RunStage = Literal["starting", "waiting", "training", "scoring", "finished", "stopped", "failed"]
SiteState = Literal["online", "asked", "answered", "failed", "missing", "refused", "quarantined"]
StopWhen = Literal["after_round", "now"]

CENTRE_VARIABLE, RUN_VARIABLE = "ICMOE_CENTRE_DIR", "ICMOE_RUN_DIR"
"""How a ServerApp process learns where it belongs; never part of a run's config, which sites see."""
SERVER_APP_LOG = "serverapp.log"
"""Its log, among those of the centre."""


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Standing:
    """How a site stands in the roll-call.

    Attributes:
        state: of the site in the current exchange.
        since: when it came into this state, ISO 8601.
        reason: why, where there is one to give.
    """

    state: SiteState
    since: str
    reason: str | None = None


class StatusBoard:
    """The roll-call and the stage of a run, on disk whenever one of them changes.

    Args:
        run_dir: of the run.
        num_rounds: of the run.
        sites: expected ones.
    """

    def __init__(self, run_dir: Path, *, num_rounds: int, sites: tuple[str, ...]) -> None:
        self._run_dir = run_dir
        self._num_rounds = num_rounds
        self._stage: RunStage = "starting"
        self._round = 0
        self._reason: str | None = None
        self.roll_call: dict[str, Standing | None] = dict.fromkeys(sorted(sites))

    def stage(self, stage: RunStage, *, server_round: int | None = None, reason: str | None = None) -> None:
        """Note what the run does now; ``reason`` is a sentence for a person."""
        self._stage, self._reason = stage, reason
        self._round = self._round if server_round is None else server_round
        self._write()

    def note(self, site: str, state: SiteState, reason: str | None = None) -> Standing:
        """Note how a site stands; the time stays if nothing changed."""
        old = self.roll_call.get(site)
        if old is not None and (old.state, old.reason) == (state, reason):
            return old
        self.roll_call[site] = standing = Standing(state, now(), reason)
        self._write()
        return standing

    def stop_wanted(self) -> StopWhen | None:
        """What an operator asked for, if anything."""
        try:
            text = (self._run_dir / "stop").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return "after_round" if text == "after_round" else "now"

    def stopped(self) -> None:
        """Note that the run obeyed; the next start goes on where it was."""
        with contextlib.suppress(FileNotFoundError):
            (self._run_dir / "stop").unlink()
        self.stage("stopped", reason="stopped by an operator; start the centre again to go on")

    def _write(self) -> None:
        roll_call = {site: asdict(standing) for site, standing in self.roll_call.items() if standing is not None}
        status = {"state": self._stage, "round": self._round, "num_rounds": self._num_rounds, "reason": self._reason}
        write_json(self._run_dir / "status.json", {**status, "updated": now(), "roll_call": roll_call})


def server_app_lock(run_dir: Path) -> Path:
    """The lock that the ServerApp of a centre holds while it works on a run."""
    return run_dir / "server_app.lock"


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read ``status.json``; empty before a run's first one."""
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def note_failure(run_dir: Path, reason: str) -> None:
    """Write down that a run failed, where its ServerApp could not."""
    write_json(run_dir / "status.json", {**read_status(run_dir), "state": "failed", "reason": reason, "updated": now()})
