"""How fast the package's kernels are, beside PyTorch's on the same data in the same run.

Every kernel of `scaled_dot_product_attention` is forced once; "best" is the fastest. All are called
from CUDA graphs, so that only the device counts, not how soon Python calls. What bounds a kernel is
measured too: how fast memory is copied, how fast a large product is. Chapters 12 to 14 read the
record.

Shapes: B batch · nh heads · S tokens · d head dim · T H W frames, rows, columns.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tinyvgpt.attention import StridedLayout
from tinyvgpt.bench.kernel_steps import training_steps
from tinyvgpt.bench.train import in_fresh_process
from tinyvgpt.kernels import (
    axial_attention,
    decode_attention,
    flash_attention,
    ladder,
    strided_attention,
)
from tinyvgpt.kernels.layout import block_layout

Call = Callable[[], object]
BACKENDS = {
    "FLASH": SDPBackend.FLASH_ATTENTION,
    "CUDNN": SDPBackend.CUDNN_ATTENTION,
    "EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
}
# B, nh, S, d and whether causal.
FLASH = [
    (4, 16, 4096, 64, False),
    (4, 16, 4096, 64, True),
    (4, 8, 4096, 128, False),
    (4, 8, 4096, 128, True),
    (16, 4, 4096, 64, True),
    (16, 16, 1024, 64, True),
    (8, 4, 4096, 144, True),
]
AXIAL = [  # B, T, H, W, nh, d
    (16, 4, 32, 32, 2, 120),
    (16, 4, 32, 32, 2, 64),
    (16, 16, 64, 64, 2, 64),
    (32, 4, 16, 16, 2, 64),
]
DECODE = [(1, 16, 64), (1, 4, 144), (16, 16, 64), (64, 16, 64), (64, 8, 128)]  # B, nh, d
LADDER = [1, 4]  # B
CACHED = 4096  # keys of a decoding step
STRIDED = [(8, 32, 16), (8, 32, 32), (16, 32, 32)]  # t, h, w: 4096, 8192 and 16384 tokens


def kernels(*, repeats: int = 20) -> dict[str, Any]:
    """Times every kernel at the sizes of the book, in bfloat16.

    Args:
        repeats: of each timing, whose median counts.

    Returns:
        Lists of rows by kernel, and the device's rates.
    """
    torch.manual_seed(0)
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are captured from it
        copy = rate_of_copies(repeats)
    parts: dict[str, Call] = {
        "copy, TB/s": lambda: round(copy, 3),
        "bfloat16 product of 8192, TFLOP/s": lambda: round(rate_of_products(repeats), 1),
        "flash": lambda: [flash(*shape, repeats=repeats) for shape in FLASH],
        "axial": lambda: [row for shape in AXIAL for row in axial(shape, copy, repeats)],
        "decode": lambda: [decode(*shape, repeats=repeats) for shape in DECODE],
        "strided": lambda: [strided(shape, repeats) for shape in STRIDED],
        "ladder, TFLOP/s": lambda: {f"{b} clips": rungs(b) for b in LADDER},
        "seconds of a first call, compiled anew or kept from before": both_first_calls,
        "training steps": training_steps,
    }
    found = {}
    for name, part in parts.items():
        start = time.perf_counter()
        with torch.cuda.stream(torch.cuda.Stream()):
            found[name] = part()
        print(f"{name}: took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def both_first_calls() -> dict[str, dict[str, float]]:
    """Seconds of each kernel's first call, with an empty cache and with what that left."""
    with tempfile.TemporaryDirectory() as folder:
        job = partial(first_calls, folder)
        return {when: in_fresh_process(job) for when in ("new", "kept")}


