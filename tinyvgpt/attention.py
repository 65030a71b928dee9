"""Attention over video: multi-head, causal, strided-sparse, cross and axial.

Chapters 05 and 07 build this file. It is the one place that calls an attention kernel.

Shapes: B batch · N tokens in a sequence · M memory positions · D width · nh heads · d head dim ·
T H W (latent) frames, rows, columns · L length of the row attended along.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyvgpt import kernels

CHOICES = ("auto", "torch", "cuda")
# What "auto" uses kernels for, of "axial", "decode", "flash" and "strided"; on an H200 cuDNN's are
# ahead of "flash" (book/results/kernels-nvidia-h200.json).
FASTER = frozenset({"axial", "decode", "strided"})
_chosen = "auto"
SHORT = 64  # keys up to which a fused kernel would mostly wait; see `attend_short`
PACKED = 32  # positions that several shorter rows are packed into


def use(which: str) -> contextlib.AbstractContextManager[None]:
    """Chooses whose attention runs on GPUs, from now on or, in a `with`, for a block.

    Args:
        which: "torch", PyTorch's kernels, with which sampling goes in the model's own precision,
            too; "cuda", this package's wherever they can do it; "auto", whichever were measured to
            be faster. Compiled code keeps what it was compiled with.

    Raises:
        ValueError: for another word.
        RuntimeError: for "cuda" where these kernels can't run, with the reason.
    """
    global _chosen
    if which not in CHOICES:
        raise ValueError(f"attention can use {', '.join(CHOICES)}, not {which!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if which == "cuda" and (reason := kernels.why_not(device)):
        raise RuntimeError(f"attention can't use the package's CUDA kernels: {reason}")
    former, _chosen = _chosen, which
    return _back_to(former)


@contextlib.contextmanager
def _back_to(former: str) -> Iterator[None]:
    global _chosen
    try:
        yield
    finally:
        _chosen = former


def own_kernel(
    kind: str, x: Tensor, dtype: torch.dtype, head_dim: int, value_dim: int | None = None
) -> bool:
    """Whether the package's kernel of a kind is to compute, where x is, on tensors of a dtype.

    Kinds are those of `FASTER`, and "flash"; values are as wide as keys if no `value_dim` is given.
    """
    if _chosen == "torch" or not x.is_cuda or dtype not in (torch.bfloat16, torch.float16):
        return False
    step, most = {"axial": (8, 128), "decode": (8, 160)}.get(kind, (16, 160))
    if head_dim % step or head_dim > most or (value_dim or head_dim) > head_dim:
        return False
    return _chosen == "cuda" or (kind in FASTER and _can_run(x.device.index or 0))


def _can_run(index: int) -> bool:
    """Whether the kernels run on a GPU; says so once if they don't."""
    reason = kernels.why_not(torch.device("cuda", index))
    if reason:
        warnings.warn(f"attention is PyTorch's: {reason}", stacklevel=2)
    return reason is None


