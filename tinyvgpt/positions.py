"""Learned positions for a grid: one table an axis, concatenated along the channels.

Chapter 08 builds this file. Source: VideoGPT's released code.

Shapes: t h w grid · D width.
"""

import torch
from torch import Tensor, nn


def check_axes(width: int, axes: int = 3) -> None:
    """Raises ValueError unless every axis gets the same share of the channels."""
    if width < 1 or width % axes:
        raise ValueError(
            f"width {width} is not divisible by the {axes} axes (t, h, w); "
            f"choose a multiple of {axes}"
        )


class AxisPositions(nn.Module):
    """A position is marked by rows t, h and w of three tables, one after the other."""

    def __init__(self, shape: tuple[int, int, int], width: int):
        """Tables of shape (axis length, width / 3), drawn from N(0, 0.01²)."""
        super().__init__()
        check_axes(width)
        self.tables = nn.ParameterList(torch.randn(size, width // 3) * 0.01 for size in shape)

    def forward(self) -> Tensor:
        """Positions of the whole grid, (t, h, w, D)."""
        t, h, w = (len(table) for table in self.tables)
        along_t, along_h, along_w = self.tables
        return torch.cat(
            [
                along_t[:, None, None].expand(-1, h, w, -1),
                along_h[None, :, None].expand(t, -1, w, -1),
                along_w[None, None, :].expand(t, h, -1, -1),
            ],
            dim=-1,
        )
