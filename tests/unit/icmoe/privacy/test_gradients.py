"""Unit gradients against single images, and what one unit can do to the sum."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icmoe.config import LossConfig, TrainConfig
from icmoe.errors import RunError
from icmoe.losses import icmoe_loss
from icmoe.privacy.dp_sgd import unit_backward
from icmoe.privacy.gradients import ClippedSum, set_gradients
from icmoe.privacy.sampling import os_noise, seeded_noise
from icmoe.training import Draw

MakeCase = Callable[..., Any]
few = settings(max_examples=12, deadline=None, database=None, derandomize=True)
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@contextmanager
def true_doubles() -> Iterator[None]:
    """The model and its losses go to float32 for their logarithms; here a double stays one."""

    def keep_double(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", keep_double)
        yield


def image_gradient(case: Any, draw: Draw, *, with_basic: bool) -> dict[str, Tensor]:
    """The obvious way: one image, its own forward and backward pass."""
    item, loss = case.data.items[draw.index], LossConfig()
    uniform = torch.from_numpy(np.random.default_rng(draw.seed).random((16, 16), dtype=np.float32))
    output = case.model(item.embeddings[None], item.detail[None], case.decoder, with_basic=with_basic)
    value = icmoe_loss(
        output,
        item.labels[None],
        uniform[None],
        weights=loss.model_dump(include={"expert", "consistency", "balance", "contrast"}),
        consistency_temperature=loss.consistency_temperature,
        contrast_temperature=loss.contrast_temperature,
        contrast_anchors=loss.contrast_anchors,
    )
    named = dict(case.model.named_parameters())
    found = torch.autograd.grad(value[0], list(named.values()), allow_unused=True, materialize_grads=True)
    return {name: gradient.double() for name, gradient in zip(named, found, strict=True)}


def summed(gradients: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([gradient[name] for gradient in gradients]).sum(dim=0) for name in gradients[0]}


def split(flat: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    pieces = torch.split(flat, [parameter.numel() for parameter in named.values()])
    return {name: piece.reshape(named[name].shape) for name, piece in zip(named, pieces, strict=True)}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, reference in expected.items():
        if dtype == torch.float64:
            torch.testing.assert_close(found[name], reference, rtol=1e-4, atol=1e-8, msg=name)
        else:
            assert float((found[name] - reference).norm()) <= 1e-4 * float(reference.norm()) + 1e-7, name


@pytest.mark.slow
@precisions
@given(
    seed=st.integers(0, 1000),
    images_per_unit=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    size=st.integers(1, 4),
    with_basic=st.booleans(),
    max_grad_norm=st.sampled_from([1e-2, 1.0, 1e6]),
)
@few
def test_clipped_unit_gradients_are_those_of_single_images(
    make_case: MakeCase,
    dtype: torch.dtype,
    seed: int,
    images_per_unit: list[int],
    size: int,
    with_basic: bool,
    max_grad_norm: float,
) -> None:
    """Units of one image (unit image) and of several (unit patient), for any physical batch; 1e6 clips nothing."""
    with true_doubles():
        case = make_case(seed, sum(images_per_unit), dtype)
        config = TrainConfig(precision="fp32")
        clipped = ClippedSum(list(case.model.parameters()), max_grad_norm=max_grad_norm)
        expected, first = [], 0
        for count in images_per_unit:
            draws = [Draw(index, "identity", seed + index) for index in range(first, first + count)]
            first += count
            unit_backward(case.model, case.decoder, case.data, draws, config=config, with_basic=with_basic, size=size)
            clipped.add_unit()
            unit = summed([image_gradient(case, draw, with_basic=with_basic) for draw in draws])
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in unit.values()))
            expected.append(
                {name: gradient * (max_grad_norm / max(norm, max_grad_norm)) for name, gradient in unit.items()}
            )
        compare(split(clipped.total, case.model), summed(expected), dtype)


def sum_of(units: Sequence[Sequence[Tensor]], max_grad_norm: float) -> Tensor:
    """Clipped sum of ready-made gradients."""
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in units[0]]
    clipped = ClippedSum(parameters, max_grad_norm=max_grad_norm)
    for unit in units:
        for parameter, gradient in zip(parameters, unit, strict=True):
            parameter.grad = gradient.clone()
        clipped.add_unit()
    return clipped.total


numbers = st.floats(-(2.0**127), 2.0**127, width=32)
unit_gradients = st.tuples(st.lists(numbers, min_size=3, max_size=3), st.lists(numbers, min_size=2, max_size=2)).map(
    lambda lists: [torch.tensor(values, dtype=torch.float32) for values in lists]
)


@pytest.mark.slow
@given(
    units=st.lists(unit_gradients, min_size=1, max_size=5),
    other=unit_gradients,
    max_grad_norm=st.floats(1e-3, 1e3),
    where=st.integers(0, 4),
)
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_one_unit_moves_the_sum_by_at_most_its_bound(
    units: list[list[Tensor]], other: list[Tensor], max_grad_norm: float, where: int
) -> None:
    where %= len(units)
    rest = [unit for index, unit in enumerate(units) if index != where]
    everything = sum_of(units, max_grad_norm)
    without = sum_of(rest, max_grad_norm) if rest else torch.zeros_like(everything)
    replaced = sum_of([*units[:where], other, *units[where + 1 :]], max_grad_norm)
    rounding = 1.0 + 1e-12
    assert float((everything - without).norm()) <= max_grad_norm * rounding
    assert float((everything - replaced).norm()) <= 2 * max_grad_norm * rounding


@pytest.mark.slow
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1.0, 1e2, 1e4]), num_other=st.integers(1, 5))
@few
def test_replacing_a_patient_by_anything_moves_the_sum_by_at_most_two_clips(
    make_case: MakeCase, seed: int, scale: float, num_other: int
) -> None:
    """Through the model: other images, more of them, of any contrast; and the bound is reached, not just kept."""
    case, other = make_case(seed, 3), make_case(seed + 1, num_other)
    other.data.items = [type(item)(item.embeddings * scale, item.detail, item.labels) for item in other.data.items]
    config, clip = TrainConfig(precision="fp32", embedding_noise=0.1), 0.01
    sums = {}
    for name, patients in {
        "all": [(case.data, 2), (case.data, 3)],
        "removed": [(case.data, 2)],
        "replaced": [(case.data, 2), (other.data, num_other)],
    }.items():
        clipped = ClippedSum(list(case.model.parameters()), max_grad_norm=clip)
        for data, count in patients:
            draws = [Draw(index, "identity", index) for index in range(count)]
            unit_backward(case.model, case.decoder, data, draws, config=config, with_basic=True, size=2)
            clipped.add_unit()
        sums[name] = clipped.total
    assert float((sums["all"] - sums["removed"]).norm()) == pytest.approx(clip, rel=1e-9)
    assert float((sums["all"] - sums["replaced"]).norm()) <= 2 * clip * (1 + 1e-12)


def test_a_gradient_below_the_clip_is_left_as_it_is() -> None:
    assert sum_of([[torch.tensor([0.3, 0.4]), torch.zeros(3)]], 0.5).tolist() == pytest.approx([0.3, 0.4, 0, 0, 0])


def test_the_norm_is_taken_over_all_tensors_together() -> None:
    assert sum_of([[torch.tensor([3.0]), torch.tensor([4.0])]], 1.0).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_an_error_without_a_number(bad: float) -> None:
    with pytest.raises(RunError, match="not finite") as caught:
        sum_of([[torch.tensor([1.0, bad])]], 1.0)
    assert not any(character.isdigit() for character in str(caught.value).replace("fp32", ""))


def test_a_tensor_a_unit_did_not_touch_gets_its_noise() -> None:
    one, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    clipped = ClippedSum([one, other], max_grad_norm=1.0)
    one.grad = torch.ones(3)
    clipped.add_unit()
    assert one.grad is None
    noisy = clipped.noisy_mean(os_noise(), noise_multiplier=1.0, expected_units=1.0)
    assert (noisy != clipped.total).all()


def test_noise_has_the_size_that_was_asked_for() -> None:
    """Standard deviation noise_multiplier * max_grad_norm / expected_units, however many units were drawn."""
    parameters = [torch.nn.Parameter(torch.zeros(100, 500)), torch.nn.Parameter(torch.zeros(50_000))]
    clipped = ClippedSum(parameters, max_grad_norm=0.3)
    parameters[0].grad, parameters[1].grad = torch.ones(100, 500), -torch.ones(50_000)
    clipped.add_unit()
    noisy = clipped.noisy_mean(seeded_noise(1), noise_multiplier=2.5, expected_units=4.0)
    noise = noisy - clipped.total / 4.0
    expected = 2.5 * 0.3 / 4.0
    for piece in noise.reshape(2, 50_000):
        assert float(piece.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * 50_000))
        assert abs(float(piece.mean())) < 6 * expected / math.sqrt(50_000)
    set_gradients(parameters, noisy)
    assert torch.equal(parameters[0].grad, noisy[:50_000].reshape(100, 500).float())
    assert torch.equal(parameters[1].grad, noisy[50_000:].float())


def test_gradients_keep_their_place_in_channels_last_tensors() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    values = torch.arange(120.0, dtype=torch.float64).reshape(2, 3, 4, 5)
    weight.grad = values.float().to(memory_format=torch.channels_last)
    clipped = ClippedSum([weight], max_grad_norm=1e9)
    clipped.add_unit()
    set_gradients([weight], clipped.total)
    assert torch.equal(weight.grad.double(), values)
    assert weight.grad.stride() == weight.stride()
