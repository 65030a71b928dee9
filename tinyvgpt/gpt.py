"""Stage 2: a transformer that predicts the next token of a clip.

Chapters 08 and 09 build this file. Source: VideoGPT (Yan et al. 2021), §3.2 and its released code;
label and frame dropout and actions are ours.

Shapes: B batch · t h w latent grid · N = t·h·w tokens in raster order · K codes · D width ·
nh heads · n given frames · A action dim.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyvgpt.attention import (
    CausalSelfAttention,
    CrossAttention,
    LayerCache,
    StridedLayout,
    check_heads,
    project,
)
from tinyvgpt.conditioning import ActionEmbedding, Condition, FrameEncoder, LayerNorm, memory_width
from tinyvgpt.positions import AxisPositions, check_axes
from tinyvgpt.vqvae import Triple, VQVAEConfig, check_tokens


@dataclass(frozen=True)
class GPTConfig:
    """Settings of a GPT over tokens; the defaults are those that VideoGPT was released with."""

    latent_shape: Triple = (4, 16, 16)  # (t, h, w) of the tokenizer's grid
    codes: int = 2048  # K of the tokenizer
    code_dim: int = 256  # channels of a code vector
    frames: int = 16  # T of a clip
    resolution: int = 64  # H and W of a clip
    channels: int = 3  # C of a clip
    width: int = 576  # D; a multiple of 3 and of `heads`
    heads: int = 4
    layers: int = 8
    mlp_ratio: float = 4.0  # hidden width of the MLP over `width`
    dropout: float = 0.2  # on the output of each attention and MLP
    attn_dropout: float = 0.3  # on softmaxed weights of full self-attention
    attention: str = "full"  # "full" or "strided" (sparse)
    classes: int = 0  # labels to condition on; 0 for none
    label_dropout: float = 0.0  # share of labels hidden in training; above 0 there is a null label
    cond_frames: int = 0  # first frames to condition on through the frame encoder; 0 for none
    cond_depth: int = 34  # of the frame encoder's ResNet: 10, 18 or 34
    cond_width: int = 64  # channels of its stem
    frame_dropout: float = 0.0  # share of first frames hidden in training; above 0: may be left out
    action_dim: int = 0  # A, floats a frame to condition on; 0 for none
    action_std: tuple[float, ...] = ()  # A numbers by which actions are divided; () for none
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory

    def __post_init__(self) -> None:
        """Raises ValueError for settings that can't be built."""
        for name in ("latent_shape", "action_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        check_axes(self.width)
        check_heads(self.width, self.heads)
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(
                f"latent_shape {self.latent_shape} must be three positive sizes (t, h, w)"
            )
        if self.attention not in ("full", "strided"):
            raise ValueError(f"attention is {self.attention!r}, must be 'full' or 'strided'")
        if self.attention == "strided":
            StridedLayout.block_grid(self.latent_shape)
        least_of = {"codes": 1, "code_dim": 1, "layers": 1, "classes": 0, "action_dim": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.frames % self.latent_shape[0]:
            raise ValueError(
                f"{self.frames} frames don't divide into {self.latent_shape[0]} latent frames"
            )
        if not 0 <= self.cond_frames <= self.frames:
            raise ValueError(
                f"cond_frames is {self.cond_frames}, must be 0 to {self.frames} (frames)"
            )
        for name in ("dropout", "attn_dropout", "label_dropout", "frame_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0 and below 1")
        if not 1 <= self.mlp_ratio * self.width < math.inf:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}, must be positive and finite")
        std = self.action_std
        if std and (len(std) != self.action_dim or not all(0 < s < math.inf for s in std)):
            raise ValueError(
                f"action_std is {std}, must be () or {self.action_dim} (action_dim) numbers above 0"
            )
        if self.cond_frames:
            check_heads(memory_width(self.cond_width), self.heads)

    @property
    def tokens(self) -> int:
        """N, tokens of a clip."""
        return math.prod(self.latent_shape)

    @property
    def norm_classes(self) -> int:
        """Classes that layer norms tell apart: `classes`, and one for the null label."""
        return self.classes + (self.label_dropout > 0) if self.classes else 0

    @classmethod
    def for_vqvae(cls, vqvae: VQVAEConfig, **fields: Any) -> "GPTConfig":
        """A configuration that fits the tokens of `vqvae`; `fields` set the rest."""
        names = ("codes", "code_dim", "frames", "resolution", "channels")
        return cls(
            latent_shape=vqvae.latent_shape,
            **{name: getattr(vqvae, name) for name in names},
            **fields,
        )


class MLP(nn.Module):
    """Two linear maps with x·σ(1.702 x), the sigmoid form of GELU, between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to the same shape."""
        x = self.up(x)
        return self.down(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    """Pre-norm block: causal self-attention, attention to given frames (by choice), MLP."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        classes = config.norm_classes
        attn_dropout = config.attn_dropout if config.attention == "full" else 0.0
        self.norm_attn = LayerNorm(config.width, classes)
        self.attn = CausalSelfAttention(
            config.width, config.heads, layers=config.layers, dropout=attn_dropout
        )
        if config.cond_frames:
            self.norm_cross = LayerNorm(config.width, classes)
            self.cross = CrossAttention(
                config.width, memory_width(config.cond_width), config.heads, layers=config.layers
            )
        self.norm_mlp = LayerNorm(config.width, classes)
        self.mlp = MLP(config.width, int(config.mlp_ratio * config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        condition: Condition,
        layout: StridedLayout | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Maps (B, N, D) to the same shape; with a cache, x holds the next N tokens."""
        labels = condition.labels
        x = x + self.dropout(self.attn(self.norm_attn(x, labels), layout, cache))
        if condition.memory is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x, labels), condition.memory, cache))
        return x + self.dropout(self.mlp(self.norm_mlp(x, labels)))


