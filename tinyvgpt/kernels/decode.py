"""Decode attention: one query a sequence against a cache of keys and values.

A cache is filled to `lengths`, which stay on the device, so that one CUDA graph serves all steps of
a sequence. The keys are split over blocks, whose results one of them merges (split-K, as in
Flash-Decoding: Dao et al. 2023). With a layout a query visits its own blocks of keys only. On a CPU
plain PyTorch does the same. Chapter 14 builds this file.

Shapes: B batch · nh heads · S positions that a cache has room for · d numbers of a key · dv of a
value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.kernels import build
from tinyvgpt.kernels.layout import BLOCK, BlockLayout
from tinyvgpt.kernels.tensors import TYPES, in_chunks

COUNTERS = 1 << 18  # 1 MB of them a device
MOST_DIM = 160  # numbers of a key or value


@dataclass(frozen=True)
class Tiles:
    """How the kernel is cut (decode.cu tells), and how many blocks a multiprocessor takes."""

    warps: int
    stages: int
    keys: int
    blocks: int

    def shared_bytes(self, d: int, dv: int, cluster: int = 1) -> int:
        """Shared memory of a block."""
        ring = self.warps * self.stages * self.keys * (chunks(d) + chunks(dv)) * 512
        return ring + (cluster * (dv + 2) * 4 if cluster > 1 else 0)

    def kernel(self, dtype: torch.dtype, d: int, dv: int, cluster: int, layout: bool) -> str:
        """The kernel as C++ spells it."""
        cut = f"{self.warps}, {self.stages}, {self.keys}, {cluster}, {str(layout).lower()}"
        return f"decode<{TYPES[dtype]}, {d}, {dv}, {cut}>"


# By chunks a lane: head dims up to 64, 128 and 160. With fewer (sequence, head) pairs than
# multiprocessors blocks are large, so that there are few results to merge; GPUs with clusters have
# the shared memory for still larger ones.
MANY = {1: Tiles(4, 3, 4, 4), 2: Tiles(4, 3, 2, 4), 3: Tiles(4, 4, 1, 4)}
FEW = {1: Tiles(4, 4, 4, 1), 2: Tiles(4, 4, 2, 1), 3: Tiles(8, 3, 1, 1)}
CLUSTERED = {**FEW, 3: Tiles(8, 5, 1, 1)}
CLUSTER = 16  # blocks that a cluster of compute capability 9.0 has at most


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: BlockLayout | None = None,
    *,
    new: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    overlap: bool = False,
) -> Tensor:
    """Attention of each sequence's last token to the tokens up to it.

    On a GPU tensors are bfloat16 or float16, head dims multiples of 8 up to 160, the last stride is
    1 and others are multiples of 8. There is no backward pass.

    Args:
        q: (B, nh, 1, d) or (B, nh, d).
        k_cache: (B, nh, S, d), read up to `lengths` only.
        v_cache: (B, nh, S, dv).
        lengths: (B,) int32, tokens of each sequence, the query's included. 0 gives 0; a length that
            the cache can't have gives NaN, since to look at it would mean to wait for the device.
        layout: which blocks of positions attend to which, by `block_layout`.
        new: key and value of the query's own token, (B, nh, d) and (B, nh, dv), with or without a
            third axis of 1. They are written to the caches first, at lengths - 1.
        scale: of q·k; 1/√d by default.
        overlap: lets the kernel begin while the stream's former one still runs, where GPUs can (9.0
            and later). That one may make q and `new`, but must leave lengths and caches alone.

    Returns:
        (B, nh, 1, dv) or (B, nh, dv), as q.

    Raises:
        TypeError: for dtypes that don't fit.
        ValueError: for shapes, strides or devices that don't fit.
    """
    given = (q, k_cache, v_cache, lengths, layout)
    return decode_with_lse(*given, new=new, scale=scale, overlap=overlap)[0]


def decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    layout: BlockLayout | None = None,
    *,
    new: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, and the natural log of each softmax's denominator.

    Returns:
        The result and float32 (B, nh, 1) or (B, nh), -inf where a query attends to nothing.
    """
    rows = [x[:, :, 0] if x.ndim == 4 and x.shape[2] == 1 else x for x in (q, *(new or ()))]
    lists = None if layout is None else layout.lists
    check(rows, k_cache, v_cache, lengths, lists)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type not in ("cuda", "meta"):
        o, lse = reference(rows[0], k_cache, v_cache, lengths, lists, new=rows[1:], scale=scale)
    else:
        check_for_kernel(rows, k_cache, v_cache)
        caches = (k_cache, v_cache, lengths.contiguous(), lists, scale, overlap)
        o, lse = append_op(*rows, *caches) if new else decode_op(*rows, *caches)
    return (o[:, :, None], lse[:, :, None]) if q.ndim == 4 else (o, lse)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lists: Tensor | None = None,
    *,
    new: Sequence[Tensor] = (),
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_with_lse` in plain PyTorch, for q (B, nh, d); sums are float32, or float64 as q.

    `lists` are a layout's.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, _, capacity, _ = k_cache.shape
    wrong = ((lengths < 0) | (lengths > capacity))[:, None]  # (B, 1)
    if new:
        each, last = torch.arange(batch, device=q.device), (lengths - 1).clamp(0, capacity - 1)
        skip = (wrong | (lengths < 1)[:, None])[..., None]
        for row, kept in zip(new, (k_cache, v_cache), strict=True):
            kept[each, :, last] = torch.where(skip, kept[each, :, last], row)

    seen = torch.arange(capacity, device=q.device) < lengths[:, None, None]  # (B, 1, S)
    if lists is not None:
        row = lists[:, (lengths - 1).clamp(0, capacity - 1) // BLOCK].mT  # (nh or 1, 2 + most, B)
        count, blocks = row[:, :2].sum(1, keepdim=True), lists.shape[1]
        listed = torch.arange(row.shape[1] - 2, device=q.device)[:, None] < count
        where = torch.where(listed, row[:, 2:], blocks).long()
        seen_blocks = listed.new_zeros(len(row), blocks + 1, batch).scatter_(1, where, True)
        seen_keys = seen_blocks[:, :blocks].repeat_interleave(BLOCK, 1)[:, :capacity]
        seen = seen & seen_keys.permute(2, 0, 1)

    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (k_cache.to(exact) @ q.to(exact)[..., None])[..., 0] * scale  # (B, nh, S)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~seen, 0)
    values = v_cache.to(exact).masked_fill(~seen[..., None], 0)
    o = (weights[:, :, None] @ values)[:, :, 0]
    o, lse = o.masked_fill(wrong[..., None], torch.nan), lse.masked_fill(wrong, torch.nan)
    return o.to(v_cache.dtype), lse


def check(
    rows: list[Tensor], k_cache: Tensor, v_cache: Tensor, lengths: Tensor, lists: Tensor | None
) -> None:
    """Raises for what makes no sense on any device; rows are q and perhaps new key and value."""
    q, *new = rows
    if k_cache.ndim != 4 or v_cache.ndim != 4 or q.ndim != 3:
        raise ValueError(
            f"q must be (B, nh, 1, d) or (B, nh, d) and caches (B, nh, S, d), "
            f"not {tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    batch, heads, capacity, d = k_cache.shape
    if v_cache.shape[:3] != k_cache.shape[:3] or q.shape != (batch, heads, d):
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} don't fit each other"
        )
    if not k_cache.numel() or not v_cache.numel():
        raise ValueError(f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} are empty")
    if new and [x.shape for x in new] != [q.shape, (batch, heads, v_cache.shape[-1])]:
        raise ValueError(f"new key and value {[tuple(x.shape) for x in new]} don't fit the caches")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be ({batch},), not {tuple(lengths.shape)}")
    if lists is not None and (len(lists) not in (1, heads) or lists.shape[1] * BLOCK < capacity):
        raise ValueError(
            f"the layout, of {len(lists)} heads and {lists.shape[1] * BLOCK} positions, must have "
            f"1 or {heads} heads and at least {capacity} positions"
        )
    others = [*new, k_cache, v_cache]
    if not q.is_floating_point() or any(x.dtype != q.dtype for x in others):
        raise TypeError(f"q, keys and values are {[str(x.dtype) for x in (q, *others)]}, not alike")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be int32, not {lengths.dtype}")
    indices = [lengths] if lists is None else [lengths, lists]
    if any(x.device != q.device for x in (*others, *indices)):
        raise ValueError(f"tensors are not all on {q.device}")


def check_for_kernel(rows: list[Tensor], k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises for what the kernel can't do."""
    batch, heads, _, d = k_cache.shape
    dv = v_cache.shape[-1]
    if k_cache.dtype not in TYPES:
        raise TypeError(f"the kernel takes bfloat16 and float16, not {k_cache.dtype}")
    if d % 8 or dv % 8 or max(d, dv) > MOST_DIM:
        raise ValueError(f"head dims must be multiples of 8 up to {MOST_DIM}, not {d} and {dv}")
    if batch * heads > 1 << 16:
        raise ValueError(f"{batch} sequences of {heads} heads are more than 65536 (sequence, head)")
    for x in (*rows, k_cache, v_cache):
        if not in_chunks(x):
            raise ValueError(f"strides must be multiples of 8 and end in 1, not {x.stride()}")
        if x.ndim == 4 and x.stride(2) * x.shape[2] >= 1 << 34:
            raise ValueError(f"a sequence of {x.shape[2]} keys of stride {x.stride(2)} is too long")
        if len(rows) == 3 and x.ndim == 4 and expanded(x):
            raise ValueError(f"a cache to be written to can't be expanded: strides {x.stride()}")


def expanded(x: Tensor) -> bool:
    """Whether several of its places are one."""
    return any(step == 0 < size - 1 for step, size in zip(x.stride(), x.shape, strict=True))


def chunks(d: int) -> int:
    """Chunks of 8 numbers that each of 8 lanes has of a row of d."""
    return -(-d // 64)


@cache
def splits(pairs: int, keys: int, slots: int) -> int:
    """The fewest blocks for each of `pairs` (sequence, head) that keep the device busy.

    It takes `slots` blocks at a time; those of the last wave may leave it half empty.
    """
    counts = range(1, max(1, min(-(-keys // 64), 128)) + 1)
    waves = [pairs * count / slots for count in counts]
    busy = [wave / math.ceil(wave) for wave in waves]
    return next(count for count, part in zip(counts, busy, strict=True) if part > 0.95 * max(busy))


def plan(pairs: int, keys: int, lane_chunks: int, device: torch.device) -> tuple[Tiles, int, int]:
    """How `pairs` (sequence, head) of up to `keys` keys are attended to.

    Returns:
        Tiles, in how many parts to split, and how many blocks a cluster has: all parts, where there
        are clusters and parts are few, or 1.
    """
    found = torch.cuda.get_device_properties(device)
    few = pairs < found.multi_processor_count
    clusters = few and (found.major, found.minor) == (9, 0)
    tiles = (CLUSTERED if clusters else FEW if few else MANY)[lane_chunks]
    parts = splits(pairs, keys, found.multi_processor_count * tiles.blocks)
    if not clusters:
        return tiles, parts, 1
    parts = min(parts, CLUSTER)
    return tiles, parts, parts


class Counters:
    """Zeros on a device, of which each call takes its own, by turns.

    A kernel counts in them and leaves them zero. So calls on several streams, or in graphs that run
    at the same time, do not meet in one counter unless there are very many of them.
    """

    def __init__(self, device: torch.device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call decode_attention once before a CUDA graph captures it")
        self.zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)  # other streams may be the first to use them
        self.start, self.lock = 0, Lock()

    def take(self, count: int) -> Tensor:
        """The next `count` of them."""
        with self.lock:
            start = self.start if self.start + count <= COUNTERS else 0
            self.start = start + count
        return self.zeros[start : self.start]


counters = cache(Counters)  # of a device


def launch(
    rows: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lists: Tensor | None,
    scale: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queues the kernel; rows are q and perhaps the new key and value."""
    batch, heads, capacity, d = k_cache.shape
    device, dv, pairs = k_cache.device, v_cache.shape[-1], batch * heads
    if any(x.data_ptr() % 16 for x in (*rows, k_cache, v_cache)):
        raise ValueError("tensors must begin at multiples of 16 bytes")
    keys = capacity if lists is None else min(capacity, (lists.shape[2] - 2) * BLOCK)
    tiles, parts, cluster = plan(pairs, keys, chunks(max(d, dv)), device)
    o = v_cache.new_empty(batch, heads, dv)
    lse = torch.empty(batch, heads, device=device)
    apart = parts > 1 and cluster == 1  # so that they meet in device memory
    partials = torch.empty(pairs * parts * (dv + 2) if apart else 0, device=device)
    arrived = counters(device).take(pairs) if apart else None

    q, k_new, v_new = rows if len(rows) == 3 else (rows[0], None, None)
    strides = [x.stride()[:-1] if x is not None else (0, 0) for x in (q, k_cache, v_cache)]
    strides += [(0, 0) if x is None else x.stride()[:2] for x in (k_new, v_new)]
    by_head = 0 if lists is None or len(lists) == 1 else lists.stride(0)
    strides.append((by_head, 0 if lists is None else lists.stride(1)))
    name = tiles.kernel(q.dtype, d, dv, cluster, lists is not None)
    tensors = (q, k_cache, v_cache, k_new, v_new, lengths, lists, o, lse, partials, arrived)
    build.launch(
        "decode.cu", name, (parts, heads, batch), 32 * tiles.warps,
        tiles.shared_bytes(d, dv, cluster), device, *tensors, np.int32(capacity),
        *(np.int64(step) for x in strides for step in x), np.float32(scale), cluster=cluster,
        overlap=overlap,
    )  # fmt: skip
    return o, lse


@torch.library.custom_op("tinyvgpt::decode_attention", mutates_args=(), device_types="cuda")
def decode_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lists: Tensor | None,
    scale: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """The kernel as an op of PyTorch: q (B, nh, d) to (B, nh, dv) and log-sum-exp (B, nh)."""
    return launch([q], k_cache, v_cache, lengths, lists, scale, overlap)


@torch.library.custom_op(
    "tinyvgpt::decode_append", mutates_args=("k_cache", "v_cache"), device_types="cuda"
)
def append_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    lists: Tensor | None,
    scale: float,
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """`decode_op`, which writes k (B, nh, d) and v (B, nh, dv) to the caches."""
    return launch([q, k, v], k_cache, v_cache, lengths, lists, scale, overlap)


@decode_op.register_fake
def _(q, k_cache, v_cache, lengths, lists, scale, overlap=False):
    return v_cache.new_empty(*q.shape[:2], v_cache.shape[-1]), q.new_empty(
        q.shape[:2], dtype=torch.float32
    )


@append_op.register_fake
def _(q, k, v, k_cache, v_cache, lengths, lists, scale, overlap=False):
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:2], dtype=torch.float32
    )
