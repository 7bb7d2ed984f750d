import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from icmoe.config import ExpertsConfig, ModelConfig, TrainConfig
from icmoe.errors import IcmoeError, RunError
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.training import (
    TrainResult,
    dump_arrays,
    evaluate,
    load_arrays,
    predict,
    round_learning_rate,
    train_local,
)

SIDE, DETAIL, LABELS = 8, 32, 32


class TinyDecoder(nn.Module):
    """A frozen decoder with FrozenDecoder's face: products of embedding and tokens, four times finer."""

    embedding_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.mask_tokens = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, class_tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


@dataclass(frozen=True)
class Item:
    embeddings: Tensor
    detail: Tensor
    labels: Tensor


class Discs:
    """Bright discs at random places; the embedding shows them coarsely along a fixed direction."""

    def __init__(self, num_images: int = 6) -> None:
        random = torch.Generator().manual_seed(1)
        direction = torch.randn(256, 1, 1, generator=random)
        rows, columns = torch.meshgrid(torch.arange(LABELS), torch.arange(LABELS), indexing="ij")
        self.items = []
        for row, column in torch.randint(8, 24, (num_images, 2), generator=random).tolist():
            disc = ((rows - row) ** 2 + (columns - column) ** 2 < 49).float()
            coarse = nn.functional.avg_pool2d(disc[None, None], LABELS // SIDE)[0]
            embeddings = coarse * direction + 0.1 * torch.randn(256, SIDE, SIDE, generator=random)
            self.items.append(Item(embeddings, (0.2 + 0.6 * disc).expand(3, -1, -1), disc.long()))
        self.views: list[str] = []

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int, view: str) -> Item:
        self.views.append(view)
        return self.items[index]

    def original_labels(self, index: int) -> npt.NDArray[np.uint8]:
        return self.items[index].labels.numpy().astype(np.uint8)

    def restore(self, index: int, probabilities: Tensor) -> Tensor:
        return nn.functional.interpolate(probabilities[None], size=(LABELS, LABELS), mode="bilinear")[0]

    def spacing(self, index: int) -> tuple[float, float] | None:
        return None


def settings(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"precision": "fp32", "batch_size": 3, "local_epochs": 1}
    return TrainConfig(**(defaults | changes))


def tiny(experts: ExpertsConfig | None = None) -> tuple[IcMoe, FrozenDecoder]:
    decoder = cast("FrozenDecoder", TinyDecoder())
    backbone = Backbone(
        name="tiny", image_encoder=nn.Identity(), decoder=decoder, image_size=DETAIL, pixel_norm="minmax"
    )
    config = ModelConfig(width=16, experts=experts or ExpertsConfig(adaptive=1))
    return build_icmoe(config, num_classes=2, backbone=backbone, seed=0), decoder


def train(
    config: TrainConfig | None = None,
    *,
    data: Discs | None = None,
    experts: ExpertsConfig | None = None,
    **arguments: Any,
) -> tuple[TrainResult, dict[str, np.ndarray]]:
    model, decoder = tiny(experts)
    defaults: dict[str, Any] = {"views": ("identity",), "learning_rate": 2e-3, "seed": (0, 1, 2)}
    result = train_local(model, decoder, data or Discs(), config=config or settings(), **(defaults | arguments))
    return result, dump_arrays(model)


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(one[name] - other[name]).sum()) for name in one))


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"embedding_noise": 0.1, "basic_every": 2}])
def test_the_same_seed_gives_the_same_bits(changes: dict[str, Any]) -> None:
    config, views = settings(**changes), ("identity", "hflip")
    (first, arrays), (second, again) = train(config, views=views), train(config, views=views)
    assert first == second
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)


def test_another_seed_gives_other_weights() -> None:
    assert distance(train()[1], train(seed=(0, 1, 3))[1]) > 0.0


