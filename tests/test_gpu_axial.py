"""Axial attention on a CUDA device: pytest -m gpu."""

import random
from contextlib import contextmanager

import pytest
import torch

from tinyvgpt.kernels import axial
from tinyvgpt.kernels.axial import axial_attention, axial_block, reference

pytest.importorskip("cuda.core")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, FP16 = torch.bfloat16, torch.float16
KERNELS = [  # length, head dim, dtype, causal: each is compiled
    (1, 16, BF16, False), (2, 64, FP16, True), (4, 120, BF16, False), (4, 64, BF16, True),
    (5, 40, FP16, False), (7, 8, BF16, True), (16, 64, BF16, False), (16, 120, FP16, True),
    (11, 96, BF16, False), (17, 72, FP16, False), (32, 120, BF16, False), (32, 64, FP16, False),
    (40, 128, BF16, False), (48, 56, BF16, True), (64, 64, BF16, False), (64, 128, FP16, True),
]  # fmt: skip


@contextmanager
def poisoned():
    """Within it new tensors start as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fused(*shape, dtype, parts=3, spare=8):
    """Views (B, T, H, W, nh, d) of one projection's result, in which all else is NaN."""
    *positions, heads, d = shape
    whole = torch.full(
        (*positions, parts + 1, heads, d + spare), torch.nan, dtype=dtype, device="cuda"
    )
    return [x[..., :d].copy_(torch.randn(shape, device="cuda")) for x in whole.unbind(4)[:parts]]


