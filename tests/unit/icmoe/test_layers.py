import pytest
import torch

from icmoe.modeling.layers import ConvNormAct, LearnedVectors, resize


@pytest.mark.parametrize(("stride", "dilation", "side"), [(1, 1, 8), (2, 1, 4), (1, 4, 8), (4, 1, 2)])
def test_conv_keeps_the_grid_up_to_its_stride(stride: int, dilation: int, side: int) -> None:
    block = ConvNormAct(3, 16, stride=stride, dilation=dilation)
    assert block(torch.randn(2, 3, 8, 8)).shape == (2, 16, side, side)


def test_conv_of_an_image_does_not_depend_on_its_batch() -> None:
    block, x = ConvNormAct(3, 16), torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]))


def test_learned_vectors_give_every_image_the_same_rows() -> None:
    vectors = LearnedVectors(3, 2)
    values = torch.arange(6.0).reshape(3, 2)
    vectors.fill(values)
    assert torch.equal(vectors(4), values.expand(4, 3, 2))
    assert [name for name, _ in vectors.named_parameters()] == ["table.weight"]


def test_learned_vectors_gather_the_gradient_of_all_images() -> None:
    vectors = LearnedVectors(2, 2)
    vectors(3).sum().backward()
    assert vectors.table.weight.grad is not None
    assert torch.equal(vectors.table.weight.grad, torch.full((2, 2), 3.0))


def test_resize_leaves_a_fitting_grid_alone() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert resize(x, 4) is x


def test_resize_down_is_the_mean_of_blocks() -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(resize(x, 4), x.reshape(2, 3, 4, 2, 4, 2).mean(dim=(3, 5)))


@pytest.mark.parametrize("size", [3, 5, 8, 16])
def test_resize_keeps_a_constant(size: int) -> None:
    torch.testing.assert_close(resize(torch.full((1, 1, 4, 4), 0.7), size), torch.full((1, 1, size, size), 0.7))
