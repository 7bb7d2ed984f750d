"""TensorBoard scalars of a finished run, written with TensorBoard's own record format and without torch."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from icmoe.errors import RunError
from icmoe.report.records import Results, Round, Run, SeedsRun, read_run
from icmoe.report.tables import mean_of

# TensorBoard looks for "tfevents" in the name; a fixed name keeps the host's name out and makes writing repeatable
EVENT_FILE = "events.out.tfevents.0.icmoe-fl"


class Scalar(NamedTuple):
    """One point of a curve."""

    tag: str
    step: int
    value: float


def write_tensorboard(run_dir: Path) -> Path:
    """Write the run's scalars into ``run_dir/tensorboard``, in the place of those of an earlier call.

    Tags: ``val_dice/<site>`` and ``val_dice/mean`` by the round whose aggregate was scored; ``train_loss``,
    ``bytes_up``, ``bytes_down`` by round; ``expert_share/<site>/<expert>``; ``test_dice``, ``test_hd95`` and
    ``test_dice_<reference>`` at the chosen round. A directory of several seeds gets one subfolder for each.
    The time of an event is seconds since the run began, so that the same run gives the same bytes.

    Args:
        run_dir: directory of a finished run.

    Returns:
        The folder of events.

    Raises:
        RunError: if ``results.json`` is missing, a file is damaged or the events cannot be written.
    """
    run = read_run(run_dir)
    target = run_dir / "tensorboard"
    temporary = run_dir / f".tensorboard.{os.getpid()}"
    try:
        temporary.mkdir()
        if isinstance(run, SeedsRun):
            for name, seed_run in run.runs.items():
                _write_events(seed_run, temporary / name)
        else:
            _write_events(run, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror}. Free some space or check who may write there."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_events(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    elapsed = 0.0
    with (folder / EVENT_FILE).open("wb") as stream:
        writer = RecordWriter(stream)
        writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for line in run.rounds:
            elapsed += line.seconds or 0.0
            _write_scalars(writer, round_scalars(line), elapsed)
        _write_scalars(writer, score_scalars(run.results), elapsed)


def _write_scalars(writer: RecordWriter, scalars: Iterator[Scalar], elapsed: float) -> None:
    for tag, step, value in scalars:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.write(Event(wall_time=elapsed, step=step, summary=summary).SerializeToString())


def round_scalars(line: Round) -> Iterator[Scalar]:
    """Scalars of one round; values that are not known are left out."""
    if line.scored_round is not None:
        yield from _by_site("val_dice", line.scored_round, line.val_dice)
        yield from _by_site("val_dice", line.scored_round, {"mean": mean_of(line.val_dice.values())})
    if line.round is None:
        return
    yield from _by_site("train_loss", line.round, line.train_loss)
    yield from _by_site("bytes_up", line.round, line.bytes_up)
    yield from _by_site("bytes_down", line.round, line.bytes_down)
    for site, shares in line.expert_shares.items():
        yield from _by_site(f"expert_share/{site}", line.round, shares)


def score_scalars(results: Results) -> Iterator[Scalar]:
    """Test scores as scalars at the chosen round."""
    step = results.best_round or 0
    yield from _by_site("test_dice", step, {site: score.dice for site, score in results.sites.items()})
    yield from _by_site("test_dice", step, {"mean": results.mean_dice})
    yield from _by_site("test_hd95", step, {site: score.hd95 for site, score in results.sites.items()})
    for reference, scores in results.reference.items():
        tag = f"test_dice_{reference}"
        yield from _by_site(tag, step, {site: score.dice for site, score in scores.sites.items()})
        yield from _by_site(tag, step, {"mean": scores.mean_dice})


def _by_site(tag: str, step: int, values: Mapping[str, float | None]) -> Iterator[Scalar]:
    for name, value in values.items():
        if value is not None:
            yield Scalar(f"{tag}/{name}", step, value)
