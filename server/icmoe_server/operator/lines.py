"""A run as plain lines, for logs and pipes: what changed, one line each."""

import math
from collections.abc import Iterator
from statistics import fmean

from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.scene import TROUBLE, Scene, clean, duration, megabytes, troubles


def describe(before: Scene, event: pb.Event) -> Iterator[str]:
    """Say what an event brings; nothing where it only repeats.

    A site that is asked and answers is no news. One that gets into trouble or out of it is.

    Args:
        before: what was heard before the event.
        event: the next one.
    """
    if event.WhichOneof("kind") == "round":
        yield _round_line(event.round)
        return
    old = before.status or pb.RunStatus()
    yield from _run_lines(old, event.status, first=before.status is None)
    yield from _site_lines(old, event.status)
    yield from _child_lines(old, event.status, first=before.status is None)


def _round_line(record: pb.RoundRecord) -> str:
    scores = {site: dice for site, dice in sorted(record.val_dice.items()) if math.isfinite(dice)}
    each = ", ".join(f"{clean(site)} {dice:.3f}" for site, dice in scores.items())
    scored = "nothing scored"
    if scores:
        scored = f"validation Dice of round {record.scored_round}: mean {fmean(scores.values()):.3f} ({each})"
    if record.evaluate_only:
        return f"round {record.round} is the last: {scored}"
    line = f"round {record.round}: {len(record.answered)} of {len(record.asked)} sites, {scored}"
    line += f", {megabytes(sum(record.bytes_up.values()))} MB up, {duration(record.seconds)}"
    if not record.aggregated:
        line += ", too few replies: the model stays as it was"
    return line + "".join(f"; {clean(site)}: {why}" for site, why in troubles(record).items())


def _run_lines(old: pb.RunStatus, new: pb.RunStatus, *, first: bool) -> Iterator[str]:
    if first or (old.state, old.round, old.reason) != (new.state, new.round, new.reason):
        of = f" of {new.num_rounds}" if new.num_rounds else ""
        line = f"{new.run}: {clean(new.state)}" + (f", round {new.round}{of}" if new.round else "")
        yield line + (f": {clean(new.reason)}" if new.reason else "")
    if new.stop_asked and old.stop_asked != new.stop_asked:
        yield "an operator asked the run to stop " + ("after this round" if new.stop_asked == "after_round" else "now")


def _site_lines(old: pb.RunStatus, new: pb.RunStatus) -> Iterator[str]:
    before = {one.site: one for one in old.roll_call}
    for one in new.roll_call:
        known = before.get(one.site, pb.SiteState())
        if one.state in TROUBLE and (one.state, one.reason) != (known.state, known.reason):
            since = f" since {clean(one.since)}" if one.since else ""
            yield f"{clean(one.site)}: {one.state}{since}" + (f": {clean(one.reason)}" if one.reason else "")
        elif known.state in TROUBLE and one.state not in TROUBLE:
            yield f"{clean(one.site)}: {clean(one.state)} again"


def _child_lines(old: pb.RunStatus, new: pb.RunStatus, *, first: bool) -> Iterator[str]:
    before = {child.name: child for child in old.children}
    for child in new.children:
        known = before.get(child.name, pb.ChildProcess())
        if first or (child.state, child.restarts) != (known.state, known.restarts):
            times = f", restarts: {child.restarts}" if child.restarts else ""
            process = f" (process {child.pid})" if child.pid else ""
            yield f"{clean(child.name)}{process}: {clean(child.state)}{times}"
