"""The whole private training, seen through the gradients its optimiser gets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icmoe import training
from icmoe.config import ExpertsConfig, TrainConfig
from icmoe.errors import PrivacyError, RunError
from icmoe.losses import icmoe_loss
from icmoe.privacy.accounting import Spend
from icmoe.privacy.config import PrivacyConfig
from icmoe.privacy.dp_sgd import train_private
from icmoe.privacy.sampling import NoiseSource, os_noise, seeded_noise
from icmoe.training import TrainResult, dump_arrays

MakeCase = Callable[..., Any]
NOBODY = 1e-12
"""A sample rate at which nobody is ever drawn."""
NO_NOISE = 1e-9


def train(case: Any, *, changes: dict[str, Any] | None = None, clip: float = 1.0, **arguments: Any) -> TrainResult:
    chosen: dict[str, Any] = {"precision": "fp32", "batch_size": 2, "local_epochs": 1} | (changes or {})
    config = TrainConfig(**chosen)
    defaults: dict[str, Any] = {
        "spend": Spend(noise_multiplier=1.0, sample_rate=0.5, num_steps=3),
        "unit_of": range(len(case.data)),
        "views": ("identity",),
        "learning_rate": 1e-3,
        "noise": seeded_noise(0),
    }
    privacy = PrivacyConfig(noise_multiplier=1.0, max_grad_norm=clip)
    return train_private(case.model, case.decoder, case.data, config=config, privacy=privacy, **(defaults | arguments))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor | None]]:
    """What the optimiser got in each step, tensor by tensor."""
    seen: list[list[Tensor | None]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        parameters = self.param_groups[0]["params"]
        seen.append([None if each.grad is None else each.grad.clone() for each in parameters])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


def flat(step: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in step if tensor is not None])


def test_the_bits_are_those_of_the_noise_source_alone(make_case: MakeCase) -> None:
    """The run's seed, which the server knows, changes nothing; the noise source changes everything."""
    arrays = {}
    for name, seed, noise in [("one", 1, 5), ("same", 2, 5), ("other", 1, 6)]:
        case = make_case(0)
        train(case, changes={"seed": seed, "embedding_noise": 0.1}, noise=seeded_noise(noise))
        arrays[name] = dump_arrays(case.model)
    assert all(np.array_equal(arrays["one"][key], arrays["same"][key]) for key in arrays["one"])
    assert not any(np.array_equal(arrays["one"][key], arrays["other"][key]) for key in arrays["one"])


def test_two_sites_with_one_run_config_draw_different_noise(
    make_case: MakeCase, gradients: list[list[Tensor | None]]
) -> None:
    """Same config, same weights, nobody drawn: all that differs comes from the operating system."""
    for _ in range(2):
        torch.manual_seed(0)
        spend = Spend(noise_multiplier=1.0, sample_rate=NOBODY, num_steps=1)
        train(make_case(0), spend=spend, noise=os_noise(), changes={"seed": 7})
    one, other = flat(gradients[0]), flat(gradients[1])
    assert (one == other).double().mean() < 1e-3
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 6 / math.sqrt(len(one))


