"""Copying a batch to where it is needed; chapter 16 says why so.

Shapes: none of its own.
"""

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what a GPU is still computing.

    Only from page-locked memory can a GPU copy by itself, while the program goes on.
    """
    if torch.device(device).type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
