import math
from typing import Any

import pytest
import torch
from torch import Tensor

from icmoe.losses import (
    Truth,
    choose_anchors,
    icmoe_loss,
    label_consistency_loss,
    load_balancing_loss,
    segmentation_loss,
    semantic_contrast_loss,
)
from icmoe.modeling.icmoe import IcMoeOutput
from icmoe.types import IGNORE_INDEX

B, E, K, G, D = 2, 3, 3, 8, 4
ALL_TERMS = {"expert": 0.2, "consistency": 0.1, "balance": 0.01, "contrast": 0.1}
NO_TERMS = dict.fromkeys(ALL_TERMS, 0.0)


def labels_of_discs() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(G), torch.arange(G), indexing="ij")
    radius = ((rows - 3) ** 2 + (columns - 3) ** 2).sqrt()
    labels = (radius < 3).long() + (radius < 1.5).long()
    return torch.stack([labels, labels.flip(1)])


def certain(labels: Tensor, num_classes: int = K, confidence: float = 20.0) -> Tensor:
    """Log-probabilities that say ``labels`` loudly; ignored pixels say background."""
    ids = labels.masked_fill(labels == IGNORE_INDEX, 0)
    one_hot = torch.nn.functional.one_hot(ids, num_classes).movedim(-1, 1).float()
    return (confidence * one_hot).log_softmax(dim=1)


def unit(shape: tuple[int, ...], dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=dim)


def random_output(grid: int = G) -> IcMoeOutput:
    experts = torch.randn(B, E, K, grid, grid).log_softmax(dim=2)
    gate = torch.randn(B, E, grid, grid).log_softmax(dim=1)
    probabilities = (experts.exp() * gate.exp().unsqueeze(2)).sum(dim=1)
    return IcMoeOutput(probabilities, experts, gate, gate.exp(), unit((B, D, grid, grid), 1), unit((B, K, D), 2))


def total(output: IcMoeOutput, labels: Tensor, **settings: Any) -> Tensor:
    defaults: dict[str, Any] = {
        "weights": ALL_TERMS,
        "consistency_temperature": 1.0,
        "contrast_temperature": 0.1,
        "contrast_anchors": 12,
    }
    grid = output.probabilities.shape[-1]
    draws = torch.rand(B, grid, grid, generator=torch.Generator().manual_seed(0))
    return icmoe_loss(output, labels, draws, **(defaults | settings))


def flipped(output: IcMoeOutput, where: Tensor) -> IcMoeOutput:
    """The same output with everything said at the pixels ``where`` (B, G, G) replaced by something else."""
    other = random_output()

    def mix(one: Tensor, new: Tensor) -> Tensor:
        return torch.where(where.reshape(B, *[1] * (one.ndim - 3), *where.shape[1:]), new, one)

    assert output.pixels is not None
    assert other.pixels is not None
    return IcMoeOutput(
        mix(output.probabilities, other.probabilities),
        mix(output.expert_log_probabilities, other.expert_log_probabilities),
        mix(output.gate_log_probabilities, other.gate_log_probabilities),
        mix(output.votes, other.votes),
        mix(output.pixels, other.pixels),
        output.prototypes,
    )


