"""The codebook: vector quantisation whose codes follow the encoder by moving averages.

Chapter 04 builds this file. Source: van den Oord et al. 2017, §3.2 and appendix A.1, with
VideoGPT's first-batch initialisation and its restarts of unused codes.

With several processes the codebook moves by the batch of all of them together, and stays the same
to the bit in all: what is all-reduced has the same bits everywhere, and all compute the same from
it.

Shapes: B batch · t h w latent grid · M = B·t·h·w vectors · K codes · D code dim.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyvgpt.compiling import uncompiled
from tinyvgpt.distributed import rank, world_size

ROWS_AT_A_TIME = 16384  # vectors compared with all codes at once: bounds the (rows, K) distances
# An unused restarted code lasts ln 2 / (1 - decay) ≈ 69 updates before the next restart.
RESTARTED_COUNT = 2.0


class Quantized(NamedTuple):
    """What quantising a batch gives."""

    vectors: Tensor  # (B, D, t, h, w), the nearest codes; gradients pass straight through to z
    tokens: Tensor  # (B, t, h, w) int64, their indices
    commitment_loss: Tensor  # scalar, commitment · MSE(z, codes)
    perplexity: Tensor  # scalar in [1, K], exp of the entropy of this batch's code usage
    used: Tensor  # scalar in [0, 1], share of the codes that this batch uses
    # In training with several processes, perplexity and used are of all their batches together.


class Codebook(nn.Module):
    """K code vectors, with a running count and a running sum of the vectors assigned to each.

    A code is the (smoothed) mean of the vectors lately assigned to it. Until the first training
    batch all counts are zero; that batch initialises the codes. Counts and sums are part of the
    state dict, so training resumes with the same codebook.
    """

    codes: Tensor  # (K, D)
    count: Tensor  # (K,)
    total: Tensor  # (K, D)

    def __init__(self, codes: int, dim: int, *, decay: float = 0.99, commitment: float = 0.25):
        """Makes `codes` random vectors of `dim` channels; `decay` is the moving averages'."""
        super().__init__()
        self.decay, self.commitment = decay, commitment
        self.register_buffer("codes", torch.randn(codes, dim))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, dim))
        # A cache of `count.any()`, so that training doesn't wait for the device.
        self._initialised = False

    # Sizes of the update and whether it initialises depend on data, and torch.compile would compile
    # a graph for each; nothing here gets faster by it.
    @uncompiled
    def forward(self, z: Tensor) -> Quantized:
        """Quantises z (B, D, t, h, w); in training mode also moves the codes towards z.

        The batch is quantised with the codes from before their update. In training all processes
        must call it, in the same order; in evaluation each is on its own.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            flat = rearrange(z.detach(), "b d t h w -> (b t h w) d")
            if self.training and not self._initialised:
                self._start(flat)
            tokens = self._nearest(flat)
            usage = torch.zeros_like(self.count).index_add_(0, tokens, torch.ones_like(flat[:, 0]))
            tokens_grid = tokens.view(z.shape[0], *z.shape[2:])
            vectors = self.lookup(tokens_grid).movedim(-1, 1)
            loss = self.commitment * F.mse_loss(z, vectors)
            if self.training:
                usage = self._update(flat, tokens, usage)
            p = usage / usage.sum()
            perplexity = torch.exp(-torch.xlogy(p, p).sum())
            straight_through = z + (vectors - z).detach()
            return Quantized(
                straight_through, tokens_grid, loss, perplexity, (usage > 0).float().mean()
            )

    def encode(self, z: Tensor) -> Tensor:
        """Tokens (B, t, h, w), int64, of the codes nearest to z (B, D, t, h, w)."""
        with torch.autocast(z.device.type, enabled=False):
            tokens = self._nearest(rearrange(z.detach().float(), "b d t h w -> (b t h w) d"))
        return tokens.view(z.shape[0], *z.shape[2:])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Code vectors (…, D) of tokens (…); unchecked, as token values live on the device."""
        return F.embedding(tokens, self.codes)

    def _nearest(self, flat: Tensor) -> Tensor:
        """Index (M,) of the code nearest in squared distance to each row of (M, D)."""
        # |z - e|² = |z|² - 2 z·e + |e|², and |z|² is the same for every code.
        codes = self.codes.to(flat.dtype)
        norms = codes.square().sum(1)
        rows = flat.split(ROWS_AT_A_TIME)
        return torch.cat([torch.addmm(norms, r, codes.T, alpha=-2).argmin(1) for r in rows])

    def _candidates(self, flat: Tensor) -> Tensor:
        """K rows of `flat` (M, D), at random, none twice; tiled, with some noise, if M < K."""
        k, dim = self.codes.shape
        if len(flat) < k:
            flat = flat.repeat(-(-k // len(flat)), 1)
            flat = flat + torch.randn_like(flat) * (0.01 / dim**0.5)
        return flat[torch.randperm(len(flat), device=flat.device)[:k]]

    @torch.no_grad()
    def _start(self, flat: Tensor) -> None:
        """Takes rank 0's codebook, and initialises it with the first batch if it is untrained."""
        if world_size() > 1:
            for buffer in (self.codes, self.count, self.total):
                dist.broadcast(buffer, 0)
        self._initialised = bool(self.count.any())
        if not self._initialised:
            self._initialise(flat)

    @torch.no_grad()
    def _initialise(self, flat: Tensor) -> None:
        """Sets the codes to vectors of rank 0's first batch whose vectors are finite."""
        fresh = self._candidates(flat)
        if world_size() > 1:
            dist.broadcast(fresh, 0)
        if fresh.isfinite().all():
            self.codes.copy_(fresh)
            self.total.copy_(fresh)
            self.count.fill_(1.0)

    @torch.no_grad()
    def _update(self, flat: Tensor, tokens: Tensor, usage: Tensor) -> Tensor:
        """Moves the codebook by one batch (van den Oord et al. 2017, A.1); restarts dead codes.

        A batch with a vector that isn't finite, in whichever process, moves nothing: it would
        stay in the moving averages for good.

        Returns:
            usage (K,), of all processes' batches.
        """
        total = torch.zeros_like(self.total).index_add_(0, tokens, flat)
        usage, total, fresh = self._reduced(usage, total, flat)
        finite = total.isfinite().all()  # on the device: training doesn't wait for it
        count, total = (
            self.count.lerp(usage, 1 - self.decay),
            self.total.lerp(total, 1 - self.decay),
        )
        n = count.sum()
        smoothed = (count + 1e-7) / (n + len(count) * 1e-7) * n  # no division by zero
        # A restarted code gets a count and a sum of its own, or the next update would undo it.
        dead = self._dead(count)
        codes = torch.where(dead[:, None], fresh, total / smoothed[:, None])
        total = torch.where(dead[:, None], RESTARTED_COUNT * fresh, total)
        count = count.masked_fill(dead, RESTARTED_COUNT)
        for buffer, moved in ((self.codes, codes), (self.total, total), (self.count, count)):
            buffer.copy_(torch.where(finite, moved, buffer))
        return usage

    def _dead(self, count: Tensor) -> Tensor:
        """Which codes (K,) to restart, by their running counts (K,)."""
        return count < 1

    def _reduced(self, usage: Tensor, total: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Usage (K,) and sums (K, D) over all processes, and rank 0's candidates (K, D).

        In one operation: the others' share of the candidates is zeros.
        """
        if world_size() == 1:
            return usage, total, self._candidates(flat)
        fresh = self._candidates(flat) if rank() == 0 else torch.zeros_like(total)
        joint = torch.cat([usage[:, None], total, fresh], dim=1)
        dist.all_reduce(joint)
        usage, total, fresh = joint.split([1, *self.codes.shape[1:], *self.codes.shape[1:]], dim=1)
        return usage.squeeze(1), total, fresh