def first_calls(folder: str) -> dict[str, float]:
    """Seconds that each kernel's first call in a process takes, imports apart."""
    import cuda.core  # noqa: F401
    import torch._dynamo  # what a process's first custom op imports

    os.environ["TINYVGPT_KERNELS"] = os.environ["CUDA_CACHE_PATH"] = folder  # NVRTC's, too
    x = random(1, 2, 64, 64)
    lengths = torch.full((1,), 64, dtype=torch.int32, device="cuda")
    video = random(1, 4, 8, 8, 2, 64)
    calls: dict[str, Call] = {
        "flash": lambda: flash_attention(x, x, x),
        "axial": lambda: axial_attention(video, video, video, 1),
        "decode": lambda: decode_attention(x[:, :, :1], x, x, lengths),
    }
    found = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found[name] = round(time.perf_counter() - start, 3)
    return found


def milliseconds(calls: list[Call], repeats: int) -> float:
    """Median time of a call in a CUDA graph of several, once they are warm."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return milliseconds_of(graph, repeats) / len(calls)


def milliseconds_of(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Median time of a replay."""
    until = time.perf_counter() + 0.05  # in which clocks rise that sank while Python compiled
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return median(taken)


def rate_of_copies(repeats: int) -> float:
    """TB/s, read and written, of a copy of a gigabyte, by a kernel; in a graph a copy is slower."""
    x = torch.randn(1 << 29, device="cuda").bfloat16()
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds([lambda: torch.neg(x, out=y)], repeats) / 1e9


def rate_of_products(repeats: int) -> float:
    """TFLOP/s of a bfloat16 product of 8192 × 8192 matrices of random numbers."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / milliseconds([lambda: x @ x], repeats) / 1e9


def random(*shape: int, grad: bool = False) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, device="cuda").bfloat16().requires_grad_(grad)


def forced(backend: SDPBackend, call: Call) -> Call:
    """A call with one of PyTorch's attention kernels."""

    def run() -> object:
        with sdpa_kernel(backend):
            return call()

    return run


def rungs(b: int) -> dict[str, float]:
    """TFLOP/s of each rung of the ladder in full attention with 16 heads, 4096 tokens, d 64."""
    q, k, v = (random(b, 16, 4096, 64) for _ in range(3))
    flops = 4 * b * 16 * 4096**2 * 64 / 1e9
    return {
        rung.name: round(
            flops / milliseconds([partial(ladder.attention, q, k, v, rung.name)], 3), 1
        )
        for rung in ladder.rungs()
    }


def both_ways(
    ways: dict[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], repeats: int
) -> dict[str, Any]:
    """Milliseconds forward and backward of each way, where it can do it."""
    found: dict[str, Any] = {"forward, ms": {}, "backward, ms": {}}
    for name, way in ways.items():
        try:
            y = way()
            gradient = torch.randn_like(y)
            backward = partial(torch.autograd.grad, y, inputs, gradient, retain_graph=True)
            found["forward, ms"][name] = round(milliseconds([way] * 5, repeats), 4)
            found["backward, ms"][name] = round(milliseconds([backward] * 5, repeats), 4)
        except RuntimeError as error:  # a kernel of PyTorch's that doesn't take this shape
            if name == "ours":
                raise
            found.setdefault("left out", {})[name] = str(error).splitlines()[0][:80]
    return found


def against(times: dict[str, float]) -> dict[str, float]:
    """How many times as fast as each other way ours is, and as the best of them."""
    others = {name: ms for name, ms in times.items() if name != "ours"}
    ratios = {name: round(ms / times["ours"], 3) for name, ms in others.items()}
    return {**ratios, "best": round(min(others.values()) / times["ours"], 3)}


def flash(b: int, nh: int, s: int, d: int, causal: bool, *, repeats: int) -> dict[str, Any]:
    """Full or causal attention."""
    q, k, v = (random(b, nh, s, d, grad=True) for _ in range(3))
    ways: dict[str, Any] = {"ours": lambda: flash_attention(q, k, v, causal)}
    for name, backend in BACKENDS.items():
        ways[name] = forced(backend, lambda: sdpa(q, k, v, is_causal=causal))
    found = both_ways(ways, (q, k, v), repeats)
    flops = 4 * b * nh * s * s * d / (2 if causal else 1) / 1e9
    for way, share in (("forward", 1), ("backward", 2.5)):
        times = found[f"{way}, ms"]
        found[f"{way}, TFLOP/s"] = {n: round(share * flops / ms, 1) for n, ms in times.items()}
        found[f"{way}, ours against"] = against(times)
    return {"shape": [b, nh, s, d], "causal": causal, **found}


