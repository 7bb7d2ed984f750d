"""Slow twins of the losses: one image, one pixel, one anchor at a time, in plain Python."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from icmoe.losses import (
    Truth,
    choose_anchors,
    label_consistency_loss,
    load_balancing_loss,
    segmentation_loss,
    semantic_contrast_loss,
)

B, E, K, G, D = 2, 3, 3, 8, 4
IGNORED = 255
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def random_labels(seed: int) -> torch.Tensor:
    """Blocks of classes, some of them ignored."""
    ids = torch.tensor([0, 1, 2, IGNORED])[
        torch.randint(0, 4, (B, G // 2, G // 2), generator=torch.Generator().manual_seed(seed))
    ]
    return ids.repeat_interleave(2, 1).repeat_interleave(2, 2)


def doubles(tensor: torch.Tensor) -> Doubles:
    return tensor.double().numpy()


def slow_segmentation(log_p: Doubles, labels: Ids) -> float:
    counted = [pixel for pixel in np.ndindex(G, G) if labels[pixel] != IGNORED]
    cross_entropy = -sum(float(log_p[(int(labels[pixel]), *pixel)]) for pixel in counted) / len(counted)
    dice = []
    for k in range(1, K):
        both = sum(math.exp(log_p[(k, *pixel)]) * (labels[pixel] == k) for pixel in counted)
        sizes = sum(math.exp(log_p[(k, *pixel)]) + (labels[pixel] == k) for pixel in counted)
        dice.append(1 - (2 * both + 1) / (sizes + 1))
    return float(cross_entropy + sum(dice) / len(dice))


def slow_consistency(log_gate: Doubles, log_p: Doubles, labels: Ids, temperature: float) -> float:
    values = []
    for pixel in np.ndindex(G, G):
        if labels[pixel] == IGNORED:
            continue
        right = [math.exp(log_p[(e, int(labels[pixel]), *pixel)] / temperature) for e in range(E)]
        values.append(-sum(right[e] / sum(right) * float(log_gate[(e, *pixel)]) for e in range(E)))
    return sum(values) / len(values)


def slow_balance(log_gate: Doubles, labels: Ids) -> float:
    counted = [pixel for pixel in np.ndindex(G, G) if labels[pixel] != IGNORED]
    load = [sum(math.exp(log_gate[(e, *pixel)]) for pixel in counted) / len(counted) for e in range(E)]
    return E * sum(each**2 for each in load) - 1


def slow_contrast(pixels: Doubles, prototypes: Doubles, labels: Ids, anchors: Ids, temperature: float) -> float:
    z, y = pixels.reshape(D, G * G), labels.reshape(G * G)
    means = {}
    for k in set(y.tolist()) - {IGNORED}:
        total = sum((z[:, i] for i in range(G * G) if y[i] == k), np.zeros(D))
        means[k] = total / np.linalg.norm(total)
    values = []
    for a in anchors:
        if y[a] == IGNORED:
            continue
        positives = [z[:, a] @ prototypes[y[a]], z[:, a] @ means[int(y[a])]]
        negatives = [z[:, a] @ prototypes[k] for k in range(K) if k != y[a]]
        negatives += [z[:, a] @ z[:, n] for n in anchors if y[n] not in (y[a], IGNORED)]
        everything = sum(math.exp(value / temperature) for value in [*positives, *negatives])
        values.append(-sum(math.log(math.exp(value / temperature) / everything) for value in positives) / 2)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
class TestSlowTwins:
    def random(self, seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 10))

    def test_segmentation(self, seed: int) -> None:
        log_p, labels = self.random(seed, B, K, G, G).log_softmax(1), random_labels(seed)
        slow = [slow_segmentation(doubles(p), y.numpy()) for p, y in zip(log_p, labels, strict=True)]
        np.testing.assert_allclose(segmentation_loss(log_p, Truth.of(labels, K)), slow, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [0.5, 1.0])
    def test_consistency(self, seed: int, temperature: float) -> None:
        labels = random_labels(seed)
        log_gate = self.random(seed, B, E, G, G).log_softmax(1)
        log_p = self.random(seed, B, E, K, G, G).log_softmax(2)
        slow = [
            slow_consistency(doubles(g), doubles(p), y.numpy(), temperature)
            for g, p, y in zip(log_gate, log_p, labels, strict=True)
        ]
        fast = label_consistency_loss(log_gate, log_p, labels, temperature=temperature)
        np.testing.assert_allclose(fast, slow, rtol=1e-5)

    def test_balance(self, seed: int) -> None:
        log_gate = (3 * self.random(seed, B, E, G, G)).log_softmax(1)
        labels = random_labels(seed)
        slow = [slow_balance(doubles(gate), y.numpy()) for gate, y in zip(log_gate, labels, strict=True)]
        np.testing.assert_allclose(load_balancing_loss(log_gate, labels), slow, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    def test_contrast(self, seed: int, temperature: float) -> None:
        labels = random_labels(seed)
        pixels = torch.nn.functional.normalize(self.random(seed, B, D, G, G), dim=1)
        prototypes = torch.nn.functional.normalize(self.random(seed, B, K, D), dim=2)
        anchors = torch.randint(0, G * G, (B, 12), generator=torch.Generator().manual_seed(seed))
        slow = [
            slow_contrast(doubles(z), doubles(c), y.numpy(), a.numpy(), temperature)
            for z, c, y, a in zip(pixels, prototypes, labels, anchors, strict=True)
        ]
        fast = semantic_contrast_loss(pixels, prototypes, labels, anchors, temperature=temperature)
        np.testing.assert_allclose(fast, slow, rtol=1e-4)

    def test_uncertain_and_random_anchors(self, seed: int) -> None:
        """The last two thirds; what is a boundary is tested beside the function."""
        probabilities = (2 * self.random(seed, B, K, G, G)).softmax(1)
        labels = random_labels(seed)
        draws = torch.rand(B, G, G, generator=torch.Generator().manual_seed(seed))
        anchors = choose_anchors(probabilities, labels, draws, 15)
        for p, y, draw, chosen in zip(probabilities, labels, draws, anchors, strict=True):
            counted = [i for i in range(G * G) if y.flatten()[i] != IGNORED]
            flat, luck = p.reshape(K, -1).double(), draw.flatten()
            entropy = [-float((flat[:, i] * flat[:, i].log()).sum()) + 0.1 * float(luck[i]) for i in range(G * G)]
            uncertain = sorted(counted, key=lambda i: -entropy[i])[:5]
            anywhere = sorted(counted, key=lambda i: float(luck[i]))[:5]
            assert set(chosen[5:10].tolist()) == set(uncertain)
            assert set(chosen[10:].tolist()) == set(anywhere)
