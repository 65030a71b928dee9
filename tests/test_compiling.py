"""What compiling needs, what is kept out of its graphs, and that importing imports no compiler."""

import subprocess
import sys

import pytest
import torch

from tinyvgpt import compiling
from tinyvgpt.compiling import lacking, uncompiled
from tinyvgpt.settings import TrainConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Says what a machine has: programs, and Triton."""

    def has(*programs, triton=True, platform="linux"):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(compiling.sys, "platform", platform)
        monkeypatch.setattr(compiling.shutil, "which", lambda name: name in programs or None)
        monkeypatch.setattr(compiling, "find_spec", lambda name: object() if triton else None)

    return has


def test_what_compiling_lacks(machine, monkeypatch):
    machine("g++")
    assert lacking(CPU) is None
    assert lacking(CUDA) == "there is no C compiler (gcc or clang)"
    machine("clang")
    assert lacking(CPU) == "there is no C++ compiler (g++)"
    assert lacking(CUDA) is None
    machine("gcc", triton=False)
    assert lacking(CUDA) == "no Triton is installed"
    machine(platform="win32")
    assert lacking(CPU) == "there is no C++ compiler (cl)"
    assert lacking(CUDA) is None
    machine("gcc")
    monkeypatch.setenv("CC", "/opt/cc")
    assert lacking(CUDA) == "there is no C compiler (/opt/cc)"


def test_training_is_compiled_where_it_can_be(machine):
    """By default not without a compiler; asked for, it says what is missing."""
    long, short = TrainConfig(steps=2000), TrainConfig(steps=1999)
    machine("gcc", "g++")
    assert long.compiled(CUDA)
    assert not short.compiled(CUDA)
    assert not long.compiled(CPU)
    asked = TrainConfig(compile="on")
    assert asked.compiled(CPU)
    machine()
    with pytest.warns(UserWarning, match=r"training isn't compiled: there is no C compiler"):
        assert not long.compiled(CUDA)
    with pytest.raises(
        ValueError, match=r"compile is on, but there is no C\+\+ compiler \(g\+\+\)"
    ):
        asked.compiled(CPU)
    assert not TrainConfig(steps=2000, compile="off").compiled(CUDA)


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
