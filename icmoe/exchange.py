"""What travels between the centre and a site, and what is allowed to. Numpy only.

What leaves a site is decided by an explicit list of names that the model gives (``IcMoe.adapter_params``) and the run's
scope, never by a pattern.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from icmoe.config import CommunicationConfig, ScopeConfig
from icmoe.errors import ExchangeError, IncompatibleUpdateError
from icmoe.types import FAMILIES, Array, Arrays

MAX_EXAMPLES = 10**9
"""More images than any site has; a larger count is a mistake or an attempt to outweigh everybody."""

Job = Literal["train", "validate", "test"]


@dataclass(frozen=True)
class Instruction:
    """What the centre asks of a site in one message.

    Attributes:
        job: ``train`` scores the received weights on the validation split, then trains; the others only score.
        run_json: the ``RunConfig``.
        config_digest: its digest.
        server_round: from 1. For ``validate`` and ``test`` the round whose aggregate is scored.
        site: whom the centre asks, by the key it registered; a site of another name refuses.
        countersigned: the centre's signature under the last receipt of this site that arrived; empty if none did.
    """

    job: Job
    run_json: str
    config_digest: str
    server_round: int
    site: str
    countersigned: str = ""


@dataclass(frozen=True)
class SiteReport:
    """What a site says of a message: closed fields, numbers only beside its name and two digests.

    Attributes:
        site: its name.
        server_round: of the instruction.
        config_digest: of the run it worked for.
        backbone_digest: of the frozen weights it used.
        numbers: scalars by name, such as ``dice``, ``num_examples``, ``train_loss``.
        expert_shares: share of the vote per expert name.
        dice_per_class: in class order, NaN where a class is absent (this travels as a list of floats).
    """

    site: str
    server_round: int
    config_digest: str
    backbone_digest: str
    numbers: Mapping[str, float]
    expert_shares: Mapping[str, float] = field(default_factory=dict)
    dice_per_class: Sequence[float] = ()


@dataclass(frozen=True)
class Update:
    """A site's trained tensors with its report."""

    report: SiteReport
    arrays: Arrays

    @property
    def num_examples(self) -> float:
        """Weight of the site in an average by examples."""
        return self.report.numbers["num_examples"]

    @property
    def num_bytes(self) -> int:
        """Payload size."""
        return sum(array.nbytes for array in self.arrays.values())


def expert_of(name: str) -> str | None:
    """Expert a tensor belongs to: ``experts.basic.0.up.weight`` -> ``basic.0``; ``None`` for the router's.

    Raises:
        ExchangeError: if the name is neither an expert's nor the router's.
    """
    parts = name.split(".")
    if parts[0] == "router":
        return None
    if parts[0] != "experts" or len(parts) < 4 or parts[1] not in FAMILIES:
        raise ExchangeError(f"the tensor {name!r} is neither experts.<family>.<n>.* nor router.*")
    return f"{parts[1]}.{parts[2]}"


def shared_names(names: Sequence[str], scope: ScopeConfig, normalisation: frozenset[str]) -> tuple[str, ...]:
    """Names whose tensors are global under ``scope``, in the given order.

    Args:
        names: all trainable tensors.
        scope: of the run; ``norm: local`` wins over the family for normalisation tensors.
        normalisation: names of the normalisation layers' tensors.
    """

    def is_global(name: str) -> bool:
        if name in normalisation and scope.norm == "local":
            return False
        expert = expert_of(name)
        return bool(getattr(scope, "router" if expert is None else expert.split(".")[0]) == "global")

    return tuple(name for name in names if is_global(name))


def extract_update(
    arrays: Arrays,
    allowed: Sequence[str],
    *,
    expert_shares: Mapping[str, float],
    communication: CommunicationConfig,
) -> dict[str, Array]:
    """Pick what leaves: allowed names only, without experts the site hardly used, in the agreed dtype.

    Args:
        arrays: all trained tensors.
        allowed: explicit list of names that may leave.
        expert_shares: share of the vote per expert.
        communication: dtype and the smallest share that is sent.

    Raises:
        ExchangeError: if an allowed tensor is missing or not finite.
    """
    picked: dict[str, Array] = {}
    for name in allowed:
        if name not in arrays:
            raise ExchangeError(f"the tensor {name!r} should be sent but was not trained")
        expert = expert_of(name)
        if expert is not None and expert_shares.get(expert, 0.0) < communication.min_expert_share:
            continue
        with np.errstate(over="ignore"):
            array = arrays[name].astype(communication.dtype)
        if not np.isfinite(array).all():
            raise ExchangeError(f"the tensor {name!r} is not finite as {communication.dtype}; nothing was sent")
        picked[name] = array
    return picked


