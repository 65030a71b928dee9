"""The ladder of kernels on a CUDA device: pytest -m gpu."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinyvgpt.kernels import ladder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
RUNGS = {rung.name: rung for rung in ladder.rungs()}


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated starts as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=RUNGS)
def rung(request):
    found = RUNGS[request.param]
    if torch.cuda.get_device_capability(CUDA) < found.oldest:
        pytest.skip(f"{found.name} is for newer GPUs")
    return found


def inputs(batch, heads, tokens, d, dtype):
    """Contiguous q, k and v (B, nh, S, d), followed in memory by NaN."""
    count = batch * heads * tokens * d
    whole = [torch.full((count + 128 * d,), math.nan, device=CUDA).to(dtype) for _ in range(3)]
    return [x[:count].view(batch, heads, tokens, d).normal_() for x in whole]


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def test_random_shapes(rung):
    """40 of each rung, against float64."""
    generator = torch.Generator().manual_seed(0)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dims = [d for d in (64, 128) if d in rung.dims]
    for _ in range(40):
        batch, heads = pick([(1, 1), (2, 3), (3, 5)])
        tokens = pick([1, 15, 64, 65, 127, 128, 129, 200, 384, 777])
        d, dtype, causal = pick(dims), pick(rung.dtypes), pick([False, True])
        q, k, v = inputs(batch, heads, tokens, d, dtype)
        wanted = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
        theirs = error(F.scaled_dot_product_attention(q, k, v, is_causal=causal), wanted)
        ours = error(ladder.attention(q, k, v, rung.name, causal), wanted)
        least = 1e-5 if dtype is torch.float32 else 2e-3
        assert ours <= max(1.2 * theirs, least), (batch, heads, tokens, d, dtype, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_many_tiles(rung, causal):
    """More blocks of threads than the device holds at a time, several times in a row."""
    dtype = torch.float16 if torch.float16 in rung.dtypes else rung.dtypes[0]
    shape = (1, 16, 1024, 64) if rung.name == "naive" else (4, 16, 4096, 64)
    q, k, v = inputs(*shape, dtype)
    o = ladder.attention(q, k, v, rung.name, causal)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert error(o, theirs.double()) < 2e-3
    for _ in range(3):
        assert ladder.attention(q, k, v, rung.name, causal).equal(o)


def test_graph(rung):
    """A captured call takes what its inputs hold when it is replayed."""
    q, k, v = inputs(2, 3, 300, 64, torch.float16)
    ladder.attention(q, k, v, rung.name)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        o = ladder.attention(q, k, v, rung.name)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert o.equal(ladder.attention(q, k, v, rung.name))


def test_bad_input(rung):
    q = torch.randn(1, 2, 64, 64, device=CUDA).half()
    with pytest.raises(TypeError, match=r"float64|bfloat16"):
        ladder.attention(*[q.double()] * 3, rung.name)
    with pytest.raises(ValueError, match="contiguous"):
        ladder.attention(q.mT, q, q, rung.name)
    off = torch.randn(2 * 64 * 64 + 4, device=CUDA).half()[4:].view(1, 2, 64, 64)
    with pytest.raises(ValueError, match="16 bytes"):
        ladder.attention(off, q, q, rung.name)
    with pytest.raises(ValueError, match="are on"):
        ladder.attention(q, q.cpu(), q, rung.name)
