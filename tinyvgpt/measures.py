"""What clips of Moving MNIST keep: digits that can be read, who they are, how they move.

All are shares of frames or clips, taken of what a probe reads; real clips, measured the same way,
stand beside them, since in a real frame, too, digits may cover each other. Chapter 18 reads them.

Shapes: B clips · T frames · 2 digits a frame.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.probes import Probe, Readings

READ_IN = 0.75  # of a clip's frames both digits must be read for it to keep them
NEAR_WALL = 3.0  # pixels from the end of a digit's way at which it may turn
SIDE = 28  # of a digit


class Kept(NamedTuple):
    """Measures of each clip, float64 (B,); NaN where a clip has nothing to measure."""

    read: np.ndarray  # share of its frames in which both digits are read
    identities: np.ndarray  # 1 if every frame that is read shows the same two digits, else 0
    speed: np.ndarray  # mean change of a digit's speed from frame to frame, pixels
    bounces: np.ndarray  # of the turns, the share that happens at a wall
    right: np.ndarray  # share of its frames in which both digits are read, and are the wanted ones
    asked: np.ndarray  # 1 if the digits that most frames show are the wanted ones, else 0


def both_read(readings: Readings, threshold: float) -> Tensor:
    """Whether two digits are read in each frame: bool (B, T)."""
    return readings.scores[..., 1] >= threshold


def pairs(readings: Readings) -> Tensor:
    """The two digits of each frame as a number, the smaller one first: int64 (B, T), 0 … 99."""
    ordered = readings.classes[..., :2].sort(-1)[0]
    return 10 * ordered[..., 0] + ordered[..., 1]


def majority(readings: Readings, threshold: float) -> Tensor:
    """The pair that most frames of a clip show, int64 (B,); -1 where none is read."""
    seen, shown = both_read(readings, threshold), pairs(readings)
    found = [
        torch.bincount(pair[ok], minlength=100).argmax() if ok.any() else torch.tensor(-1)
        for pair, ok in zip(shown, seen, strict=True)
    ]
    return torch.stack(found)


def kept(probe: Probe, clips: Tensor, wanted: Tensor | None = None) -> Kept:
    """Measures clips uint8 (B, T, H, W, 1), of which `wanted` (B,) is the pair that each shows."""
    readings, size = probe.read(clips), clips.shape[2]
    threshold = probe.config.threshold
    seen, shown = both_read(readings, threshold), pairs(readings)
    most = majority(readings, threshold)
    same = (shown == most[:, None]) | ~seen
    share = seen.double().mean(1)
    identities = same.all(1) & (share >= READ_IN)
    speed, bounces = zip(
        *(motion(places, ok, size) for places, ok in zip(tracks(readings), seen, strict=True)),
        strict=True,
    )
    right = asked = torch.full_like(share, torch.nan)
    if wanted is not None:
        right = (seen & (shown == wanted[:, None])).double().mean(1)
        asked = (most == wanted).double()
    moves = np.array(speed), np.array(bounces)
    return Kept(share.numpy(), identities.double().numpy(), *moves, right.numpy(), asked.numpy())


def apart(readings: Readings, others: Readings) -> Tensor:
    """How far the two digits of each frame are from those of another, better paired: (B, T).

    Means over the two of whatever is read with the highest scores, in pixels.
    """
    a, b = (r.places[..., :2, :].double() for r in (readings, others))
    straight, crossed = ((a - x).norm(dim=-1).mean(-1) for x in (b, b.flip(-2)))
    return torch.minimum(straight, crossed)


def tracks(readings: Readings) -> np.ndarray:
    """Middles of the two digits in the order of the frame before: float64 (B, T, 2, 2)."""
    places = readings.places[..., :2, :].double().numpy().copy()
    for t in range(1, places.shape[1]):
        before, now = places[:, t - 1], places[:, t]
        straight = np.linalg.norm(now - before, axis=-1).sum(-1)
        crossed = np.linalg.norm(now[:, ::-1] - before, axis=-1).sum(-1)
        places[:, t] = np.where((crossed < straight)[:, None, None], now[:, ::-1], now)
    return places


def motion(places: np.ndarray, seen: Tensor, size: int) -> tuple[float, float]:
    """Of one clip's tracks (T, 2, 2): mean change of speed, and share of turns at a wall.

    Only what three neighbouring frames show counts, if all are read.
    """
    ok = (seen[:-2] & seen[1:-1] & seen[2:]).numpy()
    steps = np.diff(places, axis=0)  # (T - 1, 2, 2)
    before, after, middle = steps[:-1][ok], steps[1:][ok], places[1:-1][ok]
    if not len(before):
        return float("nan"), float("nan")
    low, high = SIDE / 2 + NEAR_WALL, size - SIDE / 2 - NEAR_WALL
    at_wall = (middle < low) | (middle > high)  # of each axis
    free = ~at_wall.any(-1)
    lengths = [np.linalg.norm(x, axis=-1) for x in (before, after)]
    change = np.abs(lengths[1] - lengths[0])[free]
    turned = (before * after < 0) & (np.minimum(abs(before), abs(after)) > 1)
    speed = float(change.mean()) if len(change) else float("nan")
    return speed, float(at_wall[turned].mean()) if turned.any() else float("nan")
