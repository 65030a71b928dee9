"""Frames of robot pushing for its probe: as they are, or spoilt.

Where things are follows from the simulator: the fingertips' place as the camera sees it, the
objects' middles and their colours. Spoilt are two frames blended, a frame blurred, and one from
which the arm was taken: grey pixels that hang together with the fingertips or the upper edge, and
that the empty tray does not have, become the tray's.

Shapes: M frames of a split · N frames of a batch · n = 5 objects at most · places are in pixels,
down and right.
"""

import torch
import torch.nn.functional as F
from digit_frames import REAL, Truth, blurred
from torch import Tensor

from tinyvgpt import open_dataset
from tinyvgpt.data.robot_push import FRAMES, RobotPush, in_picture
from tinyvgpt.probes import ProbeConfig, Readings
from tinyvgpt.pushing import CLASSES, READ, acceptance, sights

AT_ONCE = 512  # frames
CLEAR, GREY = 15, 0.22  # difference from the tray, and saturation, of the arm's pixels
NEAR = 4.0  # pixels within which an object is found


class PushFrames:
    """All frames of a split."""

    config = ProbeConfig("robot-push", CLASSES, READ, channels=3)
    kinds = ("blend", "blur", "no arm")

    def __init__(self, split: str, device: torch.device):
        """Takes what TINYVGPT_ROBOT_PUSH names, or the package's videos.

        Raises:
            ValueError: the file has no colours, or a single video.
        """
        data = open_dataset("robot-push", split, frames=FRAMES)
        assert isinstance(data, RobotPush)
        if len(data) < 2:
            raise ValueError(f"blends take 2 videos of {split}, there is {len(data)}")
        every, self.about = range(len(data)), f"{len(data):,} videos"
        colours = data.colours(every)[:, None].expand(-1, FRAMES, -1)
        self.video = data.batch(every, device)["video"].flatten(0, 1)
        tips = in_picture(data.endeffector(every))[..., None, :]
        middles = torch.cat([tips, data.tracks(every)], 2).flip(-1)
        hand = torch.zeros_like(colours[..., :1])
        classes = torch.cat([hand, torch.where(colours < 0, -1, colours + 1)], -1)
        self.classes = classes.flatten(0, 1).to(device)  # (M, 1 + n)
        self.places = middles.flatten(0, 1).nan_to_num(0).to(device)  # (M, 1 + n, 2)
        self.tray = empty_tray(self.video[:: max(1, len(self.video) // 2000)])

    def batch(self, step: int) -> Truth:
        """Random frames, half of them spoilt."""
        kinds = torch.randint(2 * len(self.kinds), (AT_ONCE,))
        kinds[kinds >= len(self.kinds)] = REAL
        return self._frames(torch.randint(len(self.video), (AT_ONCE,)), kinds)

    def of_kind(self, kind: int) -> Truth:
        """All frames, of a kind."""
        parts = [
            self._frames(chosen, torch.full_like(chosen, kind))
            for chosen in torch.arange(len(self.video)).split(AT_ONCE)
        ]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    def _frames(self, chosen: Tensor, kinds: Tensor) -> Truth:
        """Frames (N,) as kinds (N,) say, `REAL` or an index."""
        device = self.video.device
        chosen, kinds = chosen.to(device), kinds.to(device)
        frames, classes = self.video[chosen].float(), self.classes[chosen].clone()
        away = torch.randint(FRAMES, len(self.video) - FRAMES + 1, (len(chosen),), device=device)
        others = self.video[(chosen + away) % len(self.video)].float()  # of another video
        blend, blur, armless = (kinds == i for i in range(len(self.kinds)))
        share = 0.35 + 0.3 * torch.rand(len(chosen), 1, 1, 1, device=device)
        frames[blend] = (share * frames + (1 - share) * others)[blend]
        frames[blur] = all_blurred(frames[blur])
        places, before = self.places[chosen], frames[armless]
        frames[armless] = without_arm(before, self.tray, places[armless, 0])
        classes[blend | blur] = -1
        taken = at(frames[armless] != before, places[armless]).any(-1)  # with the arm
        taken[:, 0] = True
        classes[armless] = torch.where(taken, -1, classes[armless])
        return frames.round().byte(), classes, places

    @staticmethod
    def score(readings: Readings) -> Tensor:
        """How certain it is that a frame shows the hand and two objects (N,)."""
        return acceptance(sights(readings))

    @staticmethod
    def told(readings: Readings, classes: Tensor, places: Tensor, threshold: float) -> dict:
        """How right readings are in frames that are accepted."""
        seen = sights(readings)
        accepted = acceptance(seen) >= threshold
        off = (seen.hand - places[:, 0]).norm(dim=-1)[accepted]
        there = classes[accepted, 1:] >= 0  # (·, n)
        colour = (classes[accepted, 1:] - 1).clamp_min(0)
        score = seen.scores[accepted].gather(1, colour)
        place = seen.objects[accepted].gather(1, colour[..., None].expand(-1, -1, 2))
        apart = (place - places[accepted, 1:]).norm(dim=-1)
        read = there & (score >= threshold)
        count = (seen.scores[accepted] >= threshold).sum()
        return {
            "fingertips off by, pixels, median": off.median().item(),
            "fingertips off by, pixels, 95 % under": off.quantile(0.95).item(),
            "of objects read": (read.sum() / there.sum()).item(),
            f"of these within {NEAR:g} pixels": (apart[read] < NEAR).float().mean().item(),
            "of colours read that are there": (read.sum() / count).item(),
        }


def at(pictures: Tensor, places: Tensor) -> Tensor:
    """What pictures (N, H, W, C) have at places (N, n, 2): (N, n, C)."""
    row, column = places.long().clamp(0, pictures.shape[1] - 1).unbind(-1)
    return pictures[torch.arange(len(pictures), device=pictures.device)[:, None], row, column]


def empty_tray(frames: Tensor) -> Tensor:
    """What nothing moves over, float (H, W, 3), of frames (N, H, W, 3): each pixel's most frequent.

    It keeps its value to the bit, whereas what passes has many.
    """
    powers = torch.tensor([1 << 16, 1 << 8, 1], device=frames.device)
    most = (frames.int() * powers).sum(-1).cpu().mode(0)[0]
    tray = torch.stack([most >> 16, (most >> 8) & 255, most & 255], -1)
    return tray.float().to(frames.device)


def all_blurred(frames: Tensor) -> Tensor:
    """Frames (N, H, W, 3), each as if much out of focus."""
    if not len(frames):
        return frames
    sigma = 2.5 + 1.5 * torch.rand(len(frames), device=frames.device)
    planes = frames.movedim(-1, 1).flatten(0, 1)  # (N · 3, H, W)
    return blurred(planes, sigma.repeat_interleave(3)).unflatten(0, (-1, 3)).movedim(1, -1)


def without_arm(frames: Tensor, tray: Tensor, tips: Tensor) -> Tensor:
    """Frames (N, H, W, 3) with the empty tray's pixels (H, W, 3) in place of the arm's.

    `tips` (N, 2) are where the fingertips are.
    """
    if not len(frames):
        return frames
    top = frames.amax(-1)
    grey = (top - frames.amin(-1)) / top.clamp_min(1) < GREY
    may_be = (grey & ((frames - tray).abs().amax(-1) > CLEAR))[:, None].float()  # (N, 1, H, W)
    line = torch.arange(frames.shape[1], device=frames.device)
    far = (line - tips[..., None] + 0.5).abs()  # (N, 2, H): of rows, of columns
    arm = ((far[:, 0, :, None] < 3) & (far[:, 1, None] < 3))[:, None].float()
    arm[:, :, 0] = 1  # where the arm comes in
    arm = arm * may_be
    for _ in range(frames.shape[1]):  # what hangs together with it
        arm = F.max_pool2d(arm, 3, stride=1, padding=1) * may_be
    rim = F.max_pool2d(arm, 3, stride=1, padding=1)[:, 0, ..., None] > 0
    return torch.where(rim, tray, frames)
