"""What a clip is conditioned on: norms that know the class, the frame encoder, actions in time."""

import re

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.testing import assert_close

from tinyvgpt.conditioning import (
    ActionEmbedding,
    ChannelNorm,
    FrameEncoder,
    LayerNorm,
    Standardise,
    memory_width,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normalised(x):
    """(x - μ)·(1e-5 + 1/√var) in float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred * (1e-5 + 1 / x.var(-1, unbiased=False, keepdim=True).sqrt())


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.0, 100.0])
def test_layer_norm(scale):
    """Also where the variance is small, where an epsilon under the root gives other numbers."""
    norm = LayerNorm(48)
    torch.nn.init.normal_(norm.gain)
    torch.nn.init.normal_(norm.bias)
    x = scale * torch.randn(2, 5, 48)
    expected = normalised(x) * norm.gain.double() + norm.bias.double()
    assert_close(norm(x), expected.float(), rtol=1e-5, atol=2e-5)
    if scale < 0.1:
        assert (F.layer_norm(x, (48,), norm.gain, norm.bias) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-8, 0.0])
def test_gradient_of_standardise(scale):
    """It is autograd's of the plain formula, also where the variance is clamped."""
    torch.manual_seed(0)
    x = (5 + torch.randn(4, 6, 12, dtype=torch.float64)) * scale
    x, g = x.float().requires_grad_(), torch.randn(4, 6, 12)
    y = x - x.mean(-1, keepdim=True)
    expected = y * (1e-5 + y.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt())
    found = Standardise.apply(x)
    assert torch.equal(found, expected)
    (a,), (b,) = torch.autograd.grad(expected, x, g), torch.autograd.grad(found, x, g)
    assert (a - b).norm() < 1e-5 * a.norm()


def test_gradient_of_standardise_has_its_input_s_dtype():
    x = torch.randn(2, 12, dtype=torch.bfloat16, requires_grad=True)
    y = Standardise.apply(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == torch.float32
    assert g.dtype == torch.bfloat16


def test_layer_norm_starts_neutral():
    norm = LayerNorm(48)
    assert torch.equal(norm.gain, torch.ones(48))
    assert torch.equal(norm.bias, torch.zeros(48))


def test_layer_norm_of_constants():
    """Gives the bias, and finite gradients, where 1/√var is infinite."""
    norm = LayerNorm(6)
    torch.nn.init.normal_(norm.bias)
    x = torch.full((1, 2, 6), 3.0, requires_grad=True)
    y = norm(x)
    assert_close(y, norm.bias.expand_as(y))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.isfinite().all()


def test_class_conditional_norm():
    """The original's form: one-hot labels through linear maps without bias."""
    norm = LayerNorm(12, classes=5)
    assert torch.equal(norm.gain.weight, torch.full((5, 12), 5**-0.5))
    assert norm.bias.weight.abs().max() <= 5**-0.5
    assert abs(norm.bias.weight.std() / (5**-0.5 / 3**0.5) - 1) < 0.25  # uniform
    torch.nn.init.normal_(norm.gain.weight)
    x, labels = torch.randn(3, 4, 12), torch.tensor([4, 0, 4])
    onehot = F.one_hot(labels, 5).float()[:, None]
    expected = (1 + onehot @ norm.gain.weight) * normalised(x).float() + onehot @ norm.bias.weight
    assert_close(norm(x, labels), expected)


@pytest.mark.parametrize("classes", [0, 3])
def test_layer_norm_computes_in_float32(classes):
    norm, labels = LayerNorm(48, classes), torch.tensor([2, 1]) if classes else None
    x = (1 + 1e-2 * torch.randn(2, 5, 48)).bfloat16()
    y = norm(x, labels)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x.float(), labels).bfloat16())


def test_channel_norm():
    norm = ChannelNorm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 3, 4, 5)
    mean = x.mean(1, keepdim=True)
    var = x.var(1, unbiased=False, keepdim=True)
    gain = norm.weight[:, None, None, None]
    assert_close(norm(x), (x - mean) / (var + 1e-5).sqrt() * gain)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_frame_encoder_of_the_original():
    encoder = FrameEncoder(3, 2, 16, depth=34, width=64)
    widths = [block.conv2.out_channels for block in encoder.blocks]
    assert widths == [64] * 3 + [128] * 4 + [256] * 6 + [240] * 3
    strides = [block.conv1.stride for block in encoder.blocks]
    assert [i for i, stride in enumerate(strides) if stride != (1, 1, 1)] == [3, 7]
    assert strides[3] == strides[7] == (1, 2, 2)
    shortcuts = [i for i, block in enumerate(encoder.blocks) if list(block.shortcut.parameters())]
    assert shortcuts == [0, 3, 7, 13]
    assert [tuple(table.shape) for table in encoder.positions.tables] == [(2, 80), (4, 80), (4, 80)]
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(convolutions) == 1 + 2 * 16 + 4
    assert all(conv.bias is None for conv in convolutions)


