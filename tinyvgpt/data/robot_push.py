"""Robot pushing: a small arm that pushes coloured objects about a tray, with its actions.

BAIR's robot pushing (Ebert et al. 2017, "Self-supervised visual planning with temporal skip
connections") is the dataset of VideoGPT's Table 1 and takes 32 GB; these are 256 training and 32
test clips of the same form, simulated by data_recipes/robot_push.py and shipped inside the package
(CC0, see ROBOT-PUSH-LICENSE.md): 30 frames of 64 × 64 pixels from an oblique camera. Every tenth
training clip is held out for validation. data_recipes/robot_push_subset.py packs more of them into
a file, which the environment variable TINYVGPT_ROBOT_PUSH puts in their place.

An action is four numbers: what is commanded between its frame and the next, as the fingertips'
displacement along x (towards the camera), y (to the right) and z (up) in metres, and the hand's
turn in radians. The arm does it to a millimetre or so, unless an object that is stuck stops it.
Chapter 02 shows the clips.

Shapes: B clips · T frames · H = W = resolution · N videos · n = 5 objects at most.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from lzma import LZMAError
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data import still_camera
from tinyvgpt.data.transfer import to_device
from tinyvgpt.data.windows import Windows, check_split, default_stride, rows_of
from tinyvgpt.video import resize_crop

FILE = Path(__file__).with_name("robot_push.npz")
FILE_VARIABLE = "TINYVGPT_ROBOT_PUSH"  # environment variable: another such file
# What NumPy and decompression say of a file that is damaged, or another one.
UNREADABLE = (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile, zlib.error, LZMAError)
FRAMES = 30  # of each video
SIDE = 64  # pixels of a frame, each way
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")  # no two alike in a video
# Where the camera is, what it looks at, in metres, and how wide it sees, in degrees.
EYE, AT, FIELD = (0.62, -0.26, 0.64), (-0.015, 0.026, 0.01), 43.5


class Videos(NamedTuple):
    """All videos of a split on disk, "train" (which holds "val" too) or "test"; read-only."""

    video: np.ndarray  # uint8 (N, 30, 64, 64, 3)
    action: np.ndarray  # float32 (N, 30, 4); action t moves frame t to t + 1
    endeffector: np.ndarray  # float32 (N, 30, 3), the fingertips' place in metres
    tracks: np.ndarray  # float32 (N, 30, n, 2), objects' middles, pixels right and down, or NaN
    colours: np.ndarray | None = None  # int8 (N, n), of COLOURS, or -1; older files have none


def load(source: str, path: str | os.PathLike | None = None) -> Videos:
    """Unpacks the videos of a split, once a process.

    Args:
        source: "train" or "test".
        path: a file that data_recipes/robot_push_subset.py wrote. None means the one that the
            environment variable TINYVGPT_ROBOT_PUSH names and, where that is unset, the embedded.

    Raises:
        ValueError: the file is no such file.
    """
    return _load(source, Path(path or os.environ.get(FILE_VARIABLE) or FILE).absolute())


@lru_cache(maxsize=4)
def _load(source: str, path: Path) -> Videos:
    try:
        with np.load(path, allow_pickle=False) as file:
            packed = {name: file[f"{source}_{name}"] for name in still_camera.KEYS}
            numbers = {name: file[f"{source}_{name}"] for name in Videos._fields[1:4]}
            colours = file.get(f"{source}_colours")
        videos = Videos(still_camera.unpack(packed), **numbers, colours=colours)
    except UNREADABLE as error:
        raise ValueError(f"{path} has no robot clips of {source!r} that can be read") from error
    for array in videos:
        if array is not None:
            array.flags.writeable = False
    return videos


def digest(videos: Videos) -> str:
    """The sha256 of the arrays' bytes, one after another, as ROBOT-PUSH-LICENSE.md has it.

    Without the colours, which older files don't have.
    """
    return hashlib.sha256(b"".join(array.tobytes() for array in videos[:4])).hexdigest()


def in_picture(points: Tensor) -> Tensor:
    """Where the camera sees points (…, 3) in metres: (…, 2), pixels to the right and down."""
    eye, at = (torch.tensor(x, dtype=torch.float64) for x in (EYE, AT))
    back = (eye - at) / (eye - at).norm()
    right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), back)
    right = right / right.norm()
    axes = torch.stack([right, torch.linalg.cross(back, right), back], dim=1)
    local = (points.double() - eye) @ axes
    focal = SIDE / 2 / math.tan(math.radians(FIELD) / 2)
    flip = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return (SIDE / 2 + focal * flip * local[..., :2] / -local[..., 2:]).float()


@dataclass(frozen=True)
class RobotPush:
    """Clips of the embedded robot videos.

    Raises:
        ValueError: a field is out of its range.
    """

    split: str = "train"  # "train", "val" or "test"
    frames: int = 16  # T, 1 … 30
    resolution: int = 64  # height and width in pixels; other than 64 is resized
    stride: int | None = None  # frames between starts of clips; None: 1 in training, else `frames`

    def __post_init__(self) -> None:
        check_split(self.split)
        if not 1 <= self.frames <= FRAMES:
            raise ValueError(f"frames is {self.frames}, robot-push has 1 … {FRAMES}")
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}, it must be at least 1")
        _ = self._windows  # a bad stride shows here, not at the first batch

    @property
    def channels(self) -> int:
        """Channels of a frame: red, green, blue."""
        return 3

    @property
    def label_names(self) -> None:
        """None: these clips have actions, not labels."""
        return None

    @cached_property
    def _videos(self) -> Videos:
        return load("test" if self.split == "test" else "train")

    @cached_property
    def _rows(self) -> np.ndarray:
        """Which of the videos belong to this split, int64."""
        count = len(self._videos.video)
        return np.arange(count) if self.split == "test" else rows_of(self.split, count)

    @cached_property
    def _windows(self) -> Windows:
        stride = default_stride(self.split, self.frames) if self.stride is None else self.stride
        return Windows([FRAMES] * len(self._rows), self.frames, stride)

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._windows)

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return clips by their indices.

        Args:
            indices: B integers in [0, len(self)), in any order.
            device: where the batch ends up.

        Returns:
            video: uint8 (B, T, H, W, 3).
            action: float32 (B, T, 4); action t moves frame t to t + 1, so the last one leads out
                of the clip.

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        place = self._frames_of(indices)
        video = torch.from_numpy(self._videos.video[place])
        action = torch.from_numpy(self._videos.action[place])
        return {
            "video": to_device(resize_crop(video, self.resolution), device),
            "action": to_device(action, device),
        }

    def endeffector(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return where the fingertips are in the clips' frames.

        Args:
            indices: B integers in [0, len(self)), in any order.

        Returns:
            float32 (B, T, 3), x, y, z in metres from the middle of the tray's floor.

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        return torch.from_numpy(self._videos.endeffector[self._frames_of(indices)])

    def tracks(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return where the objects' middles are in the clips' frames.

        Args:
            indices: B integers in [0, len(self)), in any order.

        Returns:
            float32 (B, T, n, 2), pixels to the right and down; NaN where there is no object.

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        tracks = torch.from_numpy(self._videos.tracks[self._frames_of(indices)])
        return tracks * (self.resolution / SIDE)

    def colours(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Return which colours the clips' objects have.

        Args:
            indices: B integers in [0, len(self)), in any order.

        Returns:
            int64 (B, n), of `COLOURS`, in the order of `tracks`; -1 where there is no object.

        Raises:
            ValueError: `indices` is not a list of integers, or the file has no colours.
            IndexError: an index is out of range.
        """
        if self._videos.colours is None:
            raise ValueError(
                "the robot clips have no colours: data_recipes/robot_push_subset.py adds them"
            )
        video, _ = self._frames_of(indices)
        return torch.from_numpy(self._videos.colours[video[:, 0]]).long()

    def _frames_of(
        self, indices: Sequence[int] | np.ndarray | Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the clips' frames are: videos (B, 1) and frames (B, T)."""
        video, start = self._windows.locate(indices)
        return self._rows[video][:, None], start[:, None] + np.arange(self.frames)
