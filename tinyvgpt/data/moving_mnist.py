"""Moving MNIST: handwritten digits that bounce inside a square, made while you ask for them.

The physics of Srivastava, Mansimov & Salakhutdinov 2015 ("Unsupervised learning of video
representations using LSTMs", as in the generator released with it): each digit starts anywhere,
with a direction of its own, and moves `step` of the free space a frame. At a wall its position is
clamped to the wall and that component of its velocity changes sign, so a bounce may cut a step
short. Positions are truncated to whole pixels; where digits overlap the brighter pixel wins. The
first frame shows the digits after their first step, as theirs does. Chapter 02 builds it.

What differs from the original:
- every random draw is `counter.uniform(seed, split, clip, digit, draw)`, so that clip i is the
  same whoever asks, in any order; theirs follow from one generator's state;
- digits are drawn with replacement, theirs walk through a shuffled MNIST;
- frames are uint8, as MNIST's pixels are; theirs are divided by 255.

Trajectories are computed on the CPU in float64 by operations that IEEE 754 rounds exactly (+, ×, ÷;
no library's sine, which differs between machines in the last bit), and rendered by integer
operations alone. So clip i has the same bits on every machine and device.

Shapes: B clips · T frames · n digits in a clip · H = W = resolution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from tinyvgpt import counter
from tinyvgpt.data import mnist
from tinyvgpt.data.transfer import to_device
from tinyvgpt.data.windows import checked

SIZES = {"train": 1_000_000, "val": 10_000, "test": 10_000}  # clips, where no size is given
WHICH, START_Y, START_X, DIRECTION = range(4)  # the draws for each digit of a clip
DIGITS_AT_ONCE = 1024  # drawn in one operation: their pixels' places take 6 MB, a CPU's cache


@dataclass(frozen=True)
class Trajectories:
    """Which digits B clips show, and where."""

    positions: np.ndarray  # int64 (B, T, n, 2), row and column of each digit's top left pixel
    digits: np.ndarray  # int64 (B, n), rows of the split's MNIST digits
    classes: np.ndarray  # int64 (B, n), 0 … 9


@dataclass(frozen=True)
class MovingMNIST:
    """Clips of bouncing digits; clip i is a pure function of these fields and i.

    A clip's label is the unordered multiset of its digits: for two of them "00", "01", … "09",
    "11", … "99", numbered 0 … 54 in this order.

    Raises:
        ValueError: a field is out of its range, or MNIST cannot be read from `digits`.
    """

    split: str = "train"  # "train", "val" or "test"; no digit image is in two of them
    seed: int = 0  # another seed, other clips
    frames: int = 16  # T; a longer clip begins as the shorter one
    resolution: int = 64  # height and width in pixels, at least 28
    digits_per_clip: int = 2  # n, 1 … 9
    step: float = 0.1  # distance a frame, as a part of the free space, resolution - 28 pixels
    digits: str | None = None  # folder with all of MNIST; None: TINYVGPT_MNIST, else the subset
    size: int | None = None  # number of clips; None: 1,000,000 for train, 10,000 for val and test

    def __post_init__(self) -> None:
        limits = {
            "frames": (1, math.inf),
            "resolution": (mnist.SIDE, math.inf),
            "digits_per_clip": (1, 9),
            "step": (0, 1),
        }
        if self.size is not None:
            limits["size"] = (1, math.inf)
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"{low} … {high}"
                raise ValueError(f"{name} is {value}, it must be {allowed}")
        counter.bits(self.seed)  # a bad seed, split or folder shows here, not at the first batch
        _ = self._mnist

    @property
    def channels(self) -> int:
        """Channels of a frame: grey."""
        return 1

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The digits of each label, in increasing order: names[37] == "47"."""
        multisets = combinations_with_replacement("0123456789", self.digits_per_clip)
        return tuple("".join(digits) for digits in multisets)

    @cached_property
    def _label_codes(self) -> np.ndarray:
        """The label names read as decimal numbers, int64, increasing as they are."""
        return np.array([int(name) for name in self.label_names], dtype=np.int64)

    @cached_property
    def _mnist(self) -> mnist.Digits:
        return mnist.load(self.split, self.digits)

    def __len__(self) -> int:
        return SIZES[self.split] if self.size is None else self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return clip `index`: video uint8 (T, H, W, 1) and label int64 ()."""
        return {name: value[0] for name, value in self.batch([index]).items()}

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return clips by their indices, rendered on `device`.

        Args:
            indices: B integers in [0, len(self)), in any order.
            device: where to render; the pixels are the same everywhere.

        Returns:
            video: uint8 (B, T, H, W, 1), ink 255 on black 0.
            label: int64 (B,), index into `label_names`.

        Raises:
            ValueError: `indices` is not a non-empty list of integers.
            IndexError: an index is out of range.
        """
        path = self.trajectories(indices)
        images = to_device(torch.from_numpy(self._mnist.images[path.digits]), device)
        video = render(images, to_device(torch.from_numpy(path.positions), device), self.resolution)
        labels = to_device(torch.from_numpy(self._labels(path.classes)), device)
        return {"video": video, "label": labels}

    def trajectories(self, indices: Sequence[int] | np.ndarray | Tensor) -> Trajectories:
        """Return which digits the clips show and where, as `batch` draws them.

        Args:
            indices: B integers in [0, len(self)), in any order.

        Returns:
            Trajectories: positions (B, T, n, 2), digits (B, n), classes (B, n).

        Raises:
            ValueError: `indices` is not a non-empty list of integers.
            IndexError: an index is out of range.
        """
        clip = checked(indices, len(self))[:, None]  # (B, 1)
        digit = np.arange(self.digits_per_clip)  # (n,)
        key = (self.seed, mnist.SPLITS.index(self.split), clip, digit)  # each draw (B, n)
        digits = counter.integers(len(self._mnist.labels), *key, WHICH)
        start = np.stack([counter.uniform(*key, draw) for draw in (START_Y, START_X)], axis=-1)
        velocity = self.step * directions(counter.uniform(*key, DIRECTION))  # (B, n, 2)
        path = rearrange(bounce(start, velocity, self.frames), "t b n yx -> b t n yx")
        positions = (path * (self.resolution - mnist.SIDE)).astype(np.int64)
        return Trajectories(positions, digits, self._mnist.labels[digits])

    def _labels(self, classes: np.ndarray) -> np.ndarray:
        """Index into label_names of each row of `classes`, (B, n) → (B,)."""
        powers = 10 ** np.arange(self.digits_per_clip)[::-1]
        return np.searchsorted(self._label_codes, np.sort(classes, axis=-1) @ powers)


