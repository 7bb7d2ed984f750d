"""The only way out of a site: ``release``. What is not on its lists does not leave, and nothing leaves with it.

Tensors leave under the names, shapes and dtypes of an allow-list that the model gives. Numbers leave by the table
``METRICS``, the text of a report is the site's name and two digests, and everything is rebuilt from checked values, so
that nothing rides along. The text of an error names what is on our own lists, and never a value or a foreign name.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import SystemRandom
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from icmoe.enrolment import SITE_NAME
from icmoe.errors import ExchangeError, PrivacyError
from icmoe.exchange import MAX_EXAMPLES, SiteReport, expert_of
from icmoe.types import FAMILIES, Array, Arrays

MAX_ROUND = 10**6
MAX_CLASSES = 254
_DTYPES = ("float16", "float32")
_EXPERT = re.compile(rf"({'|'.join(FAMILIES)})\.[0-9]{{1,2}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_Value = TypeVar("_Value")

Allowed = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensors that may leave: name -> (shape, dtype)."""


@dataclass(frozen=True)
class Rule:
    """When a number may leave.

    Attributes:
        leaves: ``always``, or only in runs without differential privacy.
        kind: ``count`` and ``flag`` are whole numbers, ``score`` lies between 0 and 1, ``number`` is any.
        low: smallest value.
        high: largest value.
        cell: the count that ``min_cell`` is compared with; ``None`` for what does not tell of images.
        why: for the documentation.
    """

    leaves: Literal["always", "without_dp"]
    kind: Literal["count", "flag", "score", "number"]
    low: float
    high: float
    cell: str | None
    why: str


METRICS: Mapping[str, Rule] = MappingProxyType(
    {
        "num_examples": Rule(
            "always", "count", 1, MAX_EXAMPLES, "num_examples",
            "weight in the average; with differential privacy only the number fixed in the site file",
        ),
        "trainable_params": Rule("always", "count", 1, 1e9, None, "a property of the model, not of the data"),
        "dice": Rule(
            "always", "score", 0, 1, "num_scored",
            "mean over validation or test images; epsilon does not cover it, for it is an exact function of them",
        ),
        "epsilon": Rule(
            "always", "number", 0, 1e9, None,
            "what the ledger says these data have spent; with the run config it tells the number of units",
        ),
        "hd95": Rule("always", "number", 0, 1e6, "num_scored", "as dice; of the test images only"),
        "hd95_in_mm": Rule("always", "flag", 0, 1, "num_scored", "whether all images know their spacing"),
        "num_scored": Rule("without_dp", "count", 0, MAX_EXAMPLES, "num_scored", "counts images exactly"),
        "found": Rule("without_dp", "count", 0, MAX_EXAMPLES, "found", "counts images exactly"),
        "used": Rule("without_dp", "count", 0, MAX_EXAMPLES, "used", "counts images exactly"),
        "skipped": Rule("without_dp", "count", 0, MAX_EXAMPLES, "skipped", "counts images exactly"),
        "empty_masks": Rule(
            "without_dp", "count", 0, MAX_EXAMPLES, "empty_masks", "counts images without any finding exactly"
        ),
        "num_steps": Rule("without_dp", "count", 0, 1e9, "used", "tells the number of images, to a batch"),
        "train_loss": Rule(
            "without_dp", "number", -1, 1e6, "used", "an exact function of the training images, which epsilon protects"
        ),
        "expert_shares": Rule(
            "without_dp", "score", 0, 1, "used",
            "share of the vote per expert, an exact function of the training images; also only where the site says so",
        ),
        "dice_per_class": Rule(
            "without_dp", "score", 0, 1, "num_scored",
            "tells which classes are present; a class in fewer images than min_cell reads as absent",
        ),
    }
)  # fmt: skip
"""Every number of a report. ``docs/privacy.md`` shows this table."""

_SCALARS = frozenset(METRICS) - {"expert_shares", "dice_per_class"}


