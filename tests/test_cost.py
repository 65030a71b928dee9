"""What steps compute and keep: closed formulas, and what the allocator says."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tinyvgpt import GPT, VQVAE, GPTConfig, VQVAEConfig
from tinyvgpt.attention import StridedLayout
from tinyvgpt.cost import clip_work, forward_flops, kept_bytes, meta_batch, step_flops

SMALL = GPTConfig(
    latent_shape=(2, 4, 8),
    codes=16,
    code_dim=8,
    frames=4,
    resolution=16,
    width=24,
    heads=2,
    layers=2,
)
TINY = VQVAEConfig(
    frames=4, resolution=8, downsample=(2, 4, 4), hidden=8, res_blocks=1, codes=16, code_dim=4
)


def gpt_multiply_adds(config, pairs):
    """Of one clip, without conditioning, attention looking at `pairs` of query and key."""
    n, d, hidden = config.tokens, config.width, int(config.mlp_ratio * config.width)
    layer = n * (4 * d * d + 2 * d * hidden) + 2 * pairs * d
    return n * config.code_dim * d + config.layers * layer + n * d * config.codes


def frame_multiply_adds(config):
    """Of a clip's frame encoder of depth 10, and how many of them are the stem's."""
    w, n = config.cond_width, config.cond_frames
    points = n * config.resolution**2
    stem = total = points * 27 * config.channels * w
    widths = [w, w, 2 * w, 4 * w, 15 * w // 4]
    for i, shrink in enumerate((1, 4, 4, 1)):
        points //= shrink
        a, b = widths[i], widths[i + 1]
        total += points * (27 * a * b + 27 * b * b + a * b)
    memory, dm, d = n * (config.resolution // 4) ** 2, widths[-1], config.width
    cross = config.tokens * (d * d + dm * d) + memory * (dm * d + dm * dm)
    cross += config.tokens * memory * (d + dm)
    return total + config.layers * cross, stem


def test_gpt_counts_the_half_that_causal_attention_sees():
    n = SMALL.tokens
    expected = gpt_multiply_adds(SMALL, n * (n + 1) // 2)
    assert forward_flops(SMALL) == 2 * expected
    # Codes are looked up: their projection has no gradient of its input.
    no_gradient = n * SMALL.code_dim * SMALL.width
    assert step_flops(SMALL, 3) == 3 * 2 * (3 * expected - no_gradient)


@pytest.mark.parametrize("cond_frames", [0, 3])
def test_openings(cond_frames):
    """Three of four clips have half of the tokens, and attention over a quarter of the pairs."""
    config = replace(SMALL, cond_frames=cond_frames, cond_depth=10, cond_width=8)
    tokens, flops = clip_work(config, 0.75)
    assert clip_work(config, 0.0) == (64, step_flops(config, 1))
    assert tokens == 0.25 * 64 + 0.75 * 32
    first = step_flops(replace(config, latent_shape=(1, 4, 8)), 1)
    assert flops == 0.25 * step_flops(config, 1) + 0.75 * first


def test_dropout_and_checkpointing_change_nothing():
    other = replace(SMALL, dropout=0.0, attn_dropout=0.0, checkpointing=True)
    assert step_flops(other, 2) == step_flops(SMALL, 2)


def test_strided_attention_counts_what_its_layout_sees():
    config = replace(SMALL, latent_shape=(4, 8, 8), attention="strided")
    pairs = int(StridedLayout(config.latent_shape).mask.sum())
    assert pairs < config.tokens * (config.tokens + 1) // 2
    assert forward_flops(config) == 2 * gpt_multiply_adds(config, pairs)


def test_conditioning_is_counted():
    n = SMALL.tokens
    config = replace(
        SMALL,
        cond_frames=1,
        cond_depth=10,
        cond_width=8,
        classes=5,
        label_dropout=0.1,
        action_dim=3,
    )
    frames, stem = frame_multiply_adds(config)
    actions = config.latent_shape[0] * (3 * 2) * config.width  # two frames' actions a latent frame
    expected = gpt_multiply_adds(SMALL, n * (n + 1) // 2) + frames + actions
    assert forward_flops(config) == 2 * expected
    no_gradient = n * config.code_dim * config.width + stem + actions
    assert step_flops(config, 1) == 2 * (3 * expected - no_gradient)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axial", [False, True])
def test_vqvae(causal, axial):
    config = replace(TINY, causal_time=causal, axial=axial)
    (t, h, w), c, d = config.latent_shape, config.hidden, config.code_dim
    halved, doubled = (2, 4, 4), (4, 4, 4)  # after the encoder's and the decoder's first stride
    first = prod(halved) * 64 * 3 * c
    points = t * h * w
    stack = points * (27 * c * (c // 2) + (c // 2) * c)
    if axial:
        along_time = t * (t + 1) // 2 * h * w if causal else t * points
        stack += points * 12 * c * c + 2 * c * (along_time + h * points + w * points)
    encoder = first + points * 64 * c * c + points * 27 * c * c + stack
    decoder = stack + points * 64 * c * c + prod(doubled) * 64 * c * 3
    search = points * config.codes * d
    expected = encoder + decoder + 2 * points * c * d + search
    assert forward_flops(config) == 2 * expected
    assert step_flops(config, 2) == 2 * 2 * (3 * expected - first - 2 * search)


def test_released_model():
    """6 FLOPs a weight and token, and attention; see PaLM, appendix B."""
    config = GPTConfig(latent_shape=(4, 32, 32))
    tokens, weights = 8 * 4096, 33.2e6
    attention = 6 * 8 * tokens * 4096 * 576  # layers; half of the scores
    assert step_flops(config, 8) == pytest.approx(6 * weights * tokens + attention, rel=0.01)


def allocated(config, clips):
    """Peak of what the allocator gave during a step's forward and backward pass, bytes."""
    torch.manual_seed(0)
    model = VQVAE(config) if isinstance(config, VQVAEConfig) else GPT(config)
    batch = {
        name: torch.rand(x.shape) - 0.5
        if x.is_floating_point()
        else torch.zeros_like(x, device="cpu")
        for name, x in meta_batch(config, clips).items()
    }

    def step():
        loss = model(**batch).loss if isinstance(model, VQVAE) else model.loss(**batch)
        loss.backward()

    step()  # makes the gradients' tensors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


