"""Axial attention: its kernels on a CPU, its reference, and what it refuses."""

import io
import re

import cuda_on_cpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyvgpt.kernels import axial, build
from tinyvgpt.kernels.axial import axial_attention, axial_block, reference

ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}  # KB a block
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def fused(*shape, dtype, parts=3, spare=8):
    """Views (B, T, H, W, nh, d) of one projection's result, in which all else is NaN."""
    *positions, heads, d = shape
    whole = torch.full((*positions, parts + 1, heads, d + spare), torch.nan, dtype=dtype)
    return [x[..., :d].copy_(torch.randn(shape)) for x in whole.unbind(4)[:parts]]


def exact(q, k, v, grad, axis, causal=False):
    """The answer, dq, dk and dv in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o = reference(q, k, v, axis, causal=causal)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), grad.double())


def close(got, wanted):
    """Whether errors are of the size of a rounding, both on average and the largest."""
    error, epsilon = got.double() - wanted, EPSILON[got.dtype]
    return bool(
        error.norm() < epsilon * wanted.norm()
        and error.abs().max() < 2 * epsilon * wanted.abs().max()
    )


@pytest.fixture
def emulated(kernel_folder, monkeypatch):
    """Within a test the ops' functions run their kernels on the CPU; new tensors start as NaN.

    Yields a list of the launches: name and matrix loads' bank conflicts.
    """
    source = (build.HERE / "tile.cuh").read_text() + (build.HERE / "axial.cu").read_text()
    launches = []

    def launch(file, name, grid, threads, shared_bytes, device, *args):
        cuda_on_cpu.launch(source, name, kernel_folder, grid, (threads,), shared_bytes, *args)
        launches.append((name, cuda_on_cpu.conflicts(source, name, kernel_folder)[0]))

    monkeypatch.setattr(build, "launch", launch)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield launches
    torch.use_deterministic_algorithms(False)


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("shape", "axis", "causal", "dtype"),
    [
        ((2, 4, 3, 3, 2, 64), 1, False, BF16),  # 4 rows a team, 9 teams, 3 blocks
        ((1, 2, 5, 3, 3, 40), 2, True, FP16),  # 3 rows a team, and a padding row
        ((1, 2, 3, 9, 1, 8), 3, False, FP16),
        ((1, 16, 1, 5, 1, 120), 1, False, BF16),
        ((2, 1, 32, 1, 2, 120), 2, False, BF16),
        ((1, 33, 1, 2, 1, 72), 1, True, BF16),
        ((1, 1, 2, 64, 1, 64), 3, False, FP16),
        ((1, 1, 1, 50, 2, 128), 3, True, FP16),
    ],
)
def test_kernel(emulated, shape, axis, causal, dtype):
    q, k, v = fused(*shape, dtype=dtype)
    (grad,) = fused(*shape, dtype=dtype, parts=1)
    wanted = exact(q, k, v, grad, axis, causal)
    o = axial.forward(q, k, v, axis, causal)
    grads = axial.backward(grad, q, k, v, axis, causal)
    assert all(x.is_contiguous() for x in (o, *grads))
    assert all(close(x, y) for x, y in zip((o, *grads), wanted, strict=True))
    assert [conflicts for _, conflicts in emulated] == [0, 0]


def test_kernel_over_random_shapes(emulated):
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(20):  # of few kernels, since each is compiled
        length, d, dtype, causal = pick((4, 64, BF16, False), (9, 8, FP16, False))
        axis, heads = pick(1, 2, 3), pick(1, 2, 5)
        shape = [pick(1, 2), *(pick(1, 2, 3) for _ in range(3)), heads, d]
        shape[axis] = length
        q, _, k = fused(*shape, dtype=dtype, spare=pick(0, 24))
        order = torch.randperm(5, generator=generator)  # of the axes in memory
        v = torch.randn(*(shape[i] for i in order), d).to(dtype).permute(*order.argsort(), 5)
        grad = torch.randn(*shape[:4], 1, d).to(dtype).expand(shape)
        wanted = exact(q, k, v, grad, axis, causal)
        got = (axial.forward(q, k, v, axis, causal), *axial.backward(grad, q, k, v, axis, causal))
        assert all(close(x, y) for x, y in zip(got, wanted, strict=True)), shape


def test_block(emulated):
    qkv = torch.randn(2, 4, 4, 4, 3, 3, 2, 64).bfloat16()
    grad = torch.randn(2, 4, 4, 4, 3, 2, 64).bfloat16()
    expected = qkv.double().requires_grad_()
    wanted = axial_block(expected)
    (d_wanted,) = torch.autograd.grad(wanted, expected, grad.double())
    assert close(axial.block_forward(qkv, False), wanted.detach())
    assert close(axial.block_backward(grad, qkv, False), d_wanted)
    assert len(emulated) == 6


def test_gradients_that_the_kernel_cannot_read(emulated):
    shape = (1, 4, 2, 3, 2, 64)
    q, k, v = fused(*shape, dtype=BF16)
    buffer = torch.randn(64 * 48 + 1).bfloat16()
    for grad in (
        torch.ones((), dtype=BF16).expand(shape),  # of a sum
        buffer[:-1].view(64, *shape[:-1]).movedim(0, -1),
        buffer[1:].view(shape),  # askew
    ):
        wanted = exact(q, k, v, grad, 1)[1:]
        got = axial.backward(grad, q, k, v, 1, False)
        assert all(close(x, y) for x, y in zip(got[2:], wanted[2:], strict=True))
        assert all((x - y).abs().max() < 0.03 for x, y in zip(got, wanted, strict=True))


def test_kernel_with_large_scores(emulated):
    q, k, v = (30 * x for x in fused(1, 4, 2, 3, 2, 64, dtype=BF16))
    wanted = exact(q, k, v, v, 1)[0]
    assert close(axial.forward(q, k, v, 1, False), wanted)


def test_reference_is_attention():
    q, k, v = (torch.randn(2, 3, 4, 5, 2, 16) for _ in range(3))
    for axis in (1, 2, 3):
        for causal in (False, True):
            o = axial_attention(q, k, v, axis, causal=causal)
            assert o.is_contiguous()
            torch.testing.assert_close(o, axial.by_pytorch(q, k, v, axis, causal=causal))
    for b, t, h, w, head in ((0, 1, 2, 3, 1), (1, 2, 0, 4, 0)):
        weights = (k[b, : t + 1, h, w, head] @ q[b, t, h, w, head] / 4).softmax(0)
        o = axial_attention(q, k, v, 1, causal=True)
        torch.testing.assert_close(o[b, t, h, w, head], weights @ v[b, : t + 1, h, w, head])


def test_block_is_three_attentions():
    qkv = torch.randn(2, 3, 4, 5, 3, 3, 2, 16)
    o = axial_block(qkv, causal_time=True)
    assert o.shape == (2, 3, 4, 5, 3, 2, 16)
    for i in range(3):
        q, k, v = qkv[..., i, :, :, :].unbind(4)
        assert o[..., i, :, :].equal(axial_attention(q, k, v, i + 1, causal=i == 0))


def test_a_launch_is_planned_once():
    q = torch.empty(16, 4, 32, 32, 2, 120, dtype=BF16)
    strides = (q.stride(),) * 4
    first = axial.plan(q.shape, strides, q.dtype, 2, False)
    assert axial.plan(q.shape, strides, q.dtype, 2, False) is first
    teams, blocks = axial.FORWARD[2][1]
    assert first.name == f"axial_forward<bf16, 120, 32, 0, {teams}, {blocks}>"
    assert first.grid == (4096 // teams,)
    assert first.threads == 64 * teams
    assert first.shared_bytes == 3 * 32 * 128 * 2 * teams
    along = 2 * 120 * 32 // 8
    assert [int(x) for x in first.numbers[:9]] == [
        4096,
        4,
        32,
        2,
        4 * 32 * along,
        32 * along,
        30,
        15,
        along,
    ]


def fakes(shape=(2, 4, 8, 8, 2, 64), dtype=BF16, device="meta", **kwargs):
    return [torch.empty(shape, dtype=dtype, device=device, **kwargs) for _ in range(3)]


def test_fake_tensors():
    with FakeTensorMode():
        assert axial_attention(*fakes(), 2).is_contiguous()
        assert axial_attention(*fakes((1, 2, 3, 65, 1, 64)), 3).shape[3] == 65
        q, k, v = (x.transpose(2, 3).requires_grad_() for x in fakes())
        o = axial_attention(q, k, v, 2, causal=True)
        assert (o.shape, o.dtype, o.is_contiguous()) == (q.shape, q.dtype, True)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
        assert all(x.shape == q.shape and x.is_contiguous() for x in grads)
        qkv = torch.empty(2, 4, 8, 8, 3, 3, 2, 64, dtype=BF16, device="meta", requires_grad=True)
        o = axial_block(qkv, causal_time=True)
        assert (o.shape, o.dtype, o.is_contiguous()) == ((2, 4, 8, 8, 3, 2, 64), BF16, True)
        assert torch.autograd.grad(o.sum(), qkv)[0].shape == qkv.shape


def test_bad_input_for_the_kernel():
    with FakeTensorMode():
        for error, message, tensors in (
            (TypeError, "takes bfloat16", fakes(dtype=torch.float32)),
            (ValueError, "multiple of 8 up to 128", fakes((2, 4, 8, 8, 2, 60))),
            (ValueError, "multiple of 8 up to 128", fakes((2, 4, 8, 8, 2, 136))),
            (ValueError, "strides", [x.transpose(4, 5) for x in fakes((2, 4, 8, 8, 64, 2))]),
            (ValueError, "strides", [x[..., :64] for x in fakes((2, 4, 8, 8, 2, 65))]),
            (
                ValueError,
                "2³⁰",
                [x.expand(1 << 23, 4, 8, 8, 2, 8) for x in fakes((1, 4, 8, 8, 2, 8))],
            ),
        ):
            with pytest.raises(error, match=message):
                axial_attention(*tensors, 1)
        with pytest.raises(ValueError, match="strides"):
            axial_block(torch.empty(2, 4, 4, 4, 3, 3, 64, 2, device="meta").half().mT)


def test_bad_input():
    q, k, v = fakes(device="cpu", dtype=torch.float32)
    for error, message, tensors, axis in (
        (ValueError, "axis must be", (q, k, v), 0),
        (ValueError, "axis must be", (q, k, v), -3),
        (ValueError, "must all be", (q[0], k[0], v[0]), 1),
        (ValueError, "must all be", (q, k[:, :3], v), 1),
        (ValueError, "must all be", (q, k, v[..., :32]), 1),
        (ValueError, "empty", (q[:0], k[:0], v[:0]), 1),
        (TypeError, "alike", (q, k.half(), v), 1),
        (TypeError, "alike", (q.int(), k.int(), v.int()), 1),
        (ValueError, "all on cpu", (q, k, v.to("meta")), 1),
    ):
        with pytest.raises(error, match=message):
            axial_attention(*tensors, axis)
    for shape in ((2, 4, 4, 4, 3, 3, 64), (2, 4, 4, 4, 3, 2, 2, 64)):
        with pytest.raises(ValueError, match="qkv must be"):
            axial_block(torch.empty(shape))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    text = build.source("axial.cu")
    for length, d in ((4, 120), (32, 120), (64, 64)):
        for backward in (False, True):
            cut, log = axial.tiles(length, d, backward=backward), io.StringIO()
            most = axial.shared_bytes(length, 128, cut.teams, backward=backward)
            assert most <= ARCHITECTURES[arch] * 1024
            name = axial.kernel_name(BF16, d, length, False, cut, backward=backward)
            build.compiled(text, name, arch, log)
            assert re.findall(r"(\d+) bytes spill", log.getvalue()) == ["0", "0"], name
            registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
            assert registers * 32 * axial.warps(length) * cut.teams * cut.blocks <= 1 << 16
