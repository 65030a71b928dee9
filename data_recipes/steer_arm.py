"""How far the arm of a robot-push model goes where it is commanded.

    python data_recipes/steer_arm.py robot-push --out tinyvgpt/weights/robot-push/samples.png

continues the first four frames of the 32 test clips in the package with their own commands, with
those turned round, with another clip's and with none, and follows the arm: the mean column of
bright pixels in the rows above the tray, from frame 3 on. Its way is compared with the real clip's.
The measure itself is checked against where the simulator had the fingertips. Figures go to
book/results/robot-push-arm.json; the picture shows samples of the first clips, unselected.

Shapes: B = 32 clips · T = 16 frames · 64 × 64 pixels · actions have 4 numbers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from recipe import run
from torch import Tensor

from tinyvgpt import VideoGPT, open_dataset
from tinyvgpt.bench import device_name, record

GIVEN = 4  # frames
ABOVE, BRIGHT = 14, 110  # rows above the tray; what a pixel of the arm has in every channel
MOVES = 3.0  # pixels; clips in which the arm goes less far sideways have no way to compare
SHOWN, FRAMES = 8, (3, 6, 9, 12, 15)  # of the picture: clips, and frames of each


def column(clips: Tensor) -> Tensor:
    """The arm's column in pixels, (B, T), of clips (B, T, H, W, 3)."""
    bright = (clips[:, :, :ABOVE].amin(-1) > BRIGHT).float().sum(2)  # (B, T, W)
    return (bright * torch.arange(bright.shape[-1])).sum(-1) / bright.sum(-1).clamp(min=1)


def likeness(ways: Tensor, others: Tensor) -> Tensor:
    """Correlation over time of ways (B, T) with others: (B,)."""
    a, b = ways - ways.mean(-1, keepdim=True), others - others.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-6)


def way(clips: Tensor) -> Tensor:
    """How far the arm is from where it was in the last given frame, (B, T - 4)."""
    columns = column(clips)
    return columns[:, GIVEN:] - columns[:, GIVEN - 1 : GIVEN]


def turned(actions: Tensor) -> Tensor:
    """Actions (B, T, 4) with the sign of those after the given frames turned."""
    return torch.cat([actions[:, : GIVEN - 1], -actions[:, GIVEN - 1 :]], 1)


def picture(real: Tensor, drawn: Tensor) -> Tensor:
    """Some frames of real clips, each row above what the model made of it: (H', W', 3)."""
    pairs = torch.stack([real[:SHOWN], drawn[:SHOWN]], 1).flatten(0, 1)[:, list(FRAMES)]
    halves = pairs.view(2, SHOWN, *pairs.shape[1:])  # two columns of the picture
    rows = halves.permute(1, 3, 0, 2, 4, 5)  # (rows, H, halves, frames, W, 3)
    return rows.flatten(2, 4).flatten(0, 1)


def main() -> None:
    """Continues, follows, and writes the picture and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, shipped name or hub id")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    model = VideoGPT.from_pretrained(options.model)
    data = open_dataset("robot-push", "test")
    clips = range(len(data))
    batch = data.batch(clips)
    real, own = batch["video"], batch["action"]
    commands = {
        "own": own,
        "turned": turned(own),
        "of another clip": torch.cat([own[:, : GIVEN - 1], own.roll(1, 0)[:, GIVEN - 1 :]], 1),
        "none": torch.cat([own[:, : GIVEN - 1], 0 * own[:, GIVEN - 1 :]], 1),
    }
    drawn = {
        name: model.sample(frames=real[:, :GIVEN], actions=actions, seed=0, progress=True)
        for name, actions in commands.items()
    }
    truth = way(real)
    goes = truth.abs().amax(-1) > MOVES
    place = data.endeffector(clips)[:, GIVEN:, 1]  # to the right, in metres
    figures = {
        "device": device_name("cpu"),
        "clips": int(goes.sum()),
        "left out, since the arm goes less than 3 pixels sideways": int((~goes).sum()),
        "seed": 0,
        "correlation of the measure with the simulator's fingertips": mean(truth, place, goes),
        "correlation with the real way, by commands": {
            name: mean(way(video), truth, goes) for name, video in drawn.items()
        },
        "mean distance from the real way, pixels": {
            name: round((way(video) - truth).abs()[goes].mean().item(), 2)
            for name, video in drawn.items()
        },
    }
    print(json.dumps(figures, indent=2))
    command = f"python {' '.join(['data_recipes/steer_arm.py', *sys.argv[1:]])}"
    record(figures, "robot-push-arm", command, Path("book/results"))
    from PIL import Image

    Image.fromarray(picture(real, drawn["own"]).numpy()).save(options.out)


def mean(ways: Tensor, others: Tensor, of: Tensor) -> float:
    """Mean `likeness` of some clips."""
    return round(likeness(ways, others)[of].mean().item(), 3)


if __name__ == "__main__":
    run(main)
