"""Whether the fast path learns what float32 learns: the same runs on both, on Moving MNIST.

Same seeds, so the same weights to start from, the same clips in the same order, the same dropout
and restart draws. One run computes in float32, not compiled, the other as `TrainConfig` does by
default on a GPU, compiled. Compared are means of the loss over 20 steps each, from step 51 on.

A tokenizer amplifies the least difference while many of its codes are restarted, so it is trained
from several seeds, whose differences are averaged, and a third time: in float32 again, from
weights that differ in their last bits. What that changes is chance.

Shapes: none of its own.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tinyvgpt import GPT, VQVAE, VideoGPT, open_dataset
from tinyvgpt.bench import exact_float32
from tinyvgpt.presets import moving_mnist
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import train_gpt, train_vqvae

SKIPPED, WINDOW = 50, 20  # steps
LOGGED = 10  # steps a line; divides both
MOVED = 1e-6  # relative
Curves = dict[str, list[float]]


def learning(
    *, device: str = "cuda", steps: int = 300, batch: int = 64, seeds: int = 4
) -> dict[str, Any]:
    """Loss curves of both stages on both paths, and how far apart they are.

    Args:
        device: "cuda" or "cpu".
        steps: of each run, a multiple of 10 of at least 70.
        batch: clips a step.
        seeds: of tokenizers; the GPT is trained from one.

    Returns:
        For each stage the curves of each seed, and for each path the relative differences from
        float32, a window each, averaged over the seeds, and the largest of them.
    """
    silent = {"validate_every": 0, "checkpoint_every": steps, "tensorboard": False}
    shared: dict[str, Any] = {"steps": steps, "batch_size": batch, "ema": 0.0, "encode_once": 0}
    options = {**shared, **silent, "log_every": LOGGED, "device": device}
    preset, data = moving_mnist(), open_dataset("moving-mnist")
    tokenizers: list[Curves] = []
    vqvae = VQVAE(preset.vqvae)
    for seed in range(seeds):
        curves: Curves = {}
        for name in ("float32", "float32, moved", "fast"):
            torch.manual_seed(seed)
            trained = VQVAE(preset.vqvae)
            if name == "float32, moved":
                move(trained)
            config = path(replace(preset.train_vqvae, seed=seed, **options), name)
            with exact_float32(name != "fast"), tempfile.TemporaryDirectory() as folder:
                train_vqvae(trained, data, config, Path(folder))
                curves[name] = window_means(Path(folder))
            vqvae = trained if name == "float32" else vqvae
        tokenizers.append(curves)
    gpts: Curves = {}
    for name in ("float32", "fast"):
        torch.manual_seed(0)
        gpt = GPT(preset.gpt, vqvae.cpu().codebook.codes)
        config = path(replace(preset.train_gpt, **options), name)
        with exact_float32(name != "fast"), tempfile.TemporaryDirectory() as folder:
            train_gpt(VideoGPT(vqvae, gpt, data.label_names), data, config, Path(folder))
            gpts[name] = window_means(Path(folder))
    about = {"steps": steps, "batch_size": batch, "seeds": seeds}
    return {**about, "vqvae": averaged(tokenizers), "gpt": averaged([gpts])}


def path(config: TrainConfig, name: str) -> TrainConfig:
    """Settings of the path of this name."""
    if name != "fast":
        return replace(config, precision="float32", compile="off")
    return config if config.device == "cpu" else replace(config, compile="on")


@torch.no_grad()
def move(module: torch.nn.Module) -> None:
    """Changes weights in their last bits."""
    for parameter in module.parameters():
        parameter.mul_(1 + MOVED * torch.randn_like(parameter))


def window_means(folder: Path) -> list[float]:
    """Means of the loss over `WINDOW` steps each, after the first `SKIPPED`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][SKIPPED // LOGGED :]
    each = WINDOW // LOGGED
    starts = range(0, len(losses) - each + 1, each)
    return [sum(losses[start : start + each]) / each for start in starts]


def averaged(curves: list[Curves]) -> dict[str, Any]:
    """The curves of each seed, and what they differ by from float32's."""
    found: dict[str, Any] = {"curves": [{k: rounded(v, 5) for k, v in c.items()} for c in curves]}
    for name in curves[0]:
        if name != "float32":
            each = [differences(c[name], c["float32"]) for c in curves]
            means = [fmean(window) for window in zip(*each, strict=True)]
            largest = max(abs(mean) for mean in means)
            found[name] = {
                "differences": rounded(means, 3),
                "largest": rounded([largest], 3)[0],
                "largest of one seed": rounded([max(abs(d) for e in each for d in e)], 3)[0],
            }
    return found


def differences(found: list[float], expected: list[float]) -> list[float]:
    """Relative differences, one a window."""
    return [a / b - 1 for a, b in zip(found, expected, strict=True)]


def rounded(values: list[float], digits: int) -> list[float]:
    """Values with so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]
