"""Clips as windows on longer videos: which frames of which video clip i shows.

A video of L frames holds clips of T frames that start at 0, stride, 2·stride, …, as long as they
fit: (L - T) // stride + 1 of them, so one where the video is exactly as long as the clip. Training
takes every start (stride 1). Validation and tests take clips side by side (stride T), the same ones
each time. A clip's index says everything, so batches need no random start of their own.
Chapter 02 builds it.

Shapes: V videos · B clips in a batch · T frames in a clip.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

SPLITS = ("train", "val", "test")
HELD_OUT = 10  # one training video in so many validates, where there is no validation split


class Windows:
    """All clips of a fixed length in a list of videos, in order: video by video, start by start."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, frames: int, stride: int):
        """Counts them.

        Args:
            lengths: frames of each video, (V,); a video shorter than a clip holds none.
            frames: T, of a clip.
            stride: frames from one clip's start to the next one's.

        Raises:
            ValueError: frames or stride below 1, or no video is long enough.
        """
        for name, value in (("frames", frames), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        lengths = np.asarray(lengths, dtype=np.int64)
        self.frames, self.stride = frames, stride
        counts = np.maximum((lengths - frames) // stride + 1, 0)
        self._ends = np.cumsum(counts)  # clips up to and with each video
        if not len(self):
            longest = lengths.max(initial=0)
            raise ValueError(f"no video has {frames} frames, the longest has {longest}")

    def __len__(self) -> int:
        """Return the number of clips."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return where clips are.

        Args:
            indices: B integers in [0, len(self)), in any order.

        Returns:
            video int64 (B,) and the clip's first frame in it, int64 (B,).

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        clip = checked(indices, len(self))
        video = np.searchsorted(self._ends, clip, side="right")
        before = np.concatenate([[0], self._ends])[video]  # clips of all earlier videos
        return video, (clip - before) * self.stride


def checked(indices: Sequence[int] | np.ndarray | Tensor, size: int) -> np.ndarray:
    """Indices as int64 (B,); ValueError or IndexError unless each is in [0, size)."""
    array = np.asarray(indices)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"indices are {indices!r}, they must be a list of integers")
    outside = array[(array < 0) | (array >= size)]
    if outside.size:
        raise IndexError(f"no clip {outside[0]}, there are {size} (0 … {size - 1})")
    return array.astype(np.int64)


def default_stride(split: str, frames: int) -> int:
    """Stride of a split where none is given: 1 for training, clips side by side for the others."""
    return 1 if split == "train" else frames


def check_split(split: str) -> None:
    """Raises ValueError unless split is "train", "val" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, it must be one of {', '.join(SPLITS)}")


def rows_of(split: str, count: int) -> np.ndarray:
    """Which of `count` training videos belong to "train" and which to "val".

    For sources without a validation split of their own. Every tenth video is held out, so that all
    classes are where videos are sorted by class; of fewer than ten the last.

    Returns:
        int64, increasing.

    Raises:
        ValueError: there is only one video, and "val" needs another.
    """
    rows = np.arange(count)
    held_out = rows % HELD_OUT == HELD_OUT - 1 if count >= HELD_OUT else rows == count - 1
    if split == "val" and count < 2:
        raise ValueError(f"holding out a video for validation needs two, there is {count}")
    return rows[held_out if split == "val" else ~held_out if count > 1 else rows >= 0]
