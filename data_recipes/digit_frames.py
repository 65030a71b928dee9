"""Frames of Moving MNIST for its probe: as they are, or with digits that were spoilt.

Spoilt are two digits blended into one, a digit blurred, its strokes in disorder.

Shapes: B clips · T frames · N = B·T frames · n = 2 digits of a clip.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyvgpt.data import MovingMNIST
from tinyvgpt.data.mnist import SIDE, load
from tinyvgpt.data.moving_mnist import render
from tinyvgpt.probes import ProbeConfig, Readings

CLIPS = 32  # of a step
REAL = -1  # the kind of what is not spoilt
Truth = tuple[Tensor, Tensor, Tensor]  # uint8 frames (N, H, W, C), classes and middles for targets


def shift(images: Tensor, low: int, high: int) -> Tensor:
    """Moves each image (B, 28, 28) by low … high pixels along each axis, to a random side."""
    n, size = len(images), images.shape[-1]
    steps = torch.randint(low, high + 1, (2, n, 1)) * (torch.randint(2, (2, n, 1)) * 2 - 1)
    rows, columns = high + torch.arange(size) - steps  # each (B, 28), into the padded images
    padded = F.pad(images, (high,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def scramble(images: Tensor) -> Tensor:
    """Images (B, 28, 28) whose sixteen 7 × 7 blocks change places: strokes without a digit."""
    n = len(images)
    blocks = images.view(n, 4, 7, 4, 7).transpose(2, 3).reshape(n, 16, 7, 7)
    order = torch.rand(n, 16).argsort(1)
    blocks = blocks[torch.arange(n)[:, None], order].view(n, 4, 4, 7, 7)
    return blocks.transpose(2, 3).reshape(n, 28, 28)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images (B, H, W) through a Gaussian of width `sigma` pixels (B,) each."""
    line = torch.arange(-12, 13, device=images.device)
    weights = torch.exp(-(line**2) / (2 * sigma[:, None] ** 2))
    weights = weights / weights.sum(1, keepdim=True)  # (B, 25)
    for axis in (2, 3):
        kernel = weights[:, None].unsqueeze(axis)  # (B, 1, 1, 25) or (B, 1, 25, 1)
        room = (12, 12, 0, 0) if axis == 2 else (0, 0, 12, 12)
        padded = F.pad(images[None], room, mode="replicate")  # no rim that would give it away
        images = F.conv2d(padded, kernel, groups=images.shape[0])[0]
    return images


def spoilt(images: Tensor, others: Tensor, kind: str) -> Tensor:
    """What is no digit, made of digits (B, 28, 28) in 0 … 1."""
    if kind == "blend":
        return torch.maximum(images, shift(others, 0, 4))
    if kind == "blur":
        return blurred(images, 2.5 + 1.5 * torch.rand(len(images)))
    return scramble(images)


class DigitFrames:
    """Frames of a split."""

    config = ProbeConfig("moving-mnist", tuple("0123456789"), 2)
    kinds = ("blend", "blur", "strokes")

    def __init__(self, split: str, device: torch.device, mnist: str | None, clips: int):
        """Takes the first `clips` clips for `of_kind`; training ones are endless."""
        size = None if split == "train" else clips
        self.data, self.device = MovingMNIST(split, digits=mnist, size=size), device
        self.about = f"{len(load(split, mnist).labels):,} digits"

    def batch(self, step: int) -> Truth:
        """Frames of clips of which every third digit is spoilt."""
        kinds = torch.randint(3 * len(self.kinds), (CLIPS, 2))
        kinds[kinds >= len(self.kinds)] = REAL
        return self._frames(torch.arange(step * CLIPS, (step + 1) * CLIPS) % len(self.data), kinds)

    def of_kind(self, kind: int) -> Truth:
        """Frames of all clips, with digits of a kind."""
        return self._frames(torch.arange(len(self.data)), torch.full((len(self.data), 2), kind))

    def _frames(self, indices: Tensor, kinds: Tensor) -> Truth:
        """Frames of clips (B,) whose digits are of kinds (B, n), `REAL` or an index."""
        data, path = self.data, self.data.trajectories(indices)
        digits = load(data.split, data.digits)
        images = torch.from_numpy(digits.images[path.digits]).float() / 255  # (B, n, 28, 28)
        flat, which = images.flatten(0, 1), kinds.flatten()
        others = flat[torch.randperm(len(flat))]
        for i, kind in enumerate(self.kinds):
            chosen = which == i
            if chosen.any():
                flat[chosen] = spoilt(flat[chosen], others[chosen], kind)
        drawn = (255 * flat.clamp(0, 1)).round().byte().view(images.shape).to(self.device)
        places = torch.from_numpy(path.positions)  # (B, T, n, 2)
        frames = render(drawn, places.to(self.device), data.resolution).flatten(0, 1)
        classes = torch.where(kinds < 0, torch.from_numpy(path.classes), -1)
        classes = classes[:, None].expand(-1, data.frames, -1).flatten(0, 1)
        middles = (places.flatten(0, 1) + SIDE / 2).float()
        return frames, classes.to(self.device), middles.to(self.device)

    @staticmethod
    def score(readings: Readings) -> Tensor:
        """The less certain digit's score in each frame (N,)."""
        return readings.scores[:, 1]

    @staticmethod
    def told(readings: Readings, classes: Tensor, places: Tensor, threshold: float) -> dict:
        """How right readings are in frames that are accepted."""
        accepted = readings.scores[:, 1] >= threshold
        right = readings.classes.sort(1)[0] == classes.sort(1)[0]
        order, wanted = readings.classes.argsort(1), classes.argsort(1)
        at = [x.gather(1, i[..., None].expand(-1, -1, 2)) for x, i in
              ((readings.places, order), (places, wanted))]  # fmt: skip
        apart = (at[0] - at[1]).norm(dim=-1)
        clear = accepted & right.all(1) & (classes[:, 0] != classes[:, 1])
        return {
            "of these with both digits right": right[accepted].all(1).float().mean().item(),
            "middles off by, pixels": apart[clear].mean().item(),
        }