def folded(q: Tensor, k: Tensor, v: Tensor, axis: int) -> Tensor:
    """Attention along an axis by PyTorch's kernels, inner axes seen as heads: no copies."""
    q, k, v = (x.flatten(0, axis - 1).flatten(2, -2).transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v).transpose(1, 2)


def axial(shape: tuple[int, ...], copy: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Attention along each axis of a video."""
    q, k, v = (random(*shape, grad=True) for _ in range(3))
    for axis, letter in ((1, "T"), (2, "H"), (3, "W")):
        ways: dict[str, Any] = {"ours": partial(axial_attention, q, k, v, axis)}
        for name, backend in BACKENDS.items():
            ways[name] = forced(backend, partial(folded, q, k, v, axis))
        found = both_ways(ways, (q, k, v), repeats)
        for way, tensors in (("forward", 4), ("backward", 8)):
            times = found[f"{way}, ms"]
            rates = {name: tensors * q.nbytes / ms / 1e9 for name, ms in times.items()}
            found[f"{way}, TB/s"] = {name: round(rate, 3) for name, rate in rates.items()}
            found[f"{way}, ours of the copy rate"] = round(rates["ours"] / copy, 3)
            found[f"{way}, ours against"] = against(times)
        yield {"shape": list(shape), "axis": letter, "MB": round(4 * q.nbytes / 1e6), **found}


def decode(b: int, nh: int, d: int, *, repeats: int) -> dict[str, Any]:
    """A decoding step over full caches, one after the other, more than the L2 holds."""
    size = 2 * b * nh * CACHED * d * 2
    level_2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = 3 * level_2 // size + 2
    caches = [(random(b, nh, CACHED, d), random(b, nh, CACHED, d)) for _ in range(count)]
    q = random(b, nh, 1, d)
    lengths = torch.full((b,), CACHED, dtype=torch.int32, device="cuda")
    ways: dict[str, Any] = {"ours": lambda k, v: decode_attention(q, k, v, lengths)}
    for name, backend in BACKENDS.items():
        ways[name] = lambda k, v, backend=backend: forced(backend, lambda: sdpa(q, k, v))()
    times = {
        name: milliseconds([partial(way, *cache) for cache in caches], repeats)
        for name, way in ways.items()
    }
    return {
        "shape": [b, nh, CACHED, d],
        "microseconds": {name: round(1e3 * ms, 2) for name, ms in times.items()},
        "TB/s": {name: round(size / ms / 1e9, 3) for name, ms in times.items()},
        "ours against": against(times),
    }


def strided(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Strided-sparse attention against dense causal attention by cuDNN; B 4, 8 heads, d 64."""
    pattern = StridedLayout(shape).to("cuda")
    layout = block_layout(pattern.blocks, causal=True)
    tokens = pattern.mask.shape[0]
    q, k, v = (random(4, 8, tokens, 64, grad=True) for _ in range(3))
    ways: dict[str, Any] = {
        "ours": lambda: strided_attention(q, k, v, layout),
        "dense CUDNN": forced(BACKENDS["CUDNN"], lambda: sdpa(q, k, v, is_causal=True)),
        "our dense": lambda: flash_attention(q, k, v, causal=True),
    }
    found = both_ways(ways, (q, k, v), repeats)
    for way in ("forward", "backward"):
        found[f"{way}, ours against"] = against(found[f"{way}, ms"])
    share = pattern.blocks.float().mean().item()
    return {"latent grid": list(shape), "tokens": tokens, "of all blocks": round(share, 4), **found}
