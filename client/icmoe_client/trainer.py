"""A site's share of a round: score what came, train, hand out what may leave."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load_file

from icmoe.checkpoint import write_arrays
from icmoe.config import RunConfig, parse_run_config
from icmoe.errors import BackboneError, ExchangeError
from icmoe.exchange import Instruction, Job, SiteReport, extract_update
from icmoe.metrics import ImageScore, mean_or_none
from icmoe.privacy.dp_sgd import train_private
from icmoe.privacy.sampling import os_noise, seeded_noise
from icmoe.receipts import Countersignature, Epsilon
from icmoe.training import dump_arrays, evaluate, load_arrays, round_learning_rate, train_local
from icmoe.types import Array, Arrays, Split
from icmoe_client.egress import EgressRules, release
from icmoe_client.egress_log import LOG as EGRESS_LOG
from icmoe_client.egress_log import EgressLog
from icmoe_client.private_round import PrivateRound, epsilon_so_far, refuse_forgetful
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench


@dataclass(frozen=True)
class Outgoing:
    """What leaves: checked by the egress guard, and written on a receipt where the site has a key for one."""

    report: SiteReport
    arrays: dict[str, Array] | None
    receipt: str


@dataclass(frozen=True)
class _Done:
    """What a job gave, before anything of it may leave."""

    numbers: dict[str, float]
    shares: dict[str, float] = field(default_factory=dict)
    per_class: Sequence[float] = ()
    update: dict[str, Array] | None = None
    private: PrivateRound | None = None


def carry_out(site: Site, instruction: Instruction, arrays: Arrays) -> Outgoing:
    """Do what the centre asks.

    Args:
        site: this hospital.
        instruction: job, run config and round.
        arrays: global tensors.

    Returns:
        The report and, after training, the tensors that may leave.

    Raises:
        ExchangeError: if config or tensors are not what was agreed.
        PrivacyError: if the site's budget, its books or its egress guard say no.
        BackboneError: if the frozen weights changed.
        DataError: if the images cannot be used.
    """
    if instruction.site != site.name:
        raise ExchangeError(
            f"the centre asked {instruction.site!r}, but this site calls itself {site.name!r}: its key is registered "
            "under the other name. Enrol this site under its own name."
        )
    run = parse_run_config(instruction.run_json, source="the centre's run config")
    if run.digest() != instruction.config_digest:
        raise ExchangeError(
            "the run config does not have the digest the centre announced; run the same icmoe-fl everywhere"
        )
    log = open_egress_log(site)
    if log is not None and instruction.countersigned:
        log.acknowledge(Countersignature.from_json(instruction.countersigned))
    if log is not None and run.privacy is not None:
        refuse_forgetful(site, log.highest_epsilons())
    train = instruction.job == "train"
    if train and not 1 <= instruction.server_round <= run.federation.num_rounds:
        raise ExchangeError(
            f"the centre asks to train in round {instruction.server_round}; this run has {run.federation.num_rounds}"
        )
    bench = Workbench.prepare(site, run)
    before = bench.backbone.digest()
    _load_weights(bench, instruction, arrays)
    # After all that may fail without the data, and before an image is read: a round beyond the budget touches none.
    private = PrivateRound.book(site, run, server_round=instruction.server_round) if train and run.privacy else None
    if train:
        done = _train(bench, instruction.server_round, private)
    else:
        numbers, per_class = score_split(bench, "test" if instruction.job == "test" else "val")
        done = _Done(numbers, per_class=per_class)
    if bench.backbone.digest() != before:
        raise BackboneError("the frozen backbone changed during the round; nothing was sent")
    done.numbers["trainable_params"] = sum(parameter.numel() for parameter in bench.model.parameters())
    report = SiteReport(
        site=site.name,
        server_round=instruction.server_round,
        config_digest=instruction.config_digest,
        backbone_digest=before,
        numbers=done.numbers,
        expert_shares=done.shares,
        dice_per_class=done.per_class,
    )
    return _send(bench, instruction.job, report, done, log)


def _send(bench: Workbench, job: Job, report: SiteReport, done: _Done, log: EgressLog | None) -> Outgoing:
    """Through the guard, onto the receipt, then out."""
    rules = egress_rules(bench)
    released, update = release(report, done.update, rules=rules)
    receipt = ""
    if log is not None:
        used = int(released.numbers["used"]) if "used" in released.numbers else None
        patients = rules.count(len({sample.patient for sample in bench.select("train")})) if job == "train" else None
        receipt = log.append(
            released,
            update,
            run=released.config_digest,
            job=job,
            patients=patients,
            images=used,
            epsilon=_epsilon(bench, done.private),
        ).to_json()
    if done.private is not None:
        done.private.release()
    return Outgoing(released, update, receipt)


def _epsilon(bench: Workbench, private: PrivateRound | None) -> Epsilon | None:
    if private is not None:
        return private.epsilon
    return epsilon_so_far(bench.site, bench.run.privacy) if bench.run.privacy is not None else None


def open_egress_log(site: Site) -> EgressLog | None:
    """The site's log of what left; ``None`` in a simulation."""
    if site.receipt_key is None:
        return None
    return EgressLog(site.state_dir / EGRESS_LOG, key=site.receipt_key, site=site.name)


