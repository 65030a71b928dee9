"""Chapter 16's ring adds up over any number of processes; the chapter itself runs two."""

from pathlib import Path

import jupytext
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

CHAPTER = Path(__file__).parents[1] / "book" / "16_scaling_up.md"


def sums(source, numbers):
    """What the chapter's ring and gloo make of a tensor of whole numbers, different in each."""
    names = {"torch": torch, "dist": dist, "rank": dist.get_rank()}
    exec(source, names)
    mine = torch.arange(numbers) * 10 ** dist.get_rank()
    whole, sent = names["ring"](mine)
    dist.all_reduce(mine)
    return torch.equal(whole, mine), sent


@pytest.mark.parametrize("count", [3, 4])
def test_the_ring_adds_up_and_sends_what_the_formula_says(count):
    cells = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    (source,) = (text for text in cells if text.startswith("def ring("))
    numbers = 24
    for equal, sent in run_processes(sums, count, source, numbers):
        assert equal
        assert sent == 2 * (count - 1) / count * numbers * 8
