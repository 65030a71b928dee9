"""What a clip can be conditioned on: a class label, its first frames, actions.

Chapter 11 builds this file. Labels and frames follow VideoGPT (§3.2 and the released code); actions
are described in the paper and were never released.

Shapes: B batch · C channels · n given frames · T H W frames and pixels · t latent frames ·
D width · M Dm positions and width of a memory · A action dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyvgpt.positions import AxisPositions, check_axes

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # residual blocks a group, by depth


@dataclass(frozen=True)
class Condition:
    """Everything a batch is conditioned on, computed once a clip."""

    labels: Tensor | None = None  # (B,) int64, null label included
    memory: Tensor | None = None  # (B, M, Dm), encoded first frames
    actions: Tensor | None = None  # (B, t, D), embedded


class Standardise(torch.autograd.Function):
    """y·s with y = x - μ and s = 1e-5 + 1/√max(σ², 1e-12), over the last axis, in float32.

    The gradient is written out: with g that of the output and r = 1/√σ², it is
    s·(g - mean g) - r³·mean(g·y)·y (without the last term where σ² is clamped). Two sums over a row
    that is read, and nothing kept of it: left to autograd, a compiler may write the row down and
    read it again before all of it is there (seen with PyTorch 2.11 on class-conditional norms).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Maps (…, D), of any float dtype, to float32 (…, D)."""
        mean = x.float().mean(-1, keepdim=True)
        variance = (x.float() - mean).square().mean(-1, keepdim=True)
        ctx.save_for_backward(x, mean, variance)
        return (x.float() - mean) * (1e-5 + variance.clamp_min(1e-12).rsqrt())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Gradient (…, D), the dtype of x, of the output's gradient (…, D)."""
        x, mean, variance = ctx.saved_tensors
        y, g = x.float() - mean, g.float()
        r = variance.clamp_min(1e-12).rsqrt()
        along_y = r**3 * (g * y).mean(-1, keepdim=True) * (variance > 1e-12)
        return ((1e-5 + r) * (g - g.mean(-1, keepdim=True)) - along_y * y).type_as(x)


class LayerNorm(nn.Module):
    """Layer norm, (x - μ)·(1e-5 + 1/√var)·g + b in float32, whose g and b may depend on the class.

    Without classes g and b are learned vectors. With them g = 1 + gain[y] and b = bias[y], and a
    null class, if there is one, is the last index. The epsilon stands where the original has it:
    beside the root, not under it, which matters where the variance is small. Constant input
    gives b.
    """

    gain: Any  # nn.Embedding with classes, nn.Parameter without
    bias: Any

    def __init__(self, width: int, classes: int = 0):
        """`classes` counts the null class, if there is one; 0 for an unconditional norm."""
        super().__init__()
        self.classes = classes
        if classes:
            self.gain = nn.Embedding(classes, width)
            self.bias = nn.Embedding(classes, width)
            nn.init.constant_(self.gain.weight, classes**-0.5)
            nn.init.uniform_(self.bias.weight, -(classes**-0.5), classes**-0.5)
        else:
            self.gain = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalises the last axis of x (B, N, D); `labels` (B,) int64 where there are classes."""
        y = Standardise.apply(x)
        if self.classes:
            gain, bias = 1 + self.gain(labels)[:, None], self.bias(labels)[:, None]  # (B, 1, D)
        else:
            gain, bias = self.gain, self.bias
        return (y * gain + bias).type_as(x)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a video, (B, C, T, H, W), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises axis 1."""
        return super().forward(x.movedim(1, -1).float()).movedim(-1, 1).type_as(x)