class GPT(nn.Module):
    """Autoregressive transformer over the raster-ordered tokens of a clip.

    It reads tokens as the tokenizer's code vectors, of which it keeps a (frozen) copy in `codes`.
    """

    codes: Tensor  # (K, code_dim)

    def __init__(self, config: GPTConfig = GPTConfig(), codes: Tensor | None = None):
        """Builds the model with fresh weights, for tokens of the codebook `codes` (K, code_dim).

        Raises:
            ValueError: for codes of another shape than the configuration's.
        """
        super().__init__()
        self.config = config
        expected = (config.codes, config.code_dim)
        if codes is not None and tuple(codes.shape) != expected:
            raise ValueError(
                f"codebook has shape {tuple(codes.shape)}, the configuration says {expected}"
            )
        self.register_buffer(
            "codes", torch.zeros(expected) if codes is None else codes.detach().clone().float()
        )
        self.token_in = project(config.code_dim, config.width, 0.02)
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = AxisPositions(config.latent_shape, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width, config.norm_classes)
        self.token_out = project(config.width, config.codes, 0.0)
        self.layout = StridedLayout(config.latent_shape) if config.attention == "strided" else None
        if config.cond_frames:
            self.frame_encoder = FrameEncoder(
                config.channels,
                config.cond_frames,
                config.resolution,
                depth=config.cond_depth,
                width=config.cond_width,
            )
            if config.frame_dropout:  # the memory of a clip whose first frames are not given
                self.null_frames = nn.Parameter(torch.zeros(self.frame_encoder.memory_width))
        if config.action_dim:
            self.action_embedding = ActionEmbedding(
                config.action_dim,
                config.frames,
                config.latent_shape[0],
                config.width,
                config.action_std,
            )

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        frames: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token given the earlier ones.

        Args:
            tokens: (B, t', h, w) int64, whole clips (t' = t) or their first t' latent frames.
            labels: (B,) int64, for a class-conditional model.
            frames: (B, C, n, H, W) floats in [-0.5, 0.5], for a frame-conditional model.
            actions: (B, T, A) floats, for an action-conditional model.

        Returns:
            (B, t', h, w, K).

        Raises:
            ValueError: for tokens of another shape or out of range, parts of clips where attention
                is strided, and as `condition`.
        """
        self._check_shape(tokens)
        # Elsewhere looking at values would stall the device.
        if not torch.compiler.is_compiling() and tokens.device.type == "cpu":
            check_tokens(tokens, self.config.codes)
        condition = self.condition(len(tokens), labels=labels, frames=frames, actions=actions)
        x = self.token_in(F.embedding(tokens.flatten(1), self.codes))  # (B, N, D)
        start = self.start.expand(len(x), 1, -1).type_as(x)
        x = torch.cat([start, x[:, :-1]], dim=1)  # each token is predicted from earlier ones
        offsets = self.offsets(condition)[:, : x.shape[1]]
        logits = self.decode(x + offsets.type_as(x), condition)
        return logits.view(*tokens.shape, -1)

    def loss(self, tokens: Tensor, **condition: Tensor | None) -> Tensor:
        """Mean cross-entropy, nats a token (scalar); arguments as `forward`."""
        logits = self(tokens, **condition)
        return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())

    def condition(
        self,
        batch: int,
        *,
        labels: Tensor | None = None,
        frames: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Condition:
        """Encodes what `batch` clips are conditioned on; in training mode hides some of it.

        Raises:
            ValueError: if something the model needs is missing, something it can't use is given, a
                label is out of range, or a shape is not the model's.
        """
        return Condition(
            self._labels(batch, labels),
            self._memory(batch, frames),
            self.embed_actions(batch, actions),
        )

    def offsets(self, condition: Condition) -> Tensor:
        """What is added to the input at each position: where it is, and the actions leading there.

        Returns:
            (1, N, D), or (B, N, D) with actions.
        """
        offsets = self.positions()[None]  # (1, t, h, w, D)
        if condition.actions is not None:
            offsets = offsets + condition.actions[:, :, None, None]
        return offsets.flatten(1, 3)

    def decode(
        self,
        x: Tensor,
        condition: Condition,
        caches: list[LayerCache] | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, n, K) of the next n positions of the raster sequence, or of the last of them.

        Args:
            x: (B, n, D), at each position the projected code of the token *before* it, plus its
                offset.
            condition: from `condition`.
            caches: one a layer, holding the earlier positions; without them x starts the sequence.
            last_only: leaves out the logits of all but the last position, giving (B, 1, K).
        """
        for i, block in enumerate(self.blocks):
            if self.config.checkpointing and self.training:
                x = checkpoint(block, x, condition, self.layout, use_reentrant=False)
            else:
                x = block(x, condition, self.layout, caches[i] if caches else None)
        return self.token_out(self.norm(x[:, -1:] if last_only else x, condition.labels))

    def embed_actions(self, batch: int, actions: Tensor | None) -> Tensor | None:
        """What the actions (B, T, A) add to each latent frame: (B, t, D), or None without them.

        Raises:
            ValueError: if they are missing, not for the model, or of another shape.
        """
        if not self.config.action_dim:
            if actions is not None:
                raise ValueError(
                    "actions are given, but the model is not action-conditional (action_dim is 0)"
                )
            return None
        if actions is None:
            raise ValueError(
                "the model is action-conditional: give actions "
                f"(B, {self.config.frames}, {self.config.action_dim})"
            )
        if len(actions) != batch:
            raise ValueError(f"actions of {len(actions)} clips are given for {batch} clips")
        return self.action_embedding(actions)

    def _check_shape(self, tokens: Tensor) -> None:
        t, *grid = self.config.latent_shape
        fits = tokens.ndim == 4 and list(tokens.shape[2:]) == grid and 1 <= tokens.shape[1] <= t
        if not fits:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, the model needs (B, t, h, w) with "
                f"(t, h, w) = {self.config.latent_shape}, or fewer latent frames"
            )
        if self.layout is not None and tokens.shape[1] != t:
            raise ValueError(
                f"tokens have {tokens.shape[1]} latent frames; strided attention needs all {t}"
            )

    def _labels(self, batch: int, labels: Tensor | None) -> Tensor | None:
        config = self.config
        if not config.classes:
            if labels is not None:
                raise ValueError(
                    "labels are given, but the model is not class-conditional (classes is 0)"
                )
            return None
        if labels is None:
            if not config.label_dropout:
                raise ValueError(
                    "the model is class-conditional and has no null label: "
                    f"give labels 0 to {config.classes - 1}"
                )
            return torch.full((batch,), config.classes, device=self.codes.device)
        if labels.shape != (batch,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels are {labels.dtype} {tuple(labels.shape)}, must be int64 ({batch},)"
            )
        highest = config.classes - (config.label_dropout == 0)
        visible = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if visible and batch and (labels.min() < 0 or labels.max() > highest):
            raise ValueError(
                f"labels range from {labels.min()} to {labels.max()}, the model has 0 to {highest}"
            )
        if self.training and config.label_dropout:
            hidden = torch.rand(batch, device=labels.device) < config.label_dropout
            labels = labels.masked_fill(hidden, config.classes)
        return labels

    def _memory(self, batch: int, frames: Tensor | None) -> Tensor | None:
        config = self.config
        if not config.cond_frames:
            if frames is not None:
                raise ValueError(
                    "frames are given, but the model has no frame encoder (cond_frames is 0)"
                )
            return None
        if frames is None:
            if not config.frame_dropout:
                raise ValueError(
                    f"the model is frame-conditional: give the first {config.cond_frames} frames"
                )
            return self.null_frames.expand(batch, 1, -1)
        if len(frames) != batch:
            raise ValueError(f"first frames of {len(frames)} clips are given for {batch} clips")
        memory = self.frame_encoder(frames)
        if self.training and config.frame_dropout:
            hidden = torch.rand(batch, 1, 1, device=frames.device) < config.frame_dropout
            memory = torch.where(hidden, self.null_frames.type_as(memory), memory)
        return memory
