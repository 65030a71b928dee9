"""Flash attention: its kernel on a CPU, its reference, layouts, and what it refuses."""

import io
import math
import re

import cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import build, flash
from tinyvgpt.kernels.flash import Tiles, attention_with_lse, flash_attention, strided_attention
from tinyvgpt.kernels.layout import block_layout

ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}  # KB a block
HALF, BRAIN = torch.float16, torch.bfloat16
WIDE = Tiles(2, 32, 64, 64, 2, True, 1)
NARROW = Tiles(4, 16, 32, 32, 3, False, 1)
SPARSE = Tiles(2, 32, 64, 32, 2, True, 1)
SHAPES = [(1, 1, 1, 1), (2, 1, 130, 65), (1, 3, 65, 130), (1, 1, 200, 200), (1, 2, 1, 100)]


def fused(batch, heads, length, d, dtype, *, scale=1.0):
    """(B, nh, S, d): a view of a projection's result, with NaN beside it."""
    whole = torch.full((batch, length + 3, 3, heads, d), torch.nan, dtype=dtype)
    part = whole[:, :length, 1].transpose(1, 2)
    return part.copy_(torch.randn(batch, heads, length, d) * scale)


def inputs(shape, d, dv, dtype, **options):
    batch, heads, queries, keys = shape
    sizes = ((queries, d), (keys, d), (keys, dv))
    return [fused(batch, heads, *size, dtype, **options) for size in sizes]


@pytest.fixture
def run(kernel_folder, monkeypatch):
    """Return a function that runs the kernel on the CPU and compares it to float64.

    What it allocates starts as NaN.
    """
    source = (build.HERE / "tile.cuh").read_text() + (build.HERE / "flash_forward.cu").read_text()
    seen = set()

    def emulate(file, name, grid, threads, shared_bytes, device, *args):
        cuda_on_cpu.launch(source, name, kernel_folder, grid, (threads,), shared_bytes, *args)
        seen.add(name)

    def launched(q, k, v, *, causal=False, layout=None, scale=None, tiles=WIDE):
        monkeypatch.setattr(flash, "tiles_for", lambda *_: tiles)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        wanted, wanted_lse = flash.reference(
            *(x.double() for x in (q, k, v)), causal=causal, layout=layout, scale=scale
        )
        flash.check_for_kernel(q, k, v)
        torch.use_deterministic_algorithms(True)  # new tensors start as NaN
        try:
            rows = None if layout is None else layout.rows
            o, lse = flash.launch(q, k, v, causal, scale, rows)
        finally:
            torch.use_deterministic_algorithms(False)
        error = (o.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)
        assert error < (5e-3 if q.dtype is BRAIN else 7e-4), error
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-5)
        assert o.transpose(1, 2).is_contiguous()
        return o, lse

    monkeypatch.setattr(build, "launch", emulate)
    monkeypatch.setattr(flash, "heads_at_once", lambda *_: 2)
    torch.manual_seed(0)
    yield launched
    for name in seen:
        found, loads = cuda_on_cpu.conflicts(source, name, kernel_folder)
        assert found == 0 < loads, "matrix loads meet in banks"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("d", "dv", "dtype", "tiles"), [(64, 64, BRAIN, WIDE), (48, 16, HALF, NARROW)]
)
def test_odd_lengths(run, d, dv, dtype, tiles, shape, causal):
    run(*inputs(shape, d, dv, dtype), causal=causal, tiles=tiles)


@pytest.mark.parametrize(
    ("d", "dv", "dtype"), [(128, 128, BRAIN), (144, 144, BRAIN), (144, 64, HALF), (160, 160, HALF)]
)
def test_tuned_tiles(run, d, dv, dtype):
    tiles, sparse = (flash.tiles_for(d, which) for which in (False, True))
    run(*inputs((1, 1, 150, 170), d, dv, dtype), causal=True, tiles=tiles)
    if d == dv == 144:
        layout = block_layout(torch.rand(5, 6) < 0.4, causal=True)
        tensors = inputs((1, 1, 150, 170), d, dv, dtype)
        run(*tensors, causal=True, layout=layout, tiles=sparse)


