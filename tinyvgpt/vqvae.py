"""Stage 1: a 3D VQ-VAE, clip ⇄ tokens.

Chapters 03 and 06 build this file. Source: VideoGPT (Yan et al. 2021), §3.1 and its released code;
the fields `causal_time` and `local_encoder` are ours.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid · D hidden channels ·
K codes.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyvgpt.attention import AxialAttention, check_heads
from tinyvgpt.batch_norm import BatchNorm3d
from tinyvgpt.codebook import Codebook
from tinyvgpt.convolution import SameConv3d, SameConvTranspose3d, Triple
from tinyvgpt.store import (
    build_config,
    built,
    load_weights,
    read_config,
    resolve,
    save_folder,
    weights_of,
)


@dataclass(frozen=True)
class VQVAEConfig:
    """Settings of a VQ-VAE; `VQVAEConfig()` has those that VideoGPT was released with."""

    channels: int = 3  # of the clip: 3 for RGB, 1 for grey
    frames: int = 16  # length of the clips it is trained on
    resolution: int = 64  # height and width of those clips, in pixels
    downsample: Triple = (4, 4, 4)  # pixels a token along T, H, W; powers of two
    hidden: int = 240  # channels inside encoder and decoder
    res_blocks: int = 4  # residual blocks in encoder and in decoder
    axial: bool = True  # axial attention in the residual blocks
    axial_heads: int = 2  # heads of each axial attention
    codes: int = 2048  # K, vectors in the codebook
    code_dim: int = 256  # channels of a code
    ema_decay: float = 0.99  # of the codebook's moving averages
    commitment: float = 0.25  # weight of the commitment loss
    data_variance: float = 0.06  # the reconstruction error is divided by it
    causal_time: bool = False  # latent frame k sees frames up to its own last one only
    local_encoder: bool = False  # a token sees the pixels in its place only; the decoder sees more
    checkpointing: bool = False  # recompute residual blocks in the backward pass to save memory

    def __post_init__(self) -> None:
        """Raises ValueError for settings that can't be built."""
        object.__setattr__(self, "downsample", tuple(self.downsample))  # JSON has lists
        if len(self.downsample) != 3 or any(f < 1 or f & (f - 1) for f in self.downsample):
            raise ValueError(f"downsample {self.downsample} must be three powers of two (T, H, W)")
        for name in ("channels", "frames", "resolution", "hidden", "codes", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.res_blocks < 0:
            raise ValueError(f"res_blocks is {self.res_blocks}, must be at least 0")
        if not 0 < self.data_variance < math.inf:
            raise ValueError(f"data_variance is {self.data_variance}, must be above 0 and finite")
        if not 0 <= self.commitment < math.inf:
            raise ValueError(f"commitment is {self.commitment}, must be 0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, must be at least 0 and below 1")
        if self.hidden % 2:
            raise ValueError(f"hidden is {self.hidden}, must be even (residual blocks halve it)")
        if self.axial:
            check_heads(self.hidden, self.axial_heads)
        sizes = (self.frames, self.resolution, self.resolution)
        if any(size % f for size, f in zip(sizes, self.downsample, strict=True)):
            raise ValueError(
                f"clips of (T, H, W) = {sizes} are not divisible by downsample {self.downsample}"
            )

    @property
    def latent_shape(self) -> Triple:
        """(t, h, w): the grid of tokens of one clip."""
        t, h, w = self.downsample
        return self.frames // t, self.resolution // h, self.resolution // w

    @property
    def strides(self) -> list[Triple]:
        """Strides of the encoder's convolutions: 2 along axes with halvings left, else 1."""
        t, h, w = (int(math.log2(f)) for f in self.downsample)
        return [(1 + (i < t), 1 + (i < h), 1 + (i < w)) for i in range(max(t, h, w))]


class VQVAEOutput(NamedTuple):
    """What a forward pass gives; scalars are float32."""

    reconstruction: Tensor  # (B, C, T, H, W)
    tokens: Tensor  # (B, t, h, w) int64
    loss: Tensor  # scalar, recon_loss + commitment_loss
    recon_loss: Tensor  # scalar, MSE / data_variance
    commitment_loss: Tensor  # scalar
    perplexity: Tensor  # scalar, of this batch's code usage
    used: Tensor  # scalar, share of codes that this batch uses


class ResidualBlock(nn.Module):
    """x + norm, 3×3×3 bottleneck convolution, 1×1×1 convolution and (by choice) axial attention.

    One that is `local` has neither of what looks around: 1×1×1 instead of 3×3×3, no attention.
    """

    def __init__(self, config: VQVAEConfig, *, local: bool = False):
        super().__init__()
        c, half, causal = config.hidden, config.hidden // 2, config.causal_time
        self.conv = nn.Sequential(
            BatchNorm3d(c),
            nn.ReLU(),
            SameConv3d(c, half, 1 if local else 3, causal_time=causal, bias=False),
            BatchNorm3d(half),
            nn.ReLU(),
            SameConv3d(half, c, 1, bias=False),
        )
        if config.axial and not local:
            self.norm = nn.Sequential(BatchNorm3d(c), nn.ReLU())
            self.axial = AxialAttention(c, config.axial_heads, causal_time=causal)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, D, t, h, w) to the same shape."""
        y = self.conv(x)
        if hasattr(self, "axial"):
            y = self.axial(self.norm(y).movedim(1, -1)).movedim(-1, 1)
        return x + y


class ResidualStack(nn.Module):
    """Residual blocks, then a last norm and ReLU."""

    def __init__(self, config: VQVAEConfig, *, local: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(config, local=local) for _ in range(config.res_blocks)
        )
        self.norm = BatchNorm3d(config.hidden)
        self.checkpointing = config.checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, D, t, h, w) to the same shape."""
        for block in self.blocks:
            x = recomputed(block, x) if self.checkpointing and self.training else block(x)
        return F.relu(self.norm(x))


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, keeping only x for the backward pass, where the rest is computed again."""
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), FrozenStatistics(block))
    )


class FrozenStatistics:
    """Context in which batch norms don't count a batch: recomputed, it would be counted twice."""

    def __init__(self, module: nn.Module):
        self.norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]

    def __enter__(self) -> None:
        self.counts = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:  # the running statistics themselves must stay: checkpoint counts
            norm.momentum, norm.num_batches_tracked = 0.0, None  # the tensors that are saved

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Encoder(nn.Module):
    """Strided convolutions, one a halving, then the residual stack."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        c, causal, local = config.hidden, config.causal_time, config.local_encoder
        widths = [config.channels] + [c] * len(config.strides)
        self.convs = nn.ModuleList(
            SameConv3d(widths[i], c, stride if local else 4, stride, causal_time=causal)
            for i, stride in enumerate(config.strides)
        )
        self.conv_last = SameConv3d(widths[-1], c, 1 if local else 3, causal_time=causal)
        self.res_stack = ResidualStack(config, local=local)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, D, t, h, w)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.res_stack(self.conv_last(x))


class Decoder(nn.Module):
    """The residual stack, then transposed convolutions, one a doubling."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.res_stack = ResidualStack(config)
        strides = config.strides or [(1, 1, 1)]  # something must map hidden channels to pixels
        widths = [config.hidden] * len(strides) + [config.channels]
        self.convs = nn.ModuleList(
            SameConvTranspose3d(widths[i], widths[i + 1], 4, stride, causal_time=config.causal_time)
            for i, stride in enumerate(strides)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, D, t, h, w) to (B, C, T, H, W)."""
        x = self.res_stack(x)
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(x) if i else x)
        return x


class VQVAE(nn.Module):
    """Encoder, codebook, decoder: turns clips into grids of tokens and back."""

    def __init__(self, config: VQVAEConfig = VQVAEConfig()):
        """Builds the model with fresh weights."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_code = nn.Conv3d(config.hidden, config.code_dim, 1)
        self.codebook = Codebook(
            config.codes, config.code_dim, decay=config.ema_decay, commitment=config.commitment
        )
        self.from_code = nn.Conv3d(config.code_dim, config.hidden, 1)
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Reconstructs clips (B, C, T, H, W), floats in [-0.5, 0.5].

        In training mode this also moves the codebook.

        Raises:
            ValueError: for a clip of another rank, dtype or channel count, or whose sides don't
                divide.
        """
        z = self.features(x)
        q = self.codebook(z)
        x_hat = self._pixels(q.vectors)
        recon_loss = F.mse_loss(x_hat.float(), x) / self.config.data_variance
        return VQVAEOutput(
            x_hat,
            q.tokens,
            recon_loss + q.commitment_loss,
            recon_loss,
            q.commitment_loss,
            q.perplexity,
            q.used,
        )

    def features(self, x: Tensor) -> Tensor:
        """Encoder output before quantisation: (B, C, T, H, W) to (B, code_dim, t, h, w)."""
        self._check_clip(x)
        z = self.encoder(x.to(self.to_code.weight.dtype))
        # Small differences decide which code is nearest: bfloat16's rounding would blur them.
        with torch.autocast(x.device.type, enabled=False):
            return self.to_code(z.to(self.to_code.weight.dtype))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Tokens (B, t, h, w), int64, of clips (B, C, T, H, W), floats in [-0.5, 0.5].

        Raises:
            ValueError: as `forward`.
        """
        return self.codebook.encode(self.features(x))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Clips (B, C, T, H, W), floats around [-0.5, 0.5], of tokens (B, t, h, w), int64.

        Raises:
            ValueError: for tokens of another rank or dtype, or outside 0 … K - 1.
        """
        check_tokens(tokens, self.config.codes)
        return self._pixels(self.codebook.lookup(tokens).movedim(-1, 1))

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and weights; floats as `dtype` if one is given.

        Raises:
            OSError: if writing fails; a model that was in the folder stays whole.
        """
        save_folder(
            Path(folder), {"vqvae": asdict(self.config)}, {"vqvae": weights_of(self, dtype)}
        )

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "VQVAE":
        """Loads a tokenizer, alone or a VideoGPT's, in evaluation mode.

        Args:
            name: a folder, shipped name or hub id.

        Raises:
            ValueError: if there is no such model, or its files are damaged or of another version.
        """
        folder = resolve(name)
        config = read_config(folder)
        if "vqvae" not in config:
            raise ValueError(f"{folder} holds no VQ-VAE")
        where = f"{folder}/config.json"
        settings = build_config(VQVAEConfig, config["vqvae"], where)
        vqvae = built(lambda: cls(settings), where)
        load_weights(folder / "vqvae.safetensors", vqvae)
        return vqvae.eval()

    def _pixels(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.from_code(vectors))

    def _check_clip(self, x: Tensor) -> None:
        config = self.config
        if not x.is_floating_point():
            raise ValueError(f"clip is {x.dtype}, the model needs floats (video.to_model)")
        if x.ndim != 5 or x.shape[1] != config.channels:
            raise ValueError(
                f"clip has shape {tuple(x.shape)}, the model needs (B, {config.channels}, T, H, W)"
            )
        for name, size, factor in zip(
            ("frames", "rows", "columns"), x.shape[2:], config.downsample, strict=True
        ):
            if size == 0 or size % factor:
                raise ValueError(
                    f"clip has {size} {name}, the model needs a multiple of {factor} (downsample)"
                )


def check_tokens(tokens: Tensor, codes: int) -> None:
    """Raises ValueError unless tokens are (B, t, h, w) int64 in 0 … codes - 1."""
    if tokens.ndim != 4 or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)}, must be int64 (B, t, h, w)"
        )
    if not tokens.numel():
        return
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= codes:
        raise ValueError(
            f"tokens range from {low} to {high}, the codebook has codes 0 to {codes - 1}"
        )
