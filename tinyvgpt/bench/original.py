"""The original VideoGPT's two networks: what they compute, at the cost it has there.

`bench train` times them, and chapter 16 reads them: a training step before anything is made
faster. Source: VideoGPT (Yan et al. 2021, arXiv 2104.10157) and its released code
(github.com/wilson1yan/VideoGPT: videogpt/vqvae.py, gpt.py, attention.py, utils.py), written anew.
Parameters have the original's names, so `tinyvgpt.upstream` turns them into our models.

Kept because it costs time or memory: every padding is a copy, and so is every move of an axis;
q, k, v are separate projections, for each of three axes; attention writes out all its scores and
masks them with a float matrix of its own in each layer; tokens are assigned through a one-hot
matrix. Dtypes are left to autocast where the original leaves them, so they are promoted alike:
scores are softmaxed in float32, distances to the codes and the quantised vectors are float32, and
the (float32) positions make the GPT's residual stream float32.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid · N = t·h·w tokens ·
L row length · M = B·t·h·w vectors · K codes · D width · nh heads · d head dim.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyvgpt.attention import project
from tinyvgpt.codebook import Quantized
from tinyvgpt.gpt import GPTConfig
from tinyvgpt.vqvae import Triple, VQVAEConfig, VQVAEOutput


def _moved(x: Tensor, source: int, target: int) -> Tensor:
    """`x` with one axis moved, as a contiguous copy."""
    return x.movedim(source, target).contiguous()


def _named(**layers: nn.Module) -> nn.Sequential:
    """The layers one after another, under these names."""
    return nn.Sequential(OrderedDict(layers))


def _check(config: VQVAEConfig | GPTConfig, **needed: object) -> None:
    """Raises ValueError unless these settings have the values that the reference needs."""
    for name, value in needed.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(f"{name} is {found!r}, the original's model needs {value!r}")


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention over (…, L, d) that writes out all scores; `mask` (L, L) is 0 where hidden."""
    scores = q @ k.transpose(-1, -2)  # (…, L, L)
    scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -math.inf)
    weights = F.softmax(scores, dim=-1).type_as(scores)
    return F.dropout(weights, dropout) @ v


class _Causal(nn.Module):
    """Attention from each token to itself and earlier ones; q, k, v are (B, nh, t, h, w, d)."""

    mask: Tensor | None  # (N, N) float, or none for SDPA

    def __init__(self, tokens: int, dropout: float, *, dense: bool):
        super().__init__()
        self.dropout = dropout
        mask = torch.ones(tokens, tokens).tril() if dense else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q.shape[2:-1]
        q, k, v = q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2)  # (B, nh, N, d)
        dropout = self.dropout if self.training else 0.0
        if self.mask is not None:
            y = _dense_attention(q, k, v, self.mask, dropout)
        else:  # not `attention.attend`: this one is the baseline whatever that one calls
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.unflatten(2, grid)


def _axial_attention(q: Tensor, k: Tensor, v: Tensor, axis: int) -> Tensor:
    """Attention along one axis (2, 3 or 4) of q, k, v (B, nh, t, h, w, d)."""
    q, k, v = (_moved(x, axis, -2) for x in (q, k, v))
    y = _dense_attention(q.flatten(0, -3), k.flatten(0, -3), v.flatten(0, -3))  # (rows, L, d)
    return _moved(y.view(v.shape), -2, axis)


