"""How fast both stages train, against the original's loop and against plain torch.compile.

One run on one machine, at the size of the original's released BAIR models, without dropout:

- "reference" is the original's way (`original`): activation checkpointing, a dense causal mask,
  separate projections, autocast to bfloat16, Adam;
- "plain" is the same network with PyTorch's attention for the mask, under torch.compile, with a
  fused AdamW: what an afternoon's work makes of the original. Each attention kernel is forced once;
- "ours" is `loop.take_step`, whole, as `tinyvgpt train-…` runs it.

Each stage is timed first, and profiled then. Chapter 16 reads the record.

Shapes: B clips a step · N tokens of a clip.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig
from tinyvgpt.bench import exact_float32
from tinyvgpt.bench.original import OriginalGPT, OriginalVQVAE
from tinyvgpt.bench.profile import convolutions, kinds_of_kernels
from tinyvgpt.loop import Batch, Stage, fastest_convolutions, place, take_step, wrapped
from tinyvgpt.run import Run
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import gpt_stage, vqvae_stage

RELEASED = VQVAEConfig(downsample=(4, 2, 2))
WARM_UP, REPEATS = 4, 5
Call = Callable[[], object]
R = TypeVar("R")


def training(
    vqvae: VQVAEConfig = RELEASED,
    gpt: GPTConfig | None = None,
    *,
    stage: str | None = None,
    device: str = "cuda",
    vqvae_batch: int = 16,
    gpt_batch: int = 8,
    steps: int = 10,
) -> dict[str, Any]:
    """Times training steps of both stages, and compares the fast path's gradients with float32's.

    Args:
        vqvae: the tokenizer.
        gpt: the GPT; by default the released one with 9 heads, and again with its own 4, for which
            plain torch.compile is left out.
        stage: "gpt" or "vqvae" to time one of them, by default both.
        device: "cuda" or "cpu".
        vqvae_batch: clips of a tokenizer's step.
        gpt_batch: clips of a GPT's step.
        steps: timed at a time; of `REPEATS` times the median counts.

    Returns:
        For each stage and way milliseconds a step, clips or tokens a second, and peak memory (on
        CUDA); ratios; gradients' errors; where a tokenizer's step spends its time (on CUDA).

    Raises:
        ValueError: no such stage.
    """
    if stage not in (None, "gpt", "vqvae"):
        raise ValueError(f"no stage {stage!r}; there are gpt and vqvae")
    where = torch.device(device)
    heads = (9, 4) if gpt is None else (gpt.heads,)
    released = GPTConfig.for_vqvae(vqvae, width=576, layers=8) if gpt is None else gpt
    silent = replace(released, dropout=0.0, attn_dropout=0.0)
    result: dict[str, Any] = {}
    for count in heads if stage != "vqvae" else ():
        config, plain = replace(silent, heads=count), count == heads[0]
        job = partial(time_gpt, config, vqvae, where, gpt_batch, steps, plain=plain)
        result[f"gpt, {count} heads"] = in_fresh_process(job)
    if stage != "gpt":
        result["vqvae"] = in_fresh_process(partial(time_vqvae, vqvae, where, vqvae_batch, steps))
    return result


def in_fresh_process(job: Callable[[], R]) -> R:
    """What a job returns before which nothing else has run.

    The profiler, once used, slows every later launch of a kernel in its process.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job).result()


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Context in which nothing is taken from earlier compilations.

    Compiled graphs are cached under keys that don't tell which attention kernel was forced.
    """
    from torch._inductor.utils import fresh_cache  # takes longer than all that a command imports

    torch._dynamo.reset()
    with fresh_cache():
        yield


def time_gpt(
    config: GPTConfig,
    vqvae: VQVAEConfig,
    device: torch.device,
    batch: int,
    steps: int,
    *,
    plain: bool = True,
) -> dict[str, Any]:
    """Every way of training a GPT, on random tokens; by choice without plain torch.compile."""
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    codes = tokenizer.codebook.codes  # random
    tokens = torch.randint(config.codes, (batch, *config.latent_shape), device=device)
    backends: dict[str, SDPBackend | None] = {"plain": None} if plain else {}
    if plain and device.type == "cuda":
        backends = {
            "plain, FLASH": SDPBackend.FLASH_ATTENTION,
            "plain, CUDNN": SDPBackend.CUDNN_ATTENTION,
        }
    units = batch * config.tokens
    ways: dict[str, Any] = {}
    reference = OriginalGPT(config, codes).to(device)
    ways["reference"] = timed(baseline(reference, reference.loss, tokens), device, steps, units)
    del reference
    for name, backend in backends.items():
        with compiling_anew():
            model = OriginalGPT(config, codes, attention="sdpa", checkpointing=False).to(device)
            loss = torch.compile(model.loss)
            step = baseline(model, loss, tokens, fused=True, backend=backend)
            ways[name] = timed(step, device, steps, units)
            del model, loss, step
    both = VideoGPT(tokenizer, GPT(config, codes))
    nn.init.normal_(both.gpt.token_out.weight, std=0.02)  # zeros would hide most gradients
    train = fast(batch, device)
    stage = gpt_stage(both, train, "")
    place(stage.module, device)
    found: dict[str, Any] = {"tokens a step": units}
    with compiling_anew():
        step = ours(stage, train, {"tokens": tokens}, device)
        ways["ours"] = timed(step, device, steps, units)
        found |= compared(ways)
        if device.type == "cuda":
            found["milliseconds of kernels"] = kinds_of_kernels(step)
        found["gradient error"] = gradient_error(stage, train, {"tokens": tokens[:2]}, device)
    return found


def time_vqvae(config: VQVAEConfig, device: torch.device, batch: int, steps: int) -> dict[str, Any]:
    """Every way of training a tokenizer, on random clips."""
    torch.manual_seed(0)
    size = (batch, config.frames, config.resolution, config.resolution, config.channels)
    clips = torch.randint(256, size, dtype=torch.uint8, device=device)
    x = (clips.float() / 255 - 0.5).movedim(-1, 1).contiguous()
    ways: dict[str, Any] = {}
    reference = OriginalVQVAE(config).to(device)
    step = baseline(reference, lambda x: reference(x).loss, x)
    ways["reference"] = timed(step, device, steps, batch)
    if device.type == "cuda":
        with fastest_convolutions(device):  # not the original's way, but one line would do it
            ways["reference, cudnn.benchmark"] = timed(step, device, steps, batch)
    train = fast(batch, device)
    stage = vqvae_stage(VQVAE(config), "")
    place(stage.module, device)
    with compiling_anew(), fastest_convolutions(device):
        step = ours(stage, train, {"video": clips}, device)
        ways["ours"] = timed(step, device, steps, batch)
        found = {"clips a step": batch, **compared(ways)}
        if device.type == "cuda":
            found["milliseconds of kernels"] = kinds_of_kernels(step)
            found["convolutions"] = convolutions(stage.module, clips)
        found["gradient error"] = gradient_error(stage, train, {"video": clips[:4]}, device)
    return found


def baseline(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batch: Tensor,
    *,
    fused: bool = False,
    backend: SDPBackend | None = None,
) -> Call:
    """A step as a plain loop has it: autocast, backward, Adam (or a fused AdamW)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=3e-4)
    if fused:
        optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=batch.is_cuda)

    def step() -> None:
        forced: AbstractContextManager = sdpa_kernel(backend) if backend else nullcontext()
        with forced, torch.autocast(batch.device.type, torch.bfloat16):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def fast(batch: int, device: torch.device) -> TrainConfig:
    """How a long run on a GPU trains by default."""
    compiled = "on" if device.type == "cuda" else "off"
    return TrainConfig(batch_size=batch, device=str(device), precision="bfloat16", compile=compiled)


