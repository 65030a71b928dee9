"""The tokenizer: shapes, padding, what causal time promises, what it refuses, one batch learnt."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinyvgpt import VQVAE, VQVAEConfig

DOWNSAMPLES = [(1, 1, 1), (2, 2, 2), (1, 2, 4), (4, 4, 4), (8, 2, 1), (2, 8, 4)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**fields):
    defaults = {"frames": 8, "resolution": 8, "hidden": 8, "res_blocks": 1, "codes": 32}
    return VQVAEConfig(**{**defaults, "code_dim": 6, "downsample": (2, 2, 2), **fields})


def trained_a_little(config):
    """A model whose norms and codes have seen a batch, in evaluation mode."""
    vqvae = VQVAE(config)
    size = (config.frames, config.resolution, config.resolution)
    for _ in range(3):
        vqvae(torch.rand(2, config.channels, *size) - 0.5)
    return vqvae.eval()


@pytest.mark.parametrize("causal_time", [False, True])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_shapes(downsample, causal_time):
    channels = 1 + sum(downsample) % 4
    config = small(downsample=downsample, causal_time=causal_time, channels=channels)
    vqvae = VQVAE(config)
    x = torch.rand(2, channels, 8, 8, 8) - 0.5
    out = vqvae(x)
    t, h, w = (8 // f for f in downsample)
    assert config.latent_shape == (t, h, w)
    assert out.tokens.shape == vqvae.encode(x).shape == (2, t, h, w)
    assert out.reconstruction.shape == vqvae.decode(out.tokens).shape == x.shape
    strides = torch.tensor(config.strides or [(1, 1, 1)])
    assert tuple(strides.prod(0).tolist()) == downsample
    assert (strides.diff(dim=0) <= 0).all(), "axes with halvings left halve first"


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_causal_time_makes_prefixes(downsample):
    """A clip's beginning is encoded as within the whole, its tokens' beginning decoded so."""
    vqvae = trained_a_little(small(downsample=downsample, causal_time=True))
    x = torch.rand(2, 3, 8, 8, 8) - 0.5
    f = downsample[0]
    with torch.no_grad():
        z = vqvae.features(x)
        tokens = torch.randint(32, z[:, 0].shape)
        decoded = vqvae.decode(tokens)
        for k in range(1, 8 // f + 1):
            assert_close(vqvae.features(x[:, :, : k * f]), z[:, :, :k], rtol=0, atol=1e-5)
            assert_close(vqvae.decode(tokens[:, :k]), decoded[:, :, : k * f], rtol=0, atol=1e-5)


@pytest.mark.parametrize("axial", [False, True])
def test_without_causal_time_the_beginning_sees_the_end(axial):
    vqvae = trained_a_little(small(axial=axial))
    x = torch.rand(2, 3, 8, 8, 8) - 0.5
    with torch.no_grad():
        z, decoded = vqvae.features(x), vqvae.decode(vqvae.encode(x))
        assert (vqvae.features(x[:, :, :4]) - z[:, :, :2]).abs().max() > 1e-3
        beginning = vqvae.decode(vqvae.encode(x)[:, :2])
        assert (beginning - decoded[:, :, :4]).abs().max() > 1e-3


def test_causal_time_by_gradients():
    """Latent frame k moves with the frames up to its own last one, and with no later ones."""
    vqvae = trained_a_little(small(downsample=(2, 4, 4), res_blocks=2, causal_time=True))
    x = (torch.rand(1, 3, 8, 8, 8) - 0.5).requires_grad_()
    z = vqvae.features(x)
    for k in range(4):
        (grad,) = torch.autograd.grad(z[:, :, k].square().sum(), x, retain_graph=True)
        moves = grad.abs().sum((0, 1, 3, 4)) > 0
        assert moves.tolist() == [i < 2 * (k + 1) for i in range(8)]


@pytest.mark.parametrize("causal_time", [False, True])
@pytest.mark.parametrize("downsample", [(2, 4, 4), (1, 8, 2), (4, 2, 1), (1, 1, 1)])
def test_a_local_encoder_sees_the_pixels_in_a_token_s_place(downsample, causal_time):
    """Each latent moves with its own box of pixels and no other; the decoder looks around."""
    vqvae = trained_a_little(
        small(downsample=downsample, local_encoder=True, causal_time=causal_time, res_blocks=2)
    )
    x = (torch.rand(1, 3, 8, 8, 8) - 0.5).requires_grad_()
    z = vqvae.features(x)
    for place in ((0, 0, 0), tuple(size - 1 for size in z.shape[2:])):
        (grad,) = torch.autograd.grad(
            z[(0, slice(None), *place)].square().sum(), x, retain_graph=True
        )
        moves = grad[0].abs().sum(0) > 0
        box = torch.zeros_like(moves)
        box[tuple(slice(i * f, (i + 1) * f) for i, f in zip(place, downsample, strict=True))] = True
        assert torch.equal(moves, box)
    assert not any("axial" in name for name, _ in vqvae.encoder.named_parameters())
    tokens = torch.zeros(1, *z.shape[2:], dtype=torch.int64)
    near, other = vqvae.decode(tokens), tokens.clone()
    other[:, 0, 0, 0] = 1
    moved = (vqvae.decode(other) - near).abs().sum((0, 1)) > 0
    assert moved.sum() > 2 * math.prod(downsample)


def test_a_local_encoder_has_one_token_for_what_is_blank():
    vqvae = trained_a_little(small(downsample=(4, 4, 4), local_encoder=True))
    assert vqvae.encode(torch.full((1, 3, 8, 8, 8), -0.5)).unique().numel() == 1


def test_loss():
    vqvae = VQVAE(small(data_variance=0.25, commitment=0.5)).eval()
    x = torch.rand(2, 3, 8, 8, 8) - 0.5
    out = vqvae(x)
    assert_close(out.recon_loss, (out.reconstruction - x).square().mean() / 0.25)
    z, e = vqvae.features(x), vqvae.codebook.lookup(out.tokens).movedim(-1, 1)
    assert_close(out.commitment_loss, 0.5 * (z - e).square().mean())
    assert_close(out.loss, out.recon_loss + out.commitment_loss)
    assert_close(out.reconstruction, vqvae.decode(out.tokens))


def test_checkpointing_changes_nothing_but_memory():
    """Same gradients, and batch norms that count the recomputed batch once."""
    plain = VQVAE(small(res_blocks=2))
    sparing = VQVAE(small(res_blocks=2, checkpointing=True))
    sparing.load_state_dict(plain.state_dict())
    x, saved = torch.rand(2, 3, 8, 8, 8) - 0.5, []
    for vqvae in (plain, sparing):
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = vqvae(x).loss
        loss.backward(retain_graph=True)
        loss.backward()
        saved.append(sum(sizes))
    for (name, a), b in zip(plain.named_parameters(), sparing.parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), sparing.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize("axial", [False, True])
def test_a_residual_block_adds_to_its_input(axial):
    block = VQVAE(small(axial=axial)).encoder.res_stack.blocks[0]
    last = block.axial.out if axial else block.conv[-1]
    for p in last.parameters():
        torch.nn.init.zeros_(p)
    x = torch.randn(2, 8, 4, 4, 4)
    assert torch.equal(block(x), x)


def test_without_axial_attention():
    names = [name for name, _ in VQVAE(small(axial=False)).named_parameters()]
    assert not any("axial" in name for name in names)
    VQVAEConfig(hidden=10, axial=False, axial_heads=3)  # heads that nothing uses need not divide


def test_autocast():
    vqvae = trained_a_little(small())
    x = torch.rand(2, 3, 8, 8, 8) - 0.5
    exact = vqvae(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vqvae.decode(exact.tokens)
        out = vqvae.train()(x)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert_close(out.recon_loss, F.mse_loss(out.reconstruction.float(), x) / 0.06)
    assert all(p.grad.isfinite().all() for p in vqvae.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in vqvae.parameters()) > 30
    error = (rounded.float() - exact.reconstruction).square().mean()
    assert error < 1e-3 * exact.reconstruction.var()


def test_what_is_quantised_is_made_in_float32():
    """Whatever the precision of the rest; a model that is all bfloat16 stays that."""
    torch.manual_seed(0)
    vqvae = trained_a_little(small())
    x = torch.rand(2, 3, 8, 8, 8) - 0.5
    with torch.autocast("cpu", torch.bfloat16):
        encoded, z = vqvae.encoder(x), vqvae.features(x)
        assert vqvae.to_code(encoded).dtype == torch.bfloat16
    assert torch.equal(z, vqvae.to_code(encoded.float()))
    assert vqvae.bfloat16().features(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"downsample": (3, 2, 2)}, "three powers of two"),
        ({"downsample": (2, 2, 0)}, "three powers of two"),
        ({"downsample": (2, 2, -2)}, "three powers of two"),
        ({"downsample": (2, 2)}, "three powers of two"),
        ({"frames": 10, "downsample": (4, 2, 2)}, "(10, 8, 8) are not divisible"),
        ({"resolution": 20, "downsample": (4, 8, 8)}, "(8, 20, 20) are not divisible"),
        ({"hidden": 9}, "hidden is 9, must be even"),
        ({"hidden": 10, "axial_heads": 4}, "width 10 is not divisible by 4 heads"),
        ({"channels": 0}, "channels is 0"),
        ({"codes": 0}, "codes is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"res_blocks": -1}, "res_blocks is -1"),
        ({"data_variance": 0.0}, "data_variance is 0.0, must be above 0"),
        ({"data_variance": math.nan}, "data_variance is nan"),
        ({"commitment": -1.0}, "commitment is -1.0"),
    ],
)
def test_settings_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**fields)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8, 8), "the model needs (B, 3, T, H, W)"),
        ((2, 8, 8, 8, 3), "the model needs (B, 3, T, H, W)"),
        ((3, 8, 8, 8), "the model needs (B, 3, T, H, W)"),
        ((2, 3, 7, 8, 8), "clip has 7 frames, the model needs a multiple of 2"),
        ((2, 3, 0, 8, 8), "clip has 0 frames, the model needs a multiple of 2"),
        ((2, 3, 8, 6, 8), "clip has 6 rows, the model needs a multiple of 4"),
        ((2, 3, 8, 8, 9), "clip has 9 columns, the model needs a multiple of 8"),
    ],
)
def test_clips_that_do_not_fit(shape, message):
    vqvae = VQVAE(small(downsample=(2, 4, 8))).eval()
    for use in (vqvae, vqvae.encode):
        with pytest.raises(ValueError, match=re.escape(message)):
            use(torch.zeros(shape))


def test_clips_that_are_not_floats():
    with pytest.raises(ValueError, match=r"clip is torch.uint8, the model needs floats"):
        VQVAE(small()).encode(torch.zeros(1, 3, 8, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.full((1, 4, 4, 4), 32),
            "tokens range from 32 to 32, the codebook has codes 0 to 31",
        ),
        (torch.full((1, 4, 4, 4), -1), "tokens range from -1 to -1"),
        (torch.zeros(1, 4, 4, 4), "torch.float32 (1, 4, 4, 4), must be int64 (B, t, h, w)"),
        (torch.zeros(4, 4, 4, dtype=torch.int64), "torch.int64 (4, 4, 4), must be int64"),
    ],
)
def test_tokens_that_do_not_fit(tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VQVAE(small()).decode(tokens)


def test_no_clips():
    """An empty batch of tokens is decoded to an empty batch of clips."""
    clips = VQVAE(small()).eval().decode(torch.zeros(0, 4, 4, 4, dtype=torch.int64))
    assert clips.shape == (0, 3, 8, 8, 8)


def moving_squares(clips, frames, size):
    """Bright squares that move over a dark ground, (B, 1, T, H, W)."""
    x = torch.full((clips, 1, frames, size, size), -0.5)
    for i in range(clips):
        for t in range(frames):
            row, column = (3 * i + t) % (size - 5), (5 * i + 2 * t) % (size - 5)
            x[i, 0, t, row : row + 5, column : column + 5] = 0.5
    return x


@pytest.mark.parametrize("causal_time", [False, True])
def test_learns_one_batch(causal_time):
    x = moving_squares(4, 4, 16)
    config = small(
        channels=1,
        frames=4,
        resolution=16,
        downsample=(2, 4, 4),
        hidden=32,
        codes=64,
        code_dim=16,
        causal_time=causal_time,
    )
    vqvae = VQVAE(config)
    before = copy.deepcopy(vqvae).eval()(x).recon_loss
    optimizer = torch.optim.Adam(vqvae.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        vqvae(x).loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (vqvae.eval()(x).reconstruction - x).square().mean()
    assert before * config.data_variance > x.var() / 2, "there is something to learn"
    assert error < x.var() / 10
