"""Rows of the page's tables, computed from the records and free of any markup."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from icmoe.report.records import Results, Round, Run, Scores, SeedsResults, SeedsScores, SiteScore, Spread

State = Literal["answered", "failed", "quarantined", "not asked"]
REFERENCE_TITLES = {"local": "each site alone", "pooled": "all data pooled"}


@dataclass(frozen=True)
class ScoreRow:
    """One site, or the mean over sites. ``references`` and ``differences`` follow the table's reference names."""

    name: str
    score: SiteScore
    references: tuple[float | None, ...]
    difference: float | None
    worst: bool = False
    epsilon: float | None = None


@dataclass(frozen=True)
class ScoreTable:
    """Test scores. ``hd95_unit`` is None where sites differ in it."""

    references: tuple[str, ...]
    classes: tuple[str, ...]
    hd95_unit: str | None
    rows: tuple[ScoreRow, ...]
    mean: ScoreRow
    worst: ScoreRow
    private: bool


@dataclass(frozen=True)
class SeedsRow:
    """One site, the mean or the worst site over seeds."""

    name: str
    federated: Spread
    references: tuple[Spread, ...]
    difference: float | None


@dataclass(frozen=True)
class Cell:
    """What one site did in one round."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Incident:
    """Rounds in which a site was lost for the same reason."""

    site: str
    state: State
    rounds: str
    reason: str


@dataclass(frozen=True)
class SiteTraffic:
    """Images and bytes of one site; image counts of its last round, bytes over the whole run."""

    site: str
    found: int | None
    used: int | None
    skipped: int | None
    empty_masks: int | None
    num_examples: int | None
    bytes_up: int
    bytes_down: int
    rounds_answered: int
    rounds_asked: int


def difference(value: float | None, reference: float | None) -> float | None:
    """``value - reference`` where both are known."""
    return None if value is None or reference is None else value - reference


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the finite values, None if there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def score_table(results: Results) -> ScoreTable:
    """Lay out federated scores beside those of the references."""
    references = _reference_names(results.reference)
    classes = tuple(dict.fromkeys(name for score in results.sites.values() for name in score.dice_per_class))
    units = {score.hd95_unit for score in results.sites.values() if score.hd95 is not None}
    hd95_unit = units.pop() if len(units) == 1 else None

    def row(
        name: str, score: SiteScore, by_reference: Mapping[str, float | None], *, epsilon: float | None = None
    ) -> ScoreRow:
        return ScoreRow(
            name=name,
            score=score,
            references=tuple(by_reference.values()),
            difference=difference(score.dice, by_reference.get("local")),
            worst=name == results.worst_site.name,
            epsilon=epsilon,
        )

    def of_site(name: str) -> dict[str, float | None]:
        empty = SiteScore()
        return {reference: results.reference[reference].sites.get(name, empty).dice for reference in references}

    rows = tuple(
        row(name, score, of_site(name), epsilon=results.epsilon.get(name)) for name, score in results.sites.items()
    )
    means = {reference: results.reference[reference].mean_dice for reference in references}
    worsts = {reference: results.reference[reference].worst_site.dice for reference in references}
    return ScoreTable(
        references=references,
        classes=classes,
        hd95_unit=hd95_unit,
        rows=rows,
        mean=row("Mean over sites", _mean_score(results, classes, hd95_unit), means),
        worst=row("Worst site", SiteScore(dice=results.worst_site.dice), worsts),
        private=any(value is not None for value in results.epsilon.values()),
    )


def _mean_score(results: Scores, classes: Sequence[str], hd95_unit: str | None) -> SiteScore:
    scores = list(results.sites.values())
    counts = [score.num_test for score in scores if score.num_test is not None]
    return SiteScore(
        dice=results.mean_dice,
        dice_per_class={name: mean_of(score.dice_per_class.get(name) for score in scores) for name in classes},
        hd95=mean_of(score.hd95 for score in scores) if hd95_unit is not None else None,
        num_test=sum(counts) if counts else None,
    )


def _reference_names(references: Iterable[str]) -> tuple[str, ...]:
    names = list(references)
    return tuple(
        sorted(names, key=lambda name: (list(REFERENCE_TITLES).index(name) if name in REFERENCE_TITLES else 9, name))
    )


def seeds_table(results: SeedsResults) -> tuple[tuple[str, ...], tuple[SeedsRow, ...]]:
    """Reference names, and a row for each site, the mean and the worst site."""
    references = _reference_names(results.reference)
    others = [results.reference[name] for name in references]

    def row(name: str, federated: Spread, spreads: Sequence[Spread]) -> SeedsRow:
        local = dict(zip(references, spreads, strict=True)).get("local", Spread())
        return SeedsRow(name, federated, tuple(spreads), difference(federated.mean, local.mean))

    def of_site(scores: SeedsScores, name: str) -> Spread:
        return scores.sites[name].dice if name in scores.sites else Spread()

    rows = [row(name, site.dice, [of_site(other, name) for other in others]) for name, site in results.sites.items()]
    rows.append(row("Mean over sites", results.mean_dice, [other.mean_dice for other in others]))
    rows.append(row("Worst site", results.worst_site, [other.worst_site for other in others]))
    return references, tuple(rows)


def participation(run: Run) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """What every site did in every round, in the order of ``run.rounds``."""
    return tuple((site, tuple(_cell(line, site) for line in run.rounds)) for site in run.sites)


def _cell(line: Round, site: str) -> Cell:
    if site in line.quarantined:
        return Cell("quarantined", line.quarantined[site])
    if site in line.failed:
        return Cell("failed", line.failed[site])
    if site in line.answered:
        return Cell("answered")
    if site in line.asked:
        return Cell("failed", "no answer")
    return Cell("not asked")


def incidents(run: Run) -> tuple[Incident, ...]:
    """Every loss of a site with its reason; rounds with the same reason in one entry."""
    grouped: dict[tuple[str, State, str], list[Round]] = {}
    for site, cells in participation(run):
        for line, cell in zip(run.rounds, cells, strict=True):
            if cell.state in ("failed", "quarantined"):
                grouped.setdefault((site, cell.state, cell.reason), []).append(line)
    return tuple(
        Incident(site, state, ", ".join(_spans(lines)), reason) for (site, state, reason), lines in grouped.items()
    )


def _spans(lines: Sequence[Round]) -> list[str]:
    """Round numbers as spans, such as 1, 3-5, final evaluation."""
    numbers = [line.round for line in lines if line.round is not None and not line.evaluate_only]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [f"{first}" if first == last else f"{first}\N{EN DASH}{last}" for first, last in spans]
    return texts + (["final evaluation"] if any(line.evaluate_only for line in lines) else [])


def traffic(run: Run) -> tuple[SiteTraffic, ...]:
    """Images and bytes per site."""
    lines = run.training_rounds

    def last(field: str, site: str) -> int | None:
        known = [getattr(line, field)[site] for line in lines if getattr(line, field).get(site) is not None]
        return known[-1] if known else None

    return tuple(
        SiteTraffic(
            site=site,
            found=last("found", site),
            used=last("used", site),
            skipped=last("skipped", site),
            empty_masks=run.results.empty_masks.get(site),
            num_examples=last("num_examples", site),
            bytes_up=sum(line.bytes_up.get(site) or 0 for line in run.rounds),
            bytes_down=sum(line.bytes_down.get(site) or 0 for line in run.rounds),
            rounds_answered=sum(site in line.answered for line in lines),
            rounds_asked=sum(site in line.asked for line in lines),
        )
        for site in run.sites
    )


def last_shares(rounds: Sequence[Round]) -> tuple[int | None, Mapping[str, Mapping[str, float | None]]]:
    """Round and shares by site of the last round that has any."""
    for line in reversed(rounds):
        if line.expert_shares:
            return line.round, line.expert_shares
    return None, {}