class FrameBlock(nn.Module):
    """Residual block of the frame encoder; note the ReLU before the sum, and again behind it."""

    def __init__(self, dim_in: int, dim_out: int, *, stride: int = 1, first: bool = False):
        super().__init__()
        self.conv1 = nn.Conv3d(dim_in, dim_out, 3, (1, stride, stride), padding=1, bias=False)
        self.norm1 = ChannelNorm(dim_out)
        self.conv2 = nn.Conv3d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = ChannelNorm(dim_out)
        self.shortcut = (
            nn.Sequential(
                nn.Conv3d(dim_in, dim_out, 1, (1, stride, stride), bias=False), ChannelNorm(dim_out)
            )
            if first
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, dim_in, n, H, W) to (B, dim_out, n, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(y + self.shortcut(x))


class FrameEncoder(nn.Module):
    """A 3D ResNet that turns the first n frames of a clip into a memory to attend to.

    Time is kept, height and width are divided by 4. With the original's depth 34 and width 64 the
    four groups have 64, 128, 256 and 240 channels.
    """

    def __init__(
        self, channels: int, frames: int, resolution: int, *, depth: int = 34, width: int = 64
    ):
        """For `frames` given frames of `resolution` pixels, with a stem of `width` channels.

        `depth` is 10, 18 or 34, `width` a multiple of 4.

        Raises:
            ValueError: for another depth, width, or a resolution that isn't a multiple of 4.
        """
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"cond_depth is {depth}, must be one of {sorted(BLOCKS)}")
        if width < 4 or width % 4:
            raise ValueError(f"cond_width is {width}, must be a multiple of 4")
        if resolution % 4:
            raise ValueError(f"resolution is {resolution}, the frame encoder needs a multiple of 4")
        self.expected = (channels, frames, resolution, resolution)
        self.memory_width = memory_width(width)
        widths = [width, width, 2 * width, 4 * width, self.memory_width]
        self.stem = nn.Sequential(
            nn.Conv3d(channels, width, 3, padding=1, bias=False), ChannelNorm(width), nn.ReLU()
        )
        blocks = []
        for group, count in enumerate(BLOCKS[depth]):
            dim_in, dim_out, stride = widths[group], widths[group + 1], 2 if group in (1, 2) else 1
            blocks.append(FrameBlock(dim_in, dim_out, stride=stride, first=True))
            blocks.extend(FrameBlock(dim_out, dim_out) for _ in range(count - 1))
        self.blocks = nn.Sequential(*blocks)
        check_axes(self.memory_width)
        self.positions = AxisPositions(
            (frames, resolution // 4, resolution // 4), self.memory_width
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Memory (B, n·H/4·W/4, Dm) of frames (B, C, n, H, W), floats in [-0.5, 0.5].

        Raises:
            ValueError: for frames of another shape than the encoder was made for, or not floats.
        """
        if frames.ndim != 5 or tuple(frames.shape[1:]) != self.expected:
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}, the model needs (B, C, n, H, W) with "
                f"(C, n, H, W) = {self.expected}"
            )
        if not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}, the model needs floats (video.to_model)")
        positions = self.positions()
        features = self.blocks(self.stem(frames.to(positions.dtype)))
        features = features.movedim(1, -1) + positions  # (B, n, H/4, W/4, Dm)
        return rearrange(features, "b n h w d -> b (n h w) d")


def memory_width(width: int) -> int:
    """Channels of the frame encoder's output: 240 for the original's width 64; divisible by 3."""
    return 15 * width // 4


class ActionEmbedding(nn.Module):
    """Projects the actions that lead to each latent frame into the transformer's width.

    Action i of a clip leads from frame i to frame i + 1. A latent frame of f frames is led to by
    the f actions before each of its frames; before the very first frame stands a zero. The
    projection starts at zero, so a model gains actions without forgetting what it knows.
    """

    std: Tensor

    def __init__(
        self,
        action_dim: int,
        frames: int,
        latent_frames: int,
        width: int,
        std: Sequence[float] | None = None,
    ):
        """For clips of `frames` frames in `latent_frames` latent frames; `std` divides actions."""
        super().__init__()
        self.expected, self.latent_frames = (frames, action_dim), latent_frames
        self.register_buffer("std", torch.tensor(std or [1.0] * action_dim), persistent=False)
        self.project = nn.Linear(action_dim * frames // latent_frames, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, actions: Tensor) -> Tensor:
        """Embeddings (B, t, D) of actions (B, T, A).

        Raises:
            ValueError: for actions of another shape.
        """
        if actions.ndim != 3 or tuple(actions.shape[1:]) != self.expected:
            raise ValueError(
                f"actions have shape {tuple(actions.shape)}, the model needs (B, T, A) with "
                f"(T, A) = {self.expected}"
            )
        actions = actions[:, :-1].to(self.project.weight.dtype)
        leading = F.pad(actions / self.std, (0, 0, 1, 0))  # (B, T, A), before each frame
        return self.project(rearrange(leading, "b (t f) a -> b t (f a)", t=self.latent_frames))
