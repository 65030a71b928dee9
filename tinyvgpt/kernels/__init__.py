"""The package's own CUDA kernels for attention; chapters 12 to 14 build them.

Each function takes CUDA tensors or, through plain PyTorch, any others. `why_not` says why a machine
has no kernels; `tinyvgpt.attention` decides when they are used.

Shapes: B batch · nh heads · S tokens · d head dim · T H W frames, rows, columns.
"""

from functools import cache
from importlib.util import find_spec

import torch

from tinyvgpt.kernels.axial import axial_attention, axial_block
from tinyvgpt.kernels.decode import decode_attention
from tinyvgpt.kernels.flash import flash_attention, strided_attention
from tinyvgpt.kernels.layout import BlockLayout, block_layout

__all__ = [
    "BlockLayout",
    "axial_attention",
    "axial_block",
    "block_layout",
    "decode_attention",
    "flash_attention",
    "strided_attention",
    "why_not",
]
OLDEST = (8, 0)  # compute capability with bfloat16 on tensor cores and asynchronous copies


@cache
def why_not(device: torch.device, oldest: tuple[int, int] = OLDEST) -> str | None:
    """Why kernels can't run on a device, in a few words; None if they can.

    Args:
        device: of any type.
        oldest: compute capability they need; a rung of the ladder has its own.
    """
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < oldest:
        name = torch.cuda.get_device_name(device)
        needed = "{}.{}".format(*oldest)
        return f"{name} has compute capability {major}.{minor}, the kernels need {needed}"
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "cuda-core is not installed: pip install 'tinyvgpt[cuda]'"
    return None