def test_an_empty_draw_is_a_step_of_pure_noise_on_every_tensor(
    make_case: MakeCase, gradients: list[list[Tensor | None]]
) -> None:
    case, seen = make_case(0), list[tuple[int, int]]()
    before = dump_arrays(case.model)
    spend = Spend(noise_multiplier=3.0, sample_rate=NOBODY, num_steps=2)
    result = train(case, spend=spend, clip=0.5, progress=lambda *steps: seen.append(steps))
    std = 3.0 * 0.5 / (NOBODY * len(case.data))
    for step in gradients:
        noise = flat(step)
        assert float(noise.std()) == pytest.approx(std, rel=6 / math.sqrt(2 * len(noise)))
        assert abs(float(noise.mean())) < 6 * std / math.sqrt(len(noise))
        assert all(tensor is not None and bool(tensor.ne(0).all()) for tensor in step)
    after = dump_arrays(case.model)
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    assert math.isnan(result.loss)
    assert (result.num_steps, result.expert_shares) == (2, {})
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("unit_of", [(0, 1, 2, 3), (0, 1, 0, 0), (1, 0, 1, 0)], ids=["image", "uneven", "patient"])
@pytest.mark.parametrize("size", [None, 1])
def test_a_step_is_the_mean_of_clipped_unit_gradients(
    make_case: MakeCase, gradients: list[list[Tensor | None]], unit_of: tuple[int, ...], size: int | None
) -> None:
    """Against single images, drawn and clipped by hand; at a sample rate of 1 the draw is no secret."""
    case, clip = make_case(0), 0.05
    noise = seeded_noise(11)
    num_units = max(unit_of) + 1
    noise.poisson(num_units, 1.0)
    expected = 0.0
    for unit in range(num_units):
        images = [image for image, its in enumerate(unit_of) if its == unit]
        gradient: Any = 0.0
        for image, seed in zip(images, noise.seeds(len(images)), strict=True):
            draw = training.Draw(image, "identity", seed)
            config = TrainConfig(precision="fp32")
            loss, _ = training.part_losses(case.model, case.decoder, case.data, [draw], config=config, with_basic=True)
            gradient += flat(torch.autograd.grad(loss[0], list(case.model.parameters()), materialize_grads=True))
        expected = expected + gradient * (clip / max(clip, float(gradient.norm()))) / num_units
    spend = Spend(noise_multiplier=NO_NOISE, sample_rate=1.0, num_steps=1)
    train(case, spend=spend, unit_of=unit_of, clip=clip, noise=seeded_noise(11), max_physical_batch_size=size)
    assert float((flat(gradients[0]) - expected).norm()) <= 1e-4 * float(torch.as_tensor(expected).norm())


def test_drawn_units_bring_all_their_images_in_one_view_each(make_case: MakeCase) -> None:
    case = make_case(0, 6)
    unit_of = (0, 0, 0, 1, 1, 2)
    train(case, spend=Spend(1.0, 0.5, 20), unit_of=unit_of, views=("identity", "hflip"))
    read = [image for image, _ in case.data.read[1:]]  # the first is looked at for its size
    assert {view for _, view in case.data.read[1:]} == {"identity", "hflip"}
    counts = [read.count(image) for image in range(6)]
    assert counts[0] == counts[1] == counts[2] > 0
    assert counts[3] == counts[4] > 0
    assert 0 < counts[5] < 20


def test_basic_experts_rest_on_schedule_and_get_no_noise_then(
    make_case: MakeCase, gradients: list[list[Tensor | None]]
) -> None:
    case = make_case(0)
    train(case, spend=Spend(1.0, 0.5, 3), changes={"basic_every": 2})
    for step, with_basic in zip(gradients, (True, False, True), strict=True):
        for name, tensor in zip(case.model.adapter_params(), step, strict=True):
            assert (tensor is not None) == (with_basic or not name.startswith("experts.basic"))


