"""Every source of clips behind one interface; chapter 02 builds it.

A dataset is any object with what `Dataset` lists: a length, `batch(indices, device)` that returns
a dict of tensors, and four attributes that say what its clips are like. `batches` turns one into an
endless stream for training; `open_dataset` finds one by name.

Shapes: B clips · T frames · H = W = resolution · C channels · A numbers in an action.
"""

import os
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data.batches import batches
from tinyvgpt.data.folder import VideoFolder
from tinyvgpt.data.hdf5 import HDF5Clips
from tinyvgpt.data.moving_mnist import MovingMNIST
from tinyvgpt.data.robot_push import RobotPush
from tinyvgpt.data.tokens import INDEX, JOB, TokenFolder
from tinyvgpt.data.windows import SPLITS

__all__ = [
    "Dataset",
    "HDF5Clips",
    "MovingMNIST",
    "RobotPush",
    "TokenFolder",
    "VideoFolder",
    "batches",
    "open_dataset",
]

EMBEDDED = {"moving-mnist": MovingMNIST, "robot-push": RobotPush}  # what is in the package
HDF5_SUFFIXES = (".h5", ".hdf5")


class Dataset(Protocol):
    """What a source of clips must offer."""

    @property
    def channels(self) -> int:
        """C: 1 for grey, 3 for colour."""

    @property
    def frames(self) -> int:
        """T: frames in a clip."""

    @property
    def resolution(self) -> int:
        """Height and width of a frame in pixels."""

    @property
    def label_names(self) -> Sequence[str] | None:
        """What each label means, or None where clips have no label."""

    def __len__(self) -> int:
        """Return the number of clips."""
        ...

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return the clips with these indices, on `device`.

        Returns:
            video: uint8 (B, T, H, W, C).
            label: int64 (B,), only where label_names is not None.
            action: float32 (B, T, A), only where the dataset has actions.
        """
        ...


def open_dataset(spec: str | os.PathLike, split: str = "train", **options: Any) -> Dataset:
    """Open a dataset by its name or its place.

    Args:
        spec: "moving-mnist"; "robot-push"; an HDF5 file (.h5, .hdf5) in the original's format; a
            folder of videos; or a folder of tokens that `tinyvgpt encode` wrote.
        split: "train", "val" or "test".
        **options: fields of the dataset: see `MovingMNIST`, `RobotPush`, `HDF5Clips`,
            `VideoFolder`. Tokens take none; `frames` and `resolution` are compared with the encoded
            clips'.

    Returns:
        An object as `Dataset` describes it.

    Raises:
        ValueError: unknown name, split or option, an option out of its range, or data that are not
            what they should be.
        OSError: a file or folder may not be read.
    """
    spec = os.fspath(spec)
    if spec in EMBEDDED:
        return _with_options(EMBEDDED[spec], spec, (), split, options)
    path = Path(spec)
    if path.is_file() and path.suffix.lower() in HDF5_SUFFIXES:
        return _with_options(HDF5Clips, spec, (spec,), split, options)
    if any((path / each / name).is_file() for each in SPLITS for name in (INDEX, JOB)):
        return _open_tokens(spec, split, options)
    if path.is_dir():
        return _with_options(VideoFolder, spec, (spec,), split, options)
    raise ValueError(_unknown(path))


def _with_options(
    kind: Any, spec: str, place: tuple[str, ...], split: str, options: dict[str, Any]
) -> Dataset:
    """A dataset of a dataclass `kind`, unless an option is none of its fields."""
    known = [field.name for field in fields(kind)][len(place) :]
    known.remove("split")
    for name in options:
        if name not in known:
            raise ValueError(f"{spec} has no option {name!r}{_hint(name, known)}")
    return kind(*place, split=split, **options)


def _open_tokens(spec: str, split: str, options: dict[str, Any]) -> TokenFolder:
    data = TokenFolder(spec, split)
    for name, value in options.items():
        if name not in ("frames", "resolution"):
            raise ValueError(f"{spec} holds tokens, which have no option {name!r}")
        if value != getattr(data, name):
            found = getattr(data, name)
            raise ValueError(f"{spec} holds tokens of clips with {name} {found}, not {value}")
    return data


def _unknown(path: Path) -> str:
    """What is wrong with a spec that is neither a name nor data."""
    if path.is_file():
        kinds = ", ".join(HDF5_SUFFIXES)
        return f"{path} is no dataset: a file must be HDF5 ({kinds}); of videos give the folder"
    if path.suffix or len(path.parts) > 1:
        return f"there is no file or folder {str(path)!r}"
    return f"there is no dataset, file or folder {str(path)!r}{_hint(str(path), list(EMBEDDED))}"


def _hint(name: str, known: Sequence[str]) -> str:
    """What to write instead of `name`: the most similar of the known ones, or all of them."""
    close = get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there is {', '.join(known)}"
