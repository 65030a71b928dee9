"""Flash attention's gradients: the kernel on a CPU, the reference, and what is refused."""

import io
import math
import re
from functools import partial

import cuda_on_cpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import build
from tinyvgpt.kernels import flash_backward as module
from tinyvgpt.kernels.flash_backward import (
    DENSE,
    SPARSE,
    Tiles,
    flash_backward_op,
    reference,
    tiles_for,
)
from tinyvgpt.kernels.layout import block_layout

ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}  # KB a block
FILES = {
    file: (build.HERE / "tile.cuh").read_text() + (build.HERE / file).read_text()
    for file in ("flash_backward.cu", "flash_backward_sums.cu")
}


@pytest.fixture
def run(kernel_folder, monkeypatch):
    """Return the op's implementation with its kernels run on the CPU; new tensors start as NaN."""

    def emulate(file, name, grid, threads, shared_bytes, device, *args):
        cuda_on_cpu.launch(FILES[file], name, kernel_folder, grid, (threads,), shared_bytes, *args)

    def launched(*args):
        torch.use_deterministic_algorithms(True)
        try:
            return flash_backward_op._init_fn(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    monkeypatch.setattr(build, "launch", emulate)
    torch.manual_seed(0)
    return launched


def projected(batch, heads, length, *dims, dtype):
    """Views (B, nh, S, d) of one projection's result."""
    together = torch.randn(batch, length, heads * sum(dims)).to(dtype)
    parts = together.split([heads * d for d in dims], dim=-1)
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts]


def forward(q, k, v, *, causal, scale, mask=None):
    """Attention in float64: the output in q's dtype, and the log-sum-exp in float32."""
    scores = scale * q.double() @ k.double().mT
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = seen.tril(k.shape[2] - q.shape[2]) if causal else seen
    seen = seen if mask is None else seen & mask
    scores = scores.masked_fill(~seen, -math.inf)
    o = scores.softmax(-1).nan_to_num(0) @ v.double()
    return o, scores.logsumexp(-1)


def agrees(run, grad, q, k, v, *, causal, scale=None, layout=None, floor=1e-6):
    """Asserts that the kernel's gradients are those of float64, but for rounding."""
    scale = scale or q.shape[-1] ** -0.5
    rows = columns = mask = None
    if layout is not None:
        rows, columns, causal = layout.rows, layout.columns, layout.causal
        mask = layout.mask(q.shape[2], k.shape[2])
    o, lse = forward(q, k, v, causal=causal, scale=scale, mask=mask)
    o = o.to(q.dtype)
    exact = [x.double() for x in (grad, q, k, v, o)]
    wanted = reference(*exact, lse, causal=causal, scale=scale, mask=mask)
    got = run(grad, q, k, v, o, lse.float(), causal, scale, rows, columns)
    within = 2**-11 if q.dtype is torch.float16 else 2**-8
    for x, y, like in zip(got, wanted, (q, k, v), strict=True):
        assert x.shape == like.shape
        assert x.dtype == like.dtype
        assert x.transpose(1, 2).is_contiguous()
        assert (x - y).norm() <= within * y.norm() + floor * y.numel() ** 0.5
    return got


@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [
        (64, 64, torch.float16),
        (128, 128, torch.bfloat16),
        (144, 144, torch.float16),
        (144, 64, torch.float16),
        (160, 160, torch.bfloat16),
        (16, 16, torch.bfloat16),
    ],
)
def test_kernel(run, d, dv, dtype):
    for queries, keys, causal in ((70, 150, True), (131, 66, True), (1, 65, False)):
        q, grad = projected(1, 2, queries, d, dv, dtype=dtype)
        k, v = projected(1, 2, keys, d, dv, dtype=dtype)
        agrees(run, grad, q, k, v, causal=causal)


