"""Flash attention on a CUDA device: pytest -m gpu."""

import pytest
import torch
import torch.nn.functional as F
from fused import fused_attention

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import flash
from tinyvgpt.kernels.flash import attention_with_lse, flash_attention, strided_attention
from tinyvgpt.kernels.layout import block_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
DIMS = [(64, 64), (128, 128), (144, 144), (144, 60), (16, 16), (80, 48), (160, 160), (96, 96)]


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated starts as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fused(batch, heads, queries, keys, d, dv, dtype):
    """q, k and v (B, nh, S, d): of self-attention views of one projection, with NaN behind it."""
    if queries == keys and dv % 8 == 0:
        whole = torch.full((batch, queries + 5, heads * (2 * d + dv)), torch.nan, device=CUDA)
        whole = whole.to(dtype)[:, :queries].normal_()
        parts = whole.split([heads * d, heads * d, heads * dv], dim=-1)
    else:
        sizes = ((queries, d), (keys, d), (keys, dv))
        parts = [torch.randn(batch, n, heads * m, device=CUDA).to(dtype) for n, m in sizes]
    return [x.detach().unflatten(-1, (heads, -1)).transpose(1, 2).requires_grad_() for x in parts]


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()


def one_case(generator, case):
    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    d, dv = DIMS[case % len(DIMS)]
    batch, heads = pick((1, 1), (1, 5), (2, 3), (3, 2))
    queries = pick(1, 16, 63, 129, 200, 300, 513)
    keys = queries if pick(0, 1) else pick(1, 31, 64, 128, 333, 700)
    causal, sparse = pick(False, True), dv % 16 == 0 and pick(0, 0, 1)
    if batch * heads * queries < 64:  # with few, kernels' errors differ by a fifth by chance
        batch = 64
    q, k, v = fused(batch, heads, queries, keys, d, dv, pick(torch.bfloat16, torch.float16))
    layout = None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=CUDA)
    if causal:
        seen = seen.tril(keys - queries)
    if sparse:
        blocks = torch.rand(pick(1, heads), -(-queries // 32), -(-keys // 32), device=CUDA) < 0.4
        layout = block_layout(blocks, causal=causal)
        seen = layout.mask(queries, keys)
    o, lse = attention_with_lse(q, k, v, causal=causal, layout=layout)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = flash.reference(*exact, causal=causal, layout=layout)
    theirs = fused_attention(q, k, v, seen)
    theirs = theirs.masked_fill(~seen.any(-1)[..., None], 0)
    what = (case, d, dv, batch, heads, queries, keys, causal, sparse, q.dtype)
    assert error(o, wanted) <= max(1.2 * error(theirs, wanted), 2e-3), what
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-4, rtol=1e-4)

    grad = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), grad)
    other = torch.autograd.grad(theirs, (q, k, v), grad)
    for x, y, z in zip(
        found, other, torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        y = error(y.nan_to_num(), z)  # where a query sees nothing PyTorch's gradient may be NaN
        assert error(x, z) <= max(1.2 * y, 2e-3) or z.norm() < 1e-3, what


@pytest.mark.parametrize("group", range(4))
def test_random_shapes(group):
    generator = torch.Generator().manual_seed(group)
    for case in range(50):
        one_case(generator, case)


@pytest.mark.parametrize("d", [64, 128, 144])
def test_many_tiles(d):
    """More blocks of threads than fit the device, heads in several groups."""
    q, k, v = fused(4, 16, 2048, 2048, d, d, torch.bfloat16)
    flash.heads_at_once.cache_clear()
    for causal in (False, True):
        o = flash_attention(q, k, v, causal=causal)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert error(o, theirs.double()) < 6e-3
        assert flash_attention(q, k, v, causal=causal).equal(o)


def test_strided_layout():
    strided = StridedLayout((4, 32, 32)).to(CUDA)
    layout = block_layout(strided.blocks, causal=True)
    q, k, v = fused(2, 2, 4096, 4096, 64, 64, torch.bfloat16)
    o = strided_attention(q, k, v, layout)
    theirs = F.scaled_dot_product_attention(q, k, v, strided.mask)
    assert error(o, theirs.double()) < 6e-3
    grad = torch.randn_like(o)
    found, other = (torch.autograd.grad(y, (q, k, v), grad) for y in (o, theirs))
    assert all(error(x, y.double()) < 1e-2 for x, y in zip(found, other, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (144, 48)])
def test_op(dims, sparse):
    q, k, v = fused(2, 3, 100, 100, *dims, torch.bfloat16)
    layout = block_layout(torch.ones(4, 4, dtype=torch.bool, device=CUDA), causal=True)
    lists = (layout.rows, layout.columns) if sparse else (None, None)
    torch.library.opcheck(flash.flash_forward_op, (q, k, v, True, 0.1, *lists))


@pytest.mark.parametrize("dims", [(64, 64), (144, 60)])
def test_compiled(dims):
    q, k, v = fused(2, 3, 100, 100, *dims, torch.bfloat16)
    layout = block_layout(torch.ones(4, 4, dtype=torch.bool, device=CUDA), causal=True)

    def both(q, k, v):
        return flash_attention(q, k, v) + strided_attention(q, k, v, layout)

    expected = both(q, k, v)
    found = torch.compile(both, fullgraph=True)(q, k, v)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (found, expected)), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


def test_graph():
    """A captured call takes what its inputs hold when it is replayed."""
    q, k, v = (x.detach() for x in fused(2, 3, 300, 300, 64, 64, torch.bfloat16))
    flash_attention(q, k, v, causal=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        o = flash_attention(q, k, v, causal=True)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert o.equal(flash_attention(q, k, v, causal=True))


def test_gradients_in_any_layout():
    q, k, v = fused(2, 3, 100, 100, 64, 64, torch.bfloat16)
    o = flash_attention(q, k, v)
    grad = torch.randn(64, 100, 3, 2, device=CUDA).to(o).permute(3, 2, 1, 0)
    for strange in (grad, grad[:1].expand_as(o), grad[..., :1].expand_as(o)):
        found, wanted = (
            torch.autograd.grad(o, (q, k, v), x, retain_graph=True)
            for x in (strange, strange.clone(memory_format=torch.contiguous_format))
        )
        assert all(x.equal(y) for x, y in zip(found, wanted, strict=True))


def test_bad_input():
    q = torch.randn(1, 2, 64, 64, device=CUDA)
    with pytest.raises(TypeError, match="bfloat16"):
        flash_attention(q, q, q)
    half = q.half()
    with pytest.raises(ValueError, match="strides"):
        flash_attention(half.mT, half, half)
    off = torch.randn(2 * 64 * 64 + 4, device=CUDA).half()[4:].view(1, 2, 64, 64)
    with pytest.raises(ValueError, match="16 bytes"):
        flash_attention(off, half, half)
    with pytest.raises(ValueError, match="are on"):
        flash_attention(half, half.cpu(), half)