def test_scores_that_grow(run):
    """From tile to tile by more than the kernel's slack, in some rows, and by less in others."""
    q, k, v = inputs((1, 2, 70, 300), 64, 64, BRAIN)
    k *= torch.linspace(0, 30, 300)[:, None]
    run(q, k, v)
    run(q, k.flip(2), v)
    q *= torch.linspace(0, 1, 70)[:, None]
    run(q, k, v, causal=True)


def test_scale(run):
    for scale in (1e-3, 0.7):
        run(*inputs((1, 1, 40, 90), 64, 64, BRAIN), scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "density"), [(1, 0.3), (3, 0.2), (3, 0.0)])
def test_layouts(run, heads, density, causal):
    for batch, queries, keys in ((2, 100, 130), (1, 40, 1100)):
        q, k, v = inputs((batch, 3, queries, keys), 64, 64, BRAIN)
        blocks = torch.rand(heads, -(-queries // 32), -(-keys // 32)) < density
        layout = block_layout(blocks if heads > 1 else blocks[0], causal=causal)
        run(q, k, v, layout=layout, causal=causal, tiles=SPARSE)


@pytest.mark.parametrize(
    "tiles", [Tiles(4, 16, 128, 32, 2, True, 1), Tiles(1, 32, 32, 32, 3, True, 1)]
)
def test_strided_layout(run, tiles):
    strided = StridedLayout((4, 8, 16))
    layout = block_layout(strided.blocks, causal=True)
    assert layout.mask(512, 512)[0].equal(strided.mask)
    run(*inputs((1, 2, 512, 512), 32, 32, HALF), layout=layout, causal=True, tiles=tiles)


def test_unseen_keys_are_not_read(run):
    """Whatever they are, as long as no visible key shares their tile."""
    q, k, v = inputs((1, 1, 100, 320), 64, 64, BRAIN)
    blocks = torch.zeros(4, 10, dtype=torch.bool)
    blocks[:, :2] = blocks[0, 6:8] = True
    layout = block_layout(blocks, causal=False)
    expected, _ = run(q, k, v, layout=layout, tiles=SPARSE)
    k[:, :, 64:192] = v[:, :, 64:192] = torch.nan
    found, _ = flash.launch(q, k, v, False, q.shape[-1] ** -0.5, layout.rows)
    assert found.equal(expected)


def test_layout_bits():
    blocks = torch.rand(2, 5, 70) < 0.5
    layout = block_layout(blocks, causal=True)
    assert layout.rows.shape == (2, 5, 3)
    assert layout.columns.shape == (2, 70, 1)
    assert layout.rows.dtype is layout.columns.dtype is torch.int32
    for words, expected in ((layout.rows, blocks), (layout.columns, blocks.mT)):
        bits = words[..., None] >> torch.arange(32) & 1
        assert bits.flatten(-2)[..., : expected.shape[-1]].bool().equal(expected)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_attention(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.double).requires_grad_() for n in (20, 30, 30))
    mask = torch.ones(20, 30, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, mask.tril(10) if causal else mask)
    found = flash_attention(q, k, v, causal=causal)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for x, y in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (found, expected)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, y)


def test_empty_rows():
    q, k, v = (torch.randn(1, 2, n, 16).requires_grad_() for n in (50, 20, 20))
    o, lse = attention_with_lse(q, k, v, causal=True)
    assert (o[:, :, :30] == 0).all()
    assert (lse[:, :, :30] == -math.inf).all()
    for grad in torch.autograd.grad(o.sum(), (q, k, v)):
        assert grad.isfinite().all()


def test_strided_reference():
    torch.manual_seed(0)
    strided = StridedLayout((2, 8, 16))
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    found = strided_attention(q, k, v, block_layout(strided.blocks, causal=True))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, strided.mask))


