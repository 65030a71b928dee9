"""Chapter 12's kernels in Python do what the CUDA sources beside them do, in the same order."""

import math
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import jupytext
import numpy as np
import pytest
import torch

from tinyvgpt.kernels import build, ladder

CHAPTER = Path(__file__).parents[1] / "book" / "12_first_kernel.md"
CELLS = (
    "@dataclass\nclass Thread",
    "DONE = object()",
    "def reduce(",
    "LOWEST = ",
    "def naive(",
    "class Query",
    "def load(",
    "def tiled(",
    "def work(",
)
RUNGS = {rung.name: rung for rung in ladder.rungs()}


@pytest.fixture(scope="module")
def names():
    """What those cells define, with an exponential that is rounded as the C library's is."""
    exact = {"exp": lambda x: np.exp(np.float64(x)).astype(np.float32)}
    defined = {"np": SimpleNamespace(**{**vars(np), **exact})}
    exec("import random\nfrom dataclasses import dataclass", defined)
    sources = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    for start in CELLS:
        (source,) = (source for source in sources if source.startswith(start))
        exec(source, defined)
    return defined


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["naive", "tiled"])
def test_bits_are_those_of_the_cuda_source(names, name, causal, kernel_folder):
    heads, tokens, d, scale = 2, 70, 64, np.float32(64**-0.5)
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads, tokens, d), dtype=np.float32)
    rung = RUNGS[name]
    cut = rung.cut(torch.float32, tokens, d)
    grid = (math.ceil(tokens / cut.queries), heads)
    yours = np.full_like(q, np.nan)
    names["launch"](names[name], grid, cut.threads, q, k, v, yours, causal, scale)

    text = "\n".join((build.HERE / file).read_text() for file in ("tile.cuh", rung.file))
    theirs = torch.full((heads, tokens, d), math.nan)
    tensors = [torch.from_numpy(x.copy()) for x in (q, k, v)]
    numbers = np.int32(tokens), np.int32(causal), scale
    cuda_on_cpu.launch(
        text, cut.kernel, kernel_folder, grid, (cut.threads,), cut.shared_bytes,
        *tensors, theirs, *numbers,
    )  # fmt: skip
    same = yours == theirs.numpy()
    assert same.mean() > 0.98  # an exponential in a hundred is rounded the other way
    np.testing.assert_allclose(yours, theirs.numpy(), atol=1e-6)