@pytest.mark.parametrize(
    ("experts", "changes"),
    [(ExpertsConfig(semantic=0, adaptive=0), {"basic_every": 2}), (ExpertsConfig(basic=0), {"precision": "bf16"})],
)
def test_other_models(make_case: MakeCase, experts: ExpertsConfig, changes: dict[str, Any]) -> None:
    case = make_case(0, 3, experts=experts)
    before = dump_arrays(case.model)
    assert math.isfinite(train(case, spend=Spend(1.0, 1.0, 2), changes=changes).loss)
    after = dump_arrays(case.model)
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_the_proximal_term_comes_after_the_noise(make_case: MakeCase, gradients: list[list[Tensor | None]]) -> None:
    """In the second step it is mu times the way the first one went, to the last number."""
    case = make_case(0)
    received = flat([parameter.detach().clone() for parameter in case.model.parameters()])
    moved: list[Tensor] = []

    def watch(done: int, _: int) -> None:
        if done == 1:
            moved.append(flat([parameter.detach() for parameter in case.model.parameters()]) - received)

    for mu, model_case in ((0.0, case), (0.5, make_case(0))):
        train(model_case, spend=Spend(1.0, 0.5, 2), proximal_mu=mu, progress=watch if mu == 0.0 else None)
    plain, proximal = gradients[:2], gradients[2:]
    assert torch.equal(flat(plain[0]), flat(proximal[0]))
    torch.testing.assert_close(flat(proximal[1]) - flat(plain[1]), 0.5 * moved[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_little_noise_still_learns(make_case: MakeCase) -> None:
    case = make_case(0)
    run: dict[str, Any] = {"spend": Spend(0.01, 1.0, 15), "learning_rate": 5e-3, "changes": {"local_epochs": 15}}
    first, last = train(case, **run).loss, train(case, **run).loss
    assert last < first


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_that_is_not_finite_is_an_error_that_tells_nothing_more(make_case: MakeCase, value: float) -> None:
    messages = set()
    for image in (1, 2):
        case = make_case(0)
        case.data.items[image].embeddings[0, 0, 0] = value
        with pytest.raises(RunError, match="not finite") as caught:
            train(case, spend=Spend(1.0, 1.0, 1))
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("unit_of", [(0, 1, 2), (0, 0, 2, 2), (1, 1, 2, 2), (0, 1, 1, -1)])
def test_images_without_a_unit_are_refused(make_case: MakeCase, unit_of: tuple[int, ...]) -> None:
    with pytest.raises(PrivacyError, match="unit"):
        train(make_case(0), unit_of=unit_of)


def test_a_model_that_does_not_move_is_refused(make_case: MakeCase) -> None:
    with pytest.raises(PrivacyError, match="did not change in the first private step"):
        train(make_case(0), learning_rate=0.0)


def test_an_optimiser_of_other_tensors_is_refused(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cost users of another library 45 GPU hours: the loss falls, epsilon grows, nothing moves."""
    adamw = torch.optim.AdamW

    def stale(parameters: Any, **settings: Any) -> torch.optim.AdamW:
        return adamw([nn.Parameter(parameter.detach().clone()) for parameter in parameters], **settings)

    monkeypatch.setattr(torch.optim, "AdamW", stale)
    with pytest.raises(PrivacyError, match="did not change"):
        train(make_case(0))


class _Count:
    """A noise source that counts how many numbers of noise were drawn."""

    def __init__(self) -> None:
        self.words = 0
        self._bits = seeded_noise(0).bits

    def bits(self, count: int) -> Any:
        self.words += count
        return self._bits(count)


def test_noise_is_drawn_once_per_number_and_step(make_case: MakeCase) -> None:
    case, count = make_case(0), _Count()
    train(case, spend=Spend(1.0, NOBODY, 3), noise=NoiseSource(count.bits, secret=False))
    num_numbers = sum(parameter.numel() for parameter in case.model.parameters())
    assert 3 * num_numbers <= count.words - 3 * len(case.data) <= 3 * (num_numbers + 1)


def _batch_mean(losses: Tensor) -> Tensor:
    return losses.mean().expand(len(losses)) if len(losses) > 1 else losses


def _relative(losses: Tensor) -> Tensor:
    return losses / losses.detach().mean()


@pytest.mark.parametrize("couple", [_batch_mean, _relative], ids=["mean", "detached"])
def test_a_loss_that_couples_images_is_refused(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, couple: Callable[[Tensor], Tensor]
) -> None:
    monkeypatch.setattr(training, "icmoe_loss", lambda *args, **kwargs: couple(icmoe_loss(*args, **kwargs)))
    with pytest.raises(PrivacyError, match="depends on another image"):
        train(make_case(0))


def test_a_loss_without_a_value_per_image_is_refused(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "icmoe_loss", lambda *args, **kwargs: icmoe_loss(*args, **kwargs).mean(0, True))
    with pytest.raises(PrivacyError, match="one value for each"):
        train(make_case(0))


def test_batch_norm_is_refused(make_case: MakeCase) -> None:
    case = make_case(0)
    case.model.router.reduce.norm = nn.BatchNorm2d(8)
    with pytest.raises(PrivacyError, match="BatchNorm"):
        train(case)


def test_a_model_that_remembers_the_image_before_is_refused(make_case: MakeCase) -> None:
    class Memory(nn.Module):
        kept: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            out = x + self.kept
            self.kept = 0.1 * x.detach().mean(dim=(0, 2, 3), keepdim=True)
            return out

    case = make_case(0)
    case.model.router.reduce.conv = nn.Sequential(case.model.router.reduce.conv, Memory())
    with pytest.raises(PrivacyError, match="gradient depends on another image"):
        train(case)


def test_weights_that_are_not_finite_are_no_coupling(make_case: MakeCase) -> None:
    case = make_case(0)
    with torch.no_grad():
        case.model.router.gate.weight.fill_(math.inf)
    with pytest.raises(RunError, match="not finite"):
        train(case)
