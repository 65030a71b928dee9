"""Clips from an HDF5 file in the format of the original VideoGPT; data_recipes/bair.py writes one.

The file holds, for each split, `{split}_data` uint8 (frames of all videos, H, W, C) and
`{split}_idx` int64, where each video starts; optionally `{split}_actions` float (frames, A),
`{split}_labels` int (videos,), and `label_names`, strings. The original's files, which have no
validation split, open unchanged: every tenth training video is held out. Chapter 02 opens one.

What differs from the original's reader: a clip may end at its video's last frame, and a video
exactly as long as a clip is one.

Shapes: B clips · T frames · H = W = resolution · C channels · A numbers in an action · V videos.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data.transfer import to_device
from tinyvgpt.data.windows import SPLITS, Windows, check_split, default_stride, rows_of
from tinyvgpt.video import resize_crop

if TYPE_CHECKING:
    import h5py


class _Videos(NamedTuple):
    """What a split of the file holds."""

    prefix: str  # of its keys: "train", "val" or "test"
    starts: np.ndarray  # int64 (V,), first frame of each video
    lengths: np.ndarray  # int64 (V,), frames
    channels: int
    labels: np.ndarray | None  # int64 (V,)
    label_names: tuple[str, ...] | None
    has_actions: bool


@dataclass(frozen=True)
class HDF5Clips:
    """Clips of a split of an HDF5 file.

    Raises:
        ValueError: no HDF5 file, a key is missing or of another type or shape, or a field is out of
            its range.
        OSError: the file is missing or may not be read.
        ImportError: h5py is not installed.
    """

    path: str  # the file
    split: str = "train"  # "train", "val" or "test"
    frames: int = 16  # T
    resolution: int = 64  # height and width in pixels; frames of another size are resized
    stride: int | None = None  # frames between starts of clips; None: 1 in training, else `frames`

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}, it must be at least 1")
        _ = self._windows  # a bad file or field shows here, not at the first batch

    @property
    def channels(self) -> int:
        """C: 1 for grey, 3 for colour."""
        return self._videos.channels

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What each label means, or None where videos have no label."""
        return self._videos.label_names

    @cached_property
    def _videos(self) -> _Videos:
        with _open(self.path) as file:
            return _read_split(file, self.split)

    @cached_property
    def _windows(self) -> Windows:
        stride = default_stride(self.split, self.frames) if self.stride is None else self.stride
        return Windows(self._videos.lengths, self.frames, stride)

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
            video: uint8 (B, T, H, W, C).
            label: int64 (B,), where the file has labels.
            action: float32 (B, T, A), where it has actions: action t moves frame t to t + 1.

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        videos = self._videos
        row, start = self._windows.locate(indices)
        first = videos.starts[row] + start
        file = _kept_open(self.path, os.getpid(), os.stat(self.path).st_mtime_ns)
        clips = self._read(file[f"{videos.prefix}_data"], first)
        batch = {"video": resize_crop(clips, self.resolution)}
        if videos.labels is not None:
            batch["label"] = torch.from_numpy(videos.labels[row])
        if videos.has_actions:
            actions = file[f"{videos.prefix}_actions"]
            batch["action"] = self._read(actions, first, np.float32)
        return {name: to_device(value, device) for name, value in batch.items()}

    def _read(self, data: "h5py.Dataset", first: np.ndarray, dtype: type = np.uint8) -> Tensor:
        """Rows first … first + T - 1 of a dataset, (B, T, …), as `dtype`."""
        out = np.empty((len(first), self.frames, *data.shape[1:]), dtype)
        for place, row in enumerate(first):
            data.read_direct(out, np.s_[row : row + self.frames], np.s_[place])
        return torch.from_numpy(out)


