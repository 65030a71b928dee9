"""The gradients of attention on tensor cores: P computed again, tile by tile (Dao 2023, §3.1.2).

Two passes of one kernel, without atomics: a block that owns keys sums dK and dV over the queries,
one that owns queries sums dQ over the keys. On a CPU plain PyTorch does the same. Chapter 14 builds
this file, flash_backward.cu and flash_backward_sums.cu.

Shapes: B batch · nh heads · Sq queries · Sk keys · d numbers of a query or key · dv of a value.
"""

import math
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.kernels import build
from tinyvgpt.kernels.tensors import TYPES, in_chunks, row_numbers, steps

EVERY = 1 << 29  # how many keys beyond its own a query sees where nothing is causal
MOST = 65535  # blocks along a grid's second and third axis


@dataclass(frozen=True)
class Tiles:
    """How a block cuts its work; see the table in flash_backward.cu."""

    warps: int  # of a block
    rows: int  # own rows of a warp: 16 or 32
    tile: int  # other rows in shared memory at a time
    step: int  # of these, rows whose P is in registers at a time
    held: bool  # whether a warp's own rows are in registers, too

    def shared_bytes(self, d: int, dv: int, *, keys: bool) -> int:
        """Shared memory of a block: its own rows, and two stages of others."""
        row = 2 * (row_numbers(d) + row_numbers(dv))
        return self.warps * self.rows * row + 2 * self.tile * (row + 8 * keys)

    def name(self, dtype: torch.dtype, d: int, dv: int, *, keys: bool, sparse: bool) -> str:
        """The kernel, as C++ spells it."""
        numbers = (d, dv, keys, *astuple(self), sparse)
        return f"flash_backward<{TYPES[dtype]}, {', '.join(str(int(n)) for n in numbers)}>"


# By head dims up to so many: for blocks that own keys, and for those that own queries. With a
# layout blocks are small, so that few of their tiles are wanted by some of their rows only.
DENSE = {
    64: (Tiles(4, 32, 64, 32, False), Tiles(4, 32, 64, 32, True)),
    128: (Tiles(4, 16, 64, 64, False), Tiles(4, 32, 32, 32, False)),
    160: (Tiles(4, 16, 32, 32, False), Tiles(4, 16, 32, 32, True)),
}
SPARSE = {
    64: (Tiles(2, 32, 64, 32, False), Tiles(2, 32, 64, 32, True)),
    128: (Tiles(4, 16, 64, 32, False), Tiles(4, 16, 64, 32, True)),
    160: (Tiles(4, 16, 32, 32, False), Tiles(4, 16, 32, 32, True)),
}


def reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward_op` in plain PyTorch; sums are float32, or float64 as q.

    `mask` is bool, broadcastable to (B, nh, Sq, Sk): true where a query saw a key.
    """
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v, o, lse = (x.to(exact) for x in (grad, q, k, v, o, lse))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        seen = seen & mask
    p = (scale * q @ k.mT - lse[..., None]).exp().masked_fill(~seen, 0)  # (B, nh, Sq, Sk)
    delta = (grad * o).sum(-1, keepdim=True)
    ds = p * (grad @ v.mT - delta)
    dq, dk, dv = scale * ds @ k, scale * ds.mT @ q, p.mT @ grad
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def tiles_for(d: int, *, keys: bool, sparse: bool) -> Tiles:
    """What the tables say for a head dim."""
    table = SPARSE if sparse else DENSE
    by_keys, by_queries = next(both for most, both in table.items() if d <= most)
    return by_keys if keys else by_queries


def rows_of(x: Tensor) -> Tensor:
    """The tensor if the kernel can read it, else a copy."""
    if in_chunks(x) and x.stride(-2) < 1 << 31 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def launch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool,
    scale: float, rows: Tensor | None, columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queues the kernels: sums of each query, then two passes."""
    batch, heads, queries, _ = q.shape
    if max(batch, heads) > MOST:
        raise ValueError(f"gradients: at most {MOST} sequences of {MOST} heads, not {q.shape[:2]}")
    grad = rows_of(grad)  # of a sum, say; all others are the forward pass's
    padded = math.ceil(queries / 64) * 64
    per_query = q.new_empty(batch, heads, 2, padded, dtype=torch.float32)
    build.launch(
        "flash_backward_sums.cu", f"flash_row_sums<{TYPES[q.dtype]}>",
        (padded // 32, heads, batch), 256, 0, q.device,
        o, grad, lse.contiguous(), per_query, *map(np.int32, (queries, padded, v.shape[-1])),
        *map(np.int64, (*steps(o)[:3], *steps(grad)[:3])),
    )  # fmt: skip
    dq, dk, dv = (
        x.new_empty(batch, x.shape[2], heads, x.shape[3]).transpose(1, 2) for x in (q, k, v)
    )
    shift = k.shape[2] - queries if causal else EVERY
    launch_pass((k, v), (q, grad), (dk, dv), per_query, columns, shift, scale, keys=True)
    launch_pass((q, grad), (k, v), (dq, None), per_query, rows, shift, scale, keys=False)
    return dq, dk, dv


def launch_pass(
    own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor | None], per_query: Tensor, layout: Tensor | None,
    shift: int, scale: float, *, keys: bool,
) -> None:  # fmt: skip
    """Queues the kernel for blocks that own keys, or queries; see flash_backward.cu."""
    (batch, heads, length, d), dv = own[0].shape, own[1].shape[-1]
    sparse = layout is not None
    tiles = tiles_for(d, keys=keys, sparse=sparse)
    blocks = math.ceil(length / (tiles.warps * tiles.rows))
    lengths = (length, other[0].shape[2], per_query.shape[-1])
    words = (0, 0, 0) if layout is None else (*layout.shape[1:], steps(layout)[0])
    by_batch, by_head, by_row, _ = zip(*map(steps, own + other), strict=True)
    build.launch(
        "flash_backward.cu",
        tiles.name(own[0].dtype, d, dv, keys=keys, sparse=sparse),
        (blocks, heads, batch), 32 * tiles.warps,
        tiles.shared_bytes(d, dv, keys=keys), own[0].device,
        *own, *other, per_query, layout, *out,
        *map(np.int32, (*lengths, shift, *words, *by_row)),
        *map(np.int64, (*by_head, *by_batch)), np.float32(scale),
    )  # fmt: skip


@torch.library.custom_op("tinyvgpt::flash_backward", mutates_args=(), device_types="cuda")
def flash_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    layout_rows: Tensor | None,
    layout_columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention's queries, keys and values, given that of its output.

    Args:
        grad: the output's gradient (B, nh, Sq, dv), with any strides.
        q: queries, as the forward op takes them.
        k: keys.
        v: values.
        o: the output (B, nh, Sq, dv).
        lse: float32 (B, nh, Sq), each query's log-sum-exp of scale · q·k; -inf where a query saw
            no key, whose gradient then is 0.
        causal: query i saw keys 0 … Sk - Sq + i.
        scale: of q·k, above 0.
        layout_rows: of a `BlockLayout`, or None.
        layout_columns: likewise.

    Returns:
        dq, dk and dv, shaped as q, k and v and stored as (B, S, nh, d).
    """
    return launch(grad, q, k, v, o, lse, causal, scale, layout_rows, layout_columns)


@flash_backward_op.register_fake
def _(grad, q, k, v, o, lse, causal, scale, layout_rows, layout_columns):
    batch, heads = q.shape[:2]
    return tuple(
        x.new_empty(batch, x.shape[2], heads, x.shape[3]).transpose(1, 2) for x in (q, k, v)
    )