def ours(stage: Stage, config: TrainConfig, batch: Batch, device: torch.device) -> Call:
    """A step as `fit` takes it."""
    run = Run(stage.module, config, stage.about)
    step_of = wrapped(stage, config, device)
    return lambda: take_step(stage, step_of, run, batch, device)


def timed(step: Call, device: torch.device, steps: int, units: float) -> dict[str, float]:
    """Milliseconds a step once it is warm, units a second and peak memory in GiB."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        taken.append((time.perf_counter() - start) / steps)
    seconds = sorted(taken)[REPEATS // 2]
    found = {"milliseconds": round(1e3 * seconds, 3), "per second": round(units / seconds, 1)}
    found["first step, seconds"] = round(first, 1)
    if cuda:
        found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def compared(ways: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The ways, and how many times as fast as each of the others ours is."""
    mine = ways["ours"]["milliseconds"]
    times = {
        f"ours against {name}": round(way["milliseconds"] / mine, 3)
        for name, way in ways.items()
        if name != "ours"
    }
    return {**ways, **times}


def gradient_error(
    stage: Stage, config: TrainConfig, batch: Batch, device: torch.device
) -> dict[str, float]:
    """‖g - g₃₂‖ / ‖g₃₂‖ of all gradients together, g₃₂ in float32 and not compiled.

    In evaluation mode, so that codebook and batch norms are the same for all.
    """
    stage.module.eval()

    def gradients(precision: str, compiled: str) -> Tensor:
        settings = replace(config, precision=precision, compile=compiled)
        return loss_and_gradients(stage, settings, batch, device)[1]

    with exact_float32(True):
        exact = gradients("float32", "off")
    ways = {"bfloat16": ("bfloat16", "off"), "bfloat16, compiled": ("bfloat16", "on")}
    errors = {
        name: ((gradients(*way) - exact).norm() / exact.norm()).item() for name, way in ways.items()
    }
    stage.module.train()
    return {name: float(f"{error:.3g}") for name, error in errors.items()}


def loss_and_gradients(
    stage: Stage, config: TrainConfig, batch: Batch, device: torch.device
) -> tuple[float, Tensor]:
    """A batch's loss and all of its gradients, as one vector in float64."""
    torch._dynamo.reset()
    step_of = wrapped(stage, config, device)
    with config.autocast(device):
        loss = step_of(batch)["loss"]
    trained = [p for p in stage.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    return loss.item(), torch.cat([g.double().flatten() for g in gradients])