@dataclass(frozen=True)
class EgressRules:
    """What may leave in one message.

    Attributes:
        allowed: tensors by name, from the model and the run's scope.
        dp: whether the run has differential privacy.
        min_cell: counts below it are withheld, and what is computed from so few images; 0 withholds none.
        release_shares: whether expert shares leave, in runs without differential privacy.
        metric_noise: standard deviation of noise on scores between 0 and 1, drawn from the operating system's entropy.
            It blurs; no epsilon speaks of it.
        fixed_examples: the weight that the site file fixes; ``None`` is the number of images.
    """

    allowed: Allowed
    dp: bool
    min_cell: int = 0
    release_shares: bool = True
    metric_noise: float = 0.0
    fixed_examples: int | None = None

    def count(self, value: int) -> int | None:
        """Number of patients or images as a receipt may say it; ``None`` where it may not leave."""
        return None if self.dp or value < self.min_cell else value


def release(
    report: SiteReport,
    arrays: Mapping[str, Array] | None,
    *,
    rules: EgressRules,
    images_per_class: Sequence[int] | None = None,
) -> tuple[SiteReport, dict[str, Array] | None]:
    """Let a report, and after training its tensors, leave.

    Args:
        report: of the site.
        arrays: trained tensors; ``None`` where only the report leaves.
        rules: of this run and site.
        images_per_class: images in which each foreground class is present; unknown ones withhold ``dice_per_class``
            when there is a ``min_cell``.

    Returns:
        Copies of what may leave, which nobody can change any more.

    Raises:
        PrivacyError: if anything is there that is not on the lists, or out of its range. Nothing may be sent then.
    """
    released = _check_arrays(arrays, rules.allowed) if arrays is not None else None
    _check_text(report)
    numbers = {name: _check_number(name, value) for name, value in _items(report.numbers, _SCALARS)}
    shares = _check_shares(report.expert_shares)
    per_class = _check_per_class(report.dice_per_class)
    return SiteReport(
        site=report.site,
        server_round=report.server_round,
        config_digest=report.config_digest,
        backbone_digest=report.backbone_digest,
        numbers=_withhold(numbers, rules),
        expert_shares=_withhold_shares(shares, numbers, rules),
        dice_per_class=_withhold_classes(per_class, numbers, images_per_class, rules),
    ), released


def _check_arrays(arrays: Arrays, allowed: Allowed) -> dict[str, Array]:
    if type(arrays) is not dict:
        raise PrivacyError("tensors leave as a plain dictionary only; nothing was sent")
    released: dict[str, Array] = {}
    for name, array in sorted(_items(arrays, allowed), key=lambda item: item[0]):
        shape, dtype = allowed[name]
        try:
            expert_of(name)
        except ExchangeError as error:
            raise PrivacyError(
                "the list of tensors that may leave holds one that is no expert's; nothing was sent"
            ) from error
        if type(array) is not np.ndarray or dtype not in _DTYPES or array.dtype.str != np.dtype(dtype).str:
            raise PrivacyError(f"the tensor {name} is not a plain array of {dtype}; nothing was sent")
        if array.dtype.metadata is not None or array.shape != shape:
            raise PrivacyError(f"the tensor {name} has not the shape {shape} that may leave; nothing was sent")
        # A copy: what is checked here, written on the receipt and sent must be the same bytes.
        copy = np.array(array, dtype=np.dtype(dtype), order="C", copy=True)
        if not np.isfinite(copy).all():
            raise PrivacyError(f"the tensor {name} is not finite; nothing was sent")
        copy.flags.writeable = False
        released[name] = copy
    return released


def _items(values: Mapping[str, _Value], known: Collection[str]) -> list[tuple[str, _Value]]:
    """What is there, all of it under known names."""
    if type(values) is not dict or not all(type(name) is str and name in known for name in values):
        # Not even the name: it could say anything.
        raise PrivacyError(
            f"something else than the {len(known)} known names of its kind was about to leave; nothing was sent. This "
            "site's log tells more."
        )
    return list(values.items())


def _check_text(report: SiteReport) -> None:
    texts = (report.site, SITE_NAME), (report.config_digest, _DIGEST), (report.backbone_digest, _DIGEST)
    if not all(type(text) is str and re.fullmatch(pattern, text) for text, pattern in texts):
        raise PrivacyError("the only text that leaves is the site's name and two digests; nothing was sent")
    if type(report.server_round) is not int or not 0 <= report.server_round <= MAX_ROUND:
        raise PrivacyError(f"a round is a whole number up to {MAX_ROUND}; nothing was sent")


