"""From a first attention kernel to the shipped one: a ladder of whole kernels, one idea a rung.

Each rung is one file of CUDA C++ that does what the one before does, faster, by one idea; read in
order they explain flash_forward.cu, the last. They take q, k and v of one shape and give no
gradients. Chapters 12 and 13 climb it.

Shapes: B batch · nh heads · S tokens · d head dim.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.kernels import build, flash

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALVES = (torch.bfloat16, torch.float16)


class Cut(NamedTuple):
    """How a kernel cuts its work."""

    kernel: str  # as C++ spells it, with its template arguments
    queries: int  # of a block of threads
    threads: int  # of a block
    shared_bytes: int  # of a block


@dataclass(frozen=True)
class Rung:
    """A kernel of the ladder."""

    name: str  # of the kernel
    title: str  # its idea
    oldest: tuple[int, int]  # compute capability it needs
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[int, ...]  # head dims
    queries: int = 1  # of a block of threads; the last rung's tiles are in flash.py
    keys: int = 0  # in shared memory at a time
    stages: int = 1  # of such keys and their values

    @property
    def file(self) -> str:
        """Its source, in the folder of kernels."""
        return "flash_forward.cu" if self.name == "flash" else f"ladder/{self.name}.cu"

    def cut(self, dtype: torch.dtype, tokens: int, d: int) -> Cut:
        """How it cuts attention over so many tokens with head dim d."""
        of, queries, keys = f"{self.name}<{TYPES[dtype]}, {d}", self.queries, self.keys
        if self.name == "naive":
            return Cut(f"{of}>", queries, d, 4 * (tokens + d))
        if self.name == "tiled":
            return Cut(f"{of}, {queries}, {keys}>", queries, queries, 2 * keys * d * 4)
        if self.name == "flash":
            tiles = flash.tiles_for(d, sparse=False)
            queries, kernel = tiles.warps * tiles.rows, tiles.name(dtype, d, d, False)
            return Cut(kernel, queries, 32 * tiles.warps, tiles.shared_bytes(d, d))
        warps = queries // 16
        return Cut(f"{of}, {warps}, {keys}>", queries, 32 * warps, self.stages * 2 * keys * d * 2)


RUNGS = (
    Rung("naive", "the formula as it stands", (7, 5), tuple(TYPES), (64, 128)),
    Rung("tiled", "tiles and an online softmax", (7, 5), tuple(TYPES), (64,), 128, 32),
    Rung("tensor_cores", "tensor cores", (8, 0), HALVES, (64, 128), 64, 64),
    Rung("swizzle", "swizzled tiles", (8, 0), HALVES, (64, 128), 64, 64),
    Rung("pipeline", "asynchronous copies", (8, 0), HALVES, (64, 128), 64, 64, stages=2),
    Rung("flash", "exp2 and register reuse", (8, 0), HALVES, tuple(range(16, 161, 16))),
)
MOST = 48 * 1024  # bytes of shared memory that any GPU gives a block


def rungs() -> tuple[Rung, ...]:
    """All rungs, the slowest first."""
    return RUNGS


@torch.no_grad()
def attention(q: Tensor, k: Tensor, v: Tensor, rung: str, causal: bool = False) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, eq. 1) by one rung, scale 1/√d; without gradients.

    Args:
        q: queries (B, nh, S, d), contiguous; on a GPU bfloat16 or float16, and float32 for the
            rungs without tensor cores.
        k: keys, likewise.
        v: values, likewise.
        rung: the name of one of `rungs`. On a CPU all are the same plain PyTorch.
        causal: query i sees keys 0 … i.

    Returns:
        (B, nh, S, d), the dtype of `v`.

    Raises:
        TypeError: for dtypes that the rung doesn't take.
        ValueError: for other shapes, strides, devices, GPUs or names.
    """
    found = {each.name: each for each in RUNGS}.get(rung)
    if found is None:
        raise ValueError(f"no rung {rung!r}; there are {', '.join(x.name for x in RUNGS)}")
    check(q, k, v)
    if q.device.type != "cuda":
        return flash.reference(q, k, v, causal=causal)[0]
    able = torch.cuda.get_device_capability(q.device)
    if able < found.oldest:
        name = torch.cuda.get_device_name(q.device)
        raise ValueError(f"{rung} needs compute capability {found.oldest}, {name} has {able}")
    check_for_kernel(found, q)
    if found.name == "flash":
        return flash.flash_attention(q, k, v, causal=causal)
    return launch(found, q, k, v, causal)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for what makes no sense on any device."""
    flash.check(q, k, v)
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: not alike")
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        raise ValueError("the ladder takes contiguous q, k and v only")


def check_for_kernel(rung: Rung, q: Tensor) -> None:
    """Raises for what a rung's kernel can't do."""
    batch, heads, tokens, d = q.shape
    if q.dtype not in rung.dtypes:
        known = ", ".join(str(x).removeprefix("torch.") for x in rung.dtypes)
        raise TypeError(f"{rung.name} takes {known}, not {q.dtype}")
    if d not in rung.dims:
        raise ValueError(f"{rung.name} takes a head dim of {rung.dims}, not {d}")
    if rung.name == "naive" and rung.cut(q.dtype, tokens, d).shared_bytes > MOST:
        raise ValueError(f"{rung.name} keeps a row of scores in shared memory: {tokens} are many")
    if batch * heads > 65535:
        raise ValueError(f"a grid has 65535 rows, {batch} · {heads} heads are more")


def launch(rung: Rung, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Queues the kernel of a rung but the last."""
    batch, heads, tokens, d = q.shape
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        raise ValueError("q, k and v must begin at multiples of 16 bytes")
    o, cut = torch.empty_like(q), rung.cut(q.dtype, tokens, d)
    build.launch(
        rung.file, cut.kernel, (math.ceil(tokens / cut.queries), batch * heads), cut.threads,
        cut.shared_bytes, q.device, q, k, v, o,
        np.int32(tokens), np.int32(causal), np.float32(d**-0.5),
    )  # fmt: skip
    return o
