"""Clips that have been encoded already, as datasets; chapter 09 trains from them.

`Tokens` holds them in memory, `TokenFolder` reads what `tinyvgpt encode` wrote: for each split a
folder with `index.json` and shards of memory-mapped arrays, `tokens-00000.npy`, `label-00000.npy`,
and so on, one row a clip.

Shapes: n clips · B batch · t h w latent grid · T A actions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data.transfer import to_device
from tinyvgpt.data.windows import check_split, checked

INDEX = "index.json"
JOB = ".encoding.json"  # index.json of an encoding that isn't done
VERSION = 1  # of the layout of index.json
KEYS = {
    *("channels", "frames", "resolution", "label_names", "codebook"),
    *("clips", "shard_size", "arrays"),
}


class Tokens:
    """Tokens of n clips in memory, with the labels and actions that came with them.

    Its attributes are those of the clips' dataset; `batch` gives `tokens`, and of `video` no more
    than the first frames that a model may be conditioned on.
    """

    def __init__(
        self,
        batch: dict[str, Tensor],
        *,
        channels: int,
        frames: int,
        resolution: int,
        label_names: Sequence[str] | None = None,
    ):
        """Takes all clips as one batch: tokens (n, t, h, w), and what came with them.

        Raises:
            ValueError: if their lengths differ.
        """
        lengths = {name: len(value) for name, value in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a batch must have as many of everything, found {lengths}")
        self.channels, self.frames, self.resolution = channels, frames, resolution
        self.label_names = label_names
        self._all = batch

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._all["tokens"])

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return tokens (B, t, h, w) int64, and the rest, of the clips with these indices."""
        chosen = to_device(torch.as_tensor(np.asarray(indices)), self._all["tokens"].device)
        batch = {name: value[chosen].to(device) for name, value in self._all.items()}
        return {**batch, "tokens": batch["tokens"].long()}


@dataclass(frozen=True)
class TokenFolder:
    """Tokens that `tinyvgpt encode` wrote; they are read when asked for, not before.

    Raises:
        ValueError: the folder has no such split, its encoding was not finished, or it is damaged.
    """

    folder: str  # with a sub-folder for each split
    split: str = "train"  # "train", "val" or "test"

    def __post_init__(self) -> None:
        check_split(self.split)
        self._check()

    @property
    def channels(self) -> int:
        """C of the clips that were encoded."""
        return self.about["channels"]

    @property
    def frames(self) -> int:
        """T of the clips that were encoded."""
        return self.about["frames"]

    @property
    def resolution(self) -> int:
        """Height and width of the clips that were encoded."""
        return self.about["resolution"]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What each label means, or None where clips have no label."""
        names = self.about["label_names"]
        return None if names is None else tuple(names)

    @property
    def codebook(self) -> str:
        """Fingerprint of the tokenizer's codebook, as `vqvae.fingerprint` gives it."""
        return self.about["codebook"]

    @cached_property
    def about(self) -> dict[str, Any]:
        """What index.json says."""
        path = Path(self.folder) / self.split / INDEX
        if not path.is_file() and path.with_name(JOB).is_file():
            raise ValueError(
                f"{path.parent} is not encoded to its end; run the same tinyvgpt encode again"
            )
        if not path.is_file():
            there = sorted(found.parent.name for found in Path(self.folder).glob(f"*/{INDEX}"))
            raise ValueError(
                f"{self.folder} has no tokens of split {self.split!r}; it has "
                f"{', '.join(there) or 'none at all'}"
            )
        try:
            about = json.loads(path.read_text())
            found = about["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r})") from None
        if found != VERSION or not about.keys() >= KEYS:
            raise ValueError(f"{path} is of version {found!r}, this package reads {VERSION}")
        return about

    def _check(self) -> None:
        """Raises ValueError unless all shards are there, as long as they must be."""
        about, folder = self.about, Path(self.folder) / self.split
        for number, first in enumerate(range(0, about["clips"], about["shard_size"])):
            for path in (shard_path(folder, name, number) for name in about["arrays"]):
                array = open_shard(path)
                rows = min(about["shard_size"], about["clips"] - first)
                if array is None or len(array) != rows:
                    raise ValueError(
                        f"{folder} is incomplete: {path.name} is missing or damaged; run the same "
                        "tinyvgpt encode again"
                    )

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.about["clips"]

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return tokens (B, t, h, w) int64, and the rest, of the clips with these indices.

        Raises:
            ValueError: `indices` is not a list of integers.
            IndexError: an index is out of range.
        """
        shard, row = np.divmod(checked(indices, len(self)), self.about["shard_size"])
        folder, batch = Path(self.folder) / self.split, {}
        for name in self.about["arrays"]:
            paths = {s: shard_path(folder, name, s) for s in np.unique(shard)}
            shards = {s: mapped(path, path.stat().st_mtime_ns) for s, path in paths.items()}
            values = np.stack([shards[s][r] for s, r in zip(shard, row, strict=True)])
            values = values.astype(np.int64) if name == "tokens" else values
            batch[name] = to_device(torch.from_numpy(values), device)
        return batch


def shard_path(folder: Path, name: str, number: int) -> Path:
    """Where shard `number` of an array is."""
    return folder / f"{name}-{number:05d}.npy"


def open_shard(path: Path) -> np.ndarray | None:
    """A shard mapped into memory, or None where it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


@lru_cache(maxsize=256)
def mapped(path: Path, changed: int) -> np.ndarray:
    """A version of a shard mapped into memory; not more at once than a process may have open."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
