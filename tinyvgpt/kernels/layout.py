"""Which blocks of 32 queries attend to which blocks of 32 keys, as attention kernels read it.

A bit a block. Kernels cut queries and keys in tiles of any multiple of 32: what a tile of queries
has to visit is the "or" of its rows' bits, and the next tile of keys is the lowest bit that is set.
A decoding step has one query, whose row is a list. Chapter 14 builds this file.

Shapes: H heads, or 1 for all · R blocks of queries · C blocks of keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # tokens; also the bits of a word


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """A block-sparse attention pattern; made by `block_layout`.

    Attributes:
        blocks: bool (H, R, C), true where a block attends to a block.
        causal: whether, within these blocks, a query sees only the keys at or before its own
            position, aligned at the end if there are more keys than queries or fewer.
        rows: int32 (H, R, ceil(C / 32)): bit c % 32 of word c // 32 is `blocks[:, r, c]`.
        columns: the transpose, int32 (H, C, ceil(R / 32)): the queries that see a block of keys.
        lists: for decoding, int32 (H, R, 2 + most): how many blocks before its own a row attends
            to, whether to its own, then which; later ones don't exist yet.
    """

    blocks: Tensor
    causal: bool
    rows: Tensor
    columns: Tensor
    lists: Tensor

    def mask(self, queries: int, keys: int) -> Tensor:
        """The same token by token: bool (H, queries, keys), true where a query looks."""
        tokens = self.blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        tokens = tokens[:, :queries, :keys]
        return tokens.tril(keys - queries) if self.causal else tokens


def block_layout(blocks: Tensor, *, causal: bool) -> BlockLayout:
    """Prepares a mask of blocks, once; it is on the mask's device.

    The strided pattern (Child et al. 2019, §4) is
    `block_layout(attention.StridedLayout(shape).blocks, causal=True)`.

    Args:
        blocks: bool (R, C), or (nh, R, C) if heads differ.
        causal: see BlockLayout.

    Raises:
        TypeError: if the mask isn't bool.
        ValueError: if it doesn't have two or three axes, or one is empty.
    """
    if blocks.dtype != torch.bool:
        raise TypeError(f"a mask of blocks is bool, not {blocks.dtype}")
    if blocks.dim() not in (2, 3) or not blocks.numel():
        raise ValueError(f"a mask of blocks is (rows, columns) or (heads, rows, columns), not "
                         f"{tuple(blocks.shape)}")  # fmt: skip
    blocks = blocks if blocks.dim() == 3 else blocks[None]
    return BlockLayout(blocks, causal, _words(blocks), _words(blocks.mT), _lists(blocks))


def _words(blocks: Tensor) -> Tensor:
    """Packs the last axis, 32 to an int32, the first in the lowest bit."""
    bits = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % BLOCK)).unflatten(
        -1, (-1, BLOCK)
    )
    words = (bits.long() << torch.arange(BLOCK, device=bits.device)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def _lists(blocks: Tensor) -> Tensor:
    """What each row attends to up to its own block; see `BlockLayout.lists`."""
    seen = blocks.tril()
    own = seen.diagonal(dim1=1, dim2=2).int()
    own = torch.nn.functional.pad(own, (0, blocks.shape[1] - own.shape[1]))
    count = seen.sum(-1)
    first = seen.int().argsort(dim=-1, descending=True, stable=True)  # a row's blocks, then others
    head = torch.stack([count - own, own], dim=-1)
    most = blocks.shape[-1] if blocks.is_meta else int(count.max())
    return torch.cat([head, first[..., :most]], dim=-1).int()