def gradients(function, tensors, grad, *args, **kwargs):
    """What a function makes of tensors, and their gradients."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    o = function(*tensors, *args, **kwargs)
    return o.detach(), *torch.autograd.grad(o, tensors, grad.to(o.dtype))


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def test_random_shapes():
    random.seed(0)
    torch.manual_seed(0)
    for i in range(200):
        length, d, dtype, causal = KERNELS[i % len(KERNELS)]
        axis, heads = random.choice((1, 2, 3)), random.choice((1, 2, 3, 8))
        shape = [random.randint(1, 5), *(random.randint(1, 9) for _ in range(3)), heads, d]
        shape[axis] = length
        q, k, v = fused(*shape, dtype=dtype, spare=random.choice((0, 8, 40)))
        if i % 3 == 0:
            q = q.transpose(1, 3).contiguous().transpose(1, 3)
        if i % 5 == 0:
            v = torch.randn(*shape[:4], 1, d, device="cuda").to(dtype).expand(shape)
        (grad,) = fused(*shape, dtype=dtype, parts=1)
        exact = (x.double() for x in (q, k, v))
        wanted = gradients(reference, exact, grad, axis, causal=causal)
        sdpa = gradients(axial.by_pytorch, (q, k, v), grad, axis, causal=causal)
        with poisoned():
            got = gradients(axial_attention, (q, k, v), grad, axis, causal=causal)
        for x, theirs, exactly in zip(got, sdpa, wanted, strict=True):
            if length == 1 and not exactly.any():  # of q and k: the softmax of one score is 1
                assert x.abs().max() < 1e-2
                continue
            assert error(x, exactly) <= max(1.2 * error(theirs, exactly), 2e-3), (shape, axis)


def test_large():
    for shape in ((16, 4, 32, 32, 2, 120), (4, 16, 64, 64, 2, 64)):
        q, k, v = fused(*shape, dtype=BF16, spare=0)
        (grad,) = fused(*shape, dtype=BF16, parts=1)
        for axis in (1, 2, 3):
            exact = (x.float() for x in (q, k, v))
            wanted = gradients(reference, exact, grad, axis)
            with poisoned():
                got = gradients(axial_attention, (q, k, v), grad, axis)
            assert all(error(x, y.double()) < 4e-3 for x, y in zip(got, wanted, strict=True))


def test_block():
    qkv = torch.randn(2, 4, 16, 32, 3, 3, 2, 64, device="cuda").bfloat16()
    grad = torch.randn(2, 4, 16, 32, 3, 2, 64, device="cuda").bfloat16()
    with poisoned():
        o, d_qkv = gradients(axial_block, [qkv], grad, causal_time=True)
    for i in range(3):
        exact = qkv[:, :, :, :, i].double().unbind(4)
        wanted = gradients(reference, exact, grad[:, :, :, :, i], i + 1, causal=i == 0)
        assert error(o[:, :, :, :, i], wanted[0]) < 4e-3
        assert error(d_qkv[:, :, :, :, i], torch.stack(wanted[1:], dim=4)) < 4e-3


def test_rows_that_are_too_long_are_left_to_pytorch():
    q, k, v = fused(1, 2, 70, 3, 2, 64, dtype=BF16)
    for causal in (False, True):
        wanted = reference(*(x.double() for x in (q, k, v)), 2, causal=causal)
        assert error(axial_attention(q, k, v, 2, causal=causal), wanted) < 4e-3
    qkv = torch.randn(1, 2, 70, 3, 3, 3, 2, 64, device="cuda").bfloat16()
    o = axial_block(qkv)
    assert o[:, :, :, :, 1].equal(axial_attention(*qkv[:, :, :, :, 1].unbind(4), 2))


def test_gradients_that_the_kernel_cannot_read():
    shape = (1, 4, 2, 3, 2, 64)
    q, k, v = fused(*shape, dtype=BF16)
    buffer = torch.randn(64 * 48 + 1, device="cuda").bfloat16()
    for grad in (
        torch.ones((), dtype=BF16, device="cuda").expand(shape),  # of a sum
        buffer[:-1].view(64, *shape[:-1]).movedim(0, -1),
        buffer[1:].view(shape),  # askew
    ):
        got = gradients(axial_attention, (q, k, v), grad, 1)
        wanted = gradients(
            axial_attention, (q, k, v), grad.clone(memory_format=torch.contiguous_format), 1
        )
        assert all(x.equal(y) for x, y in zip(got, wanted, strict=True))


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in fused(1, 4, 2, 3, 2, 64, dtype=BF16))
    ops = torch.ops.tinyvgpt
    torch.library.opcheck(ops.axial_attention.default, (q, k, v, 1, False))
    rest = [x.detach() for x in (v, q, k, v)]
    torch.library.opcheck(ops.axial_attention_backward.default, (*rest, 1, False))
    qkv = torch.randn(1, 4, 4, 4, 3, 3, 2, 64, device="cuda").bfloat16().requires_grad_()
    torch.library.opcheck(ops.axial_block.default, (qkv, False))
    grad = torch.randn(1, 4, 4, 4, 3, 2, 64, device="cuda").bfloat16()
    torch.library.opcheck(ops.axial_block_backward.default, (grad, qkv.detach(), False))


def test_compiled_and_captured():
    x = torch.randn(2, 4, 8, 16, 64, device="cuda").bfloat16()
    weight = torch.randn(9 * 128, 64, device="cuda").bfloat16().mul_(0.1).requires_grad_()

    def both(x):
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, 3, 2, 64))
        q, k, v = qkv[:, :, :, :, 0].unbind(4)
        return axial_block(qkv, causal_time=True).sum(4) * axial_attention(q, k, v, 2)

    def step(function):
        o = function(x)
        return o.detach(), *torch.autograd.grad(o.square().sum(), weight)

    eager = step(both)
    compiled = step(torch.compile(both, fullgraph=True))
    assert all(error(a, b.double()) < 2e-2 for a, b in zip(compiled, eager, strict=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(both)  # compiles and loads what the graph captures
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step(both)
    x.normal_()
    graph.replay()
    assert all(error(a, b.double()) < 1e-3 for a, b in zip(captured, step(both), strict=True))


def test_bad_input():
    q, k, v = fused(1, 4, 2, 3, 2, 64, dtype=BF16)
    for wrong, message, tensors in (
        (TypeError, "takes bfloat16", (q.float(), k.float(), v.float())),
        (ValueError, "all on cuda", (q, k.cpu(), v)),
        (ValueError, "multiple of 8", (q[..., :60], k[..., :60], v[..., :60])),
        (ValueError, "strides", [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in (q, k, v)]),
    ):
        with pytest.raises(wrong, match=message):
            axial_attention(*tensors, 1)
