"""Decode attention: its kernel on a CPU, its reference, and what it refuses."""

import io
import re
from types import SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import build, decode
from tinyvgpt.kernels.decode import Tiles, decode_attention, decode_with_lse, reference
from tinyvgpt.kernels.layout import block_layout

ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}  # KB a block
TUNED = [(64, 64), (128, 128), (144, 144)]
SMALL = Tiles(warps=2, stages=2, keys=1, blocks=1)


def cache(batch, heads, capacity, d, dtype, *, spare=0):
    """Random (B, nh, S, d), a view of a larger tensor of NaN if there is something to spare."""
    whole = torch.full((batch, heads, capacity + spare, d + 8 * spare), torch.nan, dtype=dtype)
    part = whole[:, :, :capacity, :d]
    return part.copy_(torch.randn(batch, heads, capacity, d))


def fused(batch, heads, *dims, dtype):
    """Rows (B, nh, d) that are views of one projection's result."""
    together = torch.randn(batch, 1, heads * sum(dims)).to(dtype)
    parts = together.split([heads * d for d in dims], dim=-1)
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2)[:, :, 0] for x in parts]


def exact(q, k, v, lengths, layout=None, new=(), scale=None):
    """The answer in float64."""
    q, k, v, *new = (x.double() for x in (q, k, v, *new))
    return reference(q, k, v, lengths, layout, new=new, scale=scale)