def _check_number(name: str, value: float, *, may_be_absent: bool = False) -> float:
    """A plain number in its range; a subclass could carry anything."""
    rule = METRICS[name]
    if type(value) not in (int, float):
        raise PrivacyError(f"{name} is not a plain number; nothing was sent")
    if may_be_absent and math.isnan(value):
        return math.nan
    if not rule.low <= value <= rule.high:
        raise PrivacyError(f"{name} is not between {rule.low:g} and {rule.high:g}; nothing was sent")
    if rule.kind in ("count", "flag") and value != int(value):
        raise PrivacyError(f"{name} is not a whole number; nothing was sent")
    return float(value)


def _check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    if type(shares) is not dict or not all(type(name) is str and _EXPERT.fullmatch(name) for name in shares):
        raise PrivacyError("a share of the vote belongs to something that is no expert; nothing was sent")
    return {name: _check_number("expert_shares", share) for name, share in shares.items()}


def _check_per_class(per_class: Sequence[float]) -> list[float]:
    if type(per_class) not in (list, tuple) or len(per_class) > MAX_CLASSES:
        raise PrivacyError(f"the Dice per class is no list of at most {MAX_CLASSES} numbers; nothing was sent")
    return [_check_number("dice_per_class", dice, may_be_absent=True) for dice in per_class]


def _withhold(numbers: Mapping[str, float], rules: EgressRules) -> dict[str, float]:
    """The numbers that leave, in the order of the table."""
    if rules.dp or rules.fixed_examples is not None:
        _expect_fixed_examples(numbers, rules)
    elif "num_examples" in numbers and not _may_leave("num_examples", numbers, rules):
        raise PrivacyError(
            "this site counts fewer images than its min_cell, so its weight may not leave; nothing was sent. A fixed "
            "num_examples in its site file would let it take part."
        )
    leaving = {
        name: numbers[name]
        for name in METRICS
        if name in numbers and (name == "num_examples" or _may_leave(name, numbers, rules))
    }
    if rules.metric_noise:
        # A distance has no scale to blur it by.
        leaving.pop("hd95", None)
    if not {"used", "skipped"} <= set(leaving):
        # found = used + skipped: of three numbers two give away the third.
        leaving.pop("found", None)
    return {name: _blur(value, rules) if METRICS[name].kind == "score" else value for name, value in leaving.items()}


def _expect_fixed_examples(numbers: Mapping[str, float], rules: EgressRules) -> None:
    if "num_examples" in numbers and numbers["num_examples"] != rules.fixed_examples:
        raise PrivacyError(
            "the weight num_examples must be the number fixed in the site file, and is not; nothing was sent. A run "
            "with differential privacy needs one."
        )


def _may_leave(name: str, numbers: Mapping[str, float], rules: EgressRules) -> bool:
    rule = METRICS[name]
    if rules.dp and rule.leaves == "without_dp":
        return False
    # An unknown count may be a small one.
    return rule.cell is None or rules.min_cell == 0 or numbers.get(rule.cell, 0) >= rules.min_cell


def _withhold_shares(shares: Mapping[str, float], numbers: Mapping[str, float], rules: EgressRules) -> dict[str, float]:
    if not rules.release_shares or not _may_leave("expert_shares", numbers, rules):
        return {}
    return {name: _blur(shares[name], rules) for name in sorted(shares)}


def _withhold_classes(
    per_class: Sequence[float],
    numbers: Mapping[str, float],
    images_per_class: Sequence[int] | None,
    rules: EgressRules,
) -> tuple[float, ...]:
    if not _may_leave("dice_per_class", numbers, rules):
        return ()
    if not rules.min_cell:
        return tuple(_blur(dice, rules) for dice in per_class)
    if images_per_class is None or len(images_per_class) != len(per_class):
        return ()
    return tuple(
        _blur(dice, rules) if count >= rules.min_cell else math.nan
        for dice, count in zip(per_class, images_per_class, strict=True)
    )


def _blur(score: float, rules: EgressRules) -> float:
    if not rules.metric_noise or math.isnan(score):
        return score
    return min(1.0, max(0.0, score + SystemRandom().gauss(0.0, rules.metric_noise)))
