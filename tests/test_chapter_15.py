"""Chapter 15's models of kernels do what the CUDA sources do, in the same order of operations.

The sources run on the CPU, thread by thread. Only exp, 1/√ and the order in which one mma adds up
may differ, so hardly any 16-bit result does. The cells that run kernels on a GPU run here, too.
"""

import shutil
from pathlib import Path

import cuda_on_cpu
import jupytext
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyvgpt.kernels import build
from tinyvgpt.kernels import step as package
from tinyvgpt.sampling import SamplingRule

CHAPTER = Path(__file__).parents[1] / "book" / "15_fast_sampling.md"
CELLS = (
    "lane = torch.arange(32)",
    "def chunks_of(",
    "def multiply(",
    "def evenly(",
    "def moments(",
    "def normalised(",
    "def product(",
    "def ordered(",
    "def pick_digit(",
    "def masses(",
    "def hit(",
    "def in_turn(",
    "def on_gpu(",
    "def compare_product(",
    "def draws_on_gpu(",
)
OUTPUTS = {"narrow": package.NARROW, "gelu": package.GELU, "add": package.ADD, "wide": package.WIDE}


@pytest.fixture(scope="module")
def names():
    """What those cells define."""
    found = {"torch": torch, "np": np, "F": F, "package": package, "why_not": "no GPU here"}
    found |= {"sampling": __import__("tinyvgpt.sampling").sampling, "device": torch.device("cpu")}
    sources = [cell.source for cell in jupytext.read(CHAPTER).cells if cell.cell_type == "code"]
    for start in CELLS:
        (source,) = (source for source in sources if source.startswith(start))
        exec(source, found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return tmp_path_factory.mktemp("chapter")


@pytest.fixture
def on_cpu(folder, monkeypatch):
    emulate = cuda_on_cpu.in_place_of_launch(folder, "product.cu", "draw.cu")
    monkeypatch.setattr(build, "launch", emulate)
    torch.manual_seed(0)


def nearly_the_same_bits(yours, theirs):
    assert (yours != theirs).float().mean() < 0.02
    torch.testing.assert_close(yours, theirs, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("rows", "count"), [(1, 72), (11, 960)])
def test_products(names, on_cpu, output, rows, count):
    """K of one step and of two, with lanes that have no chunk."""
    x, weight = torch.randn(rows, count).bfloat16(), torch.randn(21, count).bfloat16()
    bias, kind = torch.randn(21), torch.float32 if output in ("add", "wide") else torch.bfloat16
    yours = torch.randn(rows, 21).to(kind)
    theirs = yours.clone()
    names["in_turn"]([names["product"](x, weight, yours, output, bias=bias)])
    package.product(x, weight, theirs, OUTPUTS[output], bias=bias)
    if kind == torch.float32:  # the order within an mma shows
        torch.testing.assert_close(yours, theirs, rtol=1e-5, atol=1e-5)
    else:
        nearly_the_same_bits(yours, theirs)


def test_what_the_chapter_compares_on_a_gpu(names, on_cpu):
    nearly_the_same_bits(*names["compare_product"](rows=3))


def test_norms_add_up_in_the_kernels_order(names, on_cpu):
    """Seen through an identity; with such a mean the variance is made of the sums' last digits."""
    x, (gain, shift) = 5 * torch.randn(4, 64) + 3000, torch.randn(2, 64)
    yours = names["normalised"](x, gain, shift, package.evenly(64, 18))
    theirs = torch.empty(4, 64).bfloat16()
    norm = package.Norm(gain, shift)
    package.product(x, torch.eye(64).bfloat16(), theirs, package.NARROW, norm=norm)
    nearly_the_same_bits(yours, theirs)


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(),
        SamplingRule(temperature=0.7),
        SamplingRule(temperature=0),
        SamplingRule(top_k=20),
        SamplingRule(1.3, 100, 0.8),
        SamplingRule(top_p=0.5),
    ],
)
def test_draws(names, on_cpu, rule):
    rng = np.random.default_rng(0)
    z = (3 * rng.standard_normal(300)).astype(np.float32)
    z[::7] = z[3]  # ties
    u = np.append(rng.random(30), [0, 1 - 2**-53])
    theirs = names["draws_on_gpu"](z, u, rule)
    yours = names["hit"](names["masses"](z, rule), u)
    assert (yours != theirs).mean() < 0.05


def test_every_k_th_largest(names):
    """Keys that differ in any of their bytes, and ties."""
    rng = np.random.default_rng(0)
    parts = [1 << 24, 1 << 16, 1 << 8, 1]
    keys = np.array([sum(p * int(rng.integers(3)) for p in parts) for _ in range(60)], np.uint32)
    for k in range(1, len(keys) + 1):
        found = names["least_key"](keys, np.ones(len(keys), np.uint64), k)
        assert found == np.sort(keys)[-k]