def check_report(
    report: SiteReport,
    *,
    site: str,
    server_round: int,
    config_digest: str,
    backbone_digest: str,
    num_classes: int,
) -> None:
    """Refuse a report that must not enter the run's books.

    Args:
        report: as received.
        site: that was asked.
        server_round: expected round.
        config_digest: expected.
        backbone_digest: expected.
        num_classes: foreground classes.

    Raises:
        IncompatibleUpdateError: naming the first thing that is wrong.
    """
    if report.site != site:
        raise IncompatibleUpdateError(
            f"the reply claims to come from site {report.site!r}, but its key is that of {site!r}"
        )
    _expect("round", report.server_round, server_round)
    _expect("run config", report.config_digest, config_digest)
    _expect("backbone", report.backbone_digest, backbone_digest)
    for name, value in report.numbers.items():
        if not np.isfinite(value):
            raise IncompatibleUpdateError(f"the reply's {name} is {value}, expected a finite number")
    if not 0.0 <= report.numbers.get("dice", 0.0) <= 1.0:
        raise IncompatibleUpdateError(f"the reply's Dice is {report.numbers['dice']}")
    if len(report.dice_per_class) not in (0, num_classes):
        raise IncompatibleUpdateError(f"the reply scores {len(report.dice_per_class)} classes, expected {num_classes}")
    for dice in report.dice_per_class:
        # NaN says that the class is in no image.
        if not (np.isnan(dice) or 0.0 <= dice <= 1.0):
            raise IncompatibleUpdateError(f"the reply's Dice of a class is {dice}")
    for expert, share in report.expert_shares.items():
        if not 0.0 <= share <= 1.0:
            raise IncompatibleUpdateError(f"the share of expert {expert} is {share}, expected 0 to 1")


def check_update(
    update: Update, *, reference: Arrays, communication: CommunicationConfig, max_update_norm: float
) -> float:
    """Refuse tensors that must not enter the aggregate; their report is checked by ``check_report``.

    Args:
        update: as received.
        reference: global tensors that were sent out, by name.
        communication: agreed dtype; tensors may only be missing where ``min_expert_share`` allows it.
        max_update_norm: L2 norm of the change above which an update is implausible.

    Returns:
        L2 norm of the change.

    Raises:
        IncompatibleUpdateError: naming the first thing that is wrong.
    """
    if "num_examples" not in update.report.numbers:
        raise IncompatibleUpdateError("the reply's num_examples is missing")
    if not 0 < update.num_examples <= MAX_EXAMPLES:
        raise IncompatibleUpdateError(f"the reply counts {update.num_examples} examples")
    _check_names(update.arrays, reference, allow_missing_experts=communication.min_expert_share > 0)
    squared = 0.0
    for name, array in update.arrays.items():
        if array.shape != reference[name].shape or array.dtype != np.dtype(communication.dtype):
            raise IncompatibleUpdateError(
                f"tensor {name} is {array.dtype} {array.shape}, expected {communication.dtype} {reference[name].shape}"
            )
        if not np.isfinite(array).all():
            raise IncompatibleUpdateError(f"tensor {name} is not finite")
        squared += float(np.square(array.astype(np.float64) - reference[name]).sum())
    if squared**0.5 > max_update_norm:
        raise IncompatibleUpdateError(f"the change has L2 norm {squared**0.5:.3g}, allowed is {max_update_norm:.3g}")
    return float(squared**0.5)


def _check_names(arrays: Arrays, reference: Arrays, *, allow_missing_experts: bool) -> None:
    extra = sorted(set(arrays) - set(reference))
    if extra:
        raise IncompatibleUpdateError(f"{len(extra)} unknown tensors, first {extra[0]}")
    missing = sorted(set(reference) - set(arrays))
    if not missing:
        return
    sent_experts = {expert_of(name) for name in arrays}
    partial = [name for name in missing if expert_of(name) in sent_experts]
    if partial or not allow_missing_experts or None in {expert_of(name) for name in missing}:
        raise IncompatibleUpdateError(f"{len(missing)} tensors are missing, first {(partial or missing)[0]}")


def _expect(what: str, got: int | str, expected: int | str) -> None:
    if got != expected:
        raise IncompatibleUpdateError(f"the reply is for {what} {str(got)[:12]}, expected {str(expected)[:12]}")
