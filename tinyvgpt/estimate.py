"""What a training step costs, before it is run: memory, time, and what the device could do.

For the log's model FLOP utilisation (the FLOPs that the model needs over what the device could do
in the same time; PaLM, Chowdhery et al. 2022, appendix B) and for `--dry-run`. Chapter 16 reads
this file.

Shapes: none of its own.
"""

import math
import re
import time
from typing import NamedTuple

import torch

from tinyvgpt.cost import Config, clip_work, forward_flops, kept_bytes, on_meta, step_flops
from tinyvgpt.gpt import GPTConfig
from tinyvgpt.settings import TrainConfig
from tinyvgpt.vqvae import VQVAEConfig

# Dense peaks in TFLOP/s: (float16, bfloat16, float32 on ordinary cores, that is TF32 off). Where a
# data sheet gives figures "with sparsity", half of them. Products accumulate in float32, as
# PyTorch's do. A GPU is known by whole words of its name, so that an A10G is no A10.
# The figures are NVIDIA's as others restate them; its data sheets (H100 to T4, A10G for AWS) and
# white papers (RTX 4090: Ada; RTX 3090: Ampere GA102) were not opened for this table.
PEAKS: dict[str, tuple[float, float | None, float]] = {
    "H200": (989.5, 989.5, 67),
    "H100 HBM3": (989.5, 989.5, 67),  # SXM
    "H100 PCIE": (756.5, 756.5, 51),
    "A100": (312, 312, 19.5),
    "A40": (149.7, 149.7, 37.4),
    "A10G": (70, 70, 35),
    "A10": (125, 125, 31.2),
    "L40S": (362.05, 362.05, 91.6),
    "L40": (181.05, 181.05, 90.5),
    "L4": (121, 121, 30.3),
    "V100 SXM2": (125, None, 15.7),  # no bfloat16
    "V100 PCIE": (112, None, 14),
    "T4": (65, None, 8.1),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 3090": (71, 71, 35.6),
}
OTHER_CHIPS = {"MIG", "NVL", "LAPTOP", "TI", "D"}  # slices and namesakes of those

# Share of a large product's rate that a whole step reaches. "cpu": steps of the presets laptop and
# own-videos on two cores, data at hand (GPTs 0.48 and 0.47, VQ-VAEs 0.54 and 0.92). "cuda": the
# released BAIR sizes, compiled, the GPT with 9 heads, on an H200, whose large products reach
# 782 TFLOP/s in bfloat16 (book/results/train-nvidia-h200.json).
UTILISATION = {
    "cpu": {GPTConfig: 0.48, VQVAEConfig: 0.7},
    "cuda": {GPTConfig: 0.46, VQVAEConfig: 0.36},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a GPU for products in `dtype`, FLOP/s; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device).upper()))
    known = [peaks for name, peaks in PEAKS.items() if words.issuperset(name.split())]
    if not known or words & OTHER_CHIPS:
        return None
    of_dtype = dict(zip((torch.float16, torch.bfloat16, torch.float32), known[0], strict=True))
    peak = of_dtype.get(dtype)
    return None if peak is None else peak * 1e12


class Memory(NamedTuple):
    """Bytes that a training step needs on one device, in parts; `sum` of it is all."""

    weights: int  # and buffers, float32
    gradients: int  # float32
    moments: int  # AdamW's two
    average: int  # weights again, if averaged ones are kept
    activations: int  # what the backward pass needs of the forward pass


def memory(
    config: Config,
    train: TrainConfig,
    clips: int,
    *,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Memory:
    """Bytes that a training step needs on one device.

    Args:
        config: of the model.
        train: how it is trained.
        clips: in one forward pass, on one device.
        dtype: that products are computed in; below float32 under autocast.
        compiled: whether elementwise steps are fused.

    Returns:
        Its parts. Activations are those of `kept_bytes`. Not counted: the device's own share (some
        hundred MB on a GPU), a tokenizer that makes a GPT's tokens, kernels' workspaces. Checked
        against an H100's peak for the released GPT (8 clips, bfloat16, compiled): 5.41 GiB for a
        measured 5.27; and, not compiled, against the allocator on CPUs, in tests.
    """
    model = on_meta(config)
    trained = sum(p.numel() for p in model.parameters()) * 4
    weights = trained + sum(b.nbytes for b in model.buffers())
    return Memory(
        weights=weights,
        gradients=trained,
        moments=2 * trained,
        average=weights if train.ema else 0,
        activations=kept_bytes(config, clips, dtype, compiled=compiled),
    )


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the fastest of those that fit in so many seconds."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def time_per_step(
    config: Config, train: TrainConfig, device: torch.device, *, clips: int | None = None
) -> float:
    """Seconds that a training step takes, estimated.

    Measured is only how fast the device multiplies large matrices, in the precision of the
    training (0.3 s); of that rate a step is taken to reach the share in `UTILISATION`. Loading
    data, encoding them to tokens and talking to other processes are not counted.

    Args:
        config: of the model.
        train: how it is trained.
        device: to train on.
        clips: of a step on this device; all of them by default.
    """
    clips = train.batch_size if clips is None else clips
    flops = work(config, train, clips)[1]
    if config.checkpointing:
        flops += whole_clips(config, train, clips) * forward_flops(config)  # computed again
    share = UTILISATION[device.type][type(config)]
    return flops / (share * product_rate(device, train.dtype(device)))


