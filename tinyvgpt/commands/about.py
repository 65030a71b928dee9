"""The commands that tell: what data and models are, what is installed.

Shapes: none of its own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from tinyvgpt import __version__, kernels, video
from tinyvgpt.attention import FASTER, backends
from tinyvgpt.commands.common import ClipOptions, Name, Positional, check_count, check_outside
from tinyvgpt.data import VideoFolder
from tinyvgpt.presets import PRESETS
from tinyvgpt.store import SHIPPED, read_config, resolve
from tinyvgpt.write import check_target


@dataclass(frozen=True, kw_only=True)
class Look(ClipOptions):
    """Show what a dataset is made of: its clips in one grid, spread over a split, and how many."""

    data: Name
    """What train-vqvae takes, such as a folder of videos."""
    split: str = "train"
    """ "train", "val" or "test"."""
    n: int = 16
    """Number of clips in the grid."""
    frames: int = 16
    """Frames of a clip."""
    resolution: int = 64
    """Height and width of a clip in pixels."""
    out: Path = Path("look.mp4")
    """Video file to write: .mp4, .gif or .webm."""
    fps: float = 8.0
    """Frames a second of the file."""
    scale: int = 3
    """Screen pixels a pixel."""

    def run(self) -> None:
        """Counts, and writes the grid."""
        check_count(self.n)
        check_target(self.out, self.fps, self.scale)
        check_outside(self.out, self.data)
        data = self.open(self.data, self.split, self.frames, self.resolution)
        chosen = np.linspace(0, len(data) - 1, min(self.n, len(data))).astype(int)
        batch = data.batch(chosen)
        if "video" not in batch or batch["video"].shape[1] < self.frames:
            raise ValueError(f"{self.data} holds tokens, there is nothing to see")
        print(f"{len(data):,} clips of {self.frames} frames in {self.split}")
        if data.label_names:
            print(f"classes: {', '.join(data.label_names)}")
        if isinstance(data, VideoFolder):
            for path, reason in data.skipped.items():
                print(f"left out: {path}: {reason}")
        video.write(self.out, video.grid(batch["video"]), fps=self.fps, scale=self.scale)
        print(f"{len(chosen)} of them in {self.out}")


@dataclass(frozen=True)
class Info:
    """What is installed here, which models and presets there are; or what a model is."""

    model: Annotated[str | None, Positional] = None
    """Folder, shipped name or hub id to describe."""

    def run(self) -> None:
        """Prints."""
        if self.model is not None:
            folder = resolve(self.model)
            for stage, values in read_config(folder).items():
                shown = values if not isinstance(values, dict) else ""
                print(f"{stage}: {shown}" if stage != "label_names" else f"classes: {len(values)}")
                for name, value in values.items() if isinstance(values, dict) else ():
                    print(f"  {name} = {value}")
            return
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"tinyvgpt {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
        print(f"CUDA device: {gpu}; CPU threads: {torch.get_num_threads()}")
        order = [kernel.name for kernel in backends(torch.device("cuda"))] if gpu != "none" else []
        training = f", in training {', else '.join(order[:2])}" if order else ""
        print(f"attention: PyTorch's scaled_dot_product_attention{training}")
        reason = kernels.why_not(torch.device("cuda" if order else "cpu"))
        used = f"used for {', '.join(sorted(FASTER)) or 'nothing, unless asked for'}"
        print(f"attention kernels of this package: {f'not here: {reason}' if reason else used}")
        shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
        print(f"shipped models: {', '.join(shipped)}")
        print("presets:")
        for name, function in PRESETS.items():
            print(f"  {name}: {(function.__doc__ or '').splitlines()[0]}")
