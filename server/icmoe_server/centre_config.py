"""What a person may change about a centre: ``centre.yaml``."""

from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from icmoe.addresses import split_address
from icmoe.config import describe_validation
from icmoe.errors import ConfigError

CONFIG_FILE = "centre.yaml"
DEFAULT_BIND = "0.0.0.0:8443"
DEFAULT_SUPERLINK_PORT = 9620

_TEMPLATE = """\
# A centre of icmoe-fl. Changes count from the next 'icmoe-fl server start'.

# What hospitals connect to. After a change: icmoe-fl server init --renew
advertise: "{advertise}"

# Where the gateway listens. Only this port needs to be open to the outside.
bind: "{bind}"

# Flower's SuperLink, on this machine only. Never forward this port: whoever reaches it commands every hospital.
superlink_port: {superlink_port}

operator:
  # Unix socket of 'icmoe-fl server status|watch|stop'; null is state/operator.sock
  socket: null
  # host:port for operators on other machines, with mutual TLS (pki/operator.crt and .key); null is none
  tcp: null
"""


def _check_address(address: str) -> str:
    split_address(address)
    return address


def _check_reachable(address: str) -> str:
    host, _ = split_address(address)
    if host in ("0.0.0.0", "::"):
        raise ValueError("this is what a server listens on; give the name under which hospitals reach it")
    return address


Address = Annotated[str, AfterValidator(_check_address)]
ReachableAddress = Annotated[str, AfterValidator(_check_reachable)]


class OperatorConfig(BaseModel):
    """Where operators reach the centre."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: Path | None = Field(default=None, description="Unix socket; null is state/operator.sock")
    tcp: Address | None = Field(default=None, description="host:port with mutual TLS besides the socket; null is none")


class CentreConfig(BaseModel):
    """``centre.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    advertise: ReachableAddress = Field(description="what hospitals connect to")
    bind: Address = Field(default=DEFAULT_BIND, description="where the gateway listens")
    superlink_port: int = Field(default=DEFAULT_SUPERLINK_PORT, ge=1, le=65535, description="on loopback")
    operator: OperatorConfig = OperatorConfig()

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if split_address(self.bind)[1] == self.superlink_port:
            raise ValueError(f"bind and superlink_port both want port {self.superlink_port}; change one of them")
        return self


def read_config(path: Path) -> CentreConfig:
    """Read a ``centre.yaml``.

    Raises:
        ConfigError: if it is missing or wrong; the message names the keys.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{path.parent} is not a centre folder. Make one with 'icmoe-fl server init --dir {path.parent} "
            "--advertise HOST:PORT', or give the right --dir or $ICMOE_CENTRE_DIR."
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Run as the user who made the centre.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return parse_config(raw, source=str(path))


def parse_config(raw: object, *, source: str) -> CentreConfig:
    """Validate what a file or a command said.

    Raises:
        ConfigError: with one line per wrong key.
    """
    try:
        return CentreConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source} is not valid:\n{describe_validation(error, CentreConfig)}") from error


def config_text(config: CentreConfig) -> str:
    """The commented file for a config."""
    return _TEMPLATE.format(**config.model_dump())