def test_training_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    train(settings(embedding_noise=0.1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loss_falls_on_discs() -> None:
    first, _ = train(settings())
    later, _ = train(settings(local_epochs=8), learning_rate=5e-3)
    assert later.loss < 0.7 * first.loss


def test_all_tensors_move() -> None:
    before = dump_arrays(tiny()[0])
    _, after = train(settings(local_epochs=2))
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


@pytest.mark.parametrize(("num_images", "batch_size", "steps"), [(6, 3, 4), (5, 3, 4), (2, 4, 2)])
def test_steps_and_progress(num_images: int, batch_size: int, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    result, _ = train(
        settings(local_epochs=2, batch_size=batch_size),
        data=Discs(num_images),
        progress=lambda done, all_steps: seen.append((done, all_steps)),
    )
    assert result.num_steps == steps
    assert seen == [(step, steps) for step in range(1, steps + 1)]


def test_each_epoch_draws_one_view_of_every_image() -> None:
    data = Discs()
    train(settings(local_epochs=4), data=data, views=("identity", "hflip"))
    assert len(data.views) == 24
    assert set(data.views) == {"identity", "hflip"}


def test_the_proximal_term_pulls_towards_the_received_weights() -> None:
    received = dump_arrays(tiny()[0])
    far, near = (distance(train(settings(local_epochs=4), proximal_mu=mu)[1], received) for mu in (0.0, 10.0))
    assert near < 0.8 * far


@pytest.mark.parametrize("changes", [{}, {"basic_every": 2}, {"embedding_noise": 0.2}])
@pytest.mark.parametrize("physical", [1, 2])
def test_a_smaller_physical_batch_only_accumulates(physical: int, changes: dict[str, Any]) -> None:
    config = settings(batch_size=4, **changes)
    full, arrays = train(config)
    split, accumulated = train(config, max_physical_batch_size=physical)
    assert split.loss == pytest.approx(full.loss, rel=1e-4)
    assert split.expert_shares == pytest.approx(full.expert_shares, abs=1e-4)
    for name, array in arrays.items():
        np.testing.assert_allclose(accumulated[name], array, atol=1e-4, err_msg=name)


def test_an_input_that_is_not_finite_is_an_error() -> None:
    data = Discs()
    data.items[0].embeddings[0, 0, 0] = math.nan
    with pytest.raises(RunError, match=r"diverged at step \d+.*learning_rate"):
        train(data=data)


@pytest.mark.parametrize("changes", [{}, {"basic_every": 2}, {"basic_every": 5, "local_epochs": 2}])
@pytest.mark.parametrize("experts", [ExpertsConfig(adaptive=1), ExpertsConfig(basic=0), ExpertsConfig(basic=2)])
def test_expert_shares_sum_to_one(experts: ExpertsConfig, changes: dict[str, Any]) -> None:
    """Also where the basic experts take no part in any step of the last epoch."""
    result, _ = train(settings(**changes), experts=experts)
    assert len(result.expert_shares) == experts.total
    assert sum(result.expert_shares.values()) == pytest.approx(1.0)


def test_expert_shares_do_not_count_ignored_pixels() -> None:
    """Votes of images that count nowhere are left out: what is left is the share on the one image that counts."""
    data = Discs(2)
    model, decoder = tiny()
    data.items[0].labels.fill_(255)
    torch.nn.init.normal_(model.router.gate.weight)
    config = settings(batch_size=2)
    votes = predict(model, decoder, [data.items[1]], precision="fp32")[1].mean(dim=(0, 2, 3))
    result = train_local(model, decoder, data, config=config, views=("identity",), learning_rate=1e-8, seed=(0,))
    assert list(result.expert_shares.values()) == pytest.approx(votes.tolist(), abs=1e-4)


@pytest.mark.parametrize("num_rounds", [1, 2, 10])
def test_the_learning_rate_falls_from_first_to_last_round(num_rounds: int) -> None:
    config = settings(learning_rate=1e-2, final_learning_rate=1e-3)
    rates = [round_learning_rate(config, server_round=r, num_rounds=num_rounds) for r in range(1, num_rounds + 1)]
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)
    if num_rounds > 1:
        assert rates[-1] == pytest.approx(1e-3)


def test_arrays_go_out_and_in() -> None:
    model, _ = tiny()
    arrays = train()[1]
    load_arrays(model, arrays)
    again = dump_arrays(model)
    assert list(again) == model.adapter_params()
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in again.values())
    arrays["router.gate.bias"][:] = 7.0
    assert not np.array_equal(dump_arrays(model)["router.gate.bias"], arrays["router.gate.bias"])


def test_arrays_left_out_keep_their_value_and_half_precision_is_taken() -> None:
    model, _ = tiny()
    before = dump_arrays(model)
    load_arrays(model, {"router.gate.bias": np.full(3, 0.5, dtype=np.float16)})
    after = dump_arrays(model)
    assert np.array_equal(after.pop("router.gate.bias"), np.full(3, 0.5))
    assert all(np.array_equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize(
    "arrays", [{"router.other": np.zeros(3)}, {"router.gate.bias": np.zeros(4)}, {"router.gate.bias": np.zeros(1)}]
)
def test_arrays_that_do_not_fit_are_an_error_of_ours(arrays: dict[str, np.ndarray]) -> None:
    """They come from the centre: a name or shape of another model must not end in a traceback or be broadcast."""
    with pytest.raises(IcmoeError, match="router"):
        load_arrays(tiny()[0], arrays)


@pytest.fixture
def knowing() -> tuple[IcMoe, FrozenDecoder]:
    """A model that has learned the discs."""
    model, decoder = tiny()
    config = settings(local_epochs=10)
    train_local(model, decoder, Discs(), config=config, views=("identity",), learning_rate=5e-3, seed=(0,))
    return model, decoder


def test_evaluation_scores_every_image_in_order(knowing: tuple[IcMoe, FrozenDecoder]) -> None:
    data = Discs(5)
    one: Callable[..., Any] = evaluate
    scores = [
        one(*knowing, data, num_classes=2, precision="fp32", batch_size=size, with_hd95=True) for size in (1, 2, 8)
    ]
    assert [len(each) for each in scores] == [5, 5, 5]
    dice = [[score.mean_dice for score in each] for each in scores]
    assert dice[0] == pytest.approx(dice[1], abs=1e-3)
    assert dice[0] == pytest.approx(dice[2], abs=1e-3)
    assert min(dice[0]) > 0.6
    assert set(data.views) == {"identity"}
    assert all(score.hd95 is not None for score in scores[0])


def test_evaluation_changes_no_weight(knowing: tuple[IcMoe, FrozenDecoder]) -> None:
    before = dump_arrays(knowing[0])
    evaluate(*knowing, Discs(2), num_classes=2, precision="fp32")
    after = dump_arrays(knowing[0])
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_prediction_uses_all_experts() -> None:
    model, decoder = tiny()
    probabilities, votes = predict(model, decoder, Discs(2).items, precision="bf16")
    assert probabilities.shape == (2, 2, 16, 16)
    assert votes.shape == (2, 3, 16, 16)
    assert probabilities.dtype == votes.dtype == torch.float32