def test_kernel_over_random_shapes(run):
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(16):
        (d, dv), dtype = pick(((64, 64), torch.float16), ((144, 144), torch.float16))
        batch, heads = pick((1, 1), (2, 1), (1, 3))
        lengths = 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200
        queries, keys = pick(*lengths), pick(*lengths)
        if pick(0, 1):
            q, grad = projected(batch, heads, queries, d, dv, dtype=dtype)
            k, v = projected(batch, heads, keys, d, dv, dtype=dtype)
        else:
            q, grad = (torch.randn(batch, heads, queries, n).to(dtype) for n in (d, dv))
            k, v = (torch.randn(batch, heads, keys, n).to(dtype) for n in (d, dv))
        agrees(run, grad, q, k, v, causal=pick(True, False), scale=pick(None, 0.3))


@pytest.mark.parametrize(
    ("keys", "tiles", "sparse"),
    [
        (True, Tiles(4, 16, 64, 64, False), True),
        (False, Tiles(2, 32, 32, 16, True), False),
    ],
)
def test_other_tiles(run, monkeypatch, keys, tiles, sparse):
    both = dict(zip((True, False), (SPARSE if sparse else DENSE)[64], strict=True)) | {keys: tiles}
    monkeypatch.setattr(module, "tiles_for", lambda d, *, keys, sparse: both[keys])
    q, grad, k, v = (torch.randn(1, 2, 140, 64).half() for _ in range(4))
    layout = block_layout(torch.rand(2, 5, 5) < 0.4, causal=True) if sparse else None
    agrees(run, grad, q, k, v, causal=True, layout=layout)


