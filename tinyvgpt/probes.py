"""Small networks that read frames: which things they show, and where.

A model's samples have no labels, so what they show has to be read off them. A detector marks, on a
grid of cells of 4 × 4 pixels, the middle of each thing by its class (after CenterNet: Zhou et al.
2019, "Objects as points"), such as Moving MNIST's digits 0 … 9. What is no digit (two blended ones,
a blur, loose strokes) is marked nowhere: a detector is trained to say so, and the score from which
a mark counts is fixed on validation frames. data_recipes/train_probes.py trains them. Chapter 18
reads with them.

Shapes: B clips · T frames · N frames, all of a batch · C channels · H = W = 64 pixels · K classes ·
h = w = 16 cells · n things.
"""

import hashlib
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvgpt.store import build_config, load_weights, read_config, save_folder, weights_of

CELL = 4  # pixels
FOLDER = Path(__file__).with_name("weights") / "probes"


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of a detector, and the score from which it counts something as seen."""

    name: str  # of the dataset whose frames it reads
    classes: tuple[str, ...]  # K names
    most: int  # things in a frame
    channels: int = 1  # C
    width: int = 48
    threshold: float = 0.5  # of a score in 0 … 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists


class Readings(NamedTuple):
    """What frames show, the most certain first; below the threshold a score still stands."""

    classes: Tensor  # int64 (…, n)
    scores: Tensor  # float32 (…, n), 0 … 1
    places: Tensor  # float32 (…, n, 2), middles in pixels, down and right


class Probe(nn.Module):
    """A detector of the things in a frame."""

    def __init__(self, config: ProbeConfig):
        """Builds a network with fresh weights."""
        super().__init__()
        self.config, width = config, config.width
        layers: list[nn.Module] = []
        sizes = [config.channels, width // 2, width, 2 * width]
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [*conv(before, after, stride=2 if i else 1), *conv(after, after)]
        for dilation in (2, 4, 1):  # a cell sees 80 pixels
            layers += conv(2 * width, 2 * width, dilation=dilation)
        self.trunk = nn.Sequential(*layers)
        self.marks = nn.Conv2d(2 * width, len(config.classes), 1)
        self.shifts = nn.Conv2d(2 * width, 2, 1)
        self.marks.bias.data.fill_(-4.0)  # type: ignore[union-attr]  # few cells have something

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of marks (N, K, h, w) and middles' shifts within cells (N, 2, h, w), of floats.

        `frames` is (N, C, H, W) in 0 … 1.
        """
        x = self.trunk(frames)
        return self.marks(x), self.shifts(x)

    @torch.no_grad()
    def read(self, clips: Tensor, batch_size: int = 512) -> Readings:
        """The things in each frame of clips uint8 (B, T, H, W, C), or of (N, H, W, C)."""
        frames = clips.flatten(0, -4)
        parts = [self._read(part) for part in frames.split(batch_size)]
        joined = (torch.cat(x).unflatten(0, clips.shape[:-3]) for x in zip(*parts, strict=True))
        return Readings(*joined)

    def _read(self, frames: Tensor) -> Readings:
        device = self.marks.weight.device
        x = frames.to(device).movedim(-1, 1).float() / 255
        marks, shifts = self(x)
        scores = marks.sigmoid()
        # Of each class by itself: things of two classes may lie upon each other.
        peak = scores == F.max_pool2d(scores, 3, stride=1, padding=1)
        scores = torch.where(peak, scores, 0)
        top, at = scores.flatten(1).topk(self.config.most)  # (N, n)
        cells = marks.shape[2] * marks.shape[3]
        classes, cell = at // cells, at % cells
        rows, columns = cell // marks.shape[3], cell % marks.shape[3]
        shift = shifts.flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)).mT  # (N, n, 2)
        places = CELL * (torch.stack([rows, columns], -1) + 0.5 + shift)
        return Readings(classes.cpu(), top.cpu(), places.cpu())

    @torch.no_grad()
    def features(self, clips: Tensor, batch_size: int = 512) -> Tensor:
        """What Fréchet distances compare: float32 (B, 4 · width) of clips uint8 (B, T, H, W, C).

        Means over frames and cells of what the trunk has, and of how it changes between frames.
        """
        device = self.marks.weight.device
        pooled = []
        for part in clips.flatten(0, 1).split(batch_size):
            x = part.to(device).movedim(-1, 1).float() / 255
            pooled.append(self.trunk(x).mean((2, 3)).cpu())
        per_frame = torch.cat(pooled).unflatten(0, clips.shape[:2])  # (B, T, 2 · width)
        return torch.cat([per_frame.mean(1), per_frame.diff(dim=1).abs().mean(1)], dim=1)

    def save(self, folder: Path) -> None:
        """Writes settings and weights, these in float16."""
        weights = {"probe": weights_of(self, torch.float16)}
        save_folder(folder, {"probe": asdict(self.config)}, weights)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Probe":
        """Loads a probe in evaluation mode: a shipped one by its dataset's name, or a folder.

        Raises:
            ValueError: if there is none, or its files are damaged.
        """
        folder = FOLDER / name if (FOLDER / name).is_dir() else Path(name)
        if not folder.is_dir():
            shipped = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
            known = ", ".join(shipped) or "none"
            raise ValueError(f"no probe {str(name)!r}: not a folder, and shipped are {known}")
        settings = read_config(folder).get("probe")
        if settings is None:
            raise ValueError(f"{folder} holds no probe, but another model")
        probe = cls(build_config(ProbeConfig, settings, f"{folder}/config.json"))
        load_weights(folder / "probe.safetensors", probe)
        return probe.eval()

    def check(self, channels: int) -> None:
        """Raises ValueError unless it reads frames of so many channels."""
        if channels != self.config.channels:
            raise ValueError(
                f"the probe {self.config.name} reads {self.config.channels} channels, "
                f"the clips have {channels}"
            )


