"""Chapter 14's models of kernels do what the kernels do, in the same order of operations.

The CUDA sources run on the CPU, thread by thread. Only an exponential's last digit and the order in
which one product or one row adds up may differ, so hardly any 16-bit result does.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import jupytext
import pytest
import torch

from tinyvgpt.attention import StridedLayout
from tinyvgpt.kernels import axial, build, decode, flash
from tinyvgpt.kernels.flash_backward import flash_backward_op
from tinyvgpt.kernels.layout import block_layout

CHAPTER = Path(__file__).parents[1] / "book" / "14_video_kernels.md"
WANTED = {"along", "decoded", "strided", "two_passes"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def names():
    """What the chapter's cells define, up to the last model, without figures and what they use."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVGPT_BUDGET", "smoke")
        for cell in jupytext.read(CHAPTER).cells:
            drawn = "plt." in cell.source or "step_through" in cell.source
            unseen = "remove-cell" in cell.metadata.get("tags", [])
            if cell.cell_type == "code" and not drawn and not unseen:
                exec(cell.source, found)
            if found.keys() >= WANTED:
                return found
    raise AssertionError(f"the chapter does not define {WANTED - found.keys()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chapter")


@pytest.fixture
def emulated(folder, monkeypatch):
    """Within a test kernels are launched on the CPU."""

    def launch(file, name, grid, threads, shared_bytes, device, *args, cluster=1, overlap=False):
        parts = (build.HERE / "tile.cuh", build.HERE / file)
        source = "\n".join(part.read_text() for part in parts)
        cuda_on_cpu.launch(source, name, folder, grid, (threads,), shared_bytes, *args)

    monkeypatch.setattr(build, "launch", launch)
    monkeypatch.setattr(flash, "heads_at_once", lambda *_: 8)
    torch.manual_seed(0)


def alike(model, kernel, share=0.01):
    """Asserts that hardly any result differs, and none by much."""
    assert model.shape == kernel.shape
    assert (model != kernel).float().mean() < share
    torch.testing.assert_close(model, kernel, rtol=2**-6, atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "axis", "causal"),
    [
        ((1, 4, 3, 3, 2, 64), 1, False),
        ((1, 5, 3, 2, 1, 40), 1, True),
        ((1, 1, 2, 20, 2, 64), 3, False),
    ],
)
def test_axial(names, emulated, shape, axis, causal):
    q, k, v = torch.randn(3, *shape).bfloat16()
    alike(names["along"](q, k, v, axis, causal), axial.forward(q, k, v, axis, causal))


@pytest.mark.parametrize(("d", "cluster"), [(48, 5), (64, 1)])
def test_decoding(names, emulated, monkeypatch, d, cluster):
    cut, zeros = decode.Tiles(2, 3, 2, 1), torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(decode, "plan", lambda *_: (cut, 5, cluster))
    monkeypatch.setattr(decode, "counters", lambda _: SimpleNamespace(take=lambda n: zeros[:n]))
    q, k, v = torch.randn(2, d), torch.randn(2, 150, d), torch.randn(2, 150, d)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    for length in (1, 40, 150):
        lengths = torch.tensor([length], dtype=torch.int32)
        o, lse = decode.launch([q[None]], k[None], v[None], lengths, None, d**-0.5)
        mine, my_lse = names["decoded"](q, k, v, length, splits=5, cut=cut)
        alike(mine, o[0])
        torch.testing.assert_close(my_lse, lse[0], rtol=1e-6, atol=1e-6)


def test_strided(names, emulated):
    blocks = StridedLayout((4, 8, 16)).blocks
    q, k, v = torch.randn(3, 1, 1, 500, 64).bfloat16()  # the last block is not full
    layout = block_layout(blocks, causal=True)
    o, lse = flash.launch(q, k, v, True, 0.125, layout.rows)
    mine, my_lse = names["strided"](*(x[0, 0] for x in (q, k, v)), blocks)
    alike(mine, o[0, 0])
    torch.testing.assert_close(my_lse, lse[0, 0], rtol=1e-5, atol=1e-5)


def test_large_scores_move_the_maximum(names, emulated):
    blocks = torch.ones(8, 8, dtype=torch.bool)
    q, k, v = torch.randn(3, 1, 1, 256, 64).bfloat16()
    k = (k * torch.linspace(0, 20, 256)[:, None]).bfloat16()
    o, _ = flash.launch(q, k, v, True, 0.125, block_layout(blocks, causal=True).rows)
    mine, _ = names["strided"](*(x[0, 0] for x in (q, k, v)), blocks)
    alike(mine, o[0, 0])


@pytest.mark.parametrize("kind", ["causal", "strided"])
def test_backward(names, emulated, kind):
    length, layout = 160, None
    q, k, v, grad = torch.randn(4, 1, 1, length, 64).bfloat16()
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "strided":
        blocks = (torch.rand(5, 5) < 0.4) | torch.eye(5, dtype=torch.bool)
        layout = block_layout(blocks, causal=True)
        mask = layout.mask(length, length)[0]
    o, lse = flash.reference(q, k, v, causal=True, layout=layout)
    bits = (None, None) if layout is None else (layout.rows, layout.columns)
    kernel = flash_backward_op._init_fn(grad, q, k, v, o, lse, True, 0.125, *bits)
    mine = names["two_passes"](*(x[0, 0] for x in (q, k, v, o, lse, grad)), mask)
    for a, b in zip(mine, kernel, strict=True):
        alike(a, b[0, 0], share=0.02)  # numbers near 0 are sums that cancel
