"""A site's share of a round: score what came, train, hand out what may leave."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file

from icmoe.checkpoint import write_arrays
from icmoe.config import RunConfig, parse_run_config
from icmoe.errors import BackboneError, ExchangeError
from icmoe.exchange import Instruction, SiteReport, extract_update
from icmoe.metrics import ImageScore, mean_or_none
from icmoe.training import dump_arrays, evaluate, load_arrays, round_learning_rate, train_local
from icmoe.types import Array, Arrays, Split
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench


def carry_out(site: Site, instruction: Instruction, arrays: Arrays) -> tuple[SiteReport, dict[str, Array] | None]:
    """Do what the centre asks.

    Args:
        site: this hospital.
        instruction: job, run config and round.
        arrays: global tensors.

    Returns:
        The report and, after training, the tensors that may leave.

    Raises:
        ExchangeError: if config or tensors are not what was agreed.
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
    bench = Workbench.prepare(site, run)
    before = bench.backbone.digest()
    _load_weights(bench, instruction, arrays)
    if instruction.job == "train":
        numbers, shares, per_class, update = _train(bench, instruction.server_round)
    else:
        split: Split = "test" if instruction.job == "test" else "val"
        (numbers, per_class), shares, update = score_split(bench, split), {}, None
    if bench.backbone.digest() != before:
        raise BackboneError("the frozen backbone changed during the round; nothing was sent")
    numbers["trainable_params"] = sum(parameter.numel() for parameter in bench.model.parameters())
    report = SiteReport(
        site=site.name,
        server_round=instruction.server_round,
        config_digest=instruction.config_digest,
        backbone_digest=before,
        numbers=numbers,
        expert_shares=shares,
        dice_per_class=per_class,
    )
    return report, update


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


def _train(
    bench: Workbench, server_round: int
) -> tuple[dict[str, float], dict[str, float], list[float], dict[str, Array]]:
    run, federation = bench.run, bench.run.federation
    numbers, per_class = score_split(bench, "val")
    encoded = bench.encode("train")
    data = bench.dataset("train")
    result = train_local(
        bench.model,
        bench.backbone.decoder,
        data,
        config=run.train,
        views=[view for view in run.train.views if view in encoded.views],
        learning_rate=round_learning_rate(run.train, server_round=server_round, num_rounds=federation.num_rounds),
        seed=training_seed(run, bench.site.name, server_round),
        proximal_mu=federation.proximal_mu if federation.strategy == "fedprox" else 0.0,
        max_physical_batch_size=bench.site.max_physical_batch_size,
    )
    trained = dump_arrays(bench.model)
    shared = bench.shared()
    local = {name: array for name, array in trained.items() if name not in set(shared)}
    if local:
        write_arrays(bench.local_file(server_round), local)
    update = extract_update(trained, shared, expert_shares=result.expert_shares, communication=federation.communication)
    numbers |= {
        "num_examples": encoded.used,
        "train_loss": result.loss,
        "num_steps": result.num_steps,
        "found": encoded.found + bench.site.num_left_out,
        "used": encoded.used,
        "skipped": sum(encoded.skipped.values()) + bench.site.num_left_out,
        "empty_masks": data.num_empty_masks,
    }
    return numbers, result.expert_shares, per_class, update


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
