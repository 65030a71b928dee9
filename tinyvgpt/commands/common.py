"""What several commands share: how clips are cut, where to compute, a file as a clip.

Shapes: n frames · H W pixels · C channels.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from tinyvgpt import VQVAEConfig, open_dataset, video
from tinyvgpt.data import EMBEDDED, Dataset
from tinyvgpt.settings import TrainConfig

try:
    from tyro.conf import Positional
except ImportError:  # a command's dataclass can still be filled by hand, and run
    Positional = None  # type: ignore

Name = Annotated[str, Positional]
File = Annotated[Path, Positional]


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """How clips are cut from videos."""

    sample_fps: float | None = None
    """Frames a second to take, of a folder of videos; by default every frame."""
    stride: int | None = None
    """Frames from one clip's start to the next one's; by default 1 in training, else a clip's."""

    def open(self, data: str, split: str, frames: int, resolution: int) -> Dataset:
        """A dataset with clips of so many frames of so many pixels."""
        options = {"fps": self.sample_fps, "stride": self.stride}
        given = {name: value for name, value in options.items() if value is not None}
        return open_dataset(data, split, frames=frames, resolution=resolution, **given)

    def open_for(self, config: VQVAEConfig, data: str, split: str) -> Dataset:
        """A dataset with clips of the length and size that a tokenizer was made for."""
        return self.open(data, split, config.frames, config.resolution)


def pick_device(name: str) -> str:
    """The device that `name` ("auto", "cpu", "cuda") stands for."""
    return str(replace(TrainConfig(), device=name).torch_device())


def check_count(n: int, name: str = "n") -> None:
    """Raises ValueError unless so many clips, or columns of them, make a grid."""
    if n < 1:
        raise ValueError(f"{name} is {n}, it must be at least 1")


def check_outside(out: Path, data: str) -> None:
    """Raises ValueError for a file to be written into a folder of videos, or over the data."""
    if data in EMBEDDED:
        return
    source = Path(data).resolve()
    if out.resolve() == source:
        raise ValueError(f"{out} is what is read; give another --out")
    if source.is_dir() and out.resolve().is_relative_to(source):
        raise ValueError(f"{out} would be one of the videos of {data}; give another --out")


def check_apart(out: Path, data: str) -> None:
    """Raises ValueError for a folder to be written to that is the data's own."""
    if data not in EMBEDDED and out.resolve() == Path(data).resolve():
        raise ValueError(f"{out} is the folder of the data; give another --out, such as one in it")


def read_clip(path: Path, count: int, config: VQVAEConfig, fps: float | None) -> torch.Tensor:
    """The first `count` frames of a video file as uint8 (n, H, W, C), resized for a model."""
    clip = video.read(path, fps=fps, frames=count, resolution=config.resolution)
    if config.channels == 1:  # the luma of ITU-R BT.601
        clip = (
            (clip.float() @ torch.tensor([0.299, 0.587, 0.114])).round().to(torch.uint8)[..., None]
        )
    return clip