class ProbeFeatures:
    """A probe's features, behind the interface that Fréchet distances have (`features`)."""

    distance = "FD"

    def __init__(self, probe: Probe):
        """Takes a probe, on the device where it is to compute."""
        self.probe, self.size = probe, 4 * probe.config.width
        self.least = self.size + 1
        digest = hashlib.sha256()
        for name, weights in sorted(weights_of(probe).items()):
            digest.update(name.encode() + weights.numpy().tobytes())
        self.name = f"probe {probe.config.name} {digest.hexdigest()[:12]}"
        self.protocol: dict[str, str | int] = {
            "network": f"probe of {probe.config.name}, its trunk's means over frames and cells, "
            "and means of how much they change from frame to frame",
            "weights": f"sha256 {digest.hexdigest()}",
            "resizing": "none",
            "values": "0 to 1",
        }

    def __call__(self, clips: Tensor) -> Tensor:
        """Features, float32 (B, 4 · width), of clips, uint8 (B, T, H, W, C).

        Raises:
            ValueError: for clips of a single frame, or of other channels than the probe's.
        """
        self.probe.check(clips.shape[-1])
        if clips.shape[1] < 2:
            raise ValueError("clips have 1 frame, a probe's features take 2 or more")
        return self.probe.features(clips)


def conv(before: int, after: int, *, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """A 3 × 3 convolution with a batch norm and a ReLU behind it."""
    layer = nn.Conv2d(before, after, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return [layer, nn.BatchNorm2d(after), nn.ReLU()]


def targets(
    classes: Tensor, places: Tensor, count: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a detector should say of frames.

    Args:
        classes: int64 (N, n); -1 for what is to be marked nowhere.
        places: float (N, n, 2), middles in pixels, down and right.
        count: K.
        size: h = w.

    Returns:
        Marks (N, K, h, w): 1 where a middle is, and less around it; shifts (N, n, 2) within a cell;
        the cells' rows and columns (N, n, 2), and whether they count, bool (N, n).
    """
    cells = (places / CELL).floor().clamp(0, size - 1)
    shifts = places / CELL - cells - 0.5
    line = torch.arange(size, device=places.device)
    near = torch.exp(-((line - cells[..., None]) ** 2) / (2 * 0.7**2))  # (N, n, 2, size)
    bumps = near[:, :, 0, :, None] * near[:, :, 1, None, :]  # (N, n, h, w)
    counts = classes >= 0
    marks = places.new_zeros(len(classes), count, size, size)
    for i in range(classes.shape[1]):
        chosen = F.one_hot(classes[:, i].clamp_min(0), count) * counts[:, i, None]  # (N, K)
        marks = torch.maximum(marks, chosen[:, :, None, None] * bumps[:, i, None])
    return marks, shifts, cells.long(), counts


def loss(logits: Tensor, shifts: Tensor, wanted: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The penalty-reduced focal loss of marks (Law & Deng 2018, eq. 1), and how far shifts are off.

    `wanted` is what `targets` gives for the frames.
    """
    marks, right_shifts, cells, counts = wanted
    p, number = logits.sigmoid(), counts.sum().clamp_min(1)
    hit = marks == 1
    missed = (1 - p) ** 2 * F.logsigmoid(logits)
    invented = (1 - marks) ** 4 * p**2 * F.logsigmoid(-logits)
    focal = -torch.where(hit, missed, invented).sum() / number
    at = cells[..., 0] * logits.shape[-1] + cells[..., 1]  # (N, n)
    found = shifts.flatten(2).gather(2, at[:, None].expand(-1, 2, -1)).mT  # (N, n, 2)
    off = (found - right_shifts).abs().sum(-1)
    return focal + (off * counts).sum() / number
