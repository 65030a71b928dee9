"""What is kept out of compiled graphs, and that importing the package imports no compiler."""

import subprocess
import sys

import torch

from tinyvgpt.compiling import uncompiled


def test_runs_uncompiled_within_a_compiled_function():
    """A function that no graph could hold, between two parts that graphs do hold."""
    seen = []

    @uncompiled
    def inner(x, *, add):
        seen.append(torch.compiler.is_compiling())
        return x + add if x.sum().item() > 0 else x - add

    def outer(x):
        return 2 * inner(x * x, add=1)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(outer, backend=backend)
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        assert torch.equal(compiled(x), outer(x))
    assert seen == [False] * 6
    assert len(graphs) == 2


def test_importing_imports_no_compiler():
    code = "import sys, tinyvgpt.cli, tinyvgpt.train; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
