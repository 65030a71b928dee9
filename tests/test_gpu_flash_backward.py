"""Flash attention's gradients on a CUDA device: pytest -m gpu."""

import contextlib
import math

import pytest
import torch
from fused import fused_attention

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels.flash_backward import flash_backward_op, reference
from tinyvgpt.kernels.layout import block_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
KINDS = [
    (64, 64, torch.bfloat16),
    (64, 64, torch.float16),
    (128, 128, torch.bfloat16),
    (144, 144, torch.float16),
    (144, 64, torch.bfloat16),
    (80, 48, torch.bfloat16),
]


@contextlib.contextmanager
def poisoned():
    """What is allocated starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def projected(batch, heads, length, *dims, dtype):
    """Views (B, nh, S, d) of one projection's result."""
    together = torch.randn(batch, length, heads * sum(dims), device=CUDA).to(dtype)
    parts = together.split([heads * d for d in dims], dim=-1)
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts]


def inputs(batch, heads, queries, keys, d, dv, dtype):
    """Gradient, queries, keys and values."""
    q, grad = projected(batch, heads, queries, d, dv, dtype=dtype)
    k, v = projected(batch, heads, keys, d, dv, dtype=dtype)
    return grad, q, k, v


def visible(queries, keys, causal, layout=None):
    """What each query sees: bool (1 or nh, Sq, Sk)."""
    if layout is not None:
        return layout.mask(queries, keys)
    seen = torch.ones(1, queries, keys, dtype=torch.bool, device=CUDA)
    return seen.tril(keys - queries) if causal else seen


def forward(q, k, v, seen, scale):
    """Attention in float64: the output and the log-sum-exp."""
    scores = (scale * q.double() @ k.double().mT).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v.double(), scores.logsumexp(-1)


def backward(grad, q, k, v, o, lse, *, causal=False, scale=None, layout=None):
    """The op, whose arguments have no defaults."""
    lists = (None, None) if layout is None else (layout.rows, layout.columns)
    causal = causal if layout is None else layout.causal
    return flash_backward_op(grad, q, k, v, o, lse, causal, scale or q.shape[-1] ** -0.5, *lists)


def errors(got, wanted):
    return [
        ((x.double() - y).norm() / y.norm().clamp_min(1e-9)).item()
        for x, y in zip(got, wanted, strict=True)
    ]


def ours_and_wanted(grad, q, k, v, *, causal=False, layout=None, scale=None):
    """Gradients by the kernel and in float64."""
    scale = scale or q.shape[-1] ** -0.5
    seen = visible(q.shape[2], k.shape[2], causal, layout)
    o, lse = forward(q, k, v, seen, scale)
    exact = [x.double() for x in (grad, q, k, v)]
    wanted = reference(*exact, o, lse, scale=scale, mask=seen)
    rounded = (o.to(q.dtype), lse.float())
    with poisoned():
        got = backward(grad, q, k, v, *rounded, causal=causal, scale=scale, layout=layout)
    return got, wanted


def sdpa_gradients(grad, q, k, v, seen, scale):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(fused_attention(*leaves, seen, scale), leaves, grad)


