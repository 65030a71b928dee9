"""Axial attention: along time, height or width of a video, each row and head by itself.

A position looks at the positions that share its other two coordinates (Ho et al. 2019, §3). Rows
are short, so a team of warps holds a whole row in shared memory, read from where it lies: no axis
is moved first. The backward pass needs q, k and v only, for it makes the softmax again. On a CPU
plain PyTorch does the same. Chapter 14 builds this file and axial.cu.

Shapes: B batch · T H W frames, rows, columns · nh heads · d head dim · L length of the row attended
along, one of T, H, W · a chunk is 8 numbers, 16 bytes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyvgpt.kernels import build
from tinyvgpt.kernels.tensors import TYPES, in_chunks, row_numbers, steps

FILE = "axial.cu"
LONGEST = 64  # rows; longer ones are left to PyTorch
WIDEST = 128  # head dim
ON_GPU = ("cuda", "meta")  # meta: shapes alone


class Tiles(NamedTuple):
    """How a kernel is cut."""

    teams: int  # of a block
    blocks: int  # for which a multiprocessor's registers suffice


# By warps of a team, for head dims up to 64 and up to 128.
FORWARD = {
    1: (Tiles(4, 8), Tiles(4, 4)),
    2: (Tiles(1, 12), Tiles(1, 8)),
    3: (Tiles(1, 7), Tiles(1, 4)),
    4: (Tiles(1, 5), Tiles(1, 4)),
}
BACKWARD = {
    1: (Tiles(4, 5), Tiles(4, 3)),
    2: (Tiles(1, 9), Tiles(1, 6)),
    3: (Tiles(1, 5), Tiles(1, 2)),
    4: (Tiles(1, 4), Tiles(1, 2)),
}


def axial_attention(q: Tensor, k: Tensor, v: Tensor, axis: int, *, causal: bool = False) -> Tensor:
    """Self-attention along one axis of a video, scale 1/√d.

    On a GPU rows up to 64 run in one kernel: tensors are bfloat16 or float16, d a multiple of 8 up
    to 128, the last stride is 1 and others are multiples of 8, as in views of a fused projection.
    Short rows share products, so an infinity or NaN in v may reach rows beside its own.

    Args:
        q: queries (B, T, H, W, nh, d).
        k: keys, likewise.
        v: values, likewise.
        axis: attended along: 1 for time, 2 for height, 3 for width.
        causal: a position sees itself and those before it.

    Returns:
        (B, T, H, W, nh, d), contiguous.

    Raises:
        TypeError: for dtypes that don't fit.
        ValueError: for shapes, axes, strides or devices that don't fit.
    """
    check((q, k, v), axis)
    if q.device.type not in ON_GPU:
        return reference(q, k, v, axis, causal=causal)
    if q.shape[axis] > LONGEST:
        return by_pytorch(q, k, v, axis, causal=causal)
    check_for_kernel((q, k, v))
    return torch.ops.tinyvgpt.axial_attention(q, k, v, axis, causal)


def axial_block(qkv: Tensor, *, causal_time: bool = False) -> Tensor:
    """Attention along time, height and width, each with its own q, k and v.

    One projection makes `qkv`, and one takes the result, heads and axes flattened. The gradient is
    one tensor, too, so nothing is split or joined by copies.

    Args:
        qkv: (B, T, H, W, 3, 3, nh, d): axes (t, h, w), each with q, k and v; else as in
            `axial_attention`.
        causal_time: whether attention along time is causal.

    Returns:
        (B, T, H, W, 3, nh, d), contiguous.

    Raises:
        TypeError, ValueError: as `axial_attention`.
    """
    if qkv.ndim != 8 or qkv.shape[4:6] != (3, 3):
        raise ValueError(f"qkv must be (B, T, H, W, 3, 3, nh, d), not {tuple(qkv.shape)}")
    check([qkv[:, :, :, :, 0, 0]], 1)
    if qkv.device.type in ON_GPU and max(qkv.shape[1:4]) <= LONGEST:
        check_for_kernel([qkv])
        return torch.ops.tinyvgpt.axial_block(qkv, causal_time)
    parts = []
    for i, part in enumerate(qkv.unbind(4)):
        q, k, v = part.unbind(4)
        parts.append(axial_attention(q, k, v, i + 1, causal=causal_time and i == 0))
    return torch.stack(parts, dim=4)


def reference(q: Tensor, k: Tensor, v: Tensor, axis: int, *, causal: bool = False) -> Tensor:
    """`axial_attention` in plain PyTorch; sums are float32, or float64 as q."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q_rows, k_rows, v_rows = (x.to(exact).movedim(axis, -2) for x in (q, k, v))
    scores = q_rows @ k_rows.mT * q.shape[-1] ** -0.5  # (B, ·, ·, nh, L, L)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    o = scores.softmax(-1) @ v_rows
    return o.movedim(-2, axis).to(v.dtype).contiguous()


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, axis: int, *, causal: bool) -> Tensor:
    """`axial_attention` with the axis moved in place by copies, for rows of any length."""
    q_rows, k_rows, v_rows = (x.movedim(axis, -2).flatten(0, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, is_causal=causal)
    shape = q.movedim(axis, -2).shape  # (B, ·, ·, nh, L, d)
    return o.view(shape).movedim(-2, axis).contiguous()


def check(tensors: Sequence[Tensor], axis: int) -> None:
    """Raises for what makes no sense on any device."""
    q = tensors[0]
    if axis not in (1, 2, 3):
        raise ValueError(f"axis must be 1 (time), 2 (height) or 3 (width), not {axis}")
    if q.ndim != 6 or any(x.shape != q.shape for x in tensors):
        raise ValueError(
            "q, k and v must all be (B, T, H, W, nh, d), "
            f"not {', '.join(str(tuple(x.shape)) for x in tensors)}"
        )
    if not q.numel():
        raise ValueError(f"q, k and v {tuple(q.shape)} are empty")
    if not q.is_floating_point() or any(x.dtype != q.dtype for x in tensors):
        raise TypeError(f"q, k and v are {', '.join(str(x.dtype) for x in tensors)}, not alike")
    if any(x.device != q.device for x in tensors):
        raise ValueError(f"q, k and v are not all on {q.device}")


def check_for_kernel(tensors: Sequence[Tensor]) -> None:
    """Raises for what the kernel can't do."""
    q = tensors[0]
    d = q.shape[-1]
    if q.dtype not in TYPES:
        raise TypeError(f"the kernel takes bfloat16 and float16, not {q.dtype}")
    if d % 8 or d > WIDEST:
        raise ValueError(f"head dim must be a multiple of 8 up to {WIDEST}, not {d}")
    if q.numel() // d > 1 << 30:
        raise ValueError(f"q {tuple(q.shape)} has more than 2³⁰ positions and heads")
    for x in tensors:
        if not strides_fit(x):
            raise ValueError(f"strides must be multiples of 8 and end in 1, not {x.stride()}")


def strides_fit(x: Tensor) -> bool:
    """Whether a tensor's chunks can be copied from where they are."""
    return in_chunks(x) and max(steps(x)) < 1 << 34


def ready(x: Tensor) -> Tensor:
    """The tensor, or a copy if the kernel couldn't read it where it is."""
    if strides_fit(x) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def warps(length: int) -> int:
    """Of a team, for rows of so many positions; see the table in axial.cu."""
    return max(math.ceil(length / 16), 1)


def packed(length: int) -> int:
    """Rows that a team takes."""
    return max(16 // length, 1)


def shared_bytes(length: int, d: int, teams: int, *, backward: bool) -> int:
    """Shared memory of a block."""
    rows = 16 * warps(length)
    row, square = row_numbers(math.ceil(d / 16) * 16), row_numbers(rows)
    return teams * 2 * rows * (4 * row + 2 * square if backward else 3 * row)


def tiles(length: int, d: int, *, backward: bool) -> Tiles:
    """The table's entry."""
    return (BACKWARD if backward else FORWARD)[warps(length)][d > 64]


def kernel_name(
    dtype: torch.dtype, d: int, length: int, causal: bool, cut: Tiles, *, backward: bool
) -> str:
    """The kernel's name in C++."""
    kind = "backward" if backward else "forward"
    return f"axial_{kind}<{TYPES[dtype]}, {d}, {length}, {int(causal)}, {cut.teams}, {cut.blocks}>"


class Plan(NamedTuple):
    """What a launch needs beside its tensors."""

    name: str
    grid: tuple[int]
    threads: int
    shared_bytes: int
    numbers: list[Any]


@lru_cache(maxsize=1 << 10)
def plan(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    axis: int,
    causal: bool,
) -> Plan:
    """How to launch a kernel, given the strides of its inputs and of an output."""
    length, heads, d, backward = shape[axis], shape[4], shape[-1], len(strides) == 5
    others = [i for i in range(4) if i != axis]
    cut = tiles(length, d, backward=backward)
    items = math.prod(shape) // (length * d)
    numbers = [items, *(shape[i] for i in others[1:]), heads]
    for steps_of in strides:  # in chunks
        numbers += [steps_of[i] // 8 for i in (*others, 4, axis)]
    return Plan(
        name=kernel_name(dtype, d, length, causal, cut, backward=backward),
        grid=(math.ceil(items / (packed(length) * cut.teams)),),
        threads=32 * warps(length) * cut.teams,
        shared_bytes=shared_bytes(length, d, cut.teams, backward=backward),
        numbers=[*map(np.int32, numbers), np.float32(d**-0.5)],
    )


def launch(inputs: Sequence[Tensor], outputs: Sequence[Tensor], axis: int, causal: bool) -> None:
    """Queues a kernel: (q, k, v) to (o,), or (q, k, v, grad) to (dq, dk, dv) of equal strides."""
    q = inputs[0]
    strides = tuple(tuple(steps(x)) for x in (*inputs, outputs[0]))
    how = plan(q.shape, strides, q.dtype, axis, causal)
    build.launch(FILE, *how[:4], q.device, *inputs, *outputs, *how.numbers)


def forward(q: Tensor, k: Tensor, v: Tensor, axis: int, causal: bool) -> Tensor:
    """The op `axial_attention` on a GPU."""
    o = empty(q)
    launch([ready(x) for x in (q, k, v)], [o], axis, causal)
    return o


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, axis: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `axial_attention_backward` on a GPU: dq, dk and dv, contiguous."""
    grads = empty(q), empty(q), empty(q)
    launch([ready(x) for x in (q, k, v, grad)], grads, axis, causal)
    return grads


def block_forward(qkv: Tensor, causal_time: bool) -> Tensor:
    """The op `axial_block` on a GPU."""
    qkv = ready(qkv)
    o = qkv.new_empty(*qkv.shape[:4], 3, *qkv.shape[6:])
    for i in range(3):
        launch(qkv[:, :, :, :, i].unbind(4), [o[:, :, :, :, i]], i + 1, causal_time and i == 0)
    return o


def block_backward(grad: Tensor, qkv: Tensor, causal_time: bool) -> Tensor:
    """The op `axial_block_backward` on a GPU: the gradient of qkv, contiguous."""
    qkv, grad, d_qkv = ready(qkv), ready(grad), empty(qkv)
    for i in range(3):
        inputs = (*qkv[:, :, :, :, i].unbind(4), grad[:, :, :, :, i])
        launch(inputs, d_qkv[:, :, :, :, i].unbind(4), i + 1, causal_time and i == 0)
    return d_qkv


def empty(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of x's shape."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The ops, plain ones (`custom_op` would take longer than the smallest of these kernels).
LIBRARY = torch.library.Library("tinyvgpt", "FRAGMENT")
LIBRARY.define("axial_attention(Tensor q, Tensor k, Tensor v, int axis, bool causal) -> Tensor")
LIBRARY.define(
    "axial_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int axis, bool causal)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("axial_block(Tensor qkv, bool causal_time) -> Tensor")
LIBRARY.define("axial_block_backward(Tensor grad, Tensor qkv, bool causal_time) -> Tensor")
LIBRARY.impl("axial_attention", forward, "CUDA")
LIBRARY.impl("axial_attention_backward", backward, "CUDA")
LIBRARY.impl("axial_block", block_forward, "CUDA")
LIBRARY.impl("axial_block_backward", block_backward, "CUDA")


@torch.library.register_fake("tinyvgpt::axial_attention")
def _(q, k, v, axis, causal):
    return empty(q)


@torch.library.register_fake("tinyvgpt::axial_attention_backward")
def _(grad, q, k, v, axis, causal):
    return empty(q), empty(q), empty(q)


@torch.library.register_fake("tinyvgpt::axial_block")
def _(qkv, causal_time):
    return qkv.new_empty(*qkv.shape[:4], 3, *qkv.shape[6:])


@torch.library.register_fake("tinyvgpt::axial_block_backward")
def _(grad, qkv, causal_time):
    return empty(qkv)


def save(ctx, inputs, output):
    """Keeps an op's tensors and its other arguments for its gradient."""
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.rest = [x for x in inputs if not isinstance(x, Tensor)]


def attention_gradient(ctx, grad):
    """Gradients of the op `axial_attention`."""
    grads = torch.ops.tinyvgpt.axial_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None


def block_gradient(ctx, grad):
    """Gradients of the op `axial_block`."""
    return torch.ops.tinyvgpt.axial_block_backward(grad, *ctx.saved_tensors, *ctx.rest), None


torch.library.register_autograd("tinyvgpt::axial_attention", attention_gradient, setup_context=save)
torch.library.register_autograd("tinyvgpt::axial_block", block_gradient, setup_context=save)
