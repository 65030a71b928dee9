"""Whether the fast path learns what float32 learns: the same runs on both, on Moving MNIST.

Same seeds, so the same weights to start from, the same clips in the same order, the same dropout
and restart draws. One run computes in float32, not compiled, the other as `TrainConfig` does by
default on a GPU, compiled. Compared are means of the loss over 20 steps each, from step 51 on.

A tokenizer amplifies the least difference while many of its codes are restarted, so it is trained
from several seeds, whose differences are averaged, and with each a third time: in float32 again,
from weights that differ in their last bits. What that changes is chance. Chapter 16 reads the
record.

Shapes: none of its own.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tinyvgpt import GPT, VQVAE, VideoGPT, VQVAEConfig, open_dataset
from tinyvgpt.bench import exact_float32
from tinyvgpt.presets import moving_mnist
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import train_gpt, train_vqvae

SKIPPED, WINDOW = 50, 20  # steps
LOGGED = 10  # steps a line; divides both
MOVED = 1e-6  # relative
PATHS = ("float32", "fast")
Curve = list[float]  # a mean a window
Curves = dict[str, Curve]


def learning(
    *, device: str = "cuda", steps: int = 300, batch: int = 64, seeds: int = 4
) -> dict[str, Any]:
    """Loss curves of both stages on both paths, and how far apart they are.

    Args:
        device: "cuda" or "cpu".
        steps: of each run, a multiple of 10 of at least 70.
        batch: clips a step.
        seeds: of tokenizers; the GPT is trained from one, on the last float32 tokenizer.

    Returns:
        For each stage the curves of each seed, and for each path the relative differences from
        float32, a window each, averaged over the seeds, and the largest of them.
    """
    silent = {"validate_every": 0, "checkpoint_every": steps, "tensorboard": False}
    shared: dict[str, Any] = {"steps": steps, "batch_size": batch, "ema": 0.0, "encode_once": 0}
    whole = {"openings": 0.0}  # losses are of whole clips
    options = {**shared, **silent, **whole, "log_every": LOGGED, "device": device}
    preset, data = moving_mnist(), open_dataset("moving-mnist")
    tokenizers: list[Curves] = []
    for seed in range(seeds):
        config = replace(preset.train_vqvae, seed=seed, **options)
        vqvaes = {name: fresh_tokenizer(preset.vqvae, seed) for name in (*PATHS, "float32, moved")}
        move(vqvaes["float32, moved"])
        tokenizers.append(
            {n: curve(partial(train_vqvae, v, data), config, n) for n, v in vqvaes.items()}
        )
    vqvae, config = vqvaes["float32"], replace(preset.train_gpt, **options)
    gpts: Curves = {}
    for name in PATHS:
        torch.manual_seed(0)
        model = VideoGPT(vqvae.cpu(), GPT(preset.gpt, vqvae.codebook.codes), data.label_names)
        gpts[name] = curve(partial(train_gpt, model, data), config, name)
    about = {"steps": steps, "batch_size": batch, "seeds": seeds}
    return {**about, "vqvae": averaged(tokenizers), "gpt": averaged([gpts])}


def fresh_tokenizer(config: VQVAEConfig, seed: int) -> VQVAE:
    """A tokenizer with the weights of a seed."""
    torch.manual_seed(seed)
    return VQVAE(config)


def curve(train: Callable[[TrainConfig, Path], object], config: TrainConfig, name: str) -> Curve:
    """Window means of a run on the path of this name."""
    with exact_float32(name != "fast"), tempfile.TemporaryDirectory() as folder:
        train(settings(config, name), Path(folder))
        return window_means(Path(folder))


def settings(config: TrainConfig, name: str) -> TrainConfig:
    """Settings of the path of this name."""
    if name != "fast":
        return replace(config, precision="float32", compile="off")
    return config if config.device == "cpu" else replace(config, compile="on")


@torch.no_grad()
def move(module: torch.nn.Module) -> None:
    """Changes weights in their last bits."""
    for parameter in module.parameters():
        parameter.mul_(1 + MOVED * torch.randn_like(parameter))


def window_means(folder: Path) -> Curve:
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


def differences(found: Curve, expected: Curve) -> Curve:
    """Relative differences, one a window."""
    return [a / b - 1 for a, b in zip(found, expected, strict=True)]


def rounded(values: list[float], digits: int) -> list[float]:
    """Values with so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]