def egress_rules(bench: Workbench) -> EgressRules:
    """What may leave of this run, from the model and the site's policy."""
    dtype = bench.run.federation.communication.dtype
    parameters = dict(bench.model.named_parameters())
    return EgressRules(
        allowed={name: (tuple(parameters[name].shape), dtype) for name in bench.shared()},
        dp=bench.run.privacy is not None,
        min_cell=bench.site.policy.min_cell,
        release_shares=bench.site.policy.release_expert_shares,
        metric_noise=bench.site.policy.metric_noise,
        fixed_examples=bench.site.num_examples,
    )


def training_seed(run: RunConfig, site_name: str, server_round: int) -> tuple[int, int, int]:
    """Seed of a site's round: the same for the same run, site and round, on resume as well."""
    return run.train.seed, zlib.crc32(site_name.encode()), server_round


def _load_weights(bench: Workbench, instruction: Instruction, arrays: Arrays) -> None:
    expected = set(bench.shared())
    if set(arrays) != expected:
        wrong = sorted(expected ^ set(arrays))
        raise ExchangeError(f"the centre sent other tensors than this run's model has; first difference: {wrong[0]}")
    load_arrays(bench.model, arrays)
    # A round starts from the local tensors of the one before; scoring round r uses those of round r.
    source = bench.latest_local_file(instruction.server_round - (instruction.job == "train"))
    if source is not None:
        load_arrays(bench.model, load_file(source))


def _train(bench: Workbench, server_round: int, private: PrivateRound | None) -> _Done:
    run, site, federation = bench.run, bench.site, bench.run.federation
    numbers, per_class = score_split(bench, "val")
    encoded = bench.encode("train")
    data = bench.dataset("train")
    views = [view for view in run.train.views if view in encoded.views]
    learning_rate = round_learning_rate(run.train, server_round=server_round, num_rounds=federation.num_rounds)
    proximal_mu = federation.proximal_mu if federation.strategy == "fedprox" else 0.0
    seed = training_seed(run, site.name, server_round)
    if private is None:
        result = train_local(
            bench.model,
            bench.backbone.decoder,
            data,
            config=run.train,
            views=views,
            learning_rate=learning_rate,
            seed=seed,
            proximal_mu=proximal_mu,
            max_physical_batch_size=site.max_physical_batch_size,
        )
    else:
        private.require_all(encoded.used)
        result = train_private(
            bench.model,
            bench.backbone.decoder,
            data,
            config=run.train,
            privacy=private.privacy,
            spend=private.booking.spend,
            unit_of=private.unit_of,
            views=views,
            learning_rate=learning_rate,
            # The centre knows the run's seed and could subtract noise that came from it.
            noise=seeded_noise(seed) if site.simulated else os_noise(),
            proximal_mu=proximal_mu,
            max_physical_batch_size=site.max_physical_batch_size,
        )
        numbers["epsilon"] = private.booking.epsilon_after
    trained = dump_arrays(bench.model)
    shared = bench.shared()
    local = {name: array for name, array in trained.items() if name not in set(shared)}
    if local:
        write_arrays(bench.local_file(server_round), local)
    update = extract_update(trained, shared, expert_shares=result.expert_shares, communication=federation.communication)
    if private is None:
        numbers["train_loss"] = result.loss
    numbers |= {
        "num_examples": site.num_examples or encoded.used,
        "num_steps": result.num_steps,
        "found": encoded.found + site.num_left_out,
        "used": encoded.used,
        "skipped": sum(encoded.skipped.values()) + site.num_left_out,
        "empty_masks": data.num_empty_masks,
    }
    return _Done(numbers, result.expert_shares, per_class, update, private)


def score_split(bench: Workbench, split: Split) -> tuple[dict[str, float], list[float]]:
    """Score the loaded weights on a split; HD95 on test only."""
    if not bench.select(split):
        return {"num_scored": 0}, []
    bench.encode(split)
    data = bench.dataset(split)
    scores = evaluate(
        bench.model,
        bench.backbone.decoder,
        data,
        num_classes=bench.run.task.num_classes,
        precision=bench.run.train.precision,
        with_hd95=split == "test",
    )
    numbers = summarise(scores)
    numbers["empty_masks"] = data.num_empty_masks
    numbers["hd95_in_mm"] = float(all(sample.spacing for sample in data.samples))
    return numbers, dice_per_class(scores)


def summarise(scores: Sequence[ImageScore]) -> dict[str, float]:
    """Means over images; a key is left out where no image has the value."""
    means: Mapping[str, float | None] = {
        "dice": mean_or_none([score.mean_dice for score in scores]),
        "hd95": mean_or_none([mean_or_none(score.hd95) if score.hd95 else None for score in scores]),
    }
    return {"num_scored": len(scores), **{name: value for name, value in means.items() if value is not None}}


def dice_per_class(scores: Sequence[ImageScore]) -> list[float]:
    """Mean over the images in which a class is present; NaN where there is none."""
    columns = zip(*(score.dice for score in scores), strict=True)
    means = [mean_or_none(column) for column in columns]
    return [math.nan if mean is None else mean for mean in means]


def simulated_dropout(run: RunConfig, site_name: str, server_round: int) -> bool:
    """Whether a simulated site fails this round; drawn from run seed, site and round."""
    rng = np.random.default_rng([*training_seed(run, site_name, server_round), 1])
    return bool(rng.random() < run.simulation.dropout)