def forget(k, v, lengths, layout=None):
    """Turns what must not be read to NaN."""
    for x in (k, v):
        position = torch.arange(x.shape[2])
        for b, length in enumerate(lengths.tolist()):
            x[b, :, max(length, 0) :] = torch.nan
            for h in range(x.shape[1]) if layout is not None and length > 0 else ():
                earlier, own, *blocks = layout[h % len(layout), (length - 1) // 32].tolist()
                listed = torch.tensor(blocks[: earlier + own])
                unseen = torch.isin(position // 32, listed, invert=True)
                x[b, h, unseen] = torch.nan


def close(got, wanted, dtype):
    scale = wanted.abs().max().clamp_min(1e-3)
    return torch.allclose(
        got.double() / scale, wanted / scale, atol=2**-8 if dtype is torch.bfloat16 else 2**-11
    )


@pytest.fixture
def run(kernel_folder, monkeypatch):
    """Return a function that does what decode.launch does, with the kernel run on the CPU.

    What it allocates starts as NaN.
    """
    source = (build.HERE / "tile.cuh").read_text() + (build.HERE / "decode.cu").read_text()
    zeros = torch.zeros(1000, dtype=torch.int32)

    def emulate(file, name, grid, threads, shared_bytes, device, *args, cluster, overlap):
        cuda_on_cpu.launch(source, name, kernel_folder, grid, (threads,), shared_bytes, *args)

    def launched(
        q, k, v, lengths, layout=None, *, new=(), scale=None, tiles=SMALL, parts=1, cluster=False
    ):
        monkeypatch.setattr(decode, "plan", lambda *_: (tiles, parts, parts if cluster else 1))
        torch.use_deterministic_algorithms(True)  # new tensors start as NaN
        try:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return decode.launch([q, *new], k, v, lengths, layout, scale)
        finally:
            torch.use_deterministic_algorithms(False)
            assert not zeros.any(), "counters are not left at zero"

    monkeypatch.setattr(build, "launch", emulate)
    monkeypatch.setattr(decode, "counters", lambda _: SimpleNamespace(take=lambda n: zeros[:n]))
    torch.manual_seed(0)
    return launched


def lengths_of(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("d", "dv", "dtype", "tiles", "parts"),
    [
        (64, 64, torch.bfloat16, SMALL, 1),
        (64, 64, torch.float16, Tiles(2, 3, 2, 1), 3),
        (16, 16, torch.bfloat16, SMALL, 2),
        (128, 128, torch.bfloat16, Tiles(2, 3, 2, 1), 5),
        (144, 144, torch.float16, Tiles(4, 4, 1, 1), 4),
        (144, 64, torch.bfloat16, Tiles(3, 2, 1, 1), 2),
        (160, 40, torch.bfloat16, Tiles(4, 2, 2, 1), 7),
        (72, 160, torch.float16, Tiles(3, 2, 1, 1), 2),
    ],
)
def test_kernel(run, d, dv, dtype, tiles, parts):
    lengths = lengths_of(0, 1, 17, 33, 123, -1, 124)
    q, _ = fused(7, 2, d, 8, dtype=dtype)
    k, v = cache(7, 2, 123, d, dtype, spare=1), cache(7, 2, 123, dv, dtype)
    wanted, wanted_lse = exact(q, k, v, lengths)
    forget(k, v, lengths)
    o, lse = run(q, k, v, lengths, tiles=tiles, parts=parts)
    assert o.shape == (7, 2, dv)
    assert o.isnan().nonzero()[:, 0].unique().tolist() == [5, 6]  # no such length
    assert lse.isnan().nonzero()[:, 0].unique().tolist() == [5, 6]
    assert not o[0].any()
    assert (lse[0] == -torch.inf).all()
    assert close(o[1:5], wanted[1:5], dtype)
    torch.testing.assert_close(lse[1:5].double(), wanted_lse[1:5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("d", "dtype", "tiles", "blocks"),
    [(64, torch.bfloat16, SMALL, 8), (144, torch.float16, Tiles(3, 2, 1, 1), 5)],
)
def test_kernel_in_clusters(run, d, dtype, tiles, blocks):
    """Of blocks some of which have nothing to do where a sequence is short."""
    lengths = lengths_of(0, 1, 17, 33, 123, -1)
    q, *new = fused(6, 2, d, d, d, dtype=dtype)
    k, v = (cache(6, 2, 123, d, dtype) for _ in range(2))
    wanted, wanted_lse = exact(q, k, v, lengths, new=new)
    forget(k, v, lengths)
    o, lse = run(q, k, v, lengths, new=new, tiles=tiles, parts=blocks, cluster=True)
    assert o.isnan().nonzero()[:, 0].unique().tolist() == [5]
    assert not o[0].any()
    assert close(o[1:5], wanted[1:5], dtype)
    torch.testing.assert_close(lse[1:5].double(), wanted_lse[1:5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shipped", [decode.MANY, decode.FEW])
def test_kernel_as_tuned(run, shipped):
    for lane_chunks, d in ((1, 64), (2, 128), (3, 144)):
        lengths = lengths_of(100)
        q = torch.randn(1, 1, d).bfloat16()
        k, v = (cache(1, 1, 128, d, q.dtype) for _ in range(2))
        wanted, _ = exact(q, k, v, lengths)
        forget(k, v, lengths)
        o, _ = run(q, k, v, lengths, tiles=shipped[lane_chunks], parts=2)
        assert close(o, wanted, q.dtype)


def test_kernel_over_random_shapes(run):
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(20):
        dtype = pick(torch.bfloat16, torch.float16)
        d, dv = pick((64, 64), (48, 32), (144, 144))
        batch, heads, capacity = pick(1, 2), pick(1, 2), pick(1, 5, 32, 33, 64, 99)
        lengths = torch.randint(1, capacity + 1, (batch,), generator=generator).int()
        q, k_new, v_new = fused(batch, heads, d, d, dv, dtype=dtype)
        new = pick((), (k_new, v_new))
        k, v = (cache(batch, heads, capacity, n, dtype, spare=pick(0, 1)) for n in (d, dv))
        scale = pick(None, 0.3, -1.0)
        wanted, wanted_lse = exact(q, k, v, lengths, new=new, scale=scale)
        forget(k, v, lengths - len(new) // 2)
        tiles = pick(SMALL, Tiles(3, 2, 2, 1)) if d != 144 else Tiles(3, 3, 1, 1)
        o, lse = run(q, k, v, lengths, new=new, scale=scale, tiles=tiles, parts=pick(1, 2, 3, 6))
        assert close(o, wanted, dtype)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-4)
        if new:
            each = torch.arange(batch)
            assert k[each, :, lengths.long() - 1].equal(k_new)
            assert v[each, :, lengths.long() - 1].equal(v_new)
        forget(k, v, lengths - len(new) // 2)  # nothing else was written
        for x in (k, v):
            assert x.isnan().sum() == sum(
                capacity - n for n in (lengths - len(new) // 2).tolist()
            ) * (heads * x.shape[-1])


def test_kernel_with_large_scores(run):
    q = torch.full((1, 1, 64), 200.0).bfloat16()
    k, v = (cache(1, 1, 70, 64, q.dtype) for _ in range(2))
    k[0, 0, 40] = 300.0
    for sign in (1, -1):
        wanted, wanted_lse = exact(q, sign * k, v, lengths_of(70))
        o, lse = run(q, sign * k, v, lengths_of(70), parts=3)
        assert close(o, wanted, q.dtype)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=0)


def test_kernel_in_many_parts(run):
    q = torch.randn(1, 1, 16).half()
    k, v = (cache(1, 1, 400, 16, q.dtype) for _ in range(2))
    wanted, wanted_lse = exact(q, k, v, lengths_of(331))
    o, lse = run(q, k, v, lengths_of(331), parts=23)  # 21 of 16 keys, 11 of them a warp's
    assert close(o, wanted, q.dtype)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=0)


def test_kernel_repeats_itself_exactly(run):
    q = torch.randn(2, 2, 64).half()
    k, v = (cache(2, 2, 150, 64, q.dtype) for _ in range(2))
    first, again = (run(q, k, v, lengths_of(150, 90), parts=4) for _ in range(2))
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])


def random_blocks(*shape):
    blocks = torch.rand(shape) < 0.4
    blocks[..., 2, :] = False  # a row that sees nothing
    return blocks


@pytest.mark.parametrize(
    "blocks",
    [
        StridedLayout((4, 8, 8)).blocks,
        random_blocks(6, 6),
        random_blocks(2, 6, 6),
        torch.zeros(6, 6, dtype=torch.bool),
    ],
)
def test_kernel_with_a_layout(run, blocks):
    capacity = 32 * blocks.shape[-1] - 5
    layout = block_layout(blocks, causal=True).lists
    for dtype, parts, append in ((torch.bfloat16, 1, False), (torch.float16, 3, True)):
        lengths = lengths_of(0, 1, 33, 64, 90, capacity - 1, capacity)
        q, *new = fused(7, 2, 64, 64, 64, dtype=dtype)
        new = new if append else []
        k, v = (cache(7, 2, capacity, 64, dtype) for _ in range(2))
        wanted, wanted_lse = exact(q, k, v, lengths, layout, new=new)
        forget(k, v, lengths, layout)
        o, lse = run(q, k, v, lengths, layout, new=new, parts=parts)
        assert close(o, wanted, dtype)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-4, rtol=1e-4)
        if append:
            assert k[torch.arange(1, 7), :, lengths[1:].long() - 1].equal(new[0][1:])


def test_rows_of_a_strided_layout():
    strided = StridedLayout((4, 16, 16))
    rows = block_layout(strided.blocks, causal=True).lists
    assert rows.equal(strided.packed().lists)
    assert rows.shape == (1, 32, 2 + int(strided.blocks.sum(1).max()))
    for position in (0, 31, 500, 1023):
        earlier, own, *blocks = rows[0, position // 32].tolist()
        keys = [32 * block + i for block in blocks[: earlier + own] for i in range(32)]
        assert [key for key in keys if key <= position] == strided.keys(position).tolist()


def test_reference_is_attention(run):
    q, k, v = (torch.randn(2, 3, n, 16) for n in (1, 128, 128))
    lengths, strided = lengths_of(70, 128), StridedLayout((2, 8, 8))
    for layout in (None, strided.packed()):
        o, lse = decode_with_lse(q, k, v, lengths, layout)
        assert o.shape == (2, 3, 1, 16)
        assert lse.shape == (2, 3, 1)
        for b, n in enumerate(lengths.tolist()):
            keys = torch.arange(n) if layout is None else strided.keys(n - 1)
            parts = (q[b], k[b, :, keys], v[b, :, keys])
            wanted = torch.nn.functional.scaled_dot_product_attention(*parts)
            torch.testing.assert_close(o[b], wanted)
            scores = (parts[0] @ parts[1].mT)[:, 0] / 4
            torch.testing.assert_close(lse[b, :, 0], scores.logsumexp(-1))


def test_on_a_cpu_new_keys_are_kept():
    q, k, v = (torch.randn(2, 3, n, 16) for n in (1, 20, 20))
    k_new, v_new = torch.randn(2, 2, 3, 1, 16)
    before, lengths = k.clone(), lengths_of(0, 7)
    o = decode_attention(q[:, :, 0], k, v, lengths, new=(k_new, v_new))
    assert k[1, :, 6].equal(k_new[1, :, 0])
    assert v[1, :, 6].equal(v_new[1, :, 0])
    k[1, :, 6] = before[1, :, 6]
    assert k.equal(before)
    assert not o[0].any()


def test_splits_fill_the_device():
    for pairs, keys, slots, wanted in (
        (1024, 4096, 528, 1),  # 1.94 waves
        (256, 4096, 528, 2),
        (600, 4096, 528, 6),  # 6.8 waves
        (16, 4096, 132, 8),
        (4, 4096, 132, 32),
        (1, 10, 132, 1),
        (1, 0, 132, 1),
    ):
        assert decode.splits(pairs, keys, slots) == wanted


def fakes(q_stride=None, dtype=torch.bfloat16, d=64, dv=64, device="meta"):
    q = torch.empty_strided((2, 3, 1, d), q_stride or (3 * d, d, d, 1), dtype=dtype, device=device)
    k = torch.empty(2, 3, 40, d, dtype=dtype, device=device)
    v = torch.empty(2, 3, 40, dv, dtype=dtype, device=device)
    return q, k, v, torch.ones(2, dtype=torch.int32, device=device)


def test_fake_tensors():
    with FakeTensorMode():
        q, k, v, lengths = fakes(dv=32)
        for new in (None, (q, v[:, :, :1])):
            o, lse = decode_with_lse(q, k, v, lengths, new=new)
            assert (o.shape, o.stride()[:2], o.dtype) == ((2, 3, 1, 32), (96, 32), q.dtype)
            assert (lse.shape, lse.stride()[:2], lse.dtype) == ((2, 3, 1), (3, 1), torch.float32)
            assert o.is_meta


def test_bad_input_for_the_kernel():
    with FakeTensorMode():
        for error, message, changes in (
            (TypeError, "takes bfloat16", {"dtype": torch.float32}),
            (ValueError, "multiples of 8 up to 160", {"d": 60}),
            (ValueError, "multiples of 8 up to 160", {"d": 168}),
            (ValueError, "multiples of 8 up to 160", {"dv": 12}),
            (ValueError, "strides", {"q_stride": (192, 1, 64, 3)}),
            (ValueError, "strides", {"q_stride": (201, 67, 64, 1)}),
        ):
            with pytest.raises(error, match=message):
                decode_attention(*fakes(**changes))
        q, k, v, lengths = fakes()
        with pytest.raises(ValueError, match="can't be expanded"):
            decode_attention(q, k[:, :, :1].expand(k.shape), v, lengths, new=(q, q))
        with pytest.raises(ValueError, match="65536"):
            decode_attention(*(x[:1].expand(30000, *x.shape[1:]) for x in (q, k, v, lengths)))


def test_bad_input():
    q, k, v, lengths = fakes(device="cpu", dtype=torch.float32)

    def of(shape, device="cpu"):
        lists = block_layout(torch.ones(shape) > 0, causal=True).lists.to(device)
        return SimpleNamespace(lists=lists)

    new = (q, v[:, :, :1])
    decode_attention(q, k, v, lengths, of((2, 2)), new=new)
    meta = lengths.to("meta")
    for error, message, args, kwargs in (
        (ValueError, "q must be", (q[0, 0], k, v, lengths), {}),
        (ValueError, "q must be", (k, k, v, lengths), {}),
        (ValueError, "q must be", (q, k[0], v, lengths), {}),
        (ValueError, "fit each other", (q[:1], k, v, lengths), {}),
        (ValueError, "fit each other", (q[..., :32], k, v, lengths), {}),
        (ValueError, "fit each other", (q, k, v[:, :, :9], lengths), {}),
        (ValueError, "empty", (q, k[:, :, :0], v[:, :, :0], lengths), {}),
        (ValueError, "new key", (q, k, v, lengths), {"new": (q[:1], q)}),
        (ValueError, "lengths must be", (q, k, v, lengths[:1]), {}),
        (TypeError, "int32", (q, k, v, lengths.long()), {}),
        (TypeError, "alike", (q.half(), k, v, lengths), {}),
        (TypeError, "alike", (q, k, v, lengths), {"new": (q.half(), q.half())}),
        (ValueError, "all on cpu", (q, k, v, meta), {}),
        (ValueError, "all on cpu", (q, k, v, lengths, of((2, 2), device="meta")), {}),
        (ValueError, "32 positions", (q, k, v, lengths, of((1, 1))), {}),
        (ValueError, "2 heads", (q, k, v, lengths, of((2, 2, 2))), {}),
    ):
        with pytest.raises(error, match=message):
            decode_attention(*args, **kwargs)


def test_tensors_that_begin_askew(run):
    q, k, v, lengths = fakes(device="cpu")
    askew = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(2, 3, 64)
    with pytest.raises(ValueError, match="16 bytes"):
        run(askew, k, v, lengths)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    text = build.source("decode.cu")
    cases = [(decode.MANY, 1), (decode.FEW, 1)]
    if arch == "sm_90a":
        cases.append((decode.CLUSTERED, decode.CLUSTER))
    for shipped, cluster in cases:
        for d, dv in TUNED:
            tiles = shipped[decode.chunks(d)]
            assert tiles.shared_bytes(d, dv, cluster) <= ARCHITECTURES[arch] * 1024
            log = io.StringIO()
            name = tiles.kernel(torch.bfloat16, d, dv, cluster, False)
            build.compiled(text, name, arch, log)
            registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
            assert re.findall(r"(\d+) bytes spill", log.getvalue()) == ["0", "0"]
            assert registers * tiles.warps * 32 * tiles.blocks <= 65536
