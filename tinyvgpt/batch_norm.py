"""Batch normalisation over the batch of all processes, on GPUs and CPUs alike.

With the batch split among processes, each would otherwise normalise with its own part's
statistics: other results than one process with the whole batch, and running statistics that
differ. Source: Ioffe & Szegedy 2015, algorithm 1; variances are combined after Chan, Golub &
LeVeque 1979, eq. 2.1. torch.nn.SyncBatchNorm does the same on GPUs only, and torch.compile breaks
its graph around it; here the exchange is compiled with the rest. Chapter 16 builds this file.

Shapes: B batch · D channels · t h w latent grid · R processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyvgpt.distributed import rank, world_size


class BatchNorm3d(nn.BatchNorm3d):
    """nn.BatchNorm3d whose statistics in training are those of all processes' batches.

    In evaluation, and in a single process, it is nn.BatchNorm3d. In training all processes must
    call it, in the same order; their running statistics then stay the same to the bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (B, D, t, h, w); same shape, dtype and memory layout."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        # Statistics take float32 at least, as in PyTorch's own kernels under autocast.
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            var, mean = torch.var_mean(wide, (0, 2, 3, 4), correction=0)
            mean, var, size = combined(mean, var, x.numel() // x.shape[1])
            self._track(mean.detach(), var.detach() * (size / (size - 1)))
            scale = (var + self.eps).rsqrt()
            if self.affine:
                scale = scale * self.weight
            y = (wide - _along_channels(mean)) * _along_channels(scale)
            if self.affine:
                y = y + _along_channels(self.bias)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        """Moves the running statistics by one batch."""
        if self.running_mean is None or self.running_var is None:
            return
        weight: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean of all batches
                weight = 1 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


def combined(mean: Tensor, var: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all processes' batches from those of each.

    Differences of means, unlike E[x²] - E[x]², lose no digits where means are large.

    Args:
        mean: (D,), of this process's batch.
        var: (D,), its variance (biased).
        size: numbers in a channel of it.

    Returns:
        Mean (D,), variance (D,) (biased) and size (scalar), the same bits in all processes.
    """
    row = torch.cat([mean, var, mean.new_full((1,), size)])
    rows: Tensor = gathered(row)
    means, variances, sizes = rows.split([len(mean), len(var), 1], dim=1)
    total = sizes.sum()
    shares = sizes / total
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return mean, var, total


def gathered(row: Tensor) -> Tensor:
    """The rows (n,) of all processes as (R, n), differentiable; the same bits in all of them."""
    return _Gathered.apply(row)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, row: Tensor) -> Tensor:
        # Each number is added to zeros, so none is rounded. (Gloo has no gather into one tensor.)
        rows = row.new_zeros(world_size(), len(row))
        rows[rank()] = row
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # all processes' losses depend on this one's row
        return grad[rank()]


def _along_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)
