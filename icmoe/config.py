"""What a federation trains: one frozen ``RunConfig``, kept in ``configs/run/*.yaml``, sent as one JSON string.

Every default of a run is written here and nowhere else. What belongs to a hospital (paths, device, memory, keys,
limits) is not in this file: see ``icmoe_client.site``.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from icmoe.errors import ConfigError
from icmoe.privacy.config import PrivacyConfig
from icmoe.types import FAMILIES

BackboneName = Literal["sam_vit_b", "sam_vit_l", "sam_vit_h", "medsam_vit_b", "lite_medsam"]
StrategyName = Literal["fedavg", "fedprox", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum"]
Scope = Literal["global", "local"]
View = Annotated[str, Field(pattern=r"^(identity|hflip|vflip|rot90|rot180|rot270|affine[0-9]+)$")]
Weight = Annotated[float, Field(ge=0.0)]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]

UNWEIGHTED_STRATEGIES = ("fedmedian", "fedtrimmedavg", "krum")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskConfig(_Section):
    """What is segmented."""

    name: str = Field(min_length=1, description="short name of the task, for reports")
    classes: dict[str, int] = Field(
        min_length=1,
        max_length=254,
        description="class name -> raw mask value; class ids follow this order from 1. 0 is background",
    )
    ignore: tuple[int, ...] = Field(default=(), description="raw mask values that count nowhere")
    note: str = Field(default="", description="printed as the first line of every report of this task")

    @model_validator(mode="after")
    def _distinct_values(self) -> Self:
        values = [0, *self.classes.values(), *self.ignore]
        if len(set(values)) != len(values):
            raise ValueError("each raw mask value may stand once in classes and ignore, and 0 is background")
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes K, background included."""
        return len(self.classes) + 1


class ExpertsConfig(_Section):
    """How many experts of each family."""

    basic: int = Field(default=1, ge=0, le=8)
    semantic: int = Field(default=1, ge=0, le=8)
    adaptive: int = Field(default=2, ge=0, le=8)

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.total == 0:
            raise ValueError("a model needs at least one expert")
        return self

    @property
    def total(self) -> int:
        """Number of experts E."""
        return self.basic + self.semantic + self.adaptive


class ModelConfig(_Section):
    """Backbone, experts and voting."""

    backbone: BackboneName = "lite_medsam"
    image_size: int | None = Field(
        default=None,
        ge=64,
        le=1024,
        multiple_of=16,
        description="side S of the square image the backbone sees; null is its native size",
    )
    experts: ExpertsConfig = ExpertsConfig()
    width: int = Field(
        default=64, ge=16, le=256, multiple_of=16, description="channels inside semantic and adaptive experts"
    )
    residual_rank: int = Field(default=16, ge=1, le=128, description="rank of the basic expert's residual")
    temperature: float = Field(
        default=0.1, gt=0.0, description="initial temperature of the semantic expert's cosine logits"
    )
    detail_size: int | None = Field(
        default=None,
        ge=64,
        le=2048,
        multiple_of=16,
        description="side D of the square image the adaptive experts' stem sees; null is image_size",
    )
    logit_stride: int | None = Field(
        default=None,
        ge=1,
        le=16,
        description="pixels of the image_size square per logit; null is half the embedding's stride, a grid of 2h x 2w",
    )
    top_k: int | None = Field(default=None, ge=1, description="keep the k largest votes per pixel; null keeps all")
    voting: Literal["ppav", "softmax"] = Field(
        default="ppav", description="pixel probability adaptive voting, or the router's plain softmax average"
    )

    @model_validator(mode="after")
    def _top_k_in_range(self) -> Self:
        if self.top_k is not None and self.top_k > self.experts.total:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts.total} experts")
        return self


class LossConfig(_Section):
    """Weights of the loss terms; Dice + cross-entropy of the fused prediction has weight 1."""

    expert: Weight = Field(default=0.2, description="Dice + cross-entropy of each expert alone, mean over experts")
    consistency: Weight = Field(default=0.1, description="label consistency of the router")
    consistency_temperature: float = Field(default=1.0, gt=0.0, description="tau of the consistency target")
    balance: Weight = Field(default=0.01, description="load balance per image")
    contrast: Weight = Field(default=0.1, description="semantic-guided contrast within the image")
    contrast_temperature: float = Field(default=0.1, gt=0.0)
    contrast_anchors: int = Field(default=96, ge=6, description="anchor pixels per image")