def random_layout(heads, rows, columns, causal):
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.rand(heads, rows, columns, generator=generator) < 0.3
    blocks[:, rows // 2] = False  # queries that see nothing
    blocks[:, :, columns // 2] = False  # keys that nobody sees
    return block_layout(blocks, causal=causal)


@pytest.mark.parametrize(
    ("queries", "keys", "layout"),
    [
        (256, 256, block_layout(StridedLayout((4, 8, 8)).blocks, causal=True)),
        (210, 161, random_layout(1, 7, 6, True)),
        (64, 64, block_layout(torch.zeros(2, 2, dtype=torch.bool), causal=False)),
        (100, 1311, random_layout(2, 4, 41, False)),  # two words a row
        (1305, 90, random_layout(2, 41, 3, False)),
    ],
)
def test_kernel_with_a_layout(run, queries, keys, layout):
    q, grad = projected(1, 2, queries, 64, 64, dtype=torch.float16)
    k, v = projected(1, 2, keys, 64, 64, dtype=torch.float16)
    agrees(run, grad, q, k, v, causal=False, layout=layout)


def test_gradients_that_come_in_other_shapes(run):
    q, k, v = (torch.randn(2, 2, 40, 64).half() for _ in range(3))
    grads = (
        torch.randn(2, 1, 1, 1).half().expand(2, 2, 40, 64),  # of a sum
        torch.randn(2, 2, 1, 64).half().expand(2, 2, 40, 64),
        torch.randn(2, 2, 64, 40).half().mT,
        torch.randn(2, 2, 40, 65).half()[..., :64],  # rows that don't begin at 16 bytes
        torch.randn(2 * 2 * 40 * 64 + 1).half()[1:].view(2, 2, 40, 64),
        torch.randn(2, 2, 40, 128).half()[..., ::2],
    )
    for grad in grads:
        agrees(run, grad, q, k, v, causal=True)


def test_large_scores(run):
    q, k, v, grad = (torch.randn(1, 1, 70, 64).half() for _ in range(4))
    for sign in (1, -1):
        agrees(run, grad, 20 * q, sign * 20 * k, v, causal=True, floor=1e-3)


def test_empty_rows_get_zeros(run):
    q, grad = (torch.randn(1, 1, 100, 64).half() for _ in range(2))
    k, v = (torch.randn(1, 1, 30, 64).half() for _ in range(2))
    dq, _, _ = agrees(run, grad, q, k, v, causal=True)
    assert not dq[:, :, :70].any()


def test_kernel_repeats_itself_exactly(run):
    q, k, v, grad = (torch.randn(1, 2, 130, 64).half() for _ in range(4))
    first, again = (agrees(run, grad, q, k, v, causal=True) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))


def test_matrix_loads_without_bank_conflicts(run, kernel_folder):
    for d, dtype in ((64, torch.float16), (128, torch.bfloat16), (144, torch.float16)):
        q, k, v, grad = (torch.randn(1, 1, 64, d).to(dtype) for _ in range(4))
        agrees(run, grad, q, k, v, causal=False)
        for keys in (True, False):
            tiles = tiles_for(d, keys=keys, sparse=False)
            name = tiles.name(q.dtype, d, d, keys=keys, sparse=False)
            found, loads = cuda_on_cpu.conflicts(FILES["flash_backward.cu"], name, kernel_folder)
            assert loads
            assert not found


def test_the_op(run):
    """The op passes PyTorch's own checks, with the kernel on the CPU in the GPU's place."""
    with torch.library._scoped_library("tinyvgpt", "IMPL") as library:
        library.impl("flash_backward", run, "CPU")
        layout = random_layout(1, 2, 2, True)
        for rows, columns in ((None, None), (layout.rows, layout.columns)):
            for dv in (64, 48):
                q, grad = projected(2, 2, 40, 64, 64, dtype=torch.float16)
                k, v = (torch.randn(2, 2, 50, n).half() for n in (64, dv))
                o, lse = forward(q, k, v, causal=True, scale=0.2)
                args = (grad[..., :dv], q, k, v, o.half(), lse.float(), True, 0.2, rows, columns)
                checks = ("test_schema", "test_faketensor")
                torch.library.opcheck(flash_backward_op, args, test_utils=checks)


def test_reference_is_the_gradient():
    torch.manual_seed(0)
    for causal, layout in ((False, None), (True, None), (True, random_layout(1, 3, 3, True))):
        q, k, v = (torch.randn(2, 3, 70, 16, dtype=torch.float64) for _ in range(3))
        layout = layout and block_layout(layout.blocks | torch.eye(3).bool(), causal=True)
        mask = None if layout is None else layout.mask(70, 70)
        attend = partial(forward, causal=causal, scale=0.25, mask=mask)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o, lse = attend(*leaves)
        grad = torch.randn_like(o)
        o.backward(grad)
        inputs = [x.detach() for x in (q, k, v, o, lse)]
        got = reference(grad, *inputs, causal=causal, scale=0.25, mask=mask)
        for x, leaf in zip(got, leaves, strict=True):
            torch.testing.assert_close(x, leaf.grad)


def test_fake_tensors():
    with FakeTensorMode():
        make = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        q, k, v, grad = (make(2, 3, n, d) for n, d in ((30, 64), (40, 64), (40, 48), (30, 48)))
        lse = torch.empty(2, 3, 30, device="cuda")
        got = flash_backward_op(grad, q, k, v, grad, lse, True, 0.1, None, None)
        for x, like in zip(got, (q, k, v), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)
            assert x.transpose(1, 2).is_contiguous()


def test_more_sequences_than_a_grid_has(run):
    q = torch.zeros(1, 1, 1, 16).half().expand(70000, 1, 1, 16)
    with pytest.raises(ValueError, match="65535"):
        run(q, q, q, q, q, torch.zeros(70000, 1, 1), True, 0.25, None, None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    text = build.source("flash_backward.cu")
    build.compiled(build.source("flash_backward_sums.cu"), "flash_row_sums<bf16>", arch)
    for d in (64, 128, 144):
        for keys in (True, False):
            for sparse in (True, False) if (d, arch) == (64, "sm_90a") else (False,):
                tiles = tiles_for(d, keys=keys, sparse=sparse)
                assert tiles.shared_bytes(d, d, keys=keys) <= ARCHITECTURES[arch] * 1024
                log = io.StringIO()
                name = tiles.name(torch.bfloat16, d, d, keys=keys, sparse=sparse)
                build.compiled(text, name, arch, log)
                assert re.findall(r"(\d+) bytes spill", log.getvalue()) == ["0", "0"]


def test_shared_memory_of_every_head_dim():
    for d in range(16, 161, 16):
        for keys in (True, False):
            for table in (DENSE, SPARSE):
                tiles = next(both for most, both in table.items() if d <= most)[not keys]
                assert tiles.shared_bytes(d, d, keys=keys) <= 99 * 1024