class _MultiHeadAttention(nn.Module):
    """Projects (B, t, h, w, D), splits channels into heads, attends by `core`, projects again."""

    def __init__(self, width: int, heads: int, layers: int, core: Callable[..., Tensor]):
        super().__init__()
        self.heads, self.attn = heads, core
        self.w_qs, self.w_ks, self.w_vs = (project(width, width, width**-0.5) for _ in "qkv")
        self.fc = project(width, width, (width * layers) ** -0.5, bias=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = _moved(self.w_qs(q).unflatten(-1, (self.heads, -1)), -2, 1)  # (B, nh, t, h, w, d)
        k = _moved(self.w_ks(k).unflatten(-1, (self.heads, -1)), -2, 1)
        v = _moved(self.w_vs(v).unflatten(-1, (self.heads, -1)), -2, 1)
        return self.fc(_moved(self.attn(q, k, v), 1, -2).flatten(-2))


# VQ-VAE -------------------------------------------------------------------------------------------


def _padded(name: str, conv: nn.Conv3d | nn.ConvTranspose3d) -> nn.Sequential:
    """The convolution, of its input padded by kernel - stride in all, the larger half in front."""
    surplus = [k - s for k, s in zip(conv.kernel_size, conv.stride, strict=True)]
    pads = [n for s in reversed(surplus) for n in (s - s // 2, s // 2)]  # from the last axis on
    # Copies its input even if all of them are 0.
    return _named(pad=nn.ConstantPad3d(pads, 0.0), **{name: conv})  # type: ignore[arg-type]


class _AxialBlock(nn.Module):
    """The sum of three attentions over (B, D, t, h, w): along width, height and time."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn_w = _MultiHeadAttention(width, heads, 1, partial(_axial_attention, axis=4))
        self.attn_h = _MultiHeadAttention(width, heads, 1, partial(_axial_attention, axis=3))
        self.attn_t = _MultiHeadAttention(width, heads, 1, partial(_axial_attention, axis=2))

    def forward(self, x: Tensor) -> Tensor:
        x = _moved(x, 1, -1)
        return _moved(self.attn_w(x, x, x) + self.attn_h(x, x, x) + self.attn_t(x, x, x), -1, 1)


class _ResidualBlock(nn.Module):
    """x + norm, bottleneck convolutions and axial attention of x, (B, D, t, h, w)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        half = width // 2
        self.block = nn.Sequential(
            nn.BatchNorm3d(width),
            nn.ReLU(),
            _padded("conv", nn.Conv3d(width, half, 3, bias=False)),
            nn.BatchNorm3d(half),
            nn.ReLU(),
            _padded("conv", nn.Conv3d(half, width, 1, bias=False)),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            _AxialBlock(width, heads),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _res_stack(config: VQVAEConfig) -> nn.Sequential:
    blocks = [_ResidualBlock(config.hidden, config.axial_heads) for _ in range(config.res_blocks)]
    return nn.Sequential(*blocks, nn.BatchNorm3d(config.hidden), nn.ReLU())


def _encoder(config: VQVAEConfig) -> nn.Sequential:
    """Strided convolutions, one a halving, then the residual stack."""
    convs, width = nn.Sequential(), config.channels
    for stride in config.strides:
        conv = nn.Conv3d(width, config.hidden, 4, stride)
        convs.append(_padded("conv", conv).append(nn.ReLU()))
        width = config.hidden
    conv_last = _padded("conv", nn.Conv3d(width, width, 3))
    return _named(convs=convs, conv_last=conv_last, res_stack=_res_stack(config))


def _decoder(config: VQVAEConfig) -> nn.Sequential:
    """The residual stack, then transposed convolutions, one a doubling."""
    convts, width = nn.Sequential(), config.hidden
    for stride in config.strides[:-1]:
        convt = nn.ConvTranspose3d(width, width, 4, stride, padding=3)  # cuts kernel - 1 a side
        convts.append(_padded("convt", convt).append(nn.ReLU()))
    last = nn.ConvTranspose3d(width, config.channels, 4, config.strides[-1], padding=3)
    return _named(res_stack=_res_stack(config), convts=convts.append(_padded("convt", last)))


class _Codebook(nn.Module):
    """Nearest codes by all distances at once; moving averages through a one-hot matrix.

    As in the original, the first training batch draws the codes anew even after a state dict was
    loaded (`need_init` is not part of it), and a restarted code keeps its count and sum, so the
    next update undoes the restart. Its reductions across processes are left out.
    """

    embeddings: Tensor  # (K, D)
    N: Tensor  # (K,), moving average of how many vectors a code gets
    z_avg: Tensor  # (K, D), moving average of their sum

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.decay, self.commitment, self.need_init = config.ema_decay, config.commitment, True
        self.register_buffer("embeddings", torch.randn(config.codes, config.code_dim))
        self.register_buffer("N", torch.zeros(config.codes))
        self.register_buffer("z_avg", self.embeddings.clone())

    def forward(self, z: Tensor) -> Quantized:
        flat = _moved(z, 1, -1).flatten(0, -2)  # (M, D)
        if self.training and self.need_init:
            self.initialise(flat)
        codes = self.embeddings.t()
        distances = (flat**2).sum(1, keepdim=True) - 2 * flat @ codes  # (M, K)
        distances = distances + (codes**2).sum(0, keepdim=True)
        nearest = distances.argmin(1)
        onehot = F.one_hot(nearest, codes.shape[1]).type_as(flat)  # (M, K), int64 before the cast
        tokens = nearest.view(len(z), *z.shape[2:])
        vectors = _moved(F.embedding(tokens, self.embeddings), -1, 1)
        loss = self.commitment * F.mse_loss(z, vectors)
        if self.training:
            self.update(flat, onehot)
        usage = onehot.mean(0)
        perplexity = torch.exp(-(usage * torch.log(usage + 1e-10)).sum())
        vectors = (vectors - z).detach() + z
        return Quantized(vectors, tokens, loss, perplexity, (usage > 0).float().mean())

    def candidates(self, flat: Tensor) -> Tensor:
        """K distinct random rows of `flat` (M, D); tiled, with some noise, if M < K."""
        codes, dim = self.embeddings.shape
        if len(flat) < codes:
            flat = flat.repeat(-(-codes // len(flat)), 1)
            flat = flat + torch.randn_like(flat) * (0.01 / math.sqrt(dim))
        return flat[torch.randperm(len(flat))][:codes]  # drawn on the CPU, and every row is copied

    @torch.no_grad()
    def initialise(self, flat: Tensor) -> None:
        self.need_init = False
        self.embeddings.copy_(self.candidates(flat))
        self.z_avg.copy_(self.embeddings)
        self.N.fill_(1.0)

    @torch.no_grad()
    def update(self, flat: Tensor, onehot: Tensor) -> None:
        """Moves the averages by one batch, and the codes with them; restarts codes below N = 1."""
        self.N.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
        self.z_avg.mul_(self.decay).add_((flat.t() @ onehot).t(), alpha=1 - self.decay)
        n = self.N.sum()
        weights = (self.N + 1e-7) / (n + len(self.N) * 1e-7) * n
        self.embeddings.copy_(self.z_avg / weights[:, None])
        used = (self.N[:, None] >= 1).float()
        self.embeddings.mul_(used).add_(self.candidates(flat) * (1 - used))


class OriginalVQVAE(nn.Module):
    """The original's VQ-VAE; it takes and gives what ours does."""

    def __init__(self, config: VQVAEConfig):
        """Builds it with fresh weights; `config.checkpointing`, which is ours, is not heeded.

        Raises:
            ValueError: for settings that the original doesn't have or can't run.
        """
        super().__init__()
        _check(config, axial=True, causal_time=False, local_encoder=False)
        if max(config.downsample) < 4:
            raise ValueError(f"downsample is {config.downsample}, must have a factor of 4 or more")
        self.data_variance = config.data_variance
        self.encoder = _encoder(config)
        self.pre_vq_conv = _padded("conv", nn.Conv3d(config.hidden, config.code_dim, 1))
        self.codebook = _Codebook(config)
        self.post_vq_conv = _padded("conv", nn.Conv3d(config.code_dim, config.hidden, 1))
        self.decoder = _decoder(config)

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Reconstructs clips (B, C, T, H, W) in [-0.5, 0.5]; in training moves the codebook."""
        q = self.codebook(self.pre_vq_conv(self.encoder(x)))
        x_hat = self.decoder(self.post_vq_conv(q.vectors))
        error = F.mse_loss(x_hat, x) / self.data_variance
        loss = error + q.commitment_loss
        return VQVAEOutput(x_hat, q.tokens, loss, error, q.commitment_loss, q.perplexity, q.used)


# GPT ----------------------------------------------------------------------------------------------


class _LayerNorm(nn.Module):
    """(x - μ)·(1e-5 + 1/√var)·g + b, in float32; constant input gives NaN, as in the original."""

    def __init__(self, width: int):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        mean = y.mean(-1, keepdim=True)
        variance = (y - mean).square().mean(-1, keepdim=True)
        y = (y - mean) * (1e-5 + variance.rsqrt())
        return (y * self.g + self.b).type_as(x)


class _GeLU2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1.702 * x).sigmoid() * x


class _RightShift(nn.Module):
    """Puts the start token before the tokens (B, t, h, w, D), and drops the last one."""

    def __init__(self, width: int):
        super().__init__()
        self.sos = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        sos = self.sos.expand(len(x), 1, -1).type_as(x)
        return torch.cat([sos, x.flatten(1, -2)[:, :-1]], dim=1).view(x.shape)


class _AddPositions(nn.Module):
    """Adds a table for each axis, concatenated along the channels, to (B, t, h, w, D)."""

    def __init__(self, shape: Triple, width: int):
        super().__init__()
        tables = {f"d_{i}": torch.randn(size, width // 3) * 0.01 for i, size in enumerate(shape)}
        self.shape, self.emb = shape, nn.ParameterDict(tables)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.emb["d_0"], self.emb["d_1"], self.emb["d_2"]
        tables = t[:, None, None], h[None, :, None], w[None, None]
        return x + torch.cat([table.expand(*self.shape, -1) for table in tables], dim=-1)


class _Block(nn.Module):
    """Causal attention, then the MLP, over (B, t, h, w, D); each recomputed, by choice."""

    def __init__(self, config: GPTConfig, *, dense: bool, checkpointing: bool):
        super().__init__()
        width, hidden = config.width, int(config.mlp_ratio * config.width)
        core = _Causal(config.tokens, config.attn_dropout, dense=dense)
        self.checkpointing = checkpointing
        self.pre_attn_norm = _LayerNorm(width)
        self.attn = _MultiHeadAttention(width, config.heads, config.layers, core)
        self.pre_fc_norm = _LayerNorm(width)
        self.fc_block = nn.Sequential(nn.Linear(width, hidden), _GeLU2(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre_attn_norm(x)
        x = x + self.dropout(self.run(self.attn, y, y, y))
        return x + self.dropout(self.run(self.fc_block, self.pre_fc_norm(x)))

    def run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        if self.training and self.checkpointing:  # reentrant: PyTorch had no other kind yet
            return checkpoint(part, *inputs, use_reentrant=True)
        return part(*inputs)


class OriginalGPT(nn.Module):
    """The original's GPT: unconditional, with full attention."""

    codes: Tensor  # (K, code_dim)

    def __init__(
        self,
        config: GPTConfig,
        codes: Tensor,
        *,
        attention: str = "mask",
        checkpointing: bool = True,
    ):
        """Builds it with fresh weights, for tokens of the codebook `codes` (K, code_dim).

        Attention is "mask", the original's, or "sdpa", PyTorch's. With checkpointing, attention
        and MLPs are recomputed in training's backward pass; `config.checkpointing` is not heeded.
        The codes are kept out of the state dict: the original has them in its VQ-VAE.

        Raises:
            ValueError: for a configuration that isn't unconditional with full attention, another
                kind of attention, or codes of another shape than the configuration's.
        """
        super().__init__()
        _check(config, classes=0, cond_frames=0, action_dim=0, attention="full")
        if attention not in ("mask", "sdpa"):
            raise ValueError(f"attention is {attention!r}, must be 'mask' or 'sdpa'")
        expected = (config.codes, config.code_dim)
        if tuple(codes.shape) != expected:
            raise ValueError(f"codebook has shape {tuple(codes.shape)}, must have {expected}")
        options = {"dense": attention == "mask", "checkpointing": checkpointing}
        self.register_buffer("codes", codes.detach().clone().float(), persistent=False)
        self.fc_in = project(config.code_dim, config.width, 0.02)
        self.attn_stack = _named(
            right_shift=_RightShift(config.width),
            pos_embd=_AddPositions(config.latent_shape, config.width),
            attn_nets=nn.Sequential(*(_Block(config, **options) for _ in range(config.layers))),
        )
        self.norm = _LayerNorm(config.width)
        self.fc_out = project(config.width, config.codes, 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, t, h, w, K) of every token (B, t, h, w), int64, given the earlier ones."""
        x = self.fc_in(F.embedding(tokens, self.codes))
        return self.fc_out(self.norm(self.attn_stack(x)))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of tokens (B, t, h, w), int64: nats a token (scalar)."""
        return F.cross_entropy(_moved(self(tokens), -1, 1), tokens)