def directions(turns: np.ndarray) -> np.ndarray:
    """Return the unit vectors (sin, cos) of angles, the same bits on every machine.

    The angle is reduced to at most an eighth of a turn either side of a quarter, where the Taylor
    series to the 16th and 17th power are exact to float64's precision.

    Args:
        turns: float64 of any shape, angles in full turns.

    Returns:
        float64 (..., 2): sine (the y component), cosine (the x component).
    """
    quarter = np.rint(4 * turns)
    angle = (4 * turns - quarter) * (math.pi / 2)
    square = angle * angle
    sine, cosine = np.ones_like(angle), np.ones_like(angle)
    for power in range(16, 0, -2):  # Horner's rule
        cosine = 1 - cosine * square / (power * (power - 1))
        sine = 1 - sine * square / (power * (power + 1))
    sine = sine * angle
    odd = quarter % 2 == 1  # a quarter turn takes (sine, cosine) to (cosine, -sine)
    sine, cosine = np.where(odd, cosine, sine), np.where(odd, -sine, cosine)
    sign = np.where(quarter % 4 >= 2, -1.0, 1.0)  # and half a turn changes both signs
    return np.stack([sign * sine, sign * cosine], axis=-1)


def bounce(start: np.ndarray, velocity: np.ndarray, frames: int) -> np.ndarray:
    """Move points through the unit box, reflecting them at its walls.

    Srivastava et al.'s rule: a point that reaches or passes a wall is put on it, and that
    component of its velocity changes sign.

    Args:
        start: float64 (...), coordinates in [0, 1], before the first step.
        velocity: float64 (...), distance a frame in each coordinate, at most 1.
        frames: number of steps.

    Returns:
        float64 (frames, ...), the coordinates after each step.
    """
    path = np.empty((frames, *start.shape))
    position = start
    for frame in range(frames):
        position = np.clip(position + velocity, 0.0, 1.0)
        velocity = np.where((position == 0.0) | (position == 1.0), -velocity, velocity)
        path[frame] = position
    return path


def render(images: Tensor, positions: Tensor, resolution: int) -> Tensor:
    """Draw digits into frames; where they overlap, the brighter pixel wins.

    Every pixel of every digit is scattered to its place in the frame, keeping the maximum, which
    comes out the same in any order: so it does on any device.

    Args:
        images: uint8 (B, n, 28, 28), the digits of each clip.
        positions: int64 (B, T, n, 2), row and column of each digit's top left pixel, on the same
            device; every digit lies inside the frame.
        resolution: height and width of a frame in pixels.

    Returns:
        uint8 (B, T, resolution, resolution, 1).
    """
    clips, frames, n, _ = positions.shape
    video = torch.zeros(clips, frames, resolution**2, dtype=torch.uint8, device=images.device)
    line = torch.arange(mnist.SIDE, device=images.device)
    inside = line[:, None] * resolution + line  # a digit's pixels, counted from its top left one
    corners = positions[..., 0] * resolution + positions[..., 1]  # (B, T, n)
    part = max(1, DIGITS_AT_ONCE // (frames * n))  # clips
    for first in range(0, clips, part):
        clip = slice(first, first + part)
        place = rearrange(corners[clip, ..., None, None] + inside, "b t n y x -> b t (n y x)")
        ink = repeat(images[clip], "b n y x -> b t (n y x)", t=frames)
        video[clip].scatter_reduce_(2, place, ink, reduce="amax")
    return rearrange(video, "b t (h w) -> b t h w 1", h=resolution)
