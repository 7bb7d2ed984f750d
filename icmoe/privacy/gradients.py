"""Gradients of units, clipped and summed; then noise. Everything that bounds what one unit can do is in this file.

A unit (a patient or an image) has forward and backward passes of its own. What is clipped is therefore exactly what
the unit brought, whatever the layers inside are: the bound rests on this file, not on a rule for every layer.

Letters: P trainable numbers in all.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icmoe.errors import RunError
from icmoe.privacy.sampling import NoiseSource


class ClippedSum:
    """Sum of unit gradients, each clipped to one L2 norm over all parameters together.

    In float64, so that rounding neither breaks the bound nor shows in the noise: only the noisy sum is rounded to
    float32, which drops the low bits in whose holes floating-point noise gives itself away (Mironov, 2012).

    Args:
        parameters: of the step; all units have the same.
        max_grad_norm: L2 norm to which a unit's gradient is clipped.
    """

    def __init__(self, parameters: Sequence[Tensor], *, max_grad_norm: float) -> None:
        self._parameters = parameters
        self._max_grad_norm = max_grad_norm
        num_numbers = sum(parameter.numel() for parameter in parameters)
        self.total = torch.zeros(num_numbers, dtype=torch.float64, device=parameters[0].device)

    def add_unit(self) -> None:
        """Clip what the unit left in ``.grad``, add it, and clear ``.grad`` for the next unit.

        Raises:
            RunError: if it is not finite; the message is the same whatever the data.
        """
        gradient = self._take()
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            raise not_finite()
        self.total.add_(gradient, alpha=self._max_grad_norm / max(norm, self._max_grad_norm))

    def noisy_mean(self, noise: NoiseSource, *, noise_multiplier: float, expected_units: float) -> Tensor:
        """Add N(0, (noise_multiplier * max_grad_norm)^2) to each number once, divide by ``expected_units``.

        By the expected number of units, not by the number drawn: that one is a secret of the draw.

        Returns:
            (P,) float64.
        """
        draws = torch.from_numpy(noise.gaussian(self.total.numel())).to(self.total.device)
        return (self.total + noise_multiplier * self._max_grad_norm * draws) / expected_units

    def _take(self) -> Tensor:
        pieces = []
        for parameter in self._parameters:
            # A parameter the unit did not touch: all others may have, and its noise must come all the same.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pieces.append(gradient.reshape(-1).double())
            parameter.grad = None
        return torch.cat(pieces)


def set_gradients(parameters: Sequence[Tensor], flat: Tensor) -> None:
    """Write (P,) into the ``.grad`` of ``parameters``, in their order, dtype and memory format."""
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(piece.reshape(parameter.shape))


def not_finite() -> RunError:
    """The error for losses and gradients that are not finite. It names no step: which one is a secret of the draw."""
    return RunError(
        "training under differential privacy met a number that is not finite; lower train.learning_rate, set "
        "train.precision: fp32, and have the site check its images with `icmoe-fl data check`"
    )