def test_shapes_without_a_device():
    with FakeTensorMode():
        q = torch.empty(2, 70, 3, 144, dtype=BRAIN, device="cuda").transpose(1, 2)
        o, lse = attention_with_lse(q, q, q)
        assert o.device == lse.device == q.device
        assert o.stride() == (70 * 3 * 144, 144, 3 * 144, 1)
        assert lse.shape == (2, 3, 70)
        assert lse.dtype is torch.float32
    q, k, v = (meta(2, 3, 70, 144), meta(2, 3, 40, 144), meta(2, 3, 40, 60))
    o, lse = attention_with_lse(*(x.requires_grad_() for x in (q, k, v)), causal=True)
    assert o.shape == (2, 3, 70, 60)
    assert o.stride() == (70 * 3 * 64, 64, 3 * 64, 1)
    assert o.requires_grad
    assert not lse.requires_grad
    grads = torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def meta(*shape, dtype=BRAIN):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": meta(2, 3, 64)}, ValueError, "must be"),
        ({"q": meta(2, 2, 8, 64)}, ValueError, "fit"),
        ({"q": meta(2, 3, 8, 32)}, ValueError, "fit"),
        ({"v": meta(2, 3, 9, 64)}, ValueError, "fit"),
        ({"q": meta(2, 3, 0, 64)}, ValueError, "empty"),
        ({"k": meta(2, 3, 0, 64), "v": meta(2, 3, 0, 64)}, ValueError, "empty"),
        ({"q": meta(2, 3, 8, 64, dtype=HALF)}, TypeError, "alike"),
        ({"q": torch.empty(2, 3, 8, 64, dtype=BRAIN)}, ValueError, "are on"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"v": meta(2, 3, 64, 8).mT}, ValueError, "strides"),
        ({"v": meta(2, 3, 8, 68)[..., :64]}, ValueError, "strides"),
        ({"v": meta(2, 3, 8, 80)}, ValueError, "no more than d"),
        (dict.fromkeys("qkv", meta(2, 3, 8, 40)), ValueError, "multiple of 16"),
        (dict.fromkeys("qkv", meta(2, 3, 8, 176)), ValueError, "up to 160"),
        (dict.fromkeys("qkv", meta(2, 3, 8, 64, dtype=torch.float32)), TypeError, "float32"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        attention_with_lse(**{**dict.fromkeys("qkv", meta(2, 3, 8, 64)), **change})


def test_bad_layouts():
    q = torch.randn(1, 3, 70, 16)
    for shape in ((2, 2), (3, 2), (2, 3, 3), (4, 3)):
        with pytest.raises(ValueError, match="layout must have"):
            strided_attention(q, q, q, block_layout(torch.ones(shape).bool(), causal=False))
    with pytest.raises(ValueError, match="layout is on"):
        strided_attention(
            *[meta(1, 3, 32, 16)] * 3, block_layout(torch.ones(1, 1).bool(), causal=True)
        )
    with pytest.raises(TypeError, match="bool"):
        block_layout(torch.ones(3, 3), causal=False)
    for shape in ((3,), (0, 3), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="mask of blocks"):
            block_layout(torch.ones(shape).bool(), causal=False)


def test_shared_memory():
    """Every head dim has tiles that the smallest architecture has room for."""
    for sparse in (False, True):
        for d in range(16, 161, 16):
            assert (
                flash.tiles_for(d, sparse).shared_bytes(d, d) <= min(ARCHITECTURES.values()) * 1024
            )


@pytest.mark.parametrize(
    ("arch", "d", "sparse"),
    [
        *((arch, 64, False) for arch in ARCHITECTURES),
        *(("sm_90a", d, sparse) for d in (128, 144) for sparse in (False, True)),
        ("sm_90a", 64, True),
        ("sm_80", 128, False),
        ("sm_120", 144, False),
    ],
)
def test_compiles(arch, d, sparse):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    tiles, log = flash.tiles_for(d, sparse), io.StringIO()
    text = build.source("flash_forward.cu")
    build.compiled(text, tiles.name(BRAIN, d, d, sparse), arch, log)
    registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    spilled = max(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    assert spilled <= (0 if arch == "sm_90a" else 64), "bytes; the tiles are tuned for sm_90a"
    assert registers * tiles.warps * 32 * tiles.blocks <= 65536
