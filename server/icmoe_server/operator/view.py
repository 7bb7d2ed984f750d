"""A run on one screen of 80 columns: who is there, how good the model is at each site, what needs a person."""

from collections.abc import Sequence
from datetime import datetime
from statistics import fmean

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from icmoe_server.operator import operator_pb2 as pb
from icmoe_server.operator.scene import TROUBLE, Scene, age, clean, duration, megabytes, troubles
from icmoe_server.operator.service import RUNNING

BARS = "▁▂▃▄▅▆▇█"
TREND_ROUNDS = 8
MAX_TROUBLES = 8
_STYLES = {"online": "green", "answered": "green", "asked": "cyan", "missing": "yellow"}
_RUN_STYLES = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow", "waiting": "bold yellow"}
_STOPS = {"after_round": "stops after this round", "now": "stops now"}


def draw(scene: Scene, *, now: datetime, ascii_only: bool = False) -> RenderableType:
    """Draw what is known.

    Args:
        scene: what was heard.
        now: with time zone; ages are counted to it.
        ascii_only: the terminal shows no other characters.

    Returns:
        What rich prints; of any width, made for 80 columns.
    """
    if scene.status is None:
        return Text("Waiting for the centre to say how the run stands.")
    parts: list[RenderableType] = [_headline(scene.status)]
    if scene.rounds:
        parts.append(_progress(scene))
    if scene.sites():
        parts.append(_site_table(scene, now, ascii_only=ascii_only))
    space = " " if ascii_only else "\u00a0"
    lines = (_experts(scene, space), _traffic(scene), _troubles(scene, now), _processes(scene.status, space))
    parts += [line for line in lines if line is not None]
    return Group(*parts)


def _headline(status: pb.RunStatus) -> RenderableType:
    line = Text().append(clean(status.run), style="bold")
    line.append("  ").append(clean(status.state), style=_RUN_STYLES.get(status.state, "bold cyan"))
    if status.round:
        line.append(f"  round {status.round}" + (f" of {status.num_rounds}" if status.num_rounds else ""))
    if status.stop_asked:
        line.append(f"  {_STOPS.get(status.stop_asked, status.stop_asked)}", style="yellow")
    if status.reason:
        line.append(f"\n{clean(status.reason)}")
    return line


def _progress(scene: Scene) -> RenderableType:
    status, last, left = scene.status, scene.last_trained(), scene.seconds_left()
    done, total = last.round if last else 0, status.num_rounds if status else 0
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    text = f"{done} of {total or '?'} rounds done"
    row.add_row(
        ProgressBar(total=max(total, 1), completed=done), text + (f", about {duration(left)} left" if left else "")
    )
    return row


def _site_table(scene: Scene, now: datetime, *, ascii_only: bool) -> Table:
    scored = any(one.val_dice for one in scene.rounds)
    table = Table(box=ASCII2 if ascii_only else SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    table.add_column("site", overflow="fold", ratio=1)
    table.add_column("roll-call", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    for name in ("Dice", "best", "trend", "MB up") if scored else ():
        table.add_column(name, justify="left" if name == "trend" else "right", no_wrap=True)
    standing = {one.site: one for one in (scene.status.roll_call if scene.status else ())}
    last = scene.last_trained()
    for site in scene.sites():
        one = standing.get(site, pb.SiteState())
        state = Text(clean(one.state) or "-", style=_STYLES.get(one.state, "red" if one.state in TROUBLE else ""))
        cells = _score_cells(scene.dice(site), ascii_only=ascii_only) if scored else ()
        sent = (megabytes(last.bytes_up[site]) if last and site in last.bytes_up else "-",) if scored else ()
        table.add_row(Text(clean(site)), state, age(one.since, now) or "-", *cells, *sent)
    return table


def _score_cells(dice: Sequence[float], *, ascii_only: bool) -> tuple[str, str, str]:
    if not dice:
        return "-", "-", ""
    if ascii_only:
        change = f"{dice[-1] - dice[-2]:+.3f}" if len(dice) > 1 else ""
        return f"{dice[-1]:.3f}", f"{max(dice):.3f}", change
    return f"{dice[-1]:.3f}", f"{max(dice):.3f}", trend(dice[-TREND_ROUNDS:])


def trend(values: Sequence[float]) -> str:
    """A bar per value between the lowest and the highest; differences below 0.01 look flat."""
    low = min(values)
    span = max(max(values) - low, 0.01 * len(BARS))
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def _experts(scene: Scene, space: str) -> Text | None:
    """Mean share of each expert over sites, with the range where sites differ: one near 0 has died."""
    told = [one for one in scene.rounds if one.expert_shares]
    if not told:
        return None
    shares = [of.shares for of in told[-1].expert_shares.values()]
    line = Text("experts    ", style="dim")
    for number, name in enumerate(sorted({name for of in shares for name in of})):
        percent = [100 * of[name] for of in shares if name in of]
        text = f"{clean(name)} {fmean(percent):.0f} %"
        if max(percent) - min(percent) >= 1:
            text += f" ({min(percent):.0f}-{max(percent):.0f})"
        line.append(("   " if number else "") + text.replace(" ", space), style="not dim")
    return line


def _traffic(scene: Scene) -> Text | None:
    last = scene.last_trained()
    if last is None:
        return None
    sent, received = sum(last.bytes_up.values()), sum(last.bytes_down.values())
    line = Text("last round ", style="dim")
    text = f"{duration(last.seconds)}, {megabytes(sent)} MB up, {megabytes(received)} MB down"
    text += f", late replies dropped: {last.late}" if last.late else ""
    text += f", waited {duration(last.waited)}" if last.waited >= 1 else ""
    return line.append(f"{text}; {megabytes(scene.bytes_up())} MB up in all", style="not dim")


def _troubles(scene: Scene, now: datetime) -> Text | None:
    last = scene.last_trained()
    lines = [] if last is None else [f"{site}, round {last.round}: {why}" for site, why in troubles(last).items()]
    for one in scene.status.roll_call if scene.status else ():
        if one.state in TROUBLE:
            since = f" for {age(one.since, now)}" if age(one.since, now) else ""
            lines.append(f"{one.site}, now: {one.state}{since}" + (f": {one.reason}" if one.reason else ""))
    if not lines:
        return None
    hidden = len(lines) - MAX_TROUBLES
    shown = lines[-MAX_TROUBLES:] + ([f"and {hidden} more; see rounds.jsonl"] if hidden > 0 else [])
    return Text("\n".join(clean(line) for line in shown), style="yellow")


def _processes(status: pb.RunStatus, space: str) -> Text:
    line = Text("processes  ", style="dim")
    for number, child in enumerate(status.children):
        times = f", restarts: {child.restarts}" if child.restarts else ""
        style = "not dim" if child.state == RUNNING else "not dim bold red"
        text = child.name + (f" ({child.state}{times})" if times or child.state != RUNNING else "")
        line.append(("   " if number else "") + clean(text).replace(" ", space), style=style)
    return line if status.children else line.append("none", style="not dim")
