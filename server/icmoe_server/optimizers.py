"""One aggregation step per strategy name: our weighted average, and Flower's strategies where they fit.

Flower's strategies are wrapped, not subclassed: they get messages made from checked updates and give tensors back.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, FedYogi, Krum

from icmoe.aggregation import weighted_average
from icmoe.config import FederationConfig
from icmoe.exchange import Update
from icmoe.flower import ARRAYS, METRICS
from icmoe.types import Array, Arrays


class Optimizer(Protocol):
    """Turns good updates into new global tensors."""

    def step(self, server_round: int, updates: Sequence[Update], previous: Arrays) -> dict[str, Array]:
        """Aggregate ``updates``, in site order, onto ``previous``."""

    def state(self) -> dict[str, Array]:
        """Tensors that the next round needs; empty for stateless strategies."""

    def restore(self, state: Arrays) -> None:
        """Take back what ``state`` gave."""


class Averaging:
    """FedAvg and FedProx: a weighted mean per tensor. FedProx differs at the sites only."""

    def __init__(self, config: FederationConfig) -> None:
        self._config = config

    def step(self, server_round: int, updates: Sequence[Update], previous: Arrays) -> dict[str, Array]:
        """Average."""
        return weighted_average(updates, previous, expert_weighting=self._config.expert_weighting)

    def state(self) -> dict[str, Array]:
        """Nothing."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing."""


class Adaptive:
    """FedAdam and FedYogi: our average, then Flower's server optimiser on the difference."""

    def __init__(self, config: FederationConfig, inner: FedAdam | FedYogi) -> None:
        self._config = config
        self._inner = inner

    def step(self, server_round: int, updates: Sequence[Update], previous: Arrays) -> dict[str, Array]:
        """Average, then let Flower step."""
        average = weighted_average(updates, previous, expert_weighting=self._config.expert_weighting)
        self._inner.current_arrays = {name: np.asarray(array) for name, array in previous.items()}
        return _aggregate(self._inner, server_round, [average])

    def state(self) -> dict[str, Array]:
        """First and second moments."""
        moments = {"m": self._inner.m_t or {}, "v": self._inner.v_t or {}}
        return {f"{kind}/{name}": array for kind, named in moments.items() for name, array in named.items()}

    def restore(self, state: Arrays) -> None:
        """Take the moments back."""
        split = {kind: {n[2:]: a for n, a in state.items() if n.startswith(f"{kind}/")} for kind in "mv"}
        self._inner.m_t, self._inner.v_t = split["m"] or None, split["v"] or None


class Robust:
    """FedMedian, FedTrimmedAvg and Krum: Flower's, on full unweighted replies."""

    def __init__(self, inner: FedMedian | FedTrimmedAvg | Krum) -> None:
        self._inner = inner

    def step(self, server_round: int, updates: Sequence[Update], previous: Arrays) -> dict[str, Array]:
        """Aggregate."""
        return _aggregate(self._inner, server_round, [update.arrays for update in updates])

    def state(self) -> dict[str, Array]:
        """Nothing."""
        return {}

    def restore(self, state: Arrays) -> None:
        """Nothing."""


def make_optimizer(config: FederationConfig) -> Optimizer:
    """Choose by ``federation.strategy``."""
    match config.strategy:
        case "fedavg" | "fedprox":
            return Averaging(config)
        case "fedadam":
            return Adaptive(config, FedAdam(eta=config.server_learning_rate, tau=config.server_tau))
        case "fedyogi":
            return Adaptive(config, FedYogi(eta=config.server_learning_rate, tau=config.server_tau))
        case "fedmedian":
            return Robust(FedMedian())
        case "fedtrimmedavg":
            return Robust(FedTrimmedAvg(beta=config.trim))
        case "krum":
            return Robust(Krum(num_malicious_nodes=config.num_malicious))


def _aggregate(inner: FedAvg, server_round: int, replies: Sequence[Arrays]) -> dict[str, Array]:
    messages = [
        Message(
            RecordDict(
                {
                    ARRAYS: ArrayRecord(
                        {name: FlowerArray(array.astype(np.float32)) for name, array in arrays.items()}
                    ),
                    METRICS: MetricRecord({inner.weighted_by_key: 1.0}),
                }
            ),
            dst_node_id=index + 1,
            message_type=MessageType.TRAIN,
        )
        for index, arrays in enumerate(replies)
    ]
    aggregated, _ = inner.aggregate_train(server_round, messages)
    if aggregated is None:
        raise ValueError("Flower's strategy gave no arrays although replies were there")
    return {name: array.numpy().astype(np.float32) for name, array in aggregated.items()}


def _record(arrays: Arrays) -> ArrayRecord:
    """One Flower array per tensor, for Flower's arithmetic; on the wire they travel otherwise."""
    return ArrayRecord({name: FlowerArray(np.asarray(array, dtype=np.float32)) for name, array in arrays.items()})
