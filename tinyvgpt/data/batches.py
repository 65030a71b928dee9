"""An endless stream of batches in which batch k depends on nothing but the seed and k.

Think of the epochs laid end to end: epoch 0's clips in a random order, then epoch 1's in another.
Batch k is the k-th stretch of `batch_size` clips on that line, so a batch may hold the end of one
epoch and the beginning of the next, and no clip is dropped. `counter.shuffled` finds the clip at
any place of any epoch's order directly; so starting at batch 1,000,000 costs no more than starting
at 0, and training that resumes there goes on as if it had never stopped. Several training processes
cut every batch into shares, so together they see what one would. Chapter 02 builds it.

Shapes: B clips in a process's share of a batch: all of it, where there is one process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tinyvgpt import counter
from tinyvgpt.signals import leave_to_parent

if TYPE_CHECKING:
    from tinyvgpt.data import Dataset


def batches(
    dataset: "Dataset",
    batch_size: int,
    *,
    seed: int = 0,
    start: int = 0,
    shuffle: bool = True,
    workers: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Return an endless iterator over the batches from number `start` on.

    Args:
        dataset: an object as `data.Dataset` describes it.
        batch_size: clips in every batch, of all processes together; may be larger than the dataset.
        seed: of the order of the clips; with another seed every epoch has another order.
        start: number of the first batch: the batches already seen, to resume.
        shuffle: a new random order every epoch; otherwise the dataset's own order, every epoch.
        workers: processes that make batches ahead of time; 0 makes each when it is asked for, on
            `device`. The batches are the same.
        device: where the batches end up.
        rank: number of this training process: of each batch it gets clips rank, rank + world_size,
            …, so no two processes get the same.
        world_size: training processes that share the batches.

    Returns:
        Iterator over what `dataset.batch` returns: video uint8 (B, T, H, W, C), and label and
        action where the dataset has them; B = batch_size / world_size.

    Raises:
        ValueError: batch_size below 1, start or workers below 0, an empty dataset, or processes
            that don't divide the batch.
    """
    for name, value, low in (
        ("batch_size", batch_size, 1),
        ("start", start, 0),
        ("workers", workers, 0),
        ("len(dataset)", len(dataset), 1),
    ):
        if value < low:
            raise ValueError(f"{name} is {value}, it must be at least {low}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank}, of {world_size} processes it must be 0 … {world_size - 1}"
        )
    if batch_size % world_size:
        raise ValueError(f"batch_size is {batch_size}, {world_size} processes don't divide it")
    order = _Order(len(dataset), batch_size, seed, start, shuffle, rank, world_size)
    if workers == 0:
        return (dataset.batch(indices, device) for indices in order)
    return _from_workers(dataset, order, workers, torch.device(device))


@dataclass(frozen=True)
class _Order:
    """The indices of one process's share of batch start, start + 1, …; each int64 (B,)."""

    size: int  # clips in the dataset
    batch_size: int
    seed: int
    start: int
    shuffle: bool
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in count(self.start):
            share = np.arange(self.rank, self.batch_size, self.world_size)
            place = number * self.batch_size + share
            epoch, position = np.divmod(place, self.size)
            if self.shuffle:
                position = counter.shuffled(position, self.size, self.seed, epoch)
            yield position


@dataclass(frozen=True)
class _ByBatch(TorchDataset[dict[str, Tensor]]):
    """A dataset as DataLoader's workers want it: one "item" is one batch."""

    dataset: "Dataset"

    def __getitem__(self, indices: np.ndarray) -> dict[str, Tensor]:
        return self.dataset.batch(indices)


def _from_workers(
    dataset: "Dataset", order: _Order, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    pinned = device.type == "cuda"  # copies from pinned memory overlap with computing
    loader = DataLoader(
        _ByBatch(dataset),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=leave_to_parent,
        generator=torch.Generator(),  # its workers' seeds; leaves torch's own generator alone
    )
    for batch in loader:
        yield {name: value.to(device, non_blocking=pinned) for name, value in batch.items()}
