"""Chapter 13's model of a kernel does what the kernel does, in the same order of operations.

The CUDA source runs on the CPU, thread by thread, in float32 as on a GPU. Only exp and the order
in which one mma adds up may differ, so hardly any 16-bit result does.
"""

from pathlib import Path

import cuda_on_cpu
import jupytext
import pytest
import torch

from tinyvgpt.kernels import build, ladder

CHAPTER = Path(__file__).parents[1] / "book" / "13_tensor_cores.md"
WANTED = {"attend", "attend_pipelined", "swizzled"}


@pytest.fixture(scope="module")
def names():
    """What the chapter's cells define, up to the model of rung 5; figures are left out."""
    found = {}
    for cell in jupytext.read(CHAPTER).cells:
        drawn = "plt." in cell.source or "step_through" in cell.source
        if cell.cell_type == "code" and not drawn:
            exec(cell.source, found)
        if found.keys() >= WANTED:
            return found
    raise AssertionError(f"the chapter does not define {WANTED - found.keys()}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rung", ["tensor_cores", "pipeline"])
def test_the_model_follows_the_kernel(names, rung, causal, kernel_folder, monkeypatch):
    def emulate(file, kernel, grid, threads, shared_bytes, device, *args):
        parts = (build.HERE / "tile.cuh", build.HERE / file)
        text = "\n".join(part.read_text() for part in parts)
        cuda_on_cpu.launch(text, kernel, kernel_folder, grid, (threads,), shared_bytes, *args)

    monkeypatch.setattr(build, "launch", emulate)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 100, 64).bfloat16()
    found = {each.name: each for each in ladder.rungs()}[rung]
    kernel = ladder.launch(found, q, k, v, causal)[0, 0]
    model = names["attend" if rung == "tensor_cores" else "attend_pipelined"]
    yours = model(*(x[0, 0] for x in (q, k, v)), causal=causal)
    assert (yours != kernel).float().mean() < 0.01
    torch.testing.assert_close(yours, kernel, rtol=2**-7, atol=1e-6)
