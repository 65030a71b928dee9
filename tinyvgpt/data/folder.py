"""Clips from a folder of video files, sorted into splits and, if you like, classes.

`video_files` lists them, `video_index` finds the frames of each, `index_cache` remembers that, and
`video_clip` decodes the frames of a clip: the same ones that decoding the file from its beginning
shows. Chapter 02 opens one.

A file that cannot be used is left out with a warning. One whose inside turns out to be damaged
gives a warning, and in the place of each clip that cannot be decoded the dataset gives one of
another video; which one depends on the clip alone.

Shapes: B clips · T frames · H = W = resolution · V videos.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data.index_cache import Index, index_videos
from tinyvgpt.data.transfer import to_device
from tinyvgpt.data.video_clip import read_frames
from tinyvgpt.data.video_files import SUFFIXES, find_videos
from tinyvgpt.data.video_index import Timeline
from tinyvgpt.data.windows import Windows, check_split, default_stride, rows_of
from tinyvgpt.write import frame_rate

NAMED = 3  # broken files named in one message
DAMAGED = "damaged inside: clips that cannot be decoded are replaced by those of other videos"


class _Videos(NamedTuple):
    """The usable videos of a split, and those that are not."""

    names: tuple[str, ...]  # (V,), paths from the folder
    timelines: tuple[Timeline, ...]  # (V,)
    labels: np.ndarray | None  # int64 (V,)
    label_names: tuple[str, ...] | None
    broken: dict[str, str]  # path from the folder → why


@dataclass(frozen=True)
class VideoFolder:
    """Clips of a split of a folder of videos (avi, gif, mkv, mov, mp4, webm).

    The folder holds train/ and test/, optionally val/; or the training videos themselves. Without
    val/ every tenth training video is held out. Sub-folders of a split are classes.

    A broken file is skipped with a warning and listed in `skipped`. So is one that turns out to be
    damaged inside, though only its bad clips are replaced, by clips of other videos.

    The first opening scans the files, and keeps what it finds in `.tinyvgpt-index.json`. A clip
    takes as long as decoding from the key frame before it; in files that leave open which packets
    are frames (GIF, VP8, AVI with frames out of order) from the file's beginning.

    Raises:
        ValueError: the folder or the split is missing, no video has a clip, some videos are in
            class folders and others not, or a field is out of its range.
        ImportError: PyAV is not installed.
    """

    folder: str
    split: str = "train"  # "train", "val" or "test"
    frames: int = 16  # T
    resolution: int = 64  # height and width in pixels; frames are resized and cropped to it
    stride: int | None = None  # frames between starts of clips; None: 1 in training, else `frames`
    fps: float | None = None  # frames a second to sample, None: every frame of the file

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}, it must be at least 1")
        _ = self._rate, self._windows, self._damaged  # a bad field or folder shows here

    @property
    def channels(self) -> int:
        """C: colour."""
        return 3

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The class folders of all splits, in order, or None where there are none."""
        return self._videos.label_names

    @property
    def skipped(self) -> dict[str, str]:
        """Path → reason, of files that are left out or, being damaged inside, in part.

        The latter are those that clips were asked of so far, by this process or its workers.
        """
        reasons = dict(self._videos.broken)
        for row in self._damaged.nonzero().flatten().tolist():
            reasons[self._videos.names[row]] = DAMAGED
        return {str(Path(self.folder) / name): reason for name, reason in reasons.items()}

    @cached_property
    def _rate(self) -> Fraction | None:
        return None if self.fps is None else frame_rate(self.fps)

    @cached_property
    def _videos(self) -> _Videos:
        return _open(Path(self.folder), self.split)

    @cached_property
    def _damaged(self) -> Tensor:
        """Videos with a clip that could not be decoded, uint8 (V,), shared with workers."""
        return torch.zeros(len(self._videos.names), dtype=torch.uint8).share_memory_()

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Frames of each video at the rate asked for, int64 (V,)."""
        return np.array([each.samples(self._rate) for each in self._videos.timelines], np.int64)

    @cached_property
    def _stride(self) -> int:
        return default_stride(self.split, self.frames) if self.stride is None else self.stride

    @cached_property
    def _windows(self) -> Windows:
        longest = self._lengths.max(initial=0)
        if self.frames >= 1 and longest < self.frames:
            raise ValueError(self._no_clip(longest))
        return Windows(self._lengths, self.frames, self._stride)

    def _no_clip(self, longest: int) -> str:
        """Why there is no clip at all."""
        every = "" if self._rate is None else f" at {float(self._rate):g} a second"
        count, broken = len(self._lengths), self._videos.broken
        reasons = [f"the longest of {count} videos has {longest}"] if count else []
        reasons += [_named(broken)] if broken else []
        clip = f"{self.split} clip of {self.frames} frames{every}"
        return f"{self.folder} has no {clip}: {'; '.join(reasons)}"

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return clip `index`: video uint8 (T, H, W, 3) and, with classes, label int64 ()."""
        return {name: value[0] for name, value in self.batch([index]).items()}

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return clips by their indices.

        Args:
            indices: B integers in [0, len(self)), in any order.
            device: where the batch ends up.

        Returns:
            video: uint8 (B, T, H, W, 3), RGB.
            label: int64 (B,), where there are class folders.

        Raises:
            ValueError: `indices` is not a list of integers, or no video can be decoded any more.
            IndexError: an index is out of range.
        """
        rows, starts = self._windows.locate(indices)
        found = [self._clip(*place) for place in zip(rows.tolist(), starts.tolist(), strict=True)]
        batch = {"video": torch.stack([clip for _, clip in found])}
        if self._videos.labels is not None:
            rows = np.array([row for row, _ in found], np.int64)
            batch["label"] = torch.from_numpy(self._videos.labels[rows])
        return {name: to_device(value, device) for name, value in batch.items()}

    def _clip(self, row: int, start: int) -> tuple[int, Tensor]:
        """The clip (T, H, W, 3) at a place, or in its place; and which video it is of."""
        for video, first in self._places(row, start):
            path = Path(self.folder) / self._videos.names[video]
            timeline = self._videos.timelines[video]
            try:
                shown = timeline.frames_at(first, self.frames, self._rate)
                return video, read_frames(path, timeline, shown, self.resolution)
            except (ValueError, OSError) as error:
                self._warn_of(video, path, error)
        raise ValueError(f"no video of {self.folder} can be decoded any more")

    def _places(self, row: int, start: int) -> Iterator[tuple[int, int]]:
        """A place, and where to look if it is damaged: half the videos further on, and so forth."""
        yield row, start
        fit = np.flatnonzero(self._lengths >= self.frames)
        at = int(np.searchsorted(fit, row)) + len(fit) // 2
        for video in np.roll(fit, -at).tolist():
            clips = (self._lengths[video] - self.frames) // self._stride + 1
            yield video, int(start // self._stride % clips) * self._stride

    def _warn_of(self, video: int, path: Path, error: Exception) -> None:
        if not self._damaged[video]:
            self._damaged[video] = 1
            reason = str(error).removeprefix(f"{path} ")
            warnings.warn(f"{path} {reason}; other clips take its place", stacklevel=2)


def _open(folder: Path, split: str) -> _Videos:
    """Find and index the videos of a split; warn of those that are broken."""
    files = find_videos(folder)
    held_out = split != "test" and "val" not in files.splits
    source = "train" if held_out else split
    if source not in files.splits:
        there = f"only {'/, '.join(files.splits)}/"
        there = there if files.depth else "its videos are for train and val"
        raise ValueError(f"{folder} has no {source}/, {there}")
    listed = files.splits[source]
    if not listed:
        place = folder / source if files.depth else folder
        raise ValueError(f"{place} holds no video ({', '.join(SUFFIXES)})")
    index = index_videos(folder, listed, files.all)
    _warn_of_broken(folder, index)
    names = [name for name in listed if name in index.timelines]
    if held_out and names:
        try:
            names = [names[row] for row in rows_of(split, len(names))]
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    labels = None
    if files.label_names is not None:
        labels = np.array([files.label(name) for name in names], np.int64)
    timelines = tuple(index.timelines[name] for name in names)
    return _Videos(tuple(names), timelines, labels, files.label_names, index.broken)


def _warn_of_broken(folder: Path, index: Index) -> None:
    """Warn of each file that was found to be broken just now, and once of those known to be."""
    known = {}
    for name, reason in index.broken.items():
        if name in index.scanned:
            warnings.warn(f"{folder / name} is skipped: it {reason}", stacklevel=2)
        else:
            known[name] = reason
    if known:
        warnings.warn(f"{folder}: {_named(known)}", stacklevel=2)


def _named(broken: dict[str, str]) -> str:
    """`2 broken files skipped: a.mp4 (why), b.mp4 (why)`."""
    reasons = [f"{name} ({reason})" for name, reason in list(broken.items())[:NAMED]]
    more = [f"and {len(broken) - NAMED} more"] if len(broken) > NAMED else []
    files = "file" if len(broken) == 1 else "files"
    return f"{len(broken)} broken {files} skipped: {', '.join(reasons + more)}"
