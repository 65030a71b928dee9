"""Batch norm across processes: the whole batch's results, from halves of it."""

from contextlib import nullcontext

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tinyvgpt.batch_norm import BatchNorm3d
from tinyvgpt.distributed import rank
from tinyvgpt.vqvae import FrozenStatistics

CHANNELS = 6


def example(dtype=torch.float64):
    """Eight clips, far from 0 in one channel, and weights of a loss on the normalised ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, CHANNELS, 2, 3, 4, generator=generator, dtype=torch.float64)
    x[:4] = 2 * x[:4] + 3  # the halves differ
    x[:, 0] += 1000
    return x.to(dtype), torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)


def norm(kind, dtype=torch.float64, **options):
    """A norm whose gains and biases aren't 1 and 0."""
    module = kind(CHANNELS, **options).to(dtype)
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            module.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return module


def steps(module, rows=slice(None), dtype=torch.float64, run=None):
    """Two steps on some of the clips: outputs, gradients, and the state."""
    x, weights = (t[rows].clone() for t in example(dtype))
    x.requires_grad_()
    for _ in range(2):
        x.grad = None
        module.zero_grad()
        y = run(x) if run is not None else module(x)
        (y * weights).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "grads": grads, "state": module.state_dict()}


def unequal():
    """Rank 0 has the first three of the eight clips, rank 1 the others."""
    return slice(0, 3) if rank() == 0 else slice(3, 8)


def half():
    return slice(4 * rank(), 4 * rank() + 4)


def recomputed(module):
    """The module under activation checkpointing, as in the VQ-VAE's residual blocks."""
    contexts = lambda: (nullcontext(), FrozenStatistics(module))  # noqa: E731
    return lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts)


def in_two_processes():
    """What each of two processes gets."""
    found = {
        "halves": steps(norm(BatchNorm3d), half()),
        "unequal": steps(norm(BatchNorm3d), unequal()),
        "float32": steps(norm(BatchNorm3d, torch.float32), half(), torch.float32),
        "plain mean": steps(norm(BatchNorm3d, momentum=None), half()),
        "bare": steps(norm(BatchNorm3d, affine=False, track_running_stats=False), half()),
    }
    module = norm(BatchNorm3d)
    found["recomputed"] = steps(module, half(), run=recomputed(nn.Sequential(module)))
    module = norm(BatchNorm3d, torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found["compiled"] = steps(module, half(), torch.float32, run=compiled)
    x = example(torch.bfloat16)[0][half()].to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = norm(BatchNorm3d, torch.float32)(x).detach()
    strided = found["autocast"].is_contiguous(memory_format=torch.channels_last_3d)
    found["channels last"] = strided
    module = norm(BatchNorm3d).eval()
    found["evaluation"] = module(example()[0]) if rank() == 0 else None  # rank 0 alone: no exchange
    return found


@pytest.fixture(scope="module")
def processes():
    return run_processes(in_two_processes, 2)


@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [
        ("halves", torch.float64, {}),
        ("unequal", torch.float64, {}),
        ("recomputed", torch.float64, {}),
        ("float32", torch.float32, {}),
        ("compiled", torch.float32, {}),
        ("plain mean", torch.float64, {"momentum": None}),
        ("bare", torch.float64, {"affine": False, "track_running_stats": False}),
    ],
)
def test_two_processes_are_as_one_with_the_whole_batch(processes, case, dtype, options):
    first, second = (found[case] for found in processes)
    whole = steps(norm(nn.BatchNorm3d, **options))  # in float64
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-3}
    for name in ("y", "dx"):
        assert_close(torch.cat([first[name], second[name]]).double(), whole[name], **close)
    for name, grad in whole["grads"].items():  # each process has its share; DDP adds them up
        assert_close((first["grads"][name] + second["grads"][name]).double(), grad, **close)
    assert first["state"].keys() == whole["state"].keys()
    for name, value in whole["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert_close(first["state"][name].to(value.dtype), value, **close)


def test_half_a_batch_alone_gives_something_else(processes):
    alone = steps(norm(nn.BatchNorm3d), slice(0, 4))
    assert (processes[0]["halves"]["y"] - alone["y"]).abs().max() > 0.1


def test_bfloat16_and_channels_last(processes):
    x, _ = example(torch.bfloat16)
    whole = norm(nn.BatchNorm3d, torch.float32)(x.float())
    y = torch.cat([found["autocast"] for found in processes])
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), whole, rtol=2**-8, atol=1e-4)  # rounded once, at the end
    assert all(found["channels last"] for found in processes)


def test_evaluation_needs_no_other_process(processes):
    assert torch.equal(processes[0]["evaluation"], norm(nn.BatchNorm3d).eval()(example()[0]))


@pytest.mark.parametrize("compiled", [False, True])
def test_alone_it_is_the_parent(compiled):
    module, parent = norm(BatchNorm3d), norm(nn.BatchNorm3d)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else None
    found, expected = steps(module, run=run), steps(parent)
    assert list(found["state"]) == list(expected["state"])
    for name in ("y", "dx", "grads", "state"):
        assert_close(found[name], expected[name], rtol=0, atol=0)