def work(config: Config, train: TrainConfig, clips: int) -> tuple[float, float]:
    """Tokens and FLOPs of a step over so many clips."""
    if isinstance(config, VQVAEConfig):
        return clips * math.prod(config.latent_shape), step_flops(config, clips)
    tokens, flops = clip_work(config, train.openings)
    return clips * tokens, clips * flops


def whole_clips(config: Config, train: TrainConfig, clips: int) -> int:
    """How many whole clips have as many tokens as a step's clips, of which some end early."""
    return math.ceil(work(config, train, clips)[0] / math.prod(config.latent_shape))


def describe(
    config: Config,
    train: TrainConfig,
    device: torch.device,
    *,
    clips: int | None = None,
    at_once: int | None = None,
) -> str:
    """What would be trained, and what it would cost, in lines; makes no weights.

    Args:
        config: of the model.
        train: how it is trained.
        device: to train on.
        clips: of a step on this device; all of them by default.
        at_once: clips in one forward pass; by default those of the step.
    """
    clips = train.batch_size if clips is None else clips
    parameters = sum(p.numel() for p in on_meta(config).parameters())
    t, h, w = config.latent_shape
    size, tokens, batch = config.resolution, t * h * w, train.batch_size
    seconds = time_per_step(config, train, device, clips=clips)
    a_step, flops = work(config, train, batch)[0], work(config, train, clips)[1]
    short = round(train.openings * batch) if isinstance(config, GPTConfig) else 0
    seen = f"{batch} clips"
    if short:
        seen += f" ({short} of them end after the first latent frame)"
    return "\n".join(
        [
            f"parameters: {parameters:,}",
            f"clip: {config.frames} frames of {size} × {size} × {config.channels}",
            f"tokens: {t} × {h} × {w} = {tokens:,} a clip, of {config.codes:,} codes",
            f"training: {train.steps:,} steps of {seen}, {a_step:,.0f} tokens a step",
            f"on {device_name(device)}: {way_line(train, device, clips, at_once or clips)}",
            *memory_lines(config, train, device, at_once or clips),
            f"work: {in_units(flops)}FLOP a step, {in_units(flops * train.steps)}FLOP in all",
            f"time (estimate): {in_words(two_digits(seconds))} a step, "
            f"{in_words(two_digits(seconds * train.steps))} in all",
        ]
    )


def way_line(train: TrainConfig, device: torch.device, clips: int, at_once: int) -> str:
    """How `describe` says that a process computes its `clips` clips of a step."""
    way = str(train.dtype(device)).removeprefix("torch.")
    way += ", compiled" if train.compiled(device) else ", not compiled"
    if clips < train.batch_size:
        way += f", {train.batch_size // clips} processes of {clips} clips"
    return way + (f", {at_once} clips at a time" if at_once < clips else "")


def memory_lines(config: Config, train: TrainConfig, device: torch.device, clips: int) -> list[str]:
    """What `describe` says of memory."""
    dtype, compiled = train.dtype(device), train.compiled(device)
    clips = whole_clips(config, train, clips)
    needed = memory(config, train, clips, dtype=dtype, compiled=compiled)
    parts = [f"{n} {in_units(value, 1024)}B" for n, value in needed._asdict().items() if value]
    line = f"memory (estimate): {in_units(sum(needed), 1024)}B"
    if device.type == "cuda":
        line += f" of {in_units(torch.cuda.mem_get_info(device)[1], 1024)}B"
    return [line, f"  {', '.join(parts)}"]


def device_name(device: torch.device) -> str:
    """The GPU's name, or "this CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def in_units(value: float, base: int = 1000) -> str:
    """A number with its prefix: 1.5e12 is "1.5 T"; with base 1024, 2**31 is "2 Gi"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            break
        value /= base
    return f"{value:.3g} {prefix}{'i' if base == 1024 and prefix else ''}"


def in_words(seconds: float) -> str:
    """A time: "35 ms", "12 s", "3 min", "2 h 5 min", "12 days", "3 years"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days = minutes / 1440
    return f"{days:,.0f} days" if days < 730 else f"{days / 365.25:,.0f} years"


def two_digits(value: float) -> float:
    """A number rounded to as many digits as an estimate has."""
    return float(f"{value:.2g}")