@pytest.mark.parametrize("depth", [10, 18, 34])
@pytest.mark.parametrize(("channels", "frames", "size", "width"), [(1, 1, 8, 4), (3, 3, 12, 8)])
def test_frame_encoder(depth, channels, frames, size, width):
    encoder = FrameEncoder(channels, frames, size, depth=depth, width=width)
    x = torch.rand(2, channels, frames, size, size) - 0.5
    memory = encoder(x)
    assert memory.shape == (2, frames * (size // 4) ** 2, memory_width(width))
    features = encoder.blocks(encoder.stem(x))
    expected = features + encoder.positions().movedim(-1, 0)
    assert_close(memory, rearrange(expected, "b d n h w -> b (n h w) d"))
    assert features.min() >= 0, "a block ends in a ReLU"


def test_frame_block_by_hand():
    block = FrameEncoder(1, 2, 8, depth=10, width=4).blocks[1]
    x = torch.randn(1, 4, 2, 8, 8)
    y = F.relu(block.norm1(F.conv3d(x, block.conv1.weight, stride=(1, 2, 2), padding=1)))
    y = F.relu(block.norm2(F.conv3d(y, block.conv2.weight, padding=1)))
    conv, norm = block.shortcut
    assert_close(block(x), F.relu(y + norm(F.conv3d(x, conv.weight, stride=(1, 2, 2)))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 50}, "cond_depth is 50, must be one of [10, 18, 34]"),
        ({"width": 6}, "cond_width is 6, must be a multiple of 4"),
        ({"width": 0}, "cond_width is 0, must be a multiple of 4"),
        ({"resolution": 10}, "resolution is 10, the frame encoder needs a multiple of 4"),
    ],
)
def test_frame_encoders_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FrameEncoder(**{"channels": 1, "frames": 1, "resolution": 8, "depth": 10, **fields})


@pytest.mark.parametrize("shape", [(2, 1, 2, 8, 8), (2, 3, 1, 8, 8), (2, 3, 2, 8, 4), (3, 2, 8, 8)])
def test_frames_of_another_shape(shape):
    encoder = FrameEncoder(3, 2, 8, depth=10, width=4)
    with pytest.raises(ValueError, match=r"frames have shape .* \(C, n, H, W\) = \(3, 2, 8, 8\)"):
        encoder(torch.zeros(shape))


def test_frames_that_are_not_floats():
    with pytest.raises(ValueError, match=r"frames are torch.uint8, the model needs floats"):
        FrameEncoder(3, 2, 8, depth=10, width=4)(torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8))


def test_actions_go_to_the_latent_frame_they_lead_to():
    """Of 8 frames, two a latent frame: the first is led to by nothing and action 0."""
    embedding = ActionEmbedding(1, 8, 4, 2)
    with torch.no_grad():
        embedding.project.weight.copy_(torch.eye(2))
    actions = torch.arange(10.0, 18.0)[None, :, None]
    expected = torch.tensor([[0, 10], [11, 12], [13, 14], [15, 16]]).float()
    assert torch.equal(embedding(actions)[0], expected)


def test_actions_are_divided_by_their_standard_deviations():
    embedding, scaled = ActionEmbedding(2, 8, 4, 6), ActionEmbedding(2, 8, 4, 6, (0.5, 4.0))
    torch.nn.init.normal_(embedding.project.weight)
    scaled.project.weight.data.copy_(embedding.project.weight)
    actions = torch.randn(3, 8, 2)
    assert_close(scaled(actions * torch.tensor([0.5, 4.0])), embedding(actions))


def test_actions_start_without_effect():
    embedding = ActionEmbedding(3, 8, 4, 6)
    y = embedding(torch.randn(2, 8, 3))
    assert torch.equal(y, torch.zeros(2, 4, 6))
    y.sum().backward()
    assert embedding.project.weight.grad.abs().min() > 0, "but they can be learnt"


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 8, 4), (8, 3)])
def test_actions_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"actions have shape .* \(T, A\) = \(8, 3\)"):
        ActionEmbedding(3, 8, 4, 6)(torch.zeros(shape))