def with_ignored(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels whose last three columns count nowhere, as padding; and where these are."""
    where = torch.zeros_like(labels, dtype=torch.bool)
    where[..., -3:] = True
    return labels.masked_fill(where, IGNORE_INDEX), where


class TestSegmentation:
    def test_truth_costs_nothing_and_its_opposite_much(self) -> None:
        labels = labels_of_discs()
        assert (segmentation_loss(certain(labels), Truth.of(labels, K)) < 1e-3).all()
        assert (segmentation_loss(certain((labels + 1) % K), Truth.of(labels, K)) > 10.0).all()

    def test_ignored_pixels_change_nothing(self) -> None:
        labels, where = with_ignored(labels_of_discs())
        one = torch.randn(B, K, G, G)
        other = torch.where(where.unsqueeze(1), torch.randn(B, K, G, G), one)
        torch.testing.assert_close(
            segmentation_loss(one.log_softmax(1), Truth.of(labels, K)),
            segmentation_loss(other.log_softmax(1), Truth.of(labels, K)),
        )

    def test_ignored_pixels_get_no_gradient(self) -> None:
        labels, where = with_ignored(labels_of_discs())
        logits = torch.randn(B, K, G, G, requires_grad=True)
        segmentation_loss(logits.log_softmax(1), Truth.of(labels, K)).sum().backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert not logits.grad.movedim(1, -1)[where].any()
        assert logits.grad.movedim(1, -1)[~where].any()

    @pytest.mark.parametrize("value", [0, IGNORE_INDEX])
    def test_an_image_without_foreground_or_without_anything_is_finite(self, value: int) -> None:
        logits = torch.randn(B, K, G, G, requires_grad=True)
        loss = segmentation_loss(logits.log_softmax(1), Truth.of(torch.full((B, G, G), value), K))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite().all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_one_value_per_image(self) -> None:
        labels, logits = labels_of_discs(), torch.randn(B, K, G, G).log_softmax(1)
        both = segmentation_loss(logits, Truth.of(labels, K))
        torch.testing.assert_close(both[1:], segmentation_loss(logits[1:], Truth.of(labels[1:], K)))


class TestConsistency:
    def setup_method(self) -> None:
        self.labels = labels_of_discs()
        wrong = certain((self.labels + 1) % K)
        self.experts = torch.stack([wrong, certain(self.labels), wrong], dim=1)

    def loss(self, gate: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = self.labels if labels is None else labels
        return label_consistency_loss(gate, self.experts, labels, temperature=1.0)

    def test_pulls_towards_the_right_expert(self) -> None:
        gate = torch.zeros(B, E, G, G, requires_grad=True)
        self.loss(gate.log_softmax(1)).sum().backward()  # type: ignore[no-untyped-call]
        assert gate.grad is not None
        assert (gate.grad[:, 1] < 0.0).all()
        assert (gate.grad[:, [0, 2]] > 0.0).all()

    def test_is_lower_for_a_router_that_knows(self) -> None:
        knows = torch.zeros(B, E, G, G)
        knows[:, 1] = 5.0
        assert (self.loss(knows.log_softmax(1)) < self.loss(torch.zeros(B, E, G, G).log_softmax(1))).all()

    def test_does_not_train_the_experts(self) -> None:
        self.experts.requires_grad_()
        gate = torch.zeros(B, E, G, G, requires_grad=True)
        self.loss(gate.log_softmax(1)).sum().backward()  # type: ignore[no-untyped-call]
        assert self.experts.grad is None

    def test_ignored_pixels_change_nothing(self) -> None:
        labels, where = with_ignored(self.labels)
        one = torch.randn(B, E, G, G)
        other = torch.where(where.unsqueeze(1), torch.randn(B, E, G, G), one)
        torch.testing.assert_close(self.loss(one.log_softmax(1), labels), self.loss(other.log_softmax(1), labels))

    def test_an_image_that_counts_nowhere_costs_nothing(self) -> None:
        loss = self.loss(torch.randn(B, E, G, G).log_softmax(1), torch.full((B, G, G), IGNORE_INDEX))
        assert torch.equal(loss, torch.zeros(B))


class TestBalance:
    def test_equal_load_costs_nothing(self) -> None:
        torch.testing.assert_close(
            load_balancing_loss(torch.zeros(B, E, G, G).log_softmax(1), labels_of_discs()), torch.zeros(B)
        )

    def test_equal_load_by_specialists_costs_nothing(self) -> None:
        gate = torch.full((1, 2, G, G), -50.0)
        gate[:, 0, :, :4] = gate[:, 1, :, 4:] = 0.0
        torch.testing.assert_close(load_balancing_loss(gate.log_softmax(1), torch.zeros(1, G, G)), torch.zeros(1))

    def test_collapse_costs_one_less_than_the_experts(self) -> None:
        gate = torch.full((B, E, G, G), -100.0)
        gate[:, 1] = 0.0
        torch.testing.assert_close(
            load_balancing_loss(gate.log_softmax(1), labels_of_discs()), torch.full((B,), E - 1.0)
        )

    def test_one_expert_is_always_balanced(self) -> None:
        torch.testing.assert_close(load_balancing_loss(torch.zeros(B, 1, G, G), labels_of_discs()), torch.zeros(B))


class TestAnchors:
    def test_never_on_ignored_pixels_where_others_exist(self) -> None:
        labels, _ = with_ignored(labels_of_discs())
        anchors = choose_anchors(random_output().probabilities, labels, torch.rand(B, G, G), 30)
        assert anchors.shape == (B, 30)
        assert not (labels.flatten(1).gather(1, anchors) == IGNORE_INDEX).any()

    def test_the_first_third_lies_on_class_boundaries(self) -> None:
        labels = torch.zeros(1, G, G, dtype=torch.long)
        labels[..., 4:] = 1
        anchors = choose_anchors(torch.full((1, 2, G, G), 0.5), labels, torch.rand(1, G, G), 12)
        assert set((anchors[0, :4] % G).tolist()) <= {3, 4}

    def test_padding_is_not_a_class_boundary(self) -> None:
        labels = torch.zeros(1, G, G, dtype=torch.long)
        labels[..., 2:] = 1
        labels[..., 6:] = IGNORE_INDEX
        for seed in range(5):
            draws = torch.rand(1, G, G, generator=torch.Generator().manual_seed(seed))
            anchors = choose_anchors(torch.full((1, 2, G, G), 0.5), labels, draws, 24)
            assert set((anchors[0, :8] % G).tolist()) <= {1, 2}

    def test_the_second_third_lies_on_uncertain_pixels(self) -> None:
        probabilities = torch.tensor([0.999, 0.001]).reshape(1, 2, 1, 1).repeat(1, 1, G, G)
        probabilities[0, :, 2, :4] = 0.5
        anchors = choose_anchors(probabilities, torch.zeros(1, G, G, dtype=torch.long), torch.rand(1, G, G), 12)
        assert set(anchors[0, 4:8].tolist()) == {2 * G, 2 * G + 1, 2 * G + 2, 2 * G + 3}

    def test_the_draws_of_an_image_decide_for_it_alone(self) -> None:
        labels, probabilities, draws = labels_of_discs(), random_output().probabilities, torch.rand(B, G, G)
        both = choose_anchors(probabilities, labels, draws, 12)
        assert torch.equal(both[1:], choose_anchors(probabilities[1:], labels[1:], draws[1:], 12))
        assert not torch.equal(both, choose_anchors(probabilities, labels, torch.rand(B, G, G), 12))


class TestContrast:
    def loss(self, pixels: Tensor, labels: Tensor, anchors: Tensor | None = None) -> Tensor:
        prototypes = torch.eye(K, D).expand(len(pixels), K, D)
        if anchors is None:
            anchors = torch.arange(G * G).expand(len(pixels), -1)
        return semantic_contrast_loss(pixels, prototypes, labels, anchors, temperature=0.1)

    def test_is_low_where_pixels_sit_on_their_prototypes(self) -> None:
        labels = labels_of_discs()
        right = torch.eye(K, D)[labels].movedim(-1, 1)
        wrong = torch.eye(K, D)[(labels + 1) % K].movedim(-1, 1)
        scattered = unit((B, D, G, G), 1)
        assert (self.loss(right, labels) < self.loss(scattered, labels)).all()
        assert (self.loss(right, labels) < self.loss(wrong, labels)).all()

    def test_pulls_a_pixel_towards_its_prototype(self) -> None:
        labels = labels_of_discs()
        raw = torch.randn(B, D, G, G, requires_grad=True)
        before = self.loss(torch.nn.functional.normalize(raw, dim=1), labels)
        (gradient,) = torch.autograd.grad(before.sum(), raw)
        after = self.loss(torch.nn.functional.normalize(raw - gradient, dim=1), labels)
        assert (after < before).all()

    def test_ignored_pixels_change_nothing(self) -> None:
        labels, where = with_ignored(labels_of_discs())
        one = unit((B, D, G, G), 1)
        other = torch.where(where.unsqueeze(1), unit((B, D, G, G), 1), one)
        torch.testing.assert_close(self.loss(one, labels), self.loss(other, labels))

    @pytest.mark.parametrize("value", [0, IGNORE_INDEX])
    def test_one_class_or_none_is_finite(self, value: int) -> None:
        pixels = unit((B, D, G, G), 1).requires_grad_()
        loss = self.loss(pixels, torch.full((B, G, G), value))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite().all()
        assert pixels.grad is not None
        assert pixels.grad.isfinite().all()


class TestTotal:
    def test_is_one_value_per_image(self) -> None:
        assert total(random_output(), labels_of_discs()).shape == (B,)

    def test_is_the_weighted_sum_of_its_terms(self) -> None:
        torch.manual_seed(0)  # a term may be small by chance
        output, labels = random_output(), labels_of_discs()
        base = total(output, labels, weights=NO_TERMS)
        parts = [total(output, labels, weights=NO_TERMS | {name: 1.0}) - base for name in ALL_TERMS]
        expected = base + sum(w * part for w, part in zip(ALL_TERMS.values(), parts, strict=True))
        torch.testing.assert_close(total(output, labels), expected)
        assert all((part.abs() > 1e-4).all() for part in parts)

    @pytest.mark.parametrize("name", sorted(ALL_TERMS))
    def test_a_weight_of_zero_skips_the_term(self, name: str) -> None:
        """What only the skipped term reads is NaN; a term multiplied by 0 would show it."""
        output = random_output()
        nan = torch.full_like(output.gate_log_probabilities, math.nan)
        poisoned = {
            "expert": output._replace(expert_log_probabilities=output.expert_log_probabilities * math.nan),
            "consistency": output._replace(gate_log_probabilities=nan),
            "balance": output._replace(gate_log_probabilities=nan),
            "contrast": output._replace(pixels=torch.full((B, D, G, G), math.nan)),
        }[name]
        others = [other for other in ALL_TERMS if other != name]
        reads_the_same = {"expert": {"consistency"}, "consistency": {"balance"}, "balance": {"consistency"}}
        kept = [other for other in others if other not in reads_the_same.get(name, set())]
        weights = NO_TERMS | dict.fromkeys(kept, 0.1)
        assert total(poisoned, labels_of_discs(), weights=weights).isfinite().all()
        assert not total(poisoned, labels_of_discs(), weights=weights | {name: 0.1}).isfinite().all()

    def test_without_a_semantic_expert_there_is_no_contrast(self) -> None:
        output = random_output()._replace(pixels=None, prototypes=None)
        without = total(output, labels_of_discs(), weights=ALL_TERMS | {"contrast": 0.0})
        torch.testing.assert_close(total(output, labels_of_discs()), without)

    @pytest.mark.parametrize("name", ["fused", *sorted(ALL_TERMS)])
    def test_ignored_pixels_change_nothing(self, name: str) -> None:
        labels, where = with_ignored(labels_of_discs())
        output = random_output()
        weights = NO_TERMS | ({} if name == "fused" else {name: 1.0})
        one, other = (total(o, labels, weights=weights) for o in (output, flipped(output, where)))
        torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("value", [0, IGNORE_INDEX])
    @pytest.mark.parametrize("finer", [1, 2])
    def test_an_image_without_foreground_or_without_anything_is_finite(self, value: int, finer: int) -> None:
        output = random_output()
        leaves = [tensor.requires_grad_() for tensor in output if tensor is not None]
        loss = total(output, torch.full((B, finer * G, finer * G), value))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite().all()
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)

    @pytest.mark.parametrize("finer", [2, 4])
    def test_finer_labels_score_the_fused_probabilities_where_evaluation_looks(self, finer: int) -> None:
        output, coarse = random_output(), labels_of_discs()
        labels = coarse.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
        size = (finer * G, finer * G)
        fused = torch.nn.functional.interpolate(output.probabilities, size=size, mode="bilinear")
        expected = segmentation_loss((fused + 1e-6).log(), Truth.of(labels, K))
        torch.testing.assert_close(total(output, labels, weights=NO_TERMS), expected)
        extra = total(output, labels) - expected
        torch.testing.assert_close(extra, total(output, coarse) - total(output, coarse, weights=NO_TERMS))

    def test_certain_probabilities_of_zero_are_finite(self) -> None:
        labels = labels_of_discs()
        output = random_output()
        probabilities = torch.zeros(B, K, G, G)
        probabilities[:, 2] = 1.0
        probabilities.requires_grad_()
        loss = total(output._replace(probabilities=probabilities), labels)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite().all()
        assert probabilities.grad is not None
        assert probabilities.grad.isfinite().all()
