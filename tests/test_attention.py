"""Attention against its definition, sum by sum; what sees what; cached against uncached."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from tinyvgpt import attention
from tinyvgpt.attention import (
    AxialAttention,
    CausalSelfAttention,
    CrossAttention,
    LayerCache,
    StridedLayout,
    attend,
    attend_short,
    backends,
    merge_heads,
    split_heads,
)

SHAPES = [(4, 8, 8), (2, 4, 16), (16, 2, 32), (8, 4, 4), (2, 2, 8), (2, 3, 64), (3, 16, 32)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def definition(q, k, v, visible):
    """Softmax of scaled dot products over what is visible, in float64."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v.double()).to(v.dtype)


@pytest.mark.parametrize(("n", "m", "dv"), [(1, 1, 4), (1, 9, 4), (1, 9, 6), (4, 9, 6), (9, 9, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_attend(n, m, dv, causal):
    q, k, v = torch.randn(2, 3, n, 4), torch.randn(2, 3, m, 4), torch.randn(2, 3, m, dv)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    visible = torch.ones(n, m, dtype=torch.bool)
    if causal:  # aligned at the end: the last query sees everything
        visible = torch.tensor([[j <= m - n + i for j in range(m)] for i in range(n)])
    expected = definition(q, k, v, visible)
    y = attend(q, k, v, causal=causal)
    assert_close(y, expected)
    g = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (q, k, v), g),
        torch.autograd.grad(expected, (q, k, v), g),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_attend_by_the_library_kernel(n):
    """A single query sees every key there, too (dropout rules out the way around it on a CPU)."""
    q, k, v = torch.randn(2, 3, n, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    assert_close(attend(q, k, v, causal=True, dropout=1e-9), attend(q, k, v, causal=True))


@pytest.mark.parametrize("n", [1, 5])
def test_attend_with_a_mask(n):
    q, k, v = torch.randn(2, 3, n, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = torch.rand(n, 7) < 0.5
    mask[:, 0] = True
    assert_close(attend(q, k, v, mask=mask), definition(q, k, v, mask))


@pytest.mark.parametrize(
    ("major", "first"), [(7, "FLASH"), (8, "FLASH"), (9, "CUDNN"), (10, "CUDNN")]
)
def test_backends(monkeypatch, major, first):
    """All of them, so that what the fastest can't do is done; cuDNN's first where it is faster."""
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = [backend.name for backend in backends(torch.device("cuda"))]
    assert found[0] == f"{first}_ATTENTION"
    assert found[-1] == "MATH"
    assert len(set(found)) == 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(24, 4), (7, 4), (6, 5), (1, 3), (4, 32), (2, 40)])
def test_short_rows(rows, length, causal):
    """Packed or not, one head after the other: the same as attention, and so are gradients."""
    torch.manual_seed(0)
    x = torch.randn(rows, length, 3 * 12, requires_grad=True)
    q, k, v = (split_heads(part, 3) for part in x.chunk(3, dim=-1))
    expected, found = attend(q, k, v, causal=causal), attend_short(q, k, v, causal=causal)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    g = torch.randn_like(expected)
    (a,) = torch.autograd.grad(expected, x, g, retain_graph=True)
    (b,) = torch.autograd.grad(found, x, g)
    assert_close(b, a, atol=1e-5, rtol=1e-5)
    assert merge_heads(found).is_contiguous(), "merging copies nothing"


def test_dropout_acts_on_weights():
    v = torch.ones(1, 1, 400, 8)
    y = attend(torch.zeros_like(v), torch.zeros_like(v), v, dropout=0.5)
    # A row is the sum of 400 weights, each 1/400 · 2 or 0, the same for all channels.
    assert torch.equal(y[..., :1].expand_as(y), y)
    assert 0.02 < y[..., 0].std() < 0.1
    assert abs(y.mean() - 1) < 0.02


def by_words(shape):
    """The strided layout, block by block, as the original's description has it."""
    n, block = math.prod(shape), 32
    trailing = 1
    for i in (2, 1, 0):
        trailing *= shape[i]
        if trailing > block:
            break
    grid = (*shape[:i], trailing // block)
    cells = list(itertools.product(*map(range, grid)))  # raster order
    assert len(cells) == n // block
    layout = torch.zeros(n // block, n // block, dtype=torch.bool)
    for r, c in itertools.product(range(len(cells)), repeat=2):
        if c > r:
            continue
        differing = [a for a in range(len(grid)) if cells[r][a] != cells[c][a]]
        strided = not differing or (len(differing) == 1 and differing[0] != len(grid) - 1)
        layout[r, c] = c >= r - 4 or strided
    return layout


@pytest.mark.parametrize("shape", SHAPES)
def test_strided_layout(shape):
    layout, expected = StridedLayout(shape), by_words(shape)
    assert torch.equal(layout.blocks, expected)
    n = math.prod(shape)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    assert torch.equal(layout.mask, expected[i // 32, j // 32] & (j <= i))
    for position in {0, 31, 32, n // 2 - 1, n // 2, n - 1, *torch.randint(n, (20,)).tolist()}:
        if position < n:
            assert torch.equal(layout.keys(position), layout.mask[position].nonzero()[:, 0])


def test_some_layout_is_sparse():
    """The shapes above would not tell a layout from a triangle if all of them were full."""
    assert any(not torch.equal(by_words(s), torch.ones_like(by_words(s)).tril()) for s in SHAPES)


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((1, 4, 4), "16 tokens"), ((3, 5, 7), "105 tokens"), ((32, 5, 10), "trailing product 50")],
)
def test_strided_layout_that_does_not_divide(shape, numbers):
    with pytest.raises(ValueError, match="multiples of 32") as error:
        StridedLayout(shape)
    assert numbers in str(error.value)


def test_layout_has_no_state():
    layout = StridedLayout((4, 8, 8))
    assert not layout.state_dict()
    assert not list(layout.parameters())
    assert {name for name, _ in layout.named_buffers()} == {
        *("blocks", "mask", "rows", "columns", "lists")
    }


@pytest.mark.parametrize("shape", [None, (4, 8, 8), (8, 4, 8)])
def test_self_attention_sees_what_it_may(shape):
    """By gradients: an output moves with exactly those inputs that its row of the mask shows."""
    n = 256
    layout = StridedLayout(shape) if shape else None
    mask = layout.mask if layout else torch.ones(n, n, dtype=torch.bool).tril()
    attention = CausalSelfAttention(12, 3, layers=1).double()
    x = torch.randn(1, n, 12, dtype=torch.float64, requires_grad=True)
    y = attention(x, layout)
    for i in [0, 1, 40, 100, 200, n - 1]:
        (grad,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
        assert torch.equal(grad[0].abs().sum(-1) > 0, mask[i])


@pytest.mark.parametrize("shape", [None, (4, 8, 8), (2, 4, 32)])
def test_cached_decoding_in_any_pieces(shape):
    layout = StridedLayout(shape) if shape else None
    attention = CausalSelfAttention(12, 2, layers=1)
    x = torch.randn(2, 256, 12)
    with torch.no_grad():
        full = attention(x, layout)
        for _ in range(4):
            cuts = sorted({0, 256, *torch.randint(1, 255, (6,)).tolist()})
            cuts = sorted({*cuts, *(c + 1 for c in cuts if c < 255)})  # pieces of one token, too
            cache = LayerCache(2, 2, 256, 6, like=x)
            pieces = [attention(x[:, a:b], layout, cache) for a, b in itertools.pairwise(cuts)]
            assert_close(torch.cat(pieces, 1), full, rtol=0, atol=2e-6)


def test_dropout_of_full_self_attention_only_while_training():
    attention, x = CausalSelfAttention(12, 2, layers=1, dropout=0.5), torch.randn(2, 20, 12)
    training = attention(x)
    attention.eval()
    assert not torch.allclose(training, attention(x))
    assert torch.equal(attention(x), attention(x))


def test_cross_attention():
    cross = CrossAttention(12, 20, 2, layers=3).double()
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 20).double()
    heads = lambda y: rearrange(y, "b n (nh d) -> b nh n d", nh=2)  # noqa: E731
    q, k, v = heads(cross.q(x)), heads(cross.k(memory)), heads(cross.v(memory))
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (6, 6, 10)
    expected = definition(q, k, v, torch.ones(5, 7, dtype=torch.bool))
    expected = cross.out(rearrange(expected, "b nh n d -> b n (nh d)"))
    assert_close(cross(x, memory), expected)
    order = torch.randperm(7)  # a memory is a set: positions are added before
    assert_close(cross(x, memory[:, order]), expected)


def test_cross_attention_computes_its_memory_once():
    cross = CrossAttention(12, 20, 2, layers=1)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 20)
    cache = LayerCache(2, 2, 5, 6, like=x)
    first = cross(x[:, :3], memory, cache)
    second = cross(x[:, 3:], torch.full_like(memory, math.nan), cache)
    assert_close(torch.cat([first, second], 1), cross(x, memory))


@pytest.mark.parametrize("causal_time", [False, True])
def test_axial_attention(causal_time):
    """Three separate attentions, row by row, from the rows of the fused projections."""
    width, heads = 6, 2
    axial = AxialAttention(width, heads, causal_time=causal_time).double()
    x = torch.randn(2, 3, 4, 5, width).double()
    expected = axial.out.bias.expand_as(x).clone()
    for axis in range(3):
        q, k, v = axial.qkv.weight.view(3, 3, width, width)[axis]
        out = axial.out.weight[:, axis * width : (axis + 1) * width]
        rows = x.movedim(axis + 1, -2)  # (2, …, L, width)
        flat = rows.reshape(-1, *rows.shape[-2:])
        split = lambda y: rearrange(y, "b n (nh d) -> b nh n d", nh=heads)  # noqa: E731
        length = flat.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool)
        visible = visible.tril() if causal_time and axis == 0 else visible
        y = definition(split(flat @ q.T), split(flat @ k.T), split(flat @ v.T), visible)
        y = rearrange(y, "b nh n d -> b n (nh d)") @ out.T
        expected += y.view(rows.shape).movedim(-2, axis + 1)
    assert_close(axial(x), expected)


@pytest.mark.parametrize("causal_time", [False, True])
def test_axial_attention_sees_a_cross(causal_time):
    axial = AxialAttention(6, 2, causal_time=causal_time).double()
    x = torch.randn(1, 4, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(axial(x)[0, 1, 2, 3].sum(), x)
    seen = torch.zeros(4, 4, 4, dtype=torch.bool)
    seen[:, 2, 3] = seen[1, :, 3] = seen[1, 2, :] = True
    if causal_time:
        seen[2:] = False
    assert torch.equal(grad[0].abs().sum(-1) > 0, seen)


def test_initial_scales():
    std = lambda weight, expected: abs(weight.std() / expected - 1) < 0.05  # noqa: E731
    own = CausalSelfAttention(120, 4, layers=5)
    assert own.qkv.bias is None
    assert std(own.qkv.weight, 120**-0.5)
    assert std(own.out.weight, 600**-0.5)
    assert own.out.bias.abs().max() <= 120**-0.5
    cross = CrossAttention(120, 60, 4, layers=5)
    assert std(cross.q.weight, 120**-0.5)
    assert std(cross.k.weight, 60**-0.5)
    assert std(cross.v.weight, 60**-0.5)
    assert std(cross.out.weight, 600**-0.5)
    axial = AxialAttention(400, 2)
    assert std(axial.qkv.weight, 400**-0.5)
    assert std(axial.out.weight, 400**-0.5)
    # Three biases, each uniform in ±1/√400 and so of variance 1/1200, are one.
    assert abs(axial.out.bias.std() / 400**-0.5 - 1) < 0.15


@pytest.mark.parametrize(
    "build",
    [
        lambda: CausalSelfAttention(10, 3, layers=1),
        lambda: CrossAttention(10, 12, 3, layers=1),
        lambda: CrossAttention(12, 10, 3, layers=1),
        lambda: AxialAttention(10, 3),
    ],
)
def test_width_must_divide_into_heads(build):
    with pytest.raises(ValueError, match="width 10 is not divisible by 3 heads"):
        build()


def test_no_heads():
    with pytest.raises(ValueError, match="0 heads"):
        AxialAttention(10, 0)


def test_kernels_for_a_block_and_for_good():
    assert attention._chosen == "auto"
    with attention.use("torch"):
        assert attention._chosen == "torch"
        attention.use("auto")
        attention.use("torch")
    assert attention._chosen == "auto"
    with pytest.raises(ValueError, match="can use auto, torch, cuda, not 'CUDA'"):
        attention.use("CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_kernels_where_there_is_no_gpu():
    with pytest.raises(RuntimeError, match="CUDA kernels: cpu is no CUDA device"):
        attention.use("cuda")
    assert attention._chosen == "auto"


def test_a_kernel_s_layout_is_the_mask():
    layout = StridedLayout((4, 16, 16))
    assert torch.equal(layout.packed().mask(1024, 1024)[0], layout.mask)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (("flash", torch.bfloat16, 64), True),
        (("flash", torch.float16, 144, 64), True),
        (("flash", torch.bfloat16, 64, 80), False),  # values wider than keys
        (("flash", torch.float32, 64), False),
        (("flash", torch.bfloat16, 40), False),
        (("axial", torch.bfloat16, 120), True),
        (("axial", torch.bfloat16, 144), False),
        (("decode", torch.bfloat16, 72), True),
        (("decode", torch.bfloat16, 168), False),
    ],
)
def test_what_the_kernels_can_do(monkeypatch, arguments, right):
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    kind, *rest = arguments
    monkeypatch.setattr(attention, "_can_run", lambda index: True)
    assert attention.own_kernel(kind, x, *rest) == (right and kind in attention.FASTER)
    monkeypatch.setattr(attention, "_chosen", "cuda")
    assert attention.own_kernel(kind, x, *rest) == right
    assert not attention.own_kernel(kind, torch.empty(1), *rest), "not on a CPU"
