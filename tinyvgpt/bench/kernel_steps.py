"""Training steps with the package's kernels and with PyTorch's attention, from the same weights.

The tokenizer's axial attention and a GPT's strided attention, at the size of the original's
released BAIR models, without dropout. `tinyvgpt bench kernels` records it; chapter 14 reads it.

Shapes: B clips a step · N tokens of a clip.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, attention
from tinyvgpt.bench import exact_float32
from tinyvgpt.bench.original import OriginalVQVAE
from tinyvgpt.bench.train import (
    RELEASED,
    baseline,
    compiling_anew,
    fast,
    in_fresh_process,
    loss_and_gradients,
    ours,
    timed,
)
from tinyvgpt.loop import Batch, Stage, fastest_convolutions, place
from tinyvgpt.train import gpt_stage, vqvae_stage

WAYS = {"PyTorch's attention": "torch", "kernels": "auto"}


def training_steps(
    vqvae: VQVAEConfig = RELEASED,
    gpt: GPTConfig | None = None,
    *,
    device: str = "cuda",
    steps: int = 10,
) -> dict[str, Any]:
    """Times steps of both stages either way, and compares losses and gradients.

    Args:
        vqvae: the tokenizer, 16 clips a step.
        gpt: a GPT, 8 clips a step; by default the released one, strided, with 9 heads and with 4.
        device: "cuda" or "cpu".
        steps: timed at a time.
    """
    where = torch.device(device)
    released = gpt or GPTConfig.for_vqvae(vqvae, width=576, layers=8, attention="strided")
    silent = replace(released, dropout=0.0, attn_dropout=0.0)
    heads = (9, 4) if gpt is None else (gpt.heads,)
    found = {"vqvae": in_fresh_process(partial(vqvae_steps, vqvae, where, steps))}
    for count in heads:
        job = partial(gpt_steps, replace(silent, heads=count), vqvae, where, steps)
        found[f"gpt, strided, {count} heads"] = in_fresh_process(job)
    return found


def vqvae_steps(config: VQVAEConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """The tokenizer, on random clips, and the original's loop."""
    torch.manual_seed(0)
    size = (16, config.frames, config.resolution, config.resolution, config.channels)
    clips = torch.randint(256, size, dtype=torch.uint8, device=device)
    x = (clips.float() / 255 - 0.5).movedim(-1, 1).contiguous()
    original = OriginalVQVAE(config).to(device)
    reference = timed(baseline(original, lambda x: original(x).loss, x), device, steps, 16)
    with fastest_convolutions(device):
        stage = vqvae_stage(VQVAE(config), "")
        found = both_ways(stage, {"video": clips}, device, steps)
    ratio = reference["milliseconds"] / found["kernels"]["milliseconds"]
    return {**found, "reference": reference, "kernels against reference": round(ratio, 3)}


def gpt_steps(
    config: GPTConfig, vqvae: VQVAEConfig, device: torch.device, steps: int
) -> dict[str, Any]:
    """A GPT, on random tokens."""
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    tokens = torch.randint(config.codes, (8, *config.latent_shape), device=device)
    both = VideoGPT(tokenizer, GPT(config, tokenizer.codebook.codes))
    nn.init.normal_(both.gpt.token_out.weight, std=0.02)  # zeros would hide most gradients
    return both_ways(gpt_stage(both, fast(8, device), ""), {"tokens": tokens}, device, steps)


def both_ways(stage: Stage, batch: Batch, device: torch.device, steps: int) -> dict[str, Any]:
    """Loss, gradients and milliseconds a step with the kernels and without."""
    clips = len(next(iter(batch.values())))
    config = fast(clips, device)
    place(stage.module, device)
    stage.module.eval()  # codebook and batch norms stay as they are
    with exact_float32(True), attention.use("torch"):
        plain = replace(config, precision="float32", compile="off")
        loss, exact = loss_and_gradients(stage, plain, batch, device)
    found: dict[str, Any] = {"loss": {"float32": loss}, "gradient error": {}}
    for name, which in WAYS.items():
        with attention.use(which):
            eager = replace(config, compile="off")
            loss, gradients = loss_and_gradients(stage, eager, batch, device)
        error = ((gradients - exact).norm() / exact.norm()).item()
        found["loss"][name], found["gradient error"][name] = loss, float(f"{error:.3g}")
    stage.module.train()
    for name, which in WAYS.items():
        with attention.use(which), compiling_anew():
            step = ours(stage, config, batch, device)
            found[name] = timed(step, device, steps, clips)
    times = [found[name]["milliseconds"] for name in WAYS]
    return {
        "clips a step": clips,
        **found,
        "kernels against PyTorch's": round(times[0] / times[1], 3),
    }
