"""The parts of a decoding step beside attention: products of few rows, and drawing a token.

They work in place, on buffers that a CUDA graph reads and writes again and again. Chapter 15 builds
this file, product.cu and draw.cu.

Shapes: R rows (clips, twice if guided) · K numbers of a row · N outputs · V codes · D width ·
P positions of a clip.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.kernels import build
from tinyvgpt.kernels.tensors import TYPES

NARROW, GELU, ADD, WIDE = range(4)  # what becomes of a sum; see product.cu
WARPS = 18  # of a product's block at most
MANY = 1600  # from so many outputs on a product's block makes 16, not 8
# A product makes its norm itself for up to so many rows; if each has factors and shifts of its own,
# these must not take more bytes than this.
NORM_ROWS, NORM_BYTES = 16, 1 << 16
OVERLAP = True  # whether a kernel may begin before the former one ends
MOST_CODES = 1 << 14  # that can be drawn from


@dataclass(frozen=True)
class Norm:
    """A layer norm's factors and shifts, float32: (K,), or (R, K) if rows have their own."""

    gain: Tensor
    shift: Tensor

    @property
    def step(self) -> int:
        """From a row's numbers to the next row's."""
        return 0 if self.gain.ndim == 1 else self.gain.shape[1]


def product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    output: int,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
) -> None:
    """Makes x·weightᵀ + bias for few rows, of x as it is or normalised, and puts it into y.

    Args:
        x: (R, K), float32 to be normalised, else in the weight's dtype.
        weight: bfloat16 or float16 (N, K), K a multiple of 8.
        y: (R, N): in the weight's dtype for NARROW and GELU, float32 for ADD, which adds to what
            is there, and WIDE.
        output: NARROW, GELU (x·σ(1.702 x)), ADD or WIDE.
        norm: of x.
        bias: float32 (N,).
    """
    rows, count = x.shape
    if norm is not None and (rows > NORM_ROWS or norm.step * rows * 8 > NORM_BYTES):
        x, norm = normalised(x, norm, weight.dtype), None
    tiles = 1 if rows <= 16 else 2 if rows <= 32 else 4  # of 16 rows
    warps, columns = evenly(count, WARPS), 16 if len(weight) >= MANY else 8
    shared = warps * 16 * tiles * columns * 4
    if norm is not None:
        shared += 8 * count * (rows if norm.step else 1) + 8 * 16 * (warps + 1)
    name = (
        f"product<{TYPES[weight.dtype]}, {count}, {tiles}, {columns // 8}, {warps}, "
        f"{int(norm is not None)}, {output}>"
    )
    grid = (math.ceil(len(weight) / columns), math.ceil(rows / (16 * tiles)), 1)
    gain, shift, step = (None, None, 0) if norm is None else (norm.gain, norm.shift, norm.step)
    build.launch(
        "product.cu", name, grid, 32 * warps, shared, x.device, x, weight, gain, shift, bias, y,
        *map(np.int32, (rows, len(weight), x.stride(0), y.stride(0), step)), overlap=OVERLAP,
    )  # fmt: skip


def evenly(count: int, most: int) -> int:
    """How many warps, at most so many, share rows of `count` numbers, 32 at a time."""
    parts = math.ceil(count / 32)
    return math.ceil(parts / math.ceil(parts / most))


def normalised(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """The layer norm of float32 (R, K), by itself."""
    y = torch.empty_like(x, dtype=dtype)
    name = f"norm<{TYPES[dtype]}, {x.shape[1]}>"
    build.launch(
        "product.cu", name, (len(x), 1, 1), 32, 0, x.device, x, norm.gain, norm.shift, y,
        np.int32(norm.step), overlap=OVERLAP,
    )  # fmt: skip
    return y


def draw(
    logits: Tensor,
    u: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    table: Tensor,
    offsets: Tensor,
    x: Tensor,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Draws each clip's next token, and makes of it what the next step begins with.

    Args:
        logits: float32 (R, V); of guided clips first all with their labels, then all without.
        u: float64 (B, P) in [0, 1).
        tokens: int64 (B, P), written at lengths - 1.
        lengths: int32 (R,), the position to be drawn plus 1; grows by 1.
        table: float32 (V, D), what the transformer reads of a token.
        offsets: float32 (1 or R, P, D), added to it.
        x: float32 (R, D), written.
        guidance: 1 is off, and then R is B.
        temperature: as `sampling.SamplingRule`, like what follows.
        top_k: likewise.
        top_p: likewise.
    """
    (rows, codes), (clips, positions), width = logits.shape, tokens.shape, table.shape[1]
    if codes > MOST_CODES:
        raise ValueError(f"{codes} codes are more than the kernel draws from, {MOST_CODES}")
    threads = 256 if codes <= 2048 else 1024
    items = math.ceil(codes / threads)
    offset_step = offsets.stride(0) if len(offsets) > 1 else 0
    build.launch(
        "draw.cu", f"draw<{threads}, {items}>", (clips, 1, 1), threads, 0, logits.device,
        logits, u, tokens, lengths, table, offsets, x,
        *map(np.int32, (codes, positions, width, clips, rows > clips, top_k or 0)),
        *map(np.float32, (guidance, temperature, 1.0 if top_p is None else top_p)),
        np.int64(offset_step), overlap=OVERLAP,
    )  # fmt: skip