class TrainConfig(_Section):
    """Local optimisation, the same at every site."""

    seed: int = Field(default=0, ge=0)
    local_epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=4, ge=1, description="images per optimiser step")
    learning_rate: float = Field(default=2e-3, gt=0.0, description="of the first round, AdamW")
    final_learning_rate: float = Field(default=2e-4, gt=0.0, description="of the last round; cosine in between")
    weight_decay: float = Field(default=1e-2, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    views: tuple[View, ...] = Field(
        default=("identity",), min_length=1, description="cached geometric views; each epoch draws one per image"
    )
    embedding_noise: float = Field(
        default=0.0, ge=0.0, description="std of noise on embeddings, in units of their own std"
    )
    basic_every: int = Field(
        default=1, ge=1, description="the basic experts take part in every n-th step only; evaluation always uses them"
    )
    precision: Literal["fp32", "bf16"] = Field(default="bf16", description="of the frozen encoder and decoder passes")
    loss: LossConfig = LossConfig()


class ScopeConfig(_Section):
    """Which tensors are shared. ``norm: local`` wins over the family for normalisation tensors."""

    basic: Scope = "global"
    semantic: Scope = "global"
    adaptive: Scope = "global"
    router: Scope = "global"
    norm: Scope = "global"

    @model_validator(mode="after")
    def _something_global(self) -> Self:
        if all(getattr(self, name) == "local" for name in (*FAMILIES, "router")):
            raise ValueError("every scope is local: nothing would be federated")
        return self


class CommunicationConfig(_Section):
    """What travels, and how."""

    dtype: Literal["float32", "float16"] = "float32"
    min_expert_share: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="a site leaves out experts with a smaller share of its votes"
    )


class FederationConfig(_Section):
    """Rounds and aggregation."""

    num_rounds: int = Field(default=10, ge=1)
    strategy: StrategyName = "fedavg"
    expert_weighting: Literal["examples", "votes"] = "examples"
    scope: ScopeConfig = ScopeConfig()
    communication: CommunicationConfig = CommunicationConfig()
    proximal_mu: float = Field(default=0.01, ge=0.0, description="FedProx: weight of the proximal term")
    server_learning_rate: float = Field(default=0.01, gt=0.0, description="FedAdam, FedYogi: eta")
    server_tau: float = Field(default=1e-3, gt=0.0, description="FedAdam, FedYogi: adaptivity")
    trim: float = Field(default=0.2, ge=0.0, lt=0.5, description="FedTrimmedAvg: share cut at each end")
    num_malicious: int = Field(default=0, ge=0, description="Krum: number of malicious sites to withstand")
    sites: tuple[SiteName, ...] = Field(
        default=(), description="expected sites by name; a centre needs them, a simulation takes those of its data"
    )
    quorum: int | None = Field(
        default=None, ge=1, description="good updates a round needs; null is all sites that are asked"
    )
    on_missing: Literal["wait", "continue", "stop"] = Field(
        default="wait",
        description="when an expected site is not there: wait for it until the round's deadline, continue without it "
        "once the quorum answered, or stop the run",
    )
    max_update_norm: float = Field(
        default=1e3, gt=0.0, description="L2 norm of a site's change above which it is quarantined"
    )
    max_update_ratio: float = Field(
        default=30.0,
        gt=1.0,
        description="a site's change is quarantined as well when its L2 norm is more than this many times the usual "
        "one, the median over the sites of this round and of the two before",
    )
    round_deadline: float = Field(
        default=3600.0, gt=0.0, description="seconds a round may take, waiting for missing sites included"
    )

    @model_validator(mode="after")
    def _unweighted_strategies(self) -> Self:
        if self.strategy in UNWEIGHTED_STRATEGIES and (
            self.expert_weighting == "votes" or self.communication.min_expert_share > 0
        ):
            raise ValueError(
                f"{self.strategy} takes no weights: use expert_weighting: examples and min_expert_share: 0.0 with it"
            )
        return self

    @model_validator(mode="after")
    def _reachable_quorum(self) -> Self:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("each site may stand once in sites")
        if self.sites and self.quorum is not None and self.quorum > len(self.sites):
            raise ValueError(f"quorum {self.quorum} is more than the {len(self.sites)} expected sites")
        return self

    def updates_needed(self, num_asked: int) -> int:
        """Good updates a round needs when ``num_asked`` sites are asked to train."""
        return num_asked if self.quorum is None else self.quorum


