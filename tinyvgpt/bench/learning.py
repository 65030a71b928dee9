"""Whether the fast path learns what float32 learns: the same run twice, on Moving MNIST.

Same seeds, so the same weights to start from, the same clips in the same order, the same dropout
and restart draws. One run computes in float32, not compiled, the other as `TrainConfig` does by
default on a GPU, compiled. Compared are means of the loss over 20 steps each, from step 51 on.

Shapes: none of its own.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinyvgpt import GPT, VQVAE, VideoGPT, open_dataset
from tinyvgpt.bench import exact_float32
from tinyvgpt.data import Dataset
from tinyvgpt.presets import moving_mnist
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import train_gpt, train_vqvae

SKIPPED, WINDOW = 50, 20  # steps
LOGGED = 10  # steps a line; divides both


def learning(*, device: str = "cuda", steps: int = 300, batch: int = 64) -> dict[str, Any]:
    """Loss curves of both stages on both paths, and how far apart they are.

    Args:
        device: "cuda" or "cpu".
        steps: of each run, a multiple of 10 of at least 70.
        batch: clips a step.

    Returns:
        For each stage the means of each path and the largest relative difference.
    """
    preset, data = moving_mnist(), open_dataset("moving-mnist")
    shared = {"steps": steps, "batch_size": batch, "ema": 0.0, "log_every": LOGGED}
    silent = {"validate_every": 0, "checkpoint_every": steps, "tensorboard": False}
    options: dict[str, Any] = {**shared, **silent, "device": device, "encode_once": 0}
    result: dict[str, Any] = {"steps": steps, "batch_size": batch}
    tokenizers: dict[str, VQVAE] = {}
    curves: dict[str, dict[str, list[float]]] = {"vqvae": {}, "gpt": {}}
    exact, fast = {"precision": "float32", "compile": "off"}, {"compile": "on"}
    ways: dict[str, dict[str, Any]] = {"float32": exact, "fast": fast if device != "cpu" else {}}
    for name, way in ways.items():
        with exact_float32(name == "float32"), tempfile.TemporaryDirectory() as folder:
            config = replace(preset.train_vqvae, **options, **way)
            torch.manual_seed(0)
            tokenizers[name] = train_vqvae(VQVAE(preset.vqvae), data, config, Path(folder))
            curves["vqvae"][name] = window_means(Path(folder))
    for name, way in ways.items():
        with exact_float32(name == "float32"), tempfile.TemporaryDirectory() as folder:
            config = replace(preset.train_gpt, **options, **way)
            train_fresh_gpt(tokenizers["float32"], data, config, Path(folder))
            curves["gpt"][name] = window_means(Path(folder))
    for stage, curve in curves.items():
        pairs = zip(curve["fast"], curve["float32"], strict=True)
        result[stage] = {
            **{name: [float(f"{value:.5g}") for value in values] for name, values in curve.items()},
            "largest difference": float(f"{max(abs(a / b - 1) for a, b in pairs):.3g}"),
        }
    return result


def train_fresh_gpt(vqvae: VQVAE, data: Dataset, config: TrainConfig, folder: Path) -> None:
    """Trains a GPT of the preset's size on a tokenizer, from seed 0."""
    torch.manual_seed(0)
    gpt = GPT(moving_mnist().gpt, vqvae.cpu().codebook.codes)
    train_gpt(VideoGPT(vqvae, gpt, data.label_names), data, config, folder)


def window_means(folder: Path) -> list[float]:
    """Means of the loss over `WINDOW` steps each, after the first `SKIPPED`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][SKIPPED // LOGGED :]
    each = WINDOW // LOGGED
    starts = range(0, len(losses) - each + 1, each)
    return [sum(losses[start : start + each]) / each for start in starts]
