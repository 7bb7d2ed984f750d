from typing import cast

import pytest
import torch
from torch import Tensor, nn

from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.experts import AdaptiveExpert, BasicExpert, DetailStem, SemanticExpert

DIM, SIDE, CLASSES = 16, 8, 3


class Recorder(nn.Module):
    """Stands in for the frozen decoder: remembers what it saw, answers with products of embedding and tokens."""

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        self.seen = image_embeddings, class_tokens
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, class_tokens)
        return logits.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def as_decoder(recorder: Recorder) -> FrozenDecoder:
    return cast("FrozenDecoder", recorder)


def basic(num_classes: int = CLASSES, grid_size: int = 16) -> BasicExpert:
    return BasicExpert(embed_dim=DIM, num_classes=num_classes, rank=4, grid_size=grid_size)


def semantic(temperature: float = 0.1) -> SemanticExpert:
    return SemanticExpert(embed_dim=DIM, num_classes=CLASSES, width=16, grid_size=16, temperature=temperature)


def adaptive(*, grid_size: int = 16, detail_size: int = 32, width: int = 16) -> AdaptiveExpert:
    return AdaptiveExpert(
        embed_dim=DIM,
        num_classes=CLASSES,
        width=width,
        embedding_size=SIDE,
        grid_size=grid_size,
        detail_size=detail_size,
    )


def embeddings(batch: int = 2) -> Tensor:
    return torch.randn(batch, DIM, SIDE, SIDE)


def without_gradient(module: nn.Module, value: Tensor) -> list[str]:
    """Names of the parameters that ``value`` does not reach."""
    (value * torch.randn_like(value)).sum().backward()  # type: ignore[no-untyped-call]
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


def test_basic_starts_with_exactly_the_pretrained_embedding() -> None:
    expert, recorder, x = basic(), Recorder(), embeddings()
    expert(x, as_decoder(recorder))
    assert torch.equal(recorder.seen[0], x)


def test_basic_starts_from_the_mask_tokens_repeated_in_order() -> None:
    expert, recorder, tokens = basic(num_classes=6), Recorder(), torch.randn(4, DIM)
    expert.start_from(tokens)
    expert(embeddings(), as_decoder(recorder))
    assert torch.equal(recorder.seen[1], tokens[[0, 1, 2, 3, 0, 1]].expand(2, 6, DIM))


@pytest.mark.parametrize("grid_size", [8, 16, 32, 64])
def test_basic_brings_logits_to_the_grid(grid_size: int) -> None:
    assert basic(grid_size=grid_size)(embeddings(), as_decoder(Recorder())).shape == (2, CLASSES, grid_size, grid_size)


def test_basic_residual_moves_the_embedding_once_it_is_not_zero() -> None:
    expert, recorder, x = basic(), Recorder(), embeddings()
    nn.init.normal_(expert.up.weight)
    logits = expert(x, as_decoder(recorder))
    assert not torch.allclose(recorder.seen[0], x)
    assert without_gradient(expert, logits) == []


def test_basic_residual_leaves_zero_with_the_first_gradient() -> None:
    expert = basic()
    missing = without_gradient(expert, expert(embeddings(), as_decoder(Recorder())))
    assert missing == ["down.weight", "down.bias"]


def test_semantic_votes_by_cosine_over_temperature() -> None:
    expert = semantic(temperature=0.25)
    logits, pixels, prototypes = expert(embeddings())
    torch.testing.assert_close(prototypes.norm(dim=2), torch.ones(2, CLASSES))
    cosine = nn.functional.cosine_similarity(pixels.unsqueeze(1), prototypes[..., None, None], dim=2)
    torch.testing.assert_close(logits, cosine / 0.25, rtol=1e-4, atol=1e-5)


def test_semantic_trains_everything() -> None:
    expert = semantic()
    assert without_gradient(expert, expert(embeddings())[0]) == []


@pytest.mark.parametrize("detail_size", [16, 32, 48, 64, 128])
def test_stem_gives_a_pyramid_from_the_logit_grid_down(detail_size: int) -> None:
    stem = DetailStem(detail_size=detail_size, grid_size=16, widths=(8, 16, 16))
    levels = stem(torch.rand(2, 3, detail_size, detail_size))
    assert [tuple(level.shape) for level in levels] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("grid_size", [8, 16, 32, 64])
def test_adaptive_fits_every_grid(grid_size: int, width: int) -> None:
    expert = adaptive(grid_size=grid_size, detail_size=64, width=width)
    assert expert(embeddings(1), torch.rand(1, 3, 64, 64)).shape == (1, CLASSES, grid_size, grid_size)


def test_adaptive_trains_everything() -> None:
    expert = adaptive()
    assert without_gradient(expert, expert(embeddings(), torch.rand(2, 3, 32, 32))) == []


def test_adaptive_sees_a_line_that_the_embedding_lost() -> None:
    expert, x, detail = adaptive(), embeddings(1), torch.zeros(1, 3, 32, 32)
    plain = expert(x, detail)
    detail[..., 10] = 1.0
    assert not torch.allclose(expert(x, detail), plain, atol=1e-3)


@pytest.mark.parametrize("width", [16, 32, 48, 80])
def test_gradients_under_bf16_are_those_of_fp32_at_every_width(width: int) -> None:
    """Torch gives NaN for dilated bfloat16 convolutions of some widths; every width that a config allows must train."""
    torch.manual_seed(0)
    expert = AdaptiveExpert(
        embed_dim=16, num_classes=2, width=width, embedding_size=8, grid_size=16, detail_size=32
    ).to(memory_format=torch.channels_last)
    embeddings = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    detail = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last)
    gradients = []
    for enabled in (False, True):
        expert.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = expert(embeddings, detail)
        logits.float().square().mean().backward()
        found = [parameter.grad for parameter in expert.parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in found if gradient is not None]))
    exact, rounded = gradients
    assert torch.isfinite(rounded).all()
    assert (rounded - exact).norm() < 0.1 * exact.norm()
