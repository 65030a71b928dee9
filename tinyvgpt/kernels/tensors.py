"""What all kernels ask of their tensors, and how long a row is in shared memory.

A kernel copies rows by chunks of 8 numbers, 16 bytes, from wherever they lie. Chapter 13.

Shapes: any.
"""

import torch
from torch import Tensor

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # and what they are called in warp.cuh


def steps(x: Tensor) -> list[int]:
    """Strides, 0 along axes of size 1."""
    return [step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True)]


def in_chunks(x: Tensor) -> bool:
    """Whether rows can be copied in chunks: they lie together, and begin at multiples of 8."""
    return x.stride(-1) == 1 and not any(step % 8 for step in steps(x)[:-1])


def row_numbers(n: int) -> int:
    """Numbers from a row of n in a tile to the next, as in tile.cuh."""
    return n + 8 if n % 64 else n