# torch.compiler.assume_constant_result, without its import of the whole compiler
_can_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), scale 1/√d.

    Args:
        q: queries (B, nh, N, d).
        k: keys (B, nh, M, d).
        v: values (B, nh, M, dv).
        causal: query i sees keys 0 … M - N + i (aligned at the end, as in cached decoding).
        mask: bool, broadcastable to (B, nh, N, M), true where a query may look; not with `causal`.
        dropout: probability with which a softmaxed weight is dropped.

    Returns:
        (B, nh, N, dv), the dtype of `v`.
    """
    n, m = q.shape[-2], k.shape[-2]
    if n == 1 and mask is None and not dropout and q.device.type == "cpu":
        # Two matrix-vector products over contiguous rows: here SDPA takes several times as long.
        weights = (k @ (q * q.shape[-1] ** -0.5).mT).softmax(-2)  # (B, nh, M, 1)
        return weights.mT @ v
    if causal and 1 < n < m:
        mask, causal = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n), False
    causal = causal and n > 1  # a single query at the end of the sequence sees every key
    plain = mask is None and not dropout
    if plain and n > 1 and own_kernel("flash", q, q.dtype, q.shape[-1], v.shape[-1]):
        return kernels.flash_attention(q, k, v, causal)
    if plain and n == m <= SHORT and q.is_cuda and torch.compiler.is_compiling():
        return attend_short(q, k, v, causal=causal)
    if not (q.is_cuda and plain and n == m):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    with sdpa_kernel(backends(q.device), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)


def backends(device: torch.device) -> list[SDPBackend]:
    """PyTorch's kernels for whole sequences, the fastest first; what one can't do the next does.

    On Hopper cuDNN's take two thirds of FlashAttention-2's time. They are planned anew for every
    length, so decoding, where lengths grow, leaves the choice to PyTorch.
    """
    fastest = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if torch.cuda.get_device_properties(device).major >= 9:
        fastest.reverse()
    return [*fastest, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_short(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """`attend` for short rows of self-attention, to be compiled.

    A kernel made for thousands of keys mostly waits where there are a few dozen, and keeping all
    scores costs little then. The shortest rows are packed, several to one of up to `PACKED`
    positions in which each sees its own part only. One head after the other is multiplied where it
    lies, without copies.
    """
    length, scale = q.shape[-2], q.shape[-1] ** -0.5
    packed = next(n for n in range(max(PACKED // length, 1), 0, -1) if len(q) % n == 0)
    position = torch.arange(packed * length, device=q.device)
    seen = position[:, None] // length == position // length
    if causal:
        seen = seen.tril()
    heads = []
    for parts in zip(*(_packed(x, packed).unbind(2) for x in (q, k, v)), strict=True):
        q_head, k_head, v_head = parts  # (B/packed, packed·N, d)
        scores = torch.bmm(q_head, k_head.mT).float() * scale
        if causal or packed > 1:
            scores = scores.masked_fill(~seen, -math.inf)
        heads.append(torch.bmm(scores.softmax(-1).type_as(v), v_head))
    y = torch.stack(heads, dim=2).unflatten(1, (packed, length)).flatten(0, 1)  # (B, N, nh, d)
    return y.transpose(1, 2)


def _packed(x: Tensor, count: int) -> Tensor:
    """Rows (B, nh, N, d), `count` to one: (B/count, count·N, nh, d)."""
    return x.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Splits channels, head-major, into heads: (B, N, nh·d) to (B, nh, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Undoes `split_heads`: (B, nh, N, d) to (B, N, nh·d)."""
    return x.transpose(1, 2).flatten(2)


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError unless `width` splits evenly over `heads`."""
    if heads < 1 or width % heads:
        raise ValueError(
            f"width {width} is not divisible by {heads} heads; choose a multiple of {heads}"
        )


def project(dim_in: int, dim_out: int, std: float, *, bias: bool = False) -> nn.Linear:
    """A linear map whose weights start as N(0, std²)."""
    linear = nn.Linear(dim_in, dim_out, bias=bias)
    nn.init.normal_(linear.weight, std=std)
    return linear


class StridedLayout(nn.Module):
    """Which blocks of 32 tokens attend to which: Sparse Transformers' strided pattern, for video.

    The raster sequence is cut in blocks. A block row r attends to block column c ≤ r if it is local
    (c ≥ r - 4), or if the two blocks' grid coordinates differ along at most one axis other than the
    last. Inside the diagonal block attention is causal token by token (Child et al. 2019, §4; the
    block grid is that of VideoGPT's released code).

    A module only so that its masks move to the model's device; it has no parameters and no state.

    Attributes:
        blocks: bool (N/32, N/32), true where a block attends to a block.
        mask: bool (N, N), the same token by token.
        rows: as `kernels.BlockLayout` has it; `columns` and `lists`, too.
    """

    blocks: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    lists: Tensor
    block = 32
    local = 4  # so many blocks before the diagonal one are always seen

    def __init__(self, shape: tuple[int, int, int]):
        """Builds the layout for a latent grid `shape` (t, h, w).

        Raises:
            ValueError: if blocks don't fit it.
        """
        super().__init__()
        n = math.prod(shape)
        grid = self.block_grid(shape)
        rows = torch.arange(n // self.block)
        coords = torch.stack(torch.unravel_index(rows, grid), dim=1)  # (blocks, axes)
        differs = coords[:, None] != coords[None]  # (blocks, blocks, axes)
        strided = ~differs[..., -1] & (differs[..., :-1].sum(-1) <= 1)
        local = rows[:, None] - rows[None] <= self.local
        blocks = (local | strided) & (rows[:, None] >= rows[None])
        tokens = blocks.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        self.register_buffer("blocks", blocks, persistent=False)
        self.register_buffer("mask", tokens.tril(), persistent=False)
        packed = kernels.block_layout(blocks, causal=True)
        self.register_buffer("rows", packed.rows, persistent=False)
        self.register_buffer("columns", packed.columns, persistent=False)
        self.register_buffer("lists", packed.lists, persistent=False)
        self._keys: dict[tuple[int, torch.device], Tensor] = {}

    @classmethod
    def block_grid(cls, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The grid of blocks: leading axes as they are, trailing ones merged."""
        for axis in reversed(range(len(shape))):
            product = math.prod(shape[axis:])
            if product > cls.block:
                break
        if math.prod(shape) % cls.block or product % cls.block:
            raise ValueError(
                f"strided attention cuts tokens in blocks of {cls.block}: latent shape "
                f"{tuple(shape)} has {math.prod(shape)} tokens and trailing product {product}; "
                f"both must be multiples of {cls.block}"
            )
        return (*shape[:axis], product // cls.block)

    def packed(self) -> kernels.BlockLayout:
        """What `kernels.strided_attention` and `kernels.decode_attention` take."""
        return kernels.BlockLayout(self.blocks[None], True, self.rows, self.columns, self.lists)

    def keys(self, position: int) -> Tensor:
        """Positions (int64, ascending) that the query at `position` attends to, itself included."""
        row, device = position // self.block, self.blocks.device
        if (row, device) not in self._keys:
            starts = self.blocks[row].nonzero() * self.block  # (blocks seen, 1)
            within = torch.arange(self.block, device=device)
            self._keys[row, device] = (starts + within).flatten()
        unseen = self.block - 1 - position % self.block  # later tokens of the diagonal block
        keys = self._keys[row, device]
        return keys[: len(keys) - unseen]


class LayerCache:
    """Keys and values of one layer: of the tokens decoded so far, and of the memory it looks at.

    Attributes:
        k: (B, nh, N, d), filled up to `length`; so is `v`.
        memory: the (k, v) of cross-attention, computed at the first step.
    """

    def __init__(self, batch: int, heads: int, tokens: int, dim: int, like: Tensor):
        """Allocates room for `tokens` positions, with the dtype and device of `like`."""
        self.k = like.new_empty(batch, heads, tokens, dim)
        self.v = torch.empty_like(self.k)
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, nh, n, d) of the next n tokens; returns all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and earlier tokens only.

    Initialised as in VideoGPT: q, k, v ~ N(0, 1/D) without bias, the output ~ N(0, 1/(D · layers)).
    """

    def __init__(self, width: int, heads: int, *, layers: int, dropout: float = 0.0):
        """`layers` is the whole network's depth; `dropout` acts on softmaxed weights."""
        super().__init__()
        check_heads(width, heads)
        self.heads, self.dropout = heads, dropout
        self.qkv = project(width, 3 * width, width**-0.5)
        self.out = project(width, width, (width * layers) ** -0.5, bias=True)

    def forward(
        self, x: Tensor, layout: StridedLayout | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Maps (B, N, D) to (B, N, D); with a cache, x holds the next N tokens of a sequence."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        start = 0 if cache is None else cache.length
        if cache is not None:
            k, v = cache.append(k, v)
        if layout is None:
            y = attend(q, k, v, causal=True, dropout=self.dropout if self.training else 0.0)
        elif x.shape[1] == 1:
            keys = layout.keys(start)
            y = attend(q, k[:, :, keys], v[:, :, keys])
        elif cache is None and own_kernel("strided", q, q.dtype, q.shape[-1]):
            y = kernels.strided_attention(q, k, v, layout.packed())
        else:
            end = start + x.shape[1]
            y = attend(q, k, v, mask=layout.mask[start:end, :end])
        return self.out(merge_heads(y))


class CrossAttention(nn.Module):
    """Multi-head attention from a sequence of width D to a memory of width Dm, all of it visible.

    Queries and keys are D wide, values Dm wide, as in VideoGPT's frame conditioning.
    """

    def __init__(self, width: int, memory_width: int, heads: int, *, layers: int):
        """`layers` is the whole network's depth; it scales the output's initialisation."""
        super().__init__()
        check_heads(width, heads)
        check_heads(memory_width, heads)
        self.heads = heads
        self.q = project(width, width, width**-0.5)
        self.k = project(memory_width, width, memory_width**-0.5)
        self.v = project(memory_width, memory_width, memory_width**-0.5)
        self.out = project(memory_width, width, (width * layers) ** -0.5, bias=True)

    def forward(self, x: Tensor, memory: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Maps x (B, N, D), looking at `memory` (B, M, Dm), to (B, N, D)."""
        q = split_heads(self.q(x), self.heads)
        if cache is not None and cache.memory is not None:
            k, v = cache.memory
        else:
            k = split_heads(self.k(memory), self.heads)
            v = split_heads(self.v(memory), self.heads)
            if cache is not None:
                cache.memory = k, v
        return self.out(merge_heads(attend(q, k, v)))


class AxialAttention(nn.Module):
    """Sum of three self-attentions over a video: along time, along height and along width.

    A position attends to the T + H + W positions that share two of its coordinates rather than to
    all T·H·W (Ho et al. 2019; VideoGPT §3.1). Each axis has its own projections, stored fused:
    `qkv` holds axis (t, h, w) × (q, k, v) × head × d output rows, and since the axes' outputs are
    summed, their output projections are one matrix over their concatenation.
    """

    def __init__(self, width: int, heads: int, *, causal_time: bool = False):
        """With `causal_time`, attention along time sees the present and the past only."""
        super().__init__()
        check_heads(width, heads)
        self.heads, self.causal_time = heads, causal_time
        self.qkv = project(width, 9 * width, width**-0.5)
        self.out = project(3 * width, width, width**-0.5, bias=True)
        # The sum of three output projections' biases, each started as nn.Linear starts it.
        biases = torch.empty(3, width).uniform_(-(width**-0.5), width**-0.5)
        nn.init.zeros_(self.out.bias).data.add_(biases.sum(0))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, H, W, D) to (B, T, H, W, D)."""
        autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype  # of projections
        head_dim = x.shape[-1] // self.heads
        if max(x.shape[1:4]) <= SHORT and own_kernel("axial", x, dtype, head_dim):
            qkv = self.qkv(x).unflatten(-1, (3, 3, self.heads, -1))
            return self.out(kernels.axial_block(qkv, causal_time=self.causal_time).flatten(-3))
        weights = zip(self.qkv.weight.chunk(3), self.out.weight.chunk(3, dim=1), strict=True)
        total: Tensor = self.out.bias
        for axis, (qkv, out) in enumerate(weights, 1):
            rows = x.movedim(axis, -2)  # (B, ·, ·, L, D): what is attended along comes last
            parts = F.linear(rows, qkv).flatten(0, 2).chunk(3, dim=-1)  # q, k, v (rows, L, D)
            q, k, v = (split_heads(part, self.heads) for part in parts)
            y = merge_heads(attend(q, k, v, causal=self.causal_time and axis == 1))
            total = total + F.linear(y, out).view(rows.shape).movedim(-2, axis)
        return total
