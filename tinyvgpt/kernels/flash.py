"""Attention on tensor cores over a list of key tiles: full, causal and block-sparse.

A whole row of scores is never kept (Dao et al. 2022; Dao 2023, FlashAttention-2). One kernel serves
all three: what differs is the list. On a CPU plain PyTorch does the same. Chapter 14 builds this
file and flash_forward.cu; the gradients are in flash_backward.py.

Shapes: B batch · nh heads · Sq queries · Sk keys · d numbers of a query or key · dv of a value.
"""

import math
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyvgpt.kernels import build
from tinyvgpt.kernels.flash_backward import EVERY, flash_backward_op
from tinyvgpt.kernels.layout import BLOCK, BlockLayout
from tinyvgpt.kernels.tensors import TYPES, in_chunks, row_numbers, steps


@dataclass(frozen=True)
class Tiles:
    """How a block of threads cuts its work; flash_forward.cu says what each means."""

    warps: int  # of a block
    rows: int  # queries of a warp: 16 or 32
    tile: int  # keys in shared memory at a time
    step: int  # of these, keys whose scores are in registers at a time
    stages: int  # tiles in shared memory or on their way there
    held: bool  # whether the queries stay in registers
    blocks: int  # that a multiprocessor should have registers for

    def shared_bytes(self, d: int, dv: int) -> int:
        """Shared memory of a block: its queries, and the stages of keys and values."""
        row_q, row_v = (2 * row_numbers(n) for n in (d, dv))
        return self.warps * self.rows * row_q + self.stages * self.tile * (row_q + row_v)

    def name(self, dtype: torch.dtype, d: int, dv: int, sparse: bool) -> str:
        """The kernel, as C++ spells it."""
        numbers = (d, dv, *astuple(self), sparse)
        return f"flash_forward<{TYPES[dtype]}, {', '.join(str(int(n)) for n in numbers)}>"


# By head dims up to so many. With a layout, a warp takes one block of its queries.
DENSE = {
    64: Tiles(4, 32, 64, 64, 2, True, 2),
    96: Tiles(4, 32, 64, 32, 2, True, 2),
    128: Tiles(4, 32, 48, 48, 2, False, 2),
    144: Tiles(4, 32, 32, 32, 2, False, 2),
    160: Tiles(4, 32, 32, 16, 2, False, 2),
}
SPARSE = {
    64: Tiles(2, 32, 64, 32, 2, True, 4),
    160: Tiles(4, 16, 32, 32, 2, True, 2),
}


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention without a matrix of scores (Dao 2023, FlashAttention-2).

    On a GPU tensors are bfloat16 or float16, d is a multiple of 16 up to 160 and dv at most d; the
    last stride is 1 and others are multiples of 8. Values of other dv than multiples of 16 are
    copied and padded.

    Args:
        q: queries (B, nh, Sq, d).
        k: keys (B, nh, Sk, d).
        v: values (B, nh, Sk, dv).
        causal: query i sees keys 0 … Sk - Sq + i (aligned at the end).
        scale: of q·k, above 0; 1/√d by default.

    Returns:
        (B, nh, Sq, dv), stored as (B, Sq, nh, dv); 0 where a query sees no key.

    Raises:
        TypeError: for dtypes that don't fit.
        ValueError: for shapes, strides, scales or devices that don't fit.
    """
    return attention_with_lse(q, k, v, causal=causal, scale=scale)[0]


def strided_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None = None
) -> Tensor:
    """`flash_attention` within the blocks of a layout (Child et al. 2019): others cost nothing.

    Args:
        q: queries (B, nh, Sq, d).
        k: keys (B, nh, Sk, d).
        v: values (B, nh, Sk, dv).
        layout: by `block_layout`, of ceil(Sq / 32) by ceil(Sk / 32) blocks.
        scale: of q·k, above 0; 1/√d by default.

    Returns:
        (B, nh, Sq, dv), stored as (B, Sq, nh, dv); 0 where a query sees no key.

    Raises:
        TypeError: for dtypes that don't fit.
        ValueError: for shapes, strides, scales, layouts or devices that don't fit.
    """
    return attention_with_lse(q, k, v, layout=layout, scale=scale)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    layout: BlockLayout | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and the natural log of each softmax's denominator.

    Returns:
        The result, and (B, nh, Sq) of at least float32, -inf where a query sees no key; no
        gradients pass through the latter.
    """
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0, not {scale}")
    if layout is not None:
        check_layout(q, k, layout)
        causal = layout.causal
    if q.device.type not in ("cuda", "meta"):
        return reference(q, k, v, causal=causal, layout=layout, scale=scale)
    lists = (None, None) if layout is None else (layout.rows, layout.columns)
    dv = v.shape[-1]
    if dv % 16 == 0:
        return flash_forward_op(q, k, v, causal, scale, *lists)
    o, lse = flash_forward_op(q, k, F.pad(v, (0, -dv % 16)), causal, scale, *lists)
    return o[..., :dv], lse


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    layout: BlockLayout | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in plain PyTorch; sums are float32, or float64 as q."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys = q.shape[2], k.shape[2]
    if layout is not None:
        seen = layout.mask(queries, keys)
    else:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        seen = seen.tril(keys - queries) if causal else seen
    scores = (scale * q.to(exact) @ k.to(exact).mT).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1).detach()
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(0.5)  # 1, but with a gradient
    o = (weights @ v.to(exact)).to(v.dtype)
    return o.transpose(1, 2).contiguous().transpose(1, 2), lse


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for what makes no sense on any device."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"q, k and v must be (B, nh, S, d), not {shapes}")
    batch, heads, _, d = q.shape
    if k.shape != (batch, heads, k.shape[2], d) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{shapes} don't fit each other")
    if not q.numel() or not v.numel():
        raise ValueError(f"{shapes}: one is empty")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not alike")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device} and {v.device}")


