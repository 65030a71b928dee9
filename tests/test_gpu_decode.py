"""Decode attention on a CUDA device: pytest -m gpu."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import decode
from tinyvgpt.kernels.decode import decode_attention, decode_with_lse, reference
from tinyvgpt.kernels.layout import block_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
DIMS = [(64, 64), (128, 128), (144, 144), (80, 48), (16, 160)]


@contextlib.contextmanager
def poisoned():
    """What is allocated starts as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def decoding(batch, heads, capacity, d, dv, dtype, *, spare=0):
    """A query with its key and value, views of a fused projection, and caches full of numbers."""
    together = torch.randn(batch, 1, heads * (2 * d + dv), device=CUDA).to(dtype)
    parts = together.split([heads * d, heads * d, heads * dv], dim=-1)
    q, k_new, v_new = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts)
    caches = []
    for size in (d, dv):
        whole = torch.randn(batch, capacity + spare, heads, size + 8 * spare, device=CUDA)
        caches.append(whole.to(dtype)[:, :capacity, :, :size].transpose(1, 2))
    return q, *caches, (k_new, v_new)


def visible(lengths, capacity, layout=None, heads=1):
    """What each query sees: bool (B, nh, S)."""
    seen = torch.arange(capacity, device=CUDA) < lengths[:, None, None]
    if layout is None:
        return seen.expand(-1, heads, -1)
    seen = seen.repeat(1, heads, 1)
    for b, length in enumerate(lengths.tolist()):
        for h in range(heads):
            lists = layout.lists
            earlier, own, *blocks = lists[h % len(lists), (length - 1) // 32].tolist()
            listed = torch.tensor(blocks[: earlier + own], device=CUDA)
            seen[b, h] &= torch.isin(torch.arange(capacity, device=CUDA) // 32, listed)
    return seen


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()


def one_case(generator, case):
    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    d, dv = DIMS[case % len(DIMS)]
    dtype = pick(torch.bfloat16, torch.float16)
    batch, heads = pick((1, 1), (1, 16), (3, 4), (2, 5), (16, 9), (40, 8))  # the last two: MANY
    capacity = pick(1, 31, 64, 200, 777, 1024, 3000 if batch < 16 else 500)
    lengths = torch.randint(1, capacity + 1, (batch,), generator=generator).int().to(CUDA)
    q, k, v, new = decoding(batch, heads, capacity, d, dv, dtype, spare=pick(0, 1))
    new = pick(None, new)
    blocks = -(-capacity // 32)
    layout = None
    if case % 4 == 0:
        kind = (blocks, blocks) if pick(0, 1) else (heads, blocks, blocks)
        mask = torch.rand(kind, device=CUDA) < 0.3
        mask |= torch.eye(blocks, dtype=torch.bool, device=CUDA)
        layout = block_layout(mask, causal=True)
    if new is not None:
        each = torch.arange(batch, device=CUDA)
        k_full, v_full = k.clone(), v.clone()
        for kept, row in zip((k_full, v_full), new, strict=True):
            kept[each, :, lengths.long() - 1] = row[:, :, 0]
    else:
        k_full, v_full = k.clone(), v.clone()
    seen = visible(lengths, capacity, layout, heads)
    flat = [x.double() for x in (q[:, :, 0], k_full, v_full)]
    wanted, wanted_lse = reference(*flat, lengths, layout and layout.lists)
    theirs = F.scaled_dot_product_attention(q, k_full, v_full, seen[:, :, None])[:, :, 0]
    unseen = ~seen
    for x in (k, v):
        x.masked_fill_(unseen[..., None], torch.nan)
    with poisoned():
        o, lse = decode_with_lse(q, k, v, lengths, layout, new=new)
    assert error(o[:, :, 0], wanted) <= max(1.2 * error(theirs, wanted), 2e-3), (case, d, dv)
    torch.testing.assert_close(lse[:, :, 0].double(), wanted_lse, atol=1e-4, rtol=1e-4)
    for kept, full in ((k, k_full), (v, v_full)):
        assert kept.masked_fill(unseen[..., None], 0).equal(full.masked_fill(unseen[..., None], 0))


@pytest.mark.parametrize("group", range(4))
def test_random_shapes(group):
    generator = torch.Generator().manual_seed(group)
    torch.manual_seed(group)
    for case in range(50):
        one_case(generator, case)


def test_a_long_cache_exactly_alike_each_time():
    torch.manual_seed(0)
    q, k, v, _ = decoding(1, 16, 8192, 64, 64, torch.bfloat16)
    lengths = torch.tensor([8001], dtype=torch.int32, device=CUDA)
    first, lse = decode_with_lse(q, k, v, lengths)
    wanted, _ = reference(q[:, :, 0].double(), k.double(), v.double(), lengths)
    assert error(first[:, :, 0], wanted) < 4e-3
    for _ in range(50):
        again, lse_again = decode_with_lse(q, k, v, lengths)
        assert again.equal(first)
        assert lse_again.equal(lse)


def test_strided_layout():
    torch.manual_seed(0)
    strided = StridedLayout((4, 16, 16)).to(CUDA)
    layout = strided.packed()
    q, k, v, new = decoding(1, 4, 1024, 144, 144, torch.bfloat16)
    for position in (0, 31, 32, 500, 1023):
        lengths = torch.tensor([position + 1], dtype=torch.int32, device=CUDA)
        o = decode_attention(q, k, v, lengths, layout, new=new)
        keys = strided.keys(position)
        wanted = F.scaled_dot_product_attention(
            q.double(), k[:, :, keys].double(), v[:, :, keys].double()
        )
        assert error(o, wanted) < 4e-3


def test_lengths_that_cannot_be():
    q, k, v, _ = decoding(3, 2, 100, 64, 64, torch.float16)
    o, lse = decode_with_lse(q, k, v, torch.tensor([101, 0, -1], dtype=torch.int32, device=CUDA))
    assert o[[0, 2]].isnan().all()
    assert lse[[0, 2]].isnan().all()
    assert not o[1].any()
    assert (lse[1] == -torch.inf).all()


def test_ops():
    q, k, v, new = decoding(2, 3, 200, 64, 64, torch.bfloat16)
    q, k_new, v_new = (x[:, :, 0] for x in (q, *new))
    lengths = torch.tensor([5, 200], dtype=torch.int32, device=CUDA)
    layout = block_layout(torch.ones(7, 7, dtype=torch.bool, device=CUDA), causal=True)
    for lists in (None, layout.lists):
        rest = (k, v, lengths, lists, 0.125)
        torch.library.opcheck(decode.decode_op, (q, *rest))
        torch.library.opcheck(decode.append_op, (q, k_new, v_new, *rest))


def test_compiles_to_one_graph():
    def step(q, k, v, lengths, new):
        return decode_attention(q * 2, k, v, lengths, new=new) + 1

    compiled = torch.compile(step, fullgraph=True)
    q, k, v, new = decoding(2, 4, 300, 64, 64, torch.bfloat16)
    k_too, v_too = k.clone(), v.clone()
    for values in ([1, 300], [2, 17]):
        lengths = torch.tensor(values, dtype=torch.int32, device=CUDA)
        wanted = step(q, k, v, lengths, new)
        torch.testing.assert_close(compiled(q, k_too, v_too, lengths, new), wanted)
        assert k_too.equal(k)
        assert v_too.equal(v)


def captured(q, k, v, lengths, new, calls):
    """A CUDA graph of so many calls and their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_attention(q, k, v, lengths, new=new)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [decode_attention(q, k, v, lengths, new=new) for _ in range(calls)]
    return graph, results


def test_one_graph_for_all_steps():
    torch.manual_seed(0)
    q, k, v, new = decoding(2, 4, 600, 144, 144, torch.bfloat16)
    lengths = torch.ones(2, dtype=torch.int32, device=CUDA)
    graph, (o, again) = captured(q, k, v, lengths, new, 2)
    for step in (1, 2, 15, 16, 17, 33, 64, 300, 599, 600):
        lengths.copy_(torch.tensor([step, 601 - step]))
        for x in (q, *new):
            x.normal_()
        graph.replay()
        each = torch.arange(2, device=CUDA)
        assert k[each, :, lengths.long() - 1].equal(new[0][:, :, 0])
        wanted, _ = reference(q[:, :, 0].double(), k.double(), v.double(), lengths)
        assert error(o[:, :, 0], wanted) < 4e-3
        assert o.equal(again)


@pytest.mark.parametrize("batch", [1, 10])
def test_graphs_that_run_at_the_same_time(batch):
    torch.manual_seed(0)
    runs = []
    for _ in range(2):
        q, k, v, new = decoding(batch, 16, 2000, 64, 64, torch.bfloat16)
        lengths = torch.full((batch,), 1999, dtype=torch.int32, device=CUDA)
        inputs = (q, k, v, lengths, new)  # kept, since the graph reads them
        runs.append((torch.cuda.Stream(), *captured(*inputs, 20), inputs))
    wanted = []
    for _, graph, results, _ in runs:
        graph.replay()
        wanted.append([x.clone() for x in results])
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, graph, results, _ in runs:
            with torch.cuda.stream(stream):
                for x in results:
                    x.fill_(torch.nan)
                graph.replay()
        torch.cuda.synchronize()
        for (_, _, results, _), right in zip(runs, wanted, strict=True):
            assert all(a.equal(b) for a, b in zip(results, right, strict=True))


def test_a_graph_cannot_be_the_first_to_call():
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before"), torch.cuda.graph(graph):
        decode.Counters(CUDA)


def test_bad_input():
    q, k, v, _ = decoding(2, 3, 50, 64, 64, torch.bfloat16)
    lengths = torch.ones(2, dtype=torch.int32, device=CUDA)
    askew = torch.empty(q.numel() + 1, dtype=q.dtype, device=CUDA)[1:].view(2, 3, 64)
    for kind, message, args in (
        (TypeError, "takes bfloat16", (q.float(), k.float(), v.float(), lengths)),
        (ValueError, "16 bytes", (askew, k, v, lengths)),
        (ValueError, "all on", (q, k, v, lengths.cpu())),
        (ValueError, "multiples of 8", (q[..., :60], k[..., :60], v, lengths)),
        (ValueError, "strides", (q, k.mT.contiguous().mT, v, lengths)),
    ):
        with pytest.raises(kind, match=message):
            decode_attention(*args)
    o = decode_attention(q.clone().requires_grad_(), k, v, lengths)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        o.sum().backward()
