"""Every kernel once on small tensors, for compute-sanitizer; needs a CUDA device.

compute-sanitizer --tool memcheck python tests/every_kernel.py
compute-sanitizer --tool racecheck python tests/every_kernel.py
"""

import torch

from tinyvgpt.kernels import (
    axial_attention,
    block_layout,
    decode_attention,
    flash_attention,
    ladder,
    strided_attention,
)


def random(*shape, grad=True):
    """Normal numbers in bfloat16."""
    return torch.randn(shape, device="cuda").bfloat16().requires_grad_(grad)


def flash():
    """Forward and backward: full, causal, strided."""
    blocks = torch.rand(7, 7, device="cuda") < 0.5
    for d in (64, 128, 144):
        q, k, v = (random(1, 2, 200, d) for _ in range(3))
        layout = block_layout(blocks, causal=True)
        for o in (
            flash_attention(q, k, v),
            flash_attention(q[:, :, :130], k, v, True),
            strided_attention(q, k, v, layout),
        ):
            o.sum().backward()


def axial():
    """Forward and backward along each axis, rows of one and of several warps."""
    for shape, d in (((2, 4, 16, 32), 120), ((1, 5, 40, 3), 64), ((1, 17, 64, 2), 64)):
        q, k, v = (random(*shape, 2, d) for _ in range(3))
        for axis in (1, 2, 3):
            axial_attention(q, k, v, axis, causal=axis == 1).sum().backward()


def decode():
    """Few sequences and many, with and without a layout, and a row that is appended."""
    layout = block_layout(torch.rand(20, 20, device="cuda") < 0.5, causal=True)
    for batch, heads, d in ((1, 2, 64), (1, 4, 144), (20, 8, 64), (20, 8, 128)):
        q = random(batch, heads, d, grad=False)
        k, v = (random(batch, heads, 640, d, grad=False) for _ in range(2))
        lengths = torch.randint(0, 641, (batch,), device="cuda").int()
        decode_attention(q, k, v, lengths, new=(q, q))
        decode_attention(q, k, v, lengths, layout)


def rungs():
    """The ladder's kernels."""
    q, k, v = (random(1, 2, 150, 64, grad=False).half() for _ in range(3))
    for rung in ladder.rungs():
        ladder.attention(q, k, v, rung.name, True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in (flash, axial, decode, rungs):
        each()
        torch.cuda.synchronize()
        print(each.__name__, flush=True)