def check_layout(q: Tensor, k: Tensor, layout: BlockLayout) -> None:
    """Raises if a layout doesn't fit queries and keys."""
    heads, *blocks = layout.blocks.shape
    wanted = [math.ceil(x.shape[2] / BLOCK) for x in (q, k)]
    if heads not in (1, q.shape[1]) or blocks != wanted:
        raise ValueError(
            f"the layout must have 1 or {q.shape[1]} heads of {wanted[0]} × {wanted[1]} blocks, "
            f"not {heads} of {blocks[0]} × {blocks[1]}"
        )
    if layout.blocks.device != q.device:
        raise ValueError(f"the layout is on {layout.blocks.device}, q on {q.device}")


def check_for_kernel(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for what the kernel can't do."""
    d, dv = q.shape[-1], v.shape[-1]
    if q.dtype not in TYPES:
        raise TypeError(f"the kernel takes bfloat16 and float16, not {q.dtype}")
    if d % 16 or d > 160 or dv % 16 or dv > d:
        raise ValueError(
            f"d must be a multiple of 16 up to 160 and dv one, too, no more than d; "
            f"not {d} and {dv}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not in_chunks(x) or x.stride(-2) >= 1 << 31:
            raise ValueError(
                f"{name}'s strides must be multiples of 8 below 2³¹ and end in 1, not {x.stride()}"
            )


def tiles_for(d: int, sparse: bool) -> Tiles:
    """The tiles for a head dim."""
    return next(tiles for most, tiles in (SPARSE if sparse else DENSE).items() if d <= most)


@cache
def heads_at_once(bytes_a_head: int, device: torch.device) -> int:
    """How many heads' keys and values half of the L2 cache holds; at least one."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, size // 2 // bytes_a_head)


def launch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queues the kernel."""
    (batch, heads, queries, d), (keys, dv) = q.shape, v.shape[2:]
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        raise ValueError("q, k and v must begin at multiples of 16 bytes")
    o = v.new_empty(batch, queries, heads, dv).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    tiles = tiles_for(d, rows is not None)
    pairs, at_once = batch * heads, heads_at_once(2 * keys * (d + dv), q.device)
    times = math.ceil(pairs / at_once)
    grid = (math.ceil(pairs / times), math.ceil(queries / (tiles.warps * tiles.rows)), times)
    behind = keys - queries if causal else EVERY
    by_head, layout_rows, words = 0, 0, 0
    if rows is not None:
        layout_rows, words = rows.shape[1:]
        by_head = layout_rows * words if len(rows) > 1 else 0
    sizes = (batch, heads, queries, keys, behind, layout_rows, words)
    strides = [steps(x) for x in (q, k, v, o)]
    row_strides, outer = [x[2] for x in strides], [step for x in strides for step in x[:2]]
    build.launch(
        "flash_forward.cu", tiles.name(q.dtype, d, dv, rows is not None), grid,
        32 * tiles.warps, tiles.shared_bytes(d, dv), q.device, q, k, v, rows, o, lse,
        *map(np.int32, (*sizes, *row_strides)), *map(np.int64, (*outer, by_head)),
        np.float32(scale * math.log2(math.e)),
    )  # fmt: skip
    return o, lse


@torch.library.custom_op("tinyvgpt::flash_forward", mutates_args=(), device_types="cuda")
def flash_forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    layout_rows: Tensor | None,
    layout_columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel as an op of PyTorch; the columns are for its gradient."""
    check_for_kernel(q, k, v)
    return launch(q, k, v, causal, scale, layout_rows)


@flash_forward_op.register_fake
def _(q, k, v, causal, scale, layout_rows, layout_columns):
    check_for_kernel(q, k, v)
    batch, heads, queries, _ = q.shape
    o = v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return o, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _keep(ctx, inputs, output):
    """Keeps what the gradient needs."""
    q, k, v, ctx.causal, ctx.scale, rows, columns = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, rows, columns)


def _gradient(ctx, grad, _):
    """Calls the backward op."""
    *tensors, rows, columns = ctx.saved_tensors
    gradients = flash_backward_op(grad, *tensors, ctx.causal, ctx.scale, rows, columns)
    return *gradients, None, None, None, None


flash_forward_op.register_autograd(_gradient, setup_context=_keep)
