"""IC-MoE: experts on a frozen embedding, fused per pixel.

Source: "Intelligent Communication Mixture-of-Experts Boosted-Medical Image Segmentation Foundation Model",
arXiv 2510.17684. Its abstract names the parts; docs/methods/icmoe.md lists what we chose.

Letters: B batch, C = 256, h embedding grid, G logit grid, D detail image side, K classes, E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.experts import AdaptiveExpert, BasicExpert, SemanticExpert
from icmoe.modeling.router import Router
from icmoe.modeling.voting import pixel_probability_adaptive_voting
from icmoe.types import Family


class IcMoeOutput(NamedTuple):
    """Everything the losses look at.

    ``probabilities`` (B, K, G, G) fused; ``expert_log_probabilities`` (B, E, K, G, G) of the experts that took part, in
    order; ``gate_log_probabilities`` (B, E, G, G) of the router; ``votes`` (B, E, G, G); ``pixels`` (B, d, G, G) and
    ``prototypes`` (B, K, d) of the first semantic expert, ``None`` without one.
    """

    probabilities: Tensor
    expert_log_probabilities: Tensor
    gate_log_probabilities: Tensor
    votes: Tensor
    pixels: Tensor | None
    prototypes: Tensor | None


class IcMoe(nn.Module):
    """Mixture of basic, semantic and adaptive experts under one router.

    Everything trainable is named ``experts.<family>.<n>.*`` or ``router.*``. Nothing frozen is registered here: the
    backbone's decoder is handed to ``forward``.

    Args:
        basic: built basic experts.
        semantic: built semantic experts.
        adaptive: built adaptive experts.
        router: built router for their sum.
        adaptive_voting: PPAV, or the router's plain softmax average.
        top_k: experts that vote per pixel; ``None`` is all.
    """

    def __init__(
        self,
        *,
        basic: Sequence[BasicExpert],
        semantic: Sequence[SemanticExpert],
        adaptive: Sequence[AdaptiveExpert],
        router: Router,
        adaptive_voting: bool = True,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        families = {"basic": basic, "semantic": semantic, "adaptive": adaptive}
        self.experts = nn.ModuleDict({name: nn.ModuleList(experts) for name, experts in families.items()})
        self.router = router
        self.adaptive_voting = adaptive_voting
        self.top_k = top_k
        self.expert_names = tuple(f"{name}.{index}" for name, group in families.items() for index in range(len(group)))

    def family(self, name: Family) -> nn.ModuleList:
        """Experts of a family."""
        return cast(nn.ModuleList, self.experts[name])

    def adapter_params(self) -> list[str]:
        """Names of all tensors that are trained, stored and, where their scope is global, sent."""
        return [name for name, _ in self.named_parameters()]

    def forward(
        self, image_embeddings: Tensor, detail: Tensor, decoder: FrozenDecoder, *, with_basic: bool = True
    ) -> IcMoeOutput:
        """Segment.

        Args:
            image_embeddings: (B, C, h, h) float32.
            detail: (B, 3, D, D) in [0, 1].
            decoder: the backbone's frozen decoder.
            with_basic: ``False`` leaves the costly basic experts out of this vote. Ignored if there are no others.

        Returns:
            Probabilities, votes and what the losses need.
        """
        basic, others = self.family("basic"), [*self.family("semantic"), *self.family("adaptive")]
        with_basic = with_basic or not others
        logits = [expert(image_embeddings, decoder) for expert in basic] if with_basic else []
        semantic = [expert(image_embeddings) for expert in self.family("semantic")]
        logits += [result[0] for result in semantic]
        logits += [expert(image_embeddings, detail) for expert in self.family("adaptive")]
        log_probabilities = torch.stack(logits, dim=1).float().log_softmax(dim=2)
        gate_logits, beta = self.router(image_embeddings)
        gate = gate_logits[:, 0 if with_basic else len(basic) :].float().log_softmax(dim=1)
        vote = pixel_probability_adaptive_voting(
            log_probabilities.exp(), gate, beta if self.adaptive_voting else torch.zeros_like(beta), top_k=self.top_k
        )
        pixels, prototypes = semantic[0][1:] if semantic else (None, None)
        return IcMoeOutput(vote.probabilities, log_probabilities, gate, vote.weights, pixels, prototypes)
