import pytest
import torch
from torch import Tensor

from icmoe.modeling.voting import pixel_probability_adaptive_voting as vote

B, E, K, G = 2, 4, 3, 5


def some_probabilities(num_experts: int = E) -> Tensor:
    return (2.0 * torch.randn(B, num_experts, K, G, G)).softmax(dim=2)


def some_gate(num_experts: int = E) -> Tensor:
    return torch.randn(B, num_experts, G, G).log_softmax(dim=1)


def beta(value: float) -> Tensor:
    return torch.full((B, 1, 1, 1), value)


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_weights_and_probabilities_are_distributions(sharpness: float, top_k: int | None) -> None:
    fused, weights = vote(some_probabilities(), some_gate(), beta(sharpness), top_k=top_k)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, G, G))
    torch.testing.assert_close(fused.sum(dim=1), torch.ones(B, G, G))
    assert (weights >= 0.0).all()
    assert (fused >= 0.0).all()
    assert (fused <= 1.0 + 1e-6).all()


def test_beta_zero_is_the_routers_softmax_average() -> None:
    p, gate = some_probabilities(), some_gate()
    fused, weights = vote(p, gate, beta(0.0))
    torch.testing.assert_close(weights, gate.exp())
    torch.testing.assert_close(fused, (p * gate.exp().unsqueeze(2)).sum(dim=1))


def test_identical_experts_change_nothing() -> None:
    one = some_probabilities(1)
    gate = some_gate()
    fused, weights = vote(one.expand(-1, E, -1, -1, -1), gate, beta(5.0))
    torch.testing.assert_close(fused, one[:, 0])
    torch.testing.assert_close(weights, gate.exp())


def test_one_expert_is_that_expert() -> None:
    p = some_probabilities(1)
    fused, weights = vote(p, torch.zeros(B, 1, G, G), beta(3.0), top_k=1)
    torch.testing.assert_close(fused, p[:, 0])
    assert torch.equal(weights, torch.ones(B, 1, G, G))


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_order_of_experts_does_not_matter(top_k: int | None) -> None:
    p, gate, order = some_probabilities(), some_gate(), [2, 0, 3, 1]
    fused, weights = vote(p, gate, beta(2.0), top_k=top_k)
    again, moved = vote(p[:, order], gate[:, order], beta(2.0), top_k=top_k)
    torch.testing.assert_close(again, fused)
    torch.testing.assert_close(moved, weights[:, order])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_masks_all_but_the_largest(top_k: int) -> None:
    p, gate = some_probabilities(), some_gate()
    full, kept = vote(p, gate, beta(1.0)).weights, vote(p, gate, beta(1.0), top_k=top_k).weights
    assert torch.equal((kept > 0.0).sum(dim=1), torch.full((B, G, G), top_k))
    largest = torch.zeros_like(full).scatter(1, full.topk(top_k, dim=1).indices, 1.0) * full
    torch.testing.assert_close(kept, largest / largest.sum(dim=1, keepdim=True))


def test_an_outlier_loses_votes_as_beta_grows() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]).reshape(1, 4, 2, 1, 1)
    gate = torch.full((1, 4, 1, 1), 0.25).log()
    outlier = [float(vote(p, gate, torch.full((1, 1, 1, 1), b)).weights[0, 3]) for b in (0.0, 1.0, 5.0, 20.0)]
    assert outlier[0] == pytest.approx(0.25)
    assert outlier == sorted(outlier, reverse=True)
    assert outlier[-1] < 0.01


def test_a_gate_of_minus_infinity_leaves_an_expert_out() -> None:
    p, gate = some_probabilities(), some_gate()
    gate[:, 1] = -torch.inf
    fused, weights = vote(p, gate, beta(2.0))
    assert not weights[:, 1].any()
    rest = [0, 2, 3]
    torch.testing.assert_close(fused, vote(p[:, rest], gate[:, rest], beta(2.0)).probabilities)


@pytest.mark.parametrize("size", [200.0, 2e4])
def test_gradient_is_finite_where_probabilities_underflow(size: float) -> None:
    logits = (size * torch.randn(B, E, K, G, G)).requires_grad_()
    gate_logits = (size * torch.randn(B, E, G, G)).requires_grad_()
    sharpness = beta(1.0).requires_grad_()
    fused = vote(logits.log_softmax(dim=2).exp(), gate_logits.log_softmax(dim=1), sharpness).probabilities
    (fused + 1e-6).log()[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    for tensor in (logits, gate_logits, sharpness):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
