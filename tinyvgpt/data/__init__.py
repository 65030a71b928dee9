"""Every source of clips behind one interface; chapter 02 builds it.

A dataset is any object with what `Dataset` lists: a length, `batch(indices, device)` that returns
a dict of tensors, and four attributes that say what its clips are like. `batches` turns one into an
endless stream for training; `open_dataset` finds one by name.

Shapes: B clips · T frames · H = W = resolution · C channels · A numbers in an action.
"""

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data.batches import batches
from tinyvgpt.data.moving_mnist import MovingMNIST

__all__ = ["Dataset", "MovingMNIST", "batches", "open_dataset"]

NAMES = ("moving-mnist",)  # what open_dataset knows


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


def open_dataset(spec: str, split: str = "train", **options: Any) -> Dataset:
    """Open a dataset by its name.

    Args:
        spec: "moving-mnist".
        split: "train", "val" or "test".
        **options: fields of the dataset, see `MovingMNIST`.

    Returns:
        An object as `Dataset` describes it.

    Raises:
        ValueError: unknown name, split or option, or an option out of its range.
    """
    if spec == "moving-mnist":
        known = [field.name for field in fields(MovingMNIST) if field.name != "split"]
        for name in options:
            if name not in known:
                raise ValueError(f"{spec} has no option {name!r}{_hint(name, known)}")
        return MovingMNIST(split, **options)
    raise ValueError(f"there is no dataset {spec!r}{_hint(spec, NAMES)}")


def _hint(name: str, known: Sequence[str]) -> str:
    """What to write instead of `name`: the most similar of the known ones, or all of them."""
    close = get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there is {', '.join(known)}"
