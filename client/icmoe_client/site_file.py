"""The site file: what belongs to a hospital, and what it allows a run to do. Never sent."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from icmoe.config import BackboneName, RunConfig, describe_validation
from icmoe.enrolment import SiteName
from icmoe.errors import ConfigError, PolicyError
from icmoe.privacy.config import PrivacyConfig
from icmoe_client.schedule import TrainingHours

DIRECTORY_VARIABLE = "ICMOE_SITE_DIR"
LOCAL_DIRECTORY = Path("configs/site")
SYSTEM_DIRECTORY = Path("/etc/icmoe-fl/site")

_PATHS = ("ca_certificate", "flower_key", "receipt_key", "data", "state_dir", "checkpoint", "ledger")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SitePolicy(_Section):
    """What a hospital allows. A run that asks for more is refused before any image is read."""

    require_dp: bool = Field(default=False, description="take part only in runs with differential privacy")
    max_epsilon: float | None = Field(
        default=None,
        gt=0.0,
        description="privacy budget of these data over all rounds and runs; a number also refuses runs without "
        "differential privacy, which have no bound at all. null sets no limit",
    )
    target_delta: float = Field(
        default=1e-5, gt=0.0, lt=1.0, description="delta that epsilon is stated for, in runs with differential privacy"
    )
    allow_units: tuple[Literal["patient", "image"], ...] = Field(
        default=("patient", "image"),
        min_length=1,
        description="what differential privacy may protect, in runs that have it: patient is the stronger promise",
    )
    max_rounds: int | None = Field(default=None, ge=1, description="rounds a run may have; null sets no limit")
    allowed_backbones: tuple[BackboneName, ...] | None = Field(
        default=None, min_length=1, description="backbones a run may use, such as [lite_medsam]; null allows all"
    )
    max_local_epochs: int | None = Field(
        default=None, ge=1, description="epochs a round may train here; null sets no limit"
    )
    min_train_images: int = Field(
        default=1, ge=1, description="usable training images below which this site takes no part"
    )
    max_skipped_share: float = Field(
        default=0.1, ge=0.0, le=1.0, description="share of the manifest's images that may be left out as damaged"
    )
    min_cell: int = Field(
        default=0,
        ge=0,
        description="counts of images below it do not leave, nor what is computed from so few; 0 is none",
    )
    release_expert_shares: bool = Field(
        default=True,
        description="let the experts' shares of the vote leave, in runs without differential privacy; the centre shows "
        "them and may weight experts by them",
    )
    metric_noise: float = Field(
        default=0.0, ge=0.0, le=1.0, description="standard deviation of noise on scores that leave, such as Dice"
    )
    allowed_apps: tuple[Sha256, ...] = Field(
        default=(),
        description="sha256 of further apps a centre may name, beyond the one of this version. Whatever it names, only "
        "the code installed here runs",
    )

    def admit(self, run: RunConfig) -> None:
        """Let a run pass.

        Raises:
            PolicyError: if it asks for more than is allowed. The text may go to the centre: it holds limits of this
                policy and values of the run, nothing of the data.
        """
        refusals = list(self._refusals(run))
        if refusals:
            raise PolicyError(
                f"this site's policy refuses the run: {'; '.join(refusals)}. Change the run, or ask the site."
            )

    def admit_data(self, *, num_train: int, num_usable: int, num_skipped: int) -> None:
        """Let the site's own data pass.

        Args:
            num_train: usable training images.
            num_usable: usable images of all splits.
            num_skipped: images left out as damaged.

        Raises:
            PolicyError: in words that may go to the centre; the numbers stay here.
        """
        if num_train < self.min_train_images:
            raise PolicyError(
                f"this site takes no part with fewer than {self.min_train_images} usable training images, and has "
                "fewer. More images, or another min_train_images in its site file, would let it."
            )
        if num_skipped > self.max_skipped_share * (num_usable + num_skipped):
            raise PolicyError(
                f"this site takes no part when more than {self.max_skipped_share:.0%} of its images are left out as "
                "damaged, and more are. Repair them, or raise max_skipped_share in its site file."
            )

    def _refusals(self, run: RunConfig) -> Iterator[str]:
        yield from self._privacy_refusals(run.privacy)
        if self.max_rounds is not None and run.federation.num_rounds > self.max_rounds:
            yield f"federation.num_rounds is {run.federation.num_rounds}, at most {self.max_rounds} are allowed"
        if self.max_local_epochs is not None and run.train.local_epochs > self.max_local_epochs:
            yield f"train.local_epochs is {run.train.local_epochs}, at most {self.max_local_epochs} are allowed"
        if self.allowed_backbones is not None and run.model.backbone not in self.allowed_backbones:
            yield f"model.backbone is {run.model.backbone}, allowed are {', '.join(self.allowed_backbones)}"

    def _privacy_refusals(self, privacy: PrivacyConfig | None) -> Iterator[str]:
        if privacy is None:
            if self.require_dp or self.max_epsilon is not None:
                yield "it has no differential privacy, and the site takes part in no other"
            return
        if privacy.unit not in self.allow_units:
            yield f"privacy.unit is {privacy.unit}, allowed are {', '.join(self.allow_units)}"
        if privacy.target_delta > self.target_delta:
            yield f"privacy.target_delta is {privacy.target_delta}, at most {self.target_delta} is allowed"
        wanted, allowed = privacy.target_epsilon, self.max_epsilon
        if wanted is not None and allowed is not None and wanted > allowed:
            yield f"privacy.target_epsilon is {wanted}, at most {allowed} is allowed"


class SiteConfig(_Section):
    """A hospital's own settings."""

    name: SiteName = Field(description="as the centre knows this hospital; fixed by enrolment")
    server: str = Field(description="the centre, host:port; the only address that icmoe-fl calls from here")
    ca_certificate: Path | None = Field(
        description="certificate of the centre's own authority; null trusts the authorities of the operating system"
    )
    flower_key: Path = Field(description="private key that proves who we are: EC P-384, OpenSSH format, mode 0600")
    receipt_key: Path = Field(description="private key that signs the receipt of every update: Ed25519, mode 0600")
    data: Path = Field(description="folder with manifest.csv; check it with 'icmoe-fl data check'")
    state_dir: Path = Field(
        description="this site's own disk: logs, tensors that never leave, Flower's home; mode 0700"
    )
    checkpoint: Path | None = Field(
        default=None, description="file with pretrained weights, for sam_vit_* and medsam_vit_b; null for lite_medsam"
    )
    verify_checkpoint: bool = Field(
        default=True, description="refuse pretrained weights that are not the published ones"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="auto takes a GPU where there is one; else cpu, cuda or cuda:1",
    )
    max_physical_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="images in memory at once; gradients accumulate up to the run's batch size, so results stay the "
        "same. null takes the whole batch",
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; null leaves torch's default")
    training_hours: str | None = Field(
        default=None,
        description='local hours in which a round may start, such as "20:00-06:00" or "12:00-13:00, 20:00-06:00"; '
        "null is always",
    )
    num_examples: int | None = Field(
        default=None,
        ge=1,
        description="weight of this site in the average; null is its number of training images. Runs with "
        "differential privacy need a fixed number, as the count itself tells of the data",
    )
    ledger: Path | None = Field(
        default=None,
        description="the books of what privacy was spent on these data, for ever; null is ledger.sqlite in state_dir. "
        "Keep it where a reinstall does not delete it, and back it up",
    )
    policy: SitePolicy = Field(default=SitePolicy(), description="what a run may ask of this site")

    @field_validator("server")
    @classmethod
    def _host_and_port(cls, server: str) -> str:
        split_address(server)
        return server

    @field_validator("training_hours")
    @classmethod
    def _readable_hours(cls, hours: str | None) -> str | None:
        if hours is not None:
            try:
                TrainingHours.parse(hours)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return hours

    @property
    def ledger_path(self) -> Path:
        """Where the privacy ledger is."""
        return self.ledger or self.state_dir / "ledger.sqlite"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the centre."""
        return split_address(self.server)


def split_address(server: str) -> tuple[str, int]:
    """Read ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ValueError: if it is anything else.
    """
    host, _, port = server.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    valid_host = bare and not any(mark in bare for mark in "/@[] ") and (":" not in bare or bare != host)
    if not valid_host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("the server is host:port, such as fl.example.org:8443, without https://")
    return bare, int(port)


def find_site_file(name: str, config: Path | None) -> Path:
    """Look for ``NAME.yaml``.

    Args:
        name: of the site.
        config: the file itself; nothing else is looked at then.

    Raises:
        ConfigError: if there is none, naming where it was looked for.
    """
    if config is not None:
        if config.is_file():
            return config
        raise ConfigError(f"there is no site file {config}. Make one with 'icmoe-fl site init {name}'.")
    own = os.environ.get(DIRECTORY_VARIABLE)
    folders = [*([Path(own)] if own else []), LOCAL_DIRECTORY, SYSTEM_DIRECTORY]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(
        f"there is no {name}.yaml in {', '.join(map(str, folders))}. Make one with 'icmoe-fl site init {name}', give "
        f"its path with --config, or set {DIRECTORY_VARIABLE}."
    )


def load_site(path: Path, *, name: str | None = None) -> SiteConfig:
    """Read a site file. Relative paths in it are relative to the file.

    Args:
        path: a YAML file.
        name: what its ``name`` must be; ``None`` accepts any.

    Raises:
        ConfigError: if it cannot be read, a key or value is wrong, or it is another site's.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the site file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        site = SiteConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a valid site file:\n{describe_validation(error, SiteConfig)}\n"
            "configs/site/example.yaml explains every key."
        ) from error
    if name not in (None, site.name):
        raise ConfigError(f"{path} is the file of {site.name!r}, not of {name!r}. Give --site {site.name}.")
    folder = path.absolute().parent
    found = {key: folder / value.expanduser() for key in _PATHS if (value := getattr(site, key)) is not None}
    return site.model_copy(update=found)
