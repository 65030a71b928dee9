"""3D convolutions that keep a clip's size up to their stride, and their transposes.

Chapter 03 builds this file. Source: VideoGPT's released code (its padding); `causal_time` is ours.

Shapes: B batch · C channels · T H W frames, rows, columns · k kernel · s stride.
"""

import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]
FEW = 4  # channels up to which cuDNN's convolutions leave its tensor cores idle


class SameConv3d(nn.Conv3d):
    """Convolution that keeps T, H, W (divided by the stride), with zeros around the clip.

    Padding is kernel - stride in all, the larger half in front. With `causal_time` all temporal
    padding stands in front, so that no output frame sees a later input frame.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: int | Triple,
        stride: Triple = (1, 1, 1),
        *,
        causal_time: bool = False,
        bias: bool = True,
    ):
        kernels = (kernel,) * 3 if isinstance(kernel, int) else kernel
        front = [(k - s + 1) // 2 for k, s in zip(kernels, stride, strict=True)]
        behind = [(k - s) // 2 for k, s in zip(kernels, stride, strict=True)]
        if causal_time:
            front[0], behind[0] = kernels[0] - stride[0], 0
        # The part common to both sides needs no copy of the input: the convolution pads by itself.
        t, h, w = behind
        super().__init__(dim_in, dim_out, kernels, stride, padding=(t, h, w), bias=bias)
        both_sides = list(zip(reversed(front), reversed(behind), strict=True))
        self.extra = [pad for f, b in both_sides for pad in (f - b, 0)]
        self.all_around = [pad for f, b in both_sides for pad in (f, b)]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim_in, T, H, W) to (B, dim_out, T/s, H/s, W/s)."""
        if x.is_cuda and self.in_channels <= FEW:
            return self.as_product(x)
        return super().forward(F.pad(x, self.extra) if any(self.extra) else x)

    def as_product(self, x: Tensor) -> Tensor:
        """The same as one matrix product over patches (im2col): faster on a GPU for RGB or grey."""
        patches = F.pad(x, self.all_around).movedim(1, -1)  # (B, T, H, W, C), padded
        for axis, (k, s) in enumerate(zip(self.kernel_size, self.stride, strict=True), 1):
            patches = patches.unfold(axis, k, s)  # appends (k,)
        return F.linear(patches.flatten(4), self.weight.flatten(1), self.bias).movedim(-1, 1)


class SameConvTranspose3d(nn.ConvTranspose3d):
    """Transposed convolution that multiplies T, H, W by the stride; `SameConv3d`'s mirror image.

    Of the kernel - stride surplus outputs the smaller half is cut in front. With `causal_time` all
    of it is cut behind along time, so that no output frame sees a later input frame.
    """

    def __init__(
        self, dim_in: int, dim_out: int, kernel: int, stride: Triple, *, causal_time: bool = False
    ):
        t, h, w = ((kernel - s) // 2 for s in stride)
        cut = (0 if causal_time else t, h, w)
        super().__init__(dim_in, dim_out, kernel, stride, padding=cut)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim_in, T, H, W) to (B, dim_out, T·s, H·s, W·s)."""
        if x.is_cuda and self.out_channels <= FEW:
            return self.as_product(x)
        t, h, w = (size * s for size, s in zip(x.shape[2:], self.stride, strict=True))
        return super().forward(x)[:, :, :t, :h, :w]

    def as_product(self, x: Tensor) -> Tensor:
        """The same as a matrix product, whose patches are added up where they overlap (col2im)."""
        sizes = x.shape[2:]
        y = F.linear(x.movedim(1, -1), self.weight.flatten(1).T)
        y = y.unflatten(-1, (self.out_channels, *self.kernel_size))  # (B, T, H, W, C, k, k, k)
        for axis in (3, 2, 1):  # the last kernel axis is that of W
            y = overlap_add(y, axis, self.stride[axis - 1])
        for axis, (size, s, cut) in enumerate(zip(sizes, self.stride, self.cut, strict=True), 1):
            y = y.narrow(axis, cut, size * s)
        return (y if self.bias is None else y + self.bias).movedim(-1, 1)


def overlap_add(y: Tensor, axis: int, stride: int) -> Tensor:
    """Adds up patches that start `stride` apart along an axis.

    Args:
        y: (…, n, …, k): n patches at `axis`, k values of each on the last axis.
        axis: counted from the front.
        stride: a divisor of k.

    Returns:
        (…, (n - 1)·stride + k, …), without the last axis.
    """
    steps = y.unflatten(-1, (-1, stride))  # (…, n, …, k/s, s): step j lands j·s further on
    count = steps.shape[-2]
    behind = [0, 0] * (y.ndim - 1 - axis)  # axes after `axis`, which F.pad wants first
    total = sum(F.pad(steps[..., j, :], [*behind, j, count - 1 - j]) for j in range(count))
    assert isinstance(total, Tensor)
    return total.movedim(-1, axis + 1).flatten(axis, axis + 1)
