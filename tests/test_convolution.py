"""Same-padded convolutions: padding, causality, and the matrix products that stand for them."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinyvgpt.convolution import FEW, SameConv3d, SameConvTranspose3d, overlap_add

STRIDES = [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)]


def padded(x, kernel, stride):
    """The original's rule: kernel - stride in all, the larger half in front."""
    sides = []
    for s in reversed(stride):
        total = kernel - s
        sides += [total // 2 + total % 2, total // 2]
    return F.pad(x, sides)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_same_padding(stride):
    x = torch.randn(2, 3, 4, 6, 8)
    conv = SameConv3d(3, 5, 4, stride)
    expected = F.conv3d(padded(x, 4, stride), conv.weight, conv.bias, stride)
    assert_close(conv(x), expected)
    transposed = SameConvTranspose3d(3, 5, 4, stride)
    weight, bias = transposed.weight, transposed.bias
    expected = F.conv_transpose3d(padded(x, 4, stride), weight, bias, stride, padding=3)
    assert_close(transposed(x), expected)
    assert expected.shape[2:] == tuple(a * s for a, s in zip((4, 6, 8), stride, strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
def test_same_padding_of_odd_kernels(kernel):
    x = torch.randn(2, 3, 4, 6, 8)
    conv = SameConv3d(3, 5, kernel)
    assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=kernel // 2))


@pytest.mark.parametrize("causal_time", [False, True])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kernel", [3, 4])
def test_convolution_as_product(kernel, stride, causal_time):
    """Values and gradients are those of PyTorch's convolution, in odd sizes and any layout."""
    if kernel == 3:
        stride = (1, 1, 1)
    conv = SameConv3d(3, 5, kernel, stride, causal_time=causal_time)
    x = torch.randn(2, 4, 6, 8, 3).movedim(-1, 1).requires_grad_()
    compare(conv, x)


@pytest.mark.parametrize("bias", [False, True])
def test_convolution_as_product_without_bias(bias):
    compare(SameConv3d(1, 4, 4, (2, 2, 2), bias=bias), torch.randn(1, 1, 4, 4, 4).requires_grad_())


@pytest.mark.parametrize("causal_time", [False, True])
@pytest.mark.parametrize("stride", STRIDES)
def test_transposed_convolution_as_product(stride, causal_time):
    conv = SameConvTranspose3d(5, 3, 4, stride, causal_time=causal_time)
    compare(conv, torch.randn(2, 5, 4, 6, 3).requires_grad_())


def compare(conv, x):
    inputs = [x, *conv.parameters()]
    expected, found = conv(x), conv.as_product(x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    g = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(expected, inputs, g), torch.autograd.grad(found, inputs, g), strict=True
    ):
        assert_close(b, a, atol=1e-4, rtol=1e-4)


def test_products_stand_for_few_channels_on_gpus_only(monkeypatch):
    """On a CPU PyTorch's own convolutions are faster."""
    for conv, channels in (
        (SameConv3d(FEW, 5, 4, (2, 2, 2)), FEW),
        (SameConvTranspose3d(5, FEW, 4, (2, 2, 2)), 5),
    ):
        monkeypatch.setattr(conv, "as_product", lambda x: pytest.fail("used on a CPU"))
        conv(torch.randn(1, channels, 4, 4, 4))


def test_overlap_add_by_hand():
    patches = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [100, 200, 300, 400]])
    assert overlap_add(patches, 0, 2).tolist() == [1, 2, 13, 24, 130, 240, 300, 400]
    assert overlap_add(patches, 0, 4).tolist() == patches.flatten().tolist()
    assert overlap_add(patches, 0, 1).tolist() == [1, 12, 123, 234, 340, 400]


def test_overlap_add_along_an_inner_axis():
    patches = torch.randn(2, 3, 5, 4)  # along axis 1, with an axis between it and the patches
    found = overlap_add(patches, 1, 2)
    assert found.shape == (2, 8, 5)
    for i in range(2):
        for j in range(5):
            assert_close(found[i, :, j], overlap_add(patches[i, :, j], 0, 2))