def _open(path: str) -> "h5py.File":
    """The file, for reading; errors say what is wrong with it in one line."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "HDF5 files need h5py, which is not installed: pip install h5py"
        ) from error
    with Path(path).open("rb"):  # missing or unreadable: Python's own error names the file
        pass
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file, or is damaged")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is a damaged HDF5 file ({error})") from error


@lru_cache(maxsize=8)
def _kept_open(path: str, process: int, changed: int) -> "h5py.File":
    """The file, opened once a process (a worker must not share its parent's) and version."""
    return _open(path)


def _read_split(file: "h5py.File", split: str) -> _Videos:
    """What the file says of a split, checked."""
    held_out = split != "test" and "val_data" not in file
    prefix = "train" if held_out else split
    needed = "uint8 (frames, H, W, 1 or 3)"
    data = _dataset(file, f"{prefix}_data", needed)
    if data.dtype != np.uint8 or data.ndim != 4 or data.shape[3] not in (1, 3):
        raise _unfit(data, needed)
    if 0 in data.shape[1:]:
        raise _unfit(data, "frames of a pixel or more")
    starts = _starts(file, prefix, len(data))
    lengths = np.diff(starts, append=len(data))
    names, labels = _labels(file, prefix, len(starts))
    has_actions = f"{prefix}_actions" in file
    if has_actions:
        _check_actions(file, prefix, len(data))
    rows = rows_of(split, len(starts)) if held_out else np.arange(len(starts))
    labels = None if labels is None else labels[rows]
    return _Videos(prefix, starts[rows], lengths[rows], data.shape[3], labels, names, has_actions)


def _dataset(file: "h5py.File", key: str, needed: str) -> Any:
    if key not in file:
        found = ", ".join(sorted(file)) or "nothing"
        raise ValueError(f"{file.filename} has no {key!r}, {needed}; it holds {found}")
    if not hasattr(file[key], "dtype"):
        raise ValueError(f"{file.filename}: {key} is a group, {needed} is needed")
    return file[key]


def _unfit(data: Any, needed: str) -> ValueError:
    name = data.name.lstrip("/")
    return ValueError(
        f"{data.file.filename}: {name} is {data.dtype} {data.shape}, {needed} is needed"
    )


def _starts(file: "h5py.File", prefix: str, frames: int) -> np.ndarray:
    """First frame of each video, int64 (V,); a closing entry that says where the last ends goes."""
    index = _dataset(file, f"{prefix}_idx", "int64 (videos,), the frame at which each starts")
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise _unfit(index, "int64 (videos,)")
    starts = index[:].astype(np.int64)
    starts = starts[:-1] if len(starts) and starts[-1] == frames else starts
    where = f"{file.filename}: {prefix}_idx"
    if not len(starts):
        raise ValueError(f"{where} is empty, there is no video")
    if (np.diff(starts) <= 0).any() or starts[0] < 0:
        raise ValueError(f"{where} must increase from 0 or more, it starts {starts[:8].tolist()}")
    if starts[-1] >= frames:
        raise ValueError(
            f"{where} has a video that starts at frame {starts[-1]}, {prefix}_data has {frames}"
        )
    return starts


def _check_actions(file: "h5py.File", prefix: str, frames: int) -> None:
    needed = f"float ({frames}, A), a row a frame,"
    actions = _dataset(file, f"{prefix}_actions", needed)
    if actions.ndim != 2 or len(actions) != frames or actions.dtype.kind not in "fiu":
        raise _unfit(actions, needed)


def _labels(
    file: "h5py.File", prefix: str, videos: int
) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """What labels mean, and each video's; labels without names are called by their numbers."""
    if f"{prefix}_labels" not in file:
        return None, None
    needed = f"int64 ({videos},), one a video,"
    stored = _dataset(file, f"{prefix}_labels", needed)
    if stored.shape != (videos,) or stored.dtype.kind not in "iu":
        raise _unfit(stored, needed)
    labels = stored[:].astype(np.int64)
    names = _label_names(file)
    if labels.min() < 0 or labels.max() >= len(names):
        raise _unfit(stored, f"labels 0 … {len(names) - 1}, not {labels.min()} … {labels.max()},")
    return names, labels


def _label_names(file: "h5py.File") -> tuple[str, ...]:
    """What the file calls its labels, or the numbers up to the largest label of any split."""
    if "label_names" in file:
        import h5py

        names = _dataset(file, "label_names", "strings (classes,)")
        if names.ndim != 1 or h5py.check_string_dtype(names.dtype) is None:
            raise _unfit(names, "strings (classes,)")
        try:
            return tuple(names.asstr("utf-8")[:])
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.filename}: label_names are not UTF-8: {error}") from None
    largest = -1
    for key in (f"{split}_labels" for split in SPLITS if f"{split}_labels" in file):
        labels = _dataset(file, key, "int64 (videos,)")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise _unfit(labels, "int64 (videos,)")
        largest = max(largest, int(labels[:].astype(np.int64).max(initial=-1)))
    return tuple(str(number) for number in range(largest + 1))