def one_case(generator, case):
    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    d, dv, dtype = KINDS[case % len(KINDS)]
    batch, heads = pick((1, 1), (2, 3), (1, 5))
    lengths = (1, 16, 31, 64, 65, 127, 128, 200, 256, 333, 500, 777)
    queries, keys = sorted((pick(*lengths), pick(*lengths)))
    causal, scale, layout = pick(True, False), pick(d**-0.5, 0.3), None
    if not causal and pick(True, False):
        queries, keys = keys, queries
    if batch * heads * min(queries, keys) < 64:  # with few, errors differ by a fifth by chance
        batch = 64
    if (d, dtype) in ((64, torch.bfloat16), (144, torch.float16)) and pick(True, False):
        rows, columns = -(-queries // 32), -(-keys // 32)
        blocks = torch.rand(pick(1, heads), rows, columns, device=CUDA) < 0.3
        blocks[..., 0] = True  # SDPA's gradients are NaN where a query sees nothing
        layout = block_layout(blocks, causal=causal)
    tensors = inputs(batch, heads, queries, keys, d, dv, dtype)
    got, wanted = ours_and_wanted(*tensors, causal=causal, layout=layout, scale=scale)
    seen = visible(queries, keys, causal, layout)
    theirs = errors(sdpa_gradients(*tensors, seen, scale), wanted)
    floors = [1e-6 * y.numel() ** 0.5 / y.norm().clamp_min(1e-9).item() for y in wanted]
    for ours, sdpa, floor in zip(errors(got, wanted), theirs, floors, strict=True):
        where = (case, batch, heads, queries, keys, d, dv, dtype, causal)
        assert ours <= max(1.2 * sdpa, 2e-3, floor), where


@pytest.mark.parametrize("group", range(4))
def test_random_shapes(group):
    generator = torch.Generator().manual_seed(group)
    torch.manual_seed(group)
    for case in range(50):
        one_case(generator, case)


@pytest.mark.parametrize("d", [64, 128, 144])
def test_many_tiles(d):
    torch.manual_seed(0)
    tensors = inputs(2, 4, 2048, 2048, d, d, torch.bfloat16)
    for causal in (True, False):
        got, wanted = ours_and_wanted(*tensors, causal=causal)
        seen = visible(2048, 2048, causal)
        theirs = errors(sdpa_gradients(*tensors, seen, d**-0.5), wanted)
        for ours, sdpa in zip(errors(got, wanted), theirs, strict=True):
            assert ours <= max(1.2 * sdpa, 2e-3)
        again, _ = ours_and_wanted(*tensors, causal=causal)
        assert all(x.equal(y) for x, y in zip(got, again, strict=True))


def test_strided_layout():
    torch.manual_seed(0)
    layout = block_layout(StridedLayout((4, 16, 16)).to(CUDA).blocks, causal=True)
    got, wanted = ours_and_wanted(*inputs(2, 4, 1024, 1024, 64, 64, torch.bfloat16), layout=layout)
    assert max(errors(got, wanted)) < 5e-3


def test_queries_that_see_nothing():
    torch.manual_seed(0)
    tensors = inputs(2, 2, 300, 100, 64, 64, torch.bfloat16)
    got, wanted = ours_and_wanted(*tensors, causal=True)
    assert max(errors(got, wanted)) < 5e-3
    assert not got[0][:, :, :200].any()


def test_gradients_that_come_in_other_shapes():
    torch.manual_seed(0)
    _, q, k, v = inputs(2, 2, 100, 100, 64, 64, torch.bfloat16)
    like = {"dtype": q.dtype, "device": CUDA}
    for grad in (
        torch.randn(2, 2, 1, 64, **like).expand(2, 2, 100, 64),
        torch.ones(1, 1, 1, 1, **like).expand(2, 2, 100, 64),
        torch.randn(2, 2, 64, 100, **like).mT,
        torch.randn(2, 2, 100, 65, **like)[..., :64],
        torch.randn(2 * 2 * 100 * 64 + 1, **like)[1:].view(2, 2, 100, 64),
    ):
        got, wanted = ours_and_wanted(grad, q, k, v, causal=True)
        same, _ = ours_and_wanted(grad.contiguous(), q, k, v, causal=True)
        assert max(errors(got, wanted)) < 5e-3
        assert all(x.equal(y) for x, y in zip(got, same, strict=True))


def op_arguments(batch=2, heads=3, length=150, d=64, dv=64, layout=None):
    grad, q, k, v = inputs(batch, heads, length, length, d, dv, torch.bfloat16)
    o, lse = forward(q, k, v, visible(length, length, True, layout), d**-0.5)
    rows, columns = (None, None) if layout is None else (layout.rows, layout.columns)
    return grad, q, k, v, o.bfloat16(), lse.float(), True, d**-0.5, rows, columns


def test_op():
    blocks = torch.ones(5, 5, dtype=torch.bool, device=CUDA)
    for changes in ({}, {"d": 80, "dv": 48}, {"layout": block_layout(blocks, causal=True)}):
        torch.library.opcheck(flash_backward_op, op_arguments(**changes))


def test_compiles_to_one_graph():
    args = op_arguments()

    def step(grad, *rest):
        return [x + 1 for x in backward(grad * 2, *rest, causal=True)]

    found = torch.compile(step, fullgraph=True)(*args[:6])
    for x, y in zip(found, step(*args[:6]), strict=True):
        torch.testing.assert_close(x, y)


def test_graph():
    args = op_arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        flash_backward_op(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = flash_backward_op(*args)
    for x, y in zip(args[:6], op_arguments()[:6], strict=True):
        x.copy_(y)
    for x in found:
        x.fill_(torch.nan)
    graph.replay()
    assert all(x.equal(y) for x, y in zip(found, flash_backward_op(*args), strict=True))
