"""I3D, the network whose outputs the Fréchet video distance compares.

Inception-v1 with its convolutions inflated to three dimensions (Carreira & Zisserman 2017,
fig. 3), trained on Kinetics-400. Layers are called as in the port of its weights to PyTorch
("pytorch-i3d", "i3d_pretrained_400"), so such a state dict fits as it is. No weights are in this
package. Chapter 18 uses it.

Shapes: B clips · C channels · T H W frames and pixels.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvgpt.convolution import Triple

CLASSES = 400  # of Kinetics-400
# Of each module: channels in; channels of its four branches, as 1×1, then (1×1, 3×3) twice, then
# 1×1 after pooling.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def same_pad(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around (B, C, T, H, W), such that ceil(size / stride) outputs fit; TensorFlow's "SAME".

    An odd number of zeros has one more behind.
    """
    sides: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sides = [total // 2, total - total // 2, *sides]  # F.pad begins with the last axis
    return F.pad(x, sides)


class SamePool(nn.MaxPool3d):
    """Maximum over a window; zeros around change nothing, as inputs come from a ReLU."""

    kernel_size: Triple
    stride: Triple

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C, ⌈T/s⌉, ⌈H/s'⌉, ⌈W/s''⌉)."""
        return super().forward(same_pad(x, self.kernel_size, self.stride))


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(inner, outer, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outer, eps=1e-3)  # the authors' library's

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', ⌈T/s⌉, ⌈H/s⌉, ⌈W/s⌉)."""
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        return F.relu(self.bn(self.conv3d(same_pad(x, kernel, stride))))


class Mixed(nn.Module):
    """An Inception module: four branches side by side."""

    def __init__(self, inner: int, outer: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(inner, outer[0])
        self.b1a, self.b1b = Unit(inner, outer[1]), Unit(outer[1], outer[2], 3)
        self.b2a, self.b2b = Unit(inner, outer[3]), Unit(outer[3], outer[4], 3)
        self.b3a, self.b3b = SamePool((3, 3, 3), (1, 1, 1)), Unit(inner, outer[5])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T, H, W)."""
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x)))
        return torch.cat(branches, dim=1)


class Logits(nn.Module):
    """The last convolution, with bias, without norm or ReLU."""

    def __init__(self, inner: int, classes: int):
        super().__init__()
        self.conv3d = nn.Conv3d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, classes, T, H, W)."""
        return self.conv3d(x)


class I3D(nn.Sequential):
    """Inflated Inception-v1, for RGB clips."""

    def __init__(self) -> None:
        """Builds the network with fresh weights, in evaluation mode."""
        mixed = {name: Mixed(*channels) for name, channels in MIXED.items()}
        of = lambda stage: [(name, mixed[name]) for name in MIXED if name[6] == stage]  # noqa: E731
        layers: list[tuple[str, nn.Module]] = [
            ("Conv3d_1a_7x7", Unit(3, 64, 7, 2)),
            ("MaxPool3d_2a_3x3", SamePool((1, 3, 3), (1, 2, 2))),
            ("Conv3d_2b_1x1", Unit(64, 64)),
            ("Conv3d_2c_3x3", Unit(64, 192, 3)),
            ("MaxPool3d_3a_3x3", SamePool((1, 3, 3), (1, 2, 2))),
            *of("3"),
            ("MaxPool3d_4a_3x3", SamePool((3, 3, 3), (2, 2, 2))),
            *of("4"),
            ("MaxPool3d_5a_2x2", SamePool((2, 2, 2), (2, 2, 2))),
            *of("5"),
            ("avg_pool", nn.AvgPool3d((2, 7, 7), (1, 1, 1))),
            ("logits", Logits(1024, CLASSES)),
        ]
        super().__init__(OrderedDict(layers))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 400), before the softmax, of clips (B, 3, T ≥ 9, H ≥ 193, W ≥ 193) in [-1, 1].

        They are means over time, and over places where frames are larger than 224 × 224.
        """
        return super().forward(x).mean((2, 3, 4))
