"""The ``privacy`` section of a run config."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Unit = Literal["patient", "image"]


class PrivacyConfig(BaseModel):
    """DP-SGD over experts and router. Each site adds its own noise; the centre is not trusted with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit = Field(default="patient", description="what epsilon protects: all images of a patient, or one image")
    noise_multiplier: float | None = Field(
        default=None, gt=0.0, description="standard deviation of the noise in units of max_grad_norm"
    )
    target_epsilon: float | None = Field(
        default=None, gt=0.0, description="each site solves for the noise that spends this over all planned rounds"
    )
    target_delta: float = Field(default=1e-5, gt=0.0, lt=1.0, description="must be below 1 / number of units")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="L2 norm to which a unit's gradient is clipped")

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give either noise_multiplier or target_epsilon")
        return self
