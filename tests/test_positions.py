"""Positions: one table an axis, side by side along the channels."""

import pytest
import torch

from tinyvgpt.positions import AxisPositions


def test_a_position_is_its_three_rows():
    positions = AxisPositions((2, 3, 5), 12)
    along_t, along_h, along_w = positions.tables
    assert [tuple(table.shape) for table in positions.tables] == [(2, 4), (3, 4), (5, 4)]
    grid = positions()
    assert grid.shape == (2, 3, 5, 12)
    for t, h, w in [(0, 0, 0), (1, 2, 4), (1, 0, 3), (0, 2, 1)]:
        assert torch.equal(grid[t, h, w], torch.cat([along_t[t], along_h[h], along_w[w]]))


def test_a_row_learns_from_every_position_that_shows_it():
    positions = AxisPositions((2, 3, 5), 6)
    positions().sum().backward()
    shown = [15, 10, 6]  # how often a row of each table stands in the grid
    for table, times in zip(positions.tables, shown, strict=True):
        assert torch.equal(table.grad, torch.full_like(table, times))


def test_starts_small():
    tables = AxisPositions((40, 50, 60), 300).tables
    for table in tables:
        assert 0.009 < table.std() < 0.011
        assert table.mean().abs() < 0.001


@pytest.mark.parametrize("width", [0, 4, 10, -3])
def test_width_must_be_divisible(width):
    with pytest.raises(ValueError, match=rf"width {width} is not divisible by the 3 axes"):
        AxisPositions((2, 2, 2), width)
