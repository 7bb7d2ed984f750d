"""What a simulated round costs beyond its training: 4 sites, features cached.

Three measurements of the same rounds on the same number of processes:

1. simulated: from one round's end to the next, checkpoint on disk included, as ``icmoe-fl simulate`` runs it;
2. sites' work without Flower: plain processes, each in turn ``carry_out`` for its sites (build the model, load the
   weights, look up features, read masks, score, train, extract the update), all waiting for the slowest;
3. training alone: the same processes with model and data loaded before the clock starts; scoring and training only.

Beyond training is 1 minus 3; Flower, Ray, aggregation and checkpoint are 1 minus 2.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from threading import Barrier

from icmoe.data.dataset import SegmentationDataset
from icmoe.exchange import Instruction
from icmoe.simulation import SimulationRequest, make_sites, num_cpus, simulate
from icmoe.training import dump_arrays, evaluate, round_learning_rate, train_local
from icmoe.types import Split
from icmoe_client.site import Site
from icmoe_client.trainer import carry_out, training_seed
from icmoe_client.workbench import Workbench

from .document import number, seconds, table
from .sites import RoundClock, Setup, encode_first, virtual_sites
from .stopwatch import Cost, Figures, in_fresh_process, middle, now

NUM_SITES = 4
NUM_ROUNDS = 8
PER_SITE: dict[Split, int] = {"train": 4, "val": 2, "test": 1}
BAR = 1.0
"""Seconds of wall time a round may take beyond its training."""
TIMEOUT = 300.0
"""Seconds after which a process that waits for the others gives up."""

Round = Callable[[int], None]


@dataclass(frozen=True)
class Share:
    """Sites that one process works for: every ``step``-th from ``first``."""

    first: int
    step: int

    def of(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Pick them."""
        return sites[self.first :: self.step]


def measure(setup: Setup) -> Figures:
    """Run the three, features cached before."""
    num_rounds = 2 if setup.quick else NUM_ROUNDS
    request = SimulationRequest(
        run=setup.run(f"federation.num_rounds={num_rounds}"),
        data=virtual_sites(setup, name="rounds", num_sites=NUM_SITES, per_site=PER_SITE),
        out=setup.work / "rounds",
    )
    shutil.rmtree(request.out, ignore_errors=True)
    encode_first(request)
    ends = in_fresh_process(_simulate, request)
    simulated = [after - before for before, after in pairwise(ends)]
    plain = replace(request, out=setup.work / "rounds_plain")
    return {
        "num_rounds": len(simulated),
        "num_processes": _num_processes(),
        "simulated": middle(simulated).figures(),
        "work": middle(_plain_rounds(plain, _site_work)[1:]).figures(),
        "training": middle(_plain_rounds(plain, _training_alone)[1:]).figures(),
    }


def _num_processes() -> int:
    return min(num_cpus(), NUM_SITES)


def _simulate(request: SimulationRequest) -> list[Cost]:
    clock = RoundClock()
    simulate(request, clock)
    return clock.ends


def _plain_rounds(request: SimulationRequest, prepare: Callable[[SimulationRequest, Share], Round]) -> list[Cost]:
    """Rounds in plain processes; the first is not like the others, as it warms up."""
    count, context = _num_processes(), get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(count, mp_context=context) as pool:
        barrier = manager.Barrier(count, timeout=TIMEOUT)
        futures = [pool.submit(_work_through, request, prepare, Share(one, count), barrier) for one in range(count)]
        per_process = [future.result() for future in futures]
    return [
        Cost(wall=max(cost.wall for cost in costs), cpu=sum(cost.cpu for cost in costs))
        for costs in zip(*per_process, strict=True)
    ]


def _work_through(
    request: SimulationRequest,
    prepare: Callable[[SimulationRequest, Share], Round],
    share: Share,
    barrier: Barrier,
) -> list[Cost]:
    """All rounds of one process, which starts each with the others and waits for the slowest."""
    work = prepare(request, share)
    costs = []
    for server_round in range(1, request.run.federation.num_rounds + 1):
        barrier.wait()
        start = now()
        work(server_round)
        barrier.wait()
        costs.append(now() - start)
    return costs


def _site_work(request: SimulationRequest, share: Share) -> Round:
    run, sites = request.run, share.of(make_sites(request))
    bench = Workbench.prepare(sites[0], run)
    shared = set(bench.shared())
    arrays = {name: array for name, array in dump_arrays(bench.model).items() if name in shared}

    def work(server_round: int) -> None:
        for site in sites:
            carry_out(site, Instruction("train", run.model_dump_json(), run.digest(), server_round, site.name), arrays)

    return work


def _training_alone(request: SimulationRequest, share: Share) -> Round:
    benches = [Workbench.prepare(site, request.run) for site in share.of(make_sites(request))]
    loaded = [(bench, bench.dataset("train"), bench.dataset("val")) for bench in benches]

    def work(server_round: int) -> None:
        for bench, train, val in loaded:
            _score_and_train(bench, train, val, server_round)

    return work


def _score_and_train(bench: Workbench, train: SegmentationDataset, val: SegmentationDataset, server_round: int) -> None:
    run, decoder = bench.run, bench.backbone.decoder
    evaluate(bench.model, decoder, val, num_classes=run.task.num_classes, precision=run.train.precision)
    train_local(
        bench.model,
        decoder,
        train,
        config=run.train,
        views=run.train.views,
        learning_rate=round_learning_rate(run.train, server_round=server_round, num_rounds=run.federation.num_rounds),
        seed=training_seed(run, bench.site.name, server_round),
    )


def render(figures: Figures) -> str:
    """The three, and their differences."""
    simulated, work, training = (figures[name] for name in ("simulated", "work", "training"))
    beyond = {clock: simulated[clock] - training[clock] for clock in simulated}
    framework = {clock: simulated[clock] - work[clock] for clock in simulated}
    verdict = "met" if beyond["wall"] <= BAR else "NOT met"
    rows = [
        ["1. simulated round", seconds(simulated)],
        ["2. the sites' work without Flower", seconds(work)],
        ["3. scoring and training alone", seconds(training)],
        ["beyond training (1 - 3)", seconds(beyond)],
        ["Flower, Ray, aggregation, checkpoint (1 - 2)", seconds(framework)],
        [f"bar: {number(BAR)} s of wall time beyond training", verdict],
    ]
    processes = f"{figures['num_processes']} processes"
    header = [f"{NUM_SITES} sites, {processes}, median of {figures['num_rounds']} rounds", "wall / CPU seconds"]
    return table(header, rows)
