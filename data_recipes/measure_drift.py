"""What becomes of clips that go on far past the length a model was trained on.

    python data_recipes/measure_drift.py moving-mnist robot-push

continues real test clips to 128 frames and looks at each window of 16. A window begins with what
the one before ended with: its tokens, where the tokenizer's encoder is local, else its frames,
encoded anew, so that what the tokenizer loses is lost again and again. Figures a window: PSNR
between the frames it begins with and what the tokenizer makes of them; how many codes its frames
use, in all clips together; the mean of its pixels. The same of real clips, to compare. Where the
model takes actions these are the clip's own, then the same back again, and so on: the hand never
leaves its tray. Figures go to book/results/drift-MODEL.json.

Shapes: B clips · T = 16 frames of a window · L = 128 frames of a clip.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from recipe import run
from torch import Tensor

from tinyvgpt import VideoGPT, open_dataset, video
from tinyvgpt.bench import device_name, record
from tinyvgpt.pushing import back_and_forth


@torch.no_grad()
def look(model: VideoGPT, window: Tensor, overlap: int) -> dict[str, float]:
    """The figures of one window, uint8 (B, T, H, W, C)."""
    x = video.to_model(window).to(model.device)
    begun = x[:, :, :overlap]
    again = model.vqvae.decode(model.vqvae.encode(begun)).clamp(-0.5, 0.5)
    return {
        "psnr_of_its_beginning": round(-10 * (again - begun).square().mean().log10().item(), 2),
        "codes": len(model.vqvae.encode(x).unique()),
        "mean_pixel": round(window.float().mean().item(), 1),
    }


def drift(name: str, count: int, length: int, overlap: int | None, seed: int) -> dict:
    """Figures of all windows of a model's clips."""
    model = VideoGPT.from_pretrained(name)
    frames = model.vqvae.config.frames
    overlap = overlap or frames // 2
    batch = open_dataset(name, "test").batch(range(count))
    actions = batch.get("action")
    start = time.perf_counter()
    clips = model.sample(
        frames=batch["video"][:, :overlap],
        labels=batch.get("label"),
        actions=None if actions is None else back_and_forth(actions, length),
        length=length,
        overlap=overlap,
        seed=seed,
        progress=True,
    )
    seconds = time.perf_counter() - start
    starts = range(0, length - frames + 1, frames - overlap)
    return {
        "device": device_name("cpu"),
        "clips": count,
        "length": length,
        "overlap": overlap,
        "seed": seed,
        "seconds": round(seconds, 1),
        "real": look(model, batch["video"], overlap),
        "windows": [look(model, clips[:, s : s + frames], overlap) for s in starts],
    }


def main() -> None:
    """Continues, looks, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="shipped names, of the datasets they are of")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="frames of a clip")
    parser.add_argument("--overlap", type=int, help="frames; by default half a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("book/results"), help="for the record")
    options = parser.parse_args()
    command = f"python {' '.join(['data_recipes/measure_drift.py', *sys.argv[1:]])}"
    for name in options.models:
        given = options.clips, options.length, options.overlap, options.seed
        figures = drift(name, *given)
        print(json.dumps(figures, indent=2))
        record(figures, f"drift-{name}", command, options.out)


if __name__ == "__main__":
    run(main)
