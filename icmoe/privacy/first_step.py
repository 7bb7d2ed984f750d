"""What is checked once per training under differential privacy: images are separable, and weights move."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icmoe.config import TrainConfig
from icmoe.errors import PrivacyError
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.privacy.gradients import not_finite
from icmoe.training import Draw, TrainItem, part_losses
from icmoe.types import IGNORE_INDEX

TOLERANCE = 1e-2
"""Of the gradient's norm, beside another image: rounding stays below it, coupling does not. Where a gradient runs from
image to image, an exact zero is asked for instead."""
REPEATED = 1e-4
"""Of the gradient's norm, alone before and after another image: the same sums again, in another order on a GPU."""
_COUPLED = (
    "one image's {what} depends on another image, so differential privacy would not hold. Use no BatchNorm, no loss "
    "over several images and no state that outlives an image."
)


def check_separability(model: IcMoe, decoder: FrozenDecoder, like: TrainItem, *, config: TrainConfig) -> None:
    """See that an image's loss and gradient are the same alone, beside another image, and after it.

    The two images are made up, of the size of the site's: the outcome tells nothing about a patient. In fp32, whatever
    the run's precision. Leaves weights and their ``.grad`` alone.

    Args:
        model: in training mode.
        decoder: the backbone's frozen decoder.
        like: any image of the site, for its sizes.
        config: the run's train section.

    Raises:
        PrivacyError: if images are coupled.
        RunError: if the weights give gradients that are not finite.
    """
    pair = _Pair.like(like)
    draws = [Draw(index, "identity", index) for index in (0, 1)]
    config = config.model_copy(update={"precision": "fp32"})

    def losses(chosen: Sequence[Draw]) -> Tensor:
        return part_losses(model, decoder, pair, chosen, config=config, with_basic=True)[0]

    parameters = list(model.parameters())
    before, together = losses(draws[:1]), losses(draws)
    if together.shape != (2,):
        raise PrivacyError(f"the loss of two images has shape {tuple(together.shape)}; it must have one value for each")
    alone = _gradient(before[0], parameters)
    beside = _gradient(together[0], [*parameters, pair.items[1].embeddings, pair.items[1].detail])
    after = _gradient(losses(draws[:1])[0], parameters)
    if not math.isfinite(_norm(alone)):
        raise not_finite()
    if any(bool(leak.any()) for leak in beside[len(parameters) :]):
        raise PrivacyError(_COUPLED.format(what="loss"))
    for other, tolerance in ((beside[: len(parameters)], TOLERANCE), (after, REPEATED)):
        if not _norm([one - two for one, two in zip(alone, other, strict=True)]) <= tolerance * _norm(alone):
            raise PrivacyError(_COUPLED.format(what="gradient"))


def check_moved(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """See that a step changed every tensor: a model that never moves would spend epsilon on nothing.

    Args:
        model: after the step; all of its tensors took part.
        before: their values before the step, by name.

    Raises:
        PrivacyError: if one stands still.
    """
    stuck = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    if stuck:
        raise PrivacyError(
            f"{len(stuck)} of {len(before)} tensors did not change in the first private step, such as {stuck[0]}. "
            "Raise train.learning_rate; if that does not help, the optimiser holds other tensors than the model."
        )


@dataclass(frozen=True)
class _Item:
    embeddings: Tensor
    detail: Tensor
    labels: Tensor


class _Pair:
    """Two unlike images, made up, whose inputs a gradient can be taken for."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self.items = items

    @classmethod
    def like(cls, item: TrainItem) -> "_Pair":
        random = torch.Generator().manual_seed(0)
        items = []
        for scale in (1.0, 2.0):
            embeddings = scale * torch.randn(item.embeddings.shape, generator=random).to(item.embeddings.dtype)
            detail = torch.rand(item.detail.shape, generator=random).to(item.detail.dtype)
            labels = torch.randint(0, 2, item.labels.shape, generator=random)
            labels[: len(labels) // 8] = IGNORE_INDEX
            items.append(_Item(embeddings.requires_grad_(), detail.requires_grad_(), labels))
        return cls(items)

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int, view: str) -> _Item:
        return self.items[index]


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [gradient.detach() for gradient in found]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))
