import pytest
import torch
from torch import nn

from icmoe.modeling.router import Router


def router(grid_size: int = 16) -> Router:
    return Router(embed_dim=16, width=8, num_experts=4, grid_size=grid_size)


@pytest.mark.parametrize("grid_size", [8, 16, 32])
def test_shapes(grid_size: int) -> None:
    logits, beta = router(grid_size)(torch.randn(2, 16, 8, 8))
    assert logits.shape == (2, 4, grid_size, grid_size)
    assert beta.shape == (2, 1, 1, 1)


def test_starts_without_favourites_and_with_beta_one() -> None:
    logits, beta = router()(torch.randn(2, 16, 8, 8))
    assert not logits.any()
    torch.testing.assert_close(beta, torch.ones(2, 1, 1, 1), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("raw", [-50.0, -1.0, 0.0, 50.0])
def test_beta_is_never_negative(raw: float) -> None:
    module = router()
    module.sharpness.fill(torch.tensor([[raw]]))
    assert (module(torch.randn(1, 16, 8, 8))[1] >= 0.0).all()


def test_everything_trains_once_the_gate_is_not_zero() -> None:
    module = router()
    nn.init.normal_(module.gate.weight)
    logits, beta = module(torch.randn(2, 16, 8, 8))
    (logits.square().sum() + beta.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