GPT_KEPT = GPTConfig(latent_shape=(4, 8, 8), width=96, heads=4, layers=4, codes=256, code_dim=32)
VQVAE_KEPT = VQVAEConfig(downsample=(4, 4, 4), frames=8, resolution=32, hidden=48, res_blocks=3)


@pytest.mark.parametrize(
    "config",
    [
        replace(GPT_KEPT, dropout=0.0, attn_dropout=0.0),
        GPT_KEPT,
        replace(GPT_KEPT, dropout=0.0, attn_dropout=0.0, checkpointing=True),
        VQVAE_KEPT,
        replace(VQVAE_KEPT, checkpointing=True),
    ],
    ids=["gpt", "gpt-dropout", "gpt-checkpointing", "vqvae", "vqvae-checkpointing"],
)
def test_kept_is_what_is_allocated(config):
    estimate = kept_bytes(config, 8, torch.float32, compiled=False)
    assert estimate == pytest.approx(allocated(config, 8), rel=0.25)


def test_released_model_on_a_gpu():
    """An H100 allocated 5.27 GiB at the peak of a compiled step: bfloat16, no dropout, 9 heads."""
    config = GPTConfig(latent_shape=(4, 32, 32), heads=9, dropout=0.0, attn_dropout=0.0)
    kept = kept_bytes(config, 8, torch.bfloat16, compiled=True)
    assert 5.27 <= kept / 2**30 + 33.2e6 * 16 / 2**30 <= 1.35 * 5.27
    assert kept < kept_bytes(config, 8, torch.bfloat16, compiled=False)
    half, single = (
        kept_bytes(config, 8, t, compiled=False) for t in (torch.float16, torch.float32)
    )
    assert 0.5 * single < half < 0.75 * single


def test_kept_grows_with_clips():
    for config in (GPT_KEPT, VQVAE_KEPT):
        few, many = (kept_bytes(config, n, torch.float32, compiled=True) for n in (2, 8))
        assert many == pytest.approx(4 * few, rel=0.01)