class SimulationConfig(_Section):
    """How ``icmoe-fl simulate`` makes sites from one data folder. Real deployments ignore it."""

    embedded_data: bool = Field(
        default=False, description="without --data, use the demo images this package makes itself"
    )
    partition: Literal["manifest", "iid", "dirichlet"] = "manifest"
    num_sites: int | None = Field(default=None, ge=1, description="for iid and dirichlet")
    alpha: float = Field(default=0.5, gt=0.0, description="dirichlet: small is uneven")
    fraction_train: float = Field(default=1.0, gt=0.0, le=1.0, description="share of sites asked per round")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability that an asked site fails a round")

    @model_validator(mode="after")
    def _num_sites_where_needed(self) -> Self:
        if (self.partition == "manifest") != (self.num_sites is None):
            raise ValueError("num_sites belongs to partition iid and dirichlet, and only to these")
        return self

    def num_asked(self, num_sites: int) -> int:
        """Sites asked to train per round, of ``num_sites``."""
        return max(1, round(self.fraction_train * num_sites))


class RunConfig(_Section):
    """A whole run."""

    task: TaskConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    simulation: SimulationConfig = SimulationConfig()
    privacy: PrivacyConfig | None = Field(default=None, description="differential privacy; null trains without")

    @model_validator(mode="after")
    def _nothing_unnoised_under_dp(self) -> Self:
        if self.privacy is None:
            return self
        if self.federation.expert_weighting == "votes":
            raise ValueError("under privacy expert_weighting must be examples: votes are unnoised counts of the data")
        if self.federation.communication.min_expert_share > 0:
            raise ValueError("under privacy min_expert_share must be 0: which experts are left out tells of the data")
        return self

    @model_validator(mode="after")
    def _quorum_under_dropout(self) -> Self:
        if self.simulation.dropout > 0 and self.federation.quorum is None:
            raise ValueError(
                "simulation.dropout fails sites on purpose: say with federation.quorum how many are enough"
            )
        return self

    def digest(self) -> str:
        """Sha256 of the canonical JSON form, the same at every site and at the centre."""
        content = self.model_dump(mode="json")
        # The order of classes gives their ids, so it must count; sorted keys would hide it.
        content["task"]["classes"] = list(content["task"]["classes"].items())
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config and apply ``KEY=VALUE`` overrides with dotted keys.

    Args:
        path: a YAML file.
        overrides: such as ``train.learning_rate=1e-3``; values are read as YAML.

    Returns:
        The validated config.

    Raises:
        ConfigError: if the file cannot be read or a key or value is wrong. The message names the key's path.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the run config {path}: {error.strerror}. Shipped ones are in configs/run/."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold a mapping with the key 'task' and optional sections; see configs/run/cardiac.yaml"
        )
    for override in overrides:
        _apply_override(raw, override)
    return parse_run_config(raw, source=str(path))


def parse_run_config(raw: object, *, source: str) -> RunConfig:
    """Validate a nested mapping (or the JSON text that travelled) as a ``RunConfig``.

    Raises:
        ConfigError: with one line per wrong key.
    """
    try:
        return RunConfig.model_validate_json(raw) if isinstance(raw, str) else RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source} is not a valid run config:\n{describe_validation(error, RunConfig)}") from error


def describe_validation(error: ValidationError, model: type[BaseModel]) -> str:
    """Write pydantic's findings as one line each, with the keys that are allowed where one is unknown."""
    lines = []
    for finding in error.errors():
        where = ".".join(str(part) for part in finding["loc"]) or "(top level)"
        if finding["type"] == "extra_forbidden":
            allowed = ", ".join(sorted(_fields_at(model, finding["loc"][:-1])))
            lines.append(f"  {where}: unknown key. Allowed here: {allowed}")
        else:
            lines.append(f"  {where}: {finding['msg']}, got {finding['input']!r}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set takes KEY=VALUE such as train.learning_rate=1e-3, got {override!r}")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node[parent] = {} if node.get(parent) is None else node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error
