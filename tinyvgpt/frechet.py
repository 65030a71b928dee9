"""Fréchet distances between sets of features, and how far a figure depends on the clips.

The squared Wasserstein-2 distance between two Gaussians (Dowson & Landau 1982), here of the means
and covariances of two sets of features; with I3D's features it is the Fréchet video distance
(Unterthiner et al. 2018). Everything is computed in float64. Intervals are by bootstrap (Efron
1979): the figure again and again, each time of as many clips drawn from the set with replacement.

A distance between finite sets is too large: two sets of real clips don't have 0. So what two such
sets have belongs beside every distance. Chapter 18 uses them.

Shapes: n clips · D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95  # of the intervals
RESAMPLES = 1000  # of means
DISTANCE_RESAMPLES = 200  # of distances, each of which takes two eigenvalue problems


class Figure(NamedTuple):
    """A measured value, and between what bounds 95 % of other choices of clips would put it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FeatureSet:
    """What a network makes of a set of clips."""

    values: Tensor  # float64 (n, D), on the CPU
    network: str  # its name: features of different networks can't be compared
    least: int  # clips that a distance needs

    def __post_init__(self) -> None:
        """Raises ValueError unless there are two clips or more, with finite features."""
        if self.values.ndim != 2 or self.values.dtype != torch.float64:
            raise ValueError(
                f"features are {self.values.dtype} of shape {tuple(self.values.shape)}, float64 "
                "(n, D) is needed"
            )
        if len(self.values) < 2:
            raise ValueError(f"a covariance needs 2 clips, {len(self.values)} are given")
        bad = int((~self.values.isfinite().all(1)).sum())
        if bad:
            raise ValueError(
                f"features of {self.network} are not finite for {bad} of {len(self.values)} clips"
            )


def check_enough(network: str, size: int, least: int, clips: int) -> None:
    """Raises ValueError unless there are as many clips as a distance with `size` features needs."""
    if clips < least:
        raise ValueError(
            f"{clips} clips are too few for a distance between {size} features of {network}: at "
            f"least {least} are needed"
        )


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (n, D), float64."""
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.mT @ centred / (len(values) - 1)


def trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Trace of (a b)^½, scalar, of covariances (D, D) of any rank.

    a b is not symmetric, but has the eigenvalues of a^½ b a^½, which is. Of that only the part
    within the range of a is built; elsewhere it is 0, and rounding would add the root of a tiny
    number for each missing dimension.
    """
    values, vectors = torch.linalg.eigh(a)
    kept = values > _noise(values)
    root = vectors[:, kept] * values[kept].sqrt()  # (D, rank): a = root · rootᵀ
    if not root.shape[1]:
        return a.new_zeros(())
    squares = torch.linalg.eigvalsh(root.mT @ b @ root)
    return squares[squares > _noise(squares)].sqrt().sum()


def _noise(eigenvalues: Tensor) -> Tensor:
    """Below what rounding leaves nothing of eigenvalues (n,) in ascending order; at least 0."""
    relative = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return (eigenvalues[-1] * relative).clamp(min=0)


def gaussian_distance(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """Fréchet distance |m - m'|² + tr(S + S' - 2 (S S')^½) of Gaussians.

    Args:
        mean: (D,) float64, of the first one.
        cov: (D, D) float64, symmetric, without negative eigenvalues.
        other_mean: of the second one.
        other_cov: of the second one.

    Returns:
        At least 0, in squared units of the features.
    """
    spread = cov.trace() + other_cov.trace() - 2 * trace_of_root(cov, other_cov)
    return max(((mean - other_mean).square().sum() + spread).item(), 0.0)


def distance(a: FeatureSet, b: FeatureSet) -> float:
    """Fréchet distance between two sets of features, of any number of clips.

    Raises:
        ValueError: for features of different networks or sizes.
    """
    if a.network != b.network:
        raise ValueError(f"features are of different networks: {a.network} and {b.network}")
    sizes = a.values.shape[1], b.values.shape[1]
    if sizes[0] != sizes[1]:
        raise ValueError(f"one set has {sizes[0]} features of {a.network}, the other {sizes[1]}")
    return gaussian_distance(*statistics(a.values), *statistics(b.values))


def compare(a: FeatureSet, b: FeatureSet, seed: int = 0) -> Figure:
    """Fréchet distance between two sets of as many clips, with its interval.

    Clips are drawn in pairs, row i of both sets, as what is compared may be two versions of the
    same clips. Sets drawn so have fewer different clips and larger distances: the interval is moved
    to where their mean meets the value. It tells how far the value moves with the choice of clips,
    not how far it is from that of endless sets. Of few clips for their features, or of sets that
    are alike, it is too wide, in trials with Gaussians by up to 1.9 times.

    Raises:
        ValueError: as `distance`, and for too few clips or different numbers of them.
    """
    value = distance(a, b)
    for each in (a, b):
        check_enough(each.network, each.values.shape[1], each.least, len(each.values))
    if len(a.values) != len(b.values):
        raise ValueError(
            f"one set has {len(a.values)} clips, the other {len(b.values)}; as many are needed"
        )

    def again(rows: Tensor) -> float:
        return gaussian_distance(*statistics(a.values[rows]), *statistics(b.values[rows]))

    drawn = torch.tensor([again(rows) for rows in draws(len(a.values), DISTANCE_RESAMPLES, seed)])
    low, high = (drawn.double() - drawn.double().mean()).quantile(bounds()).tolist()
    return Figure(value, max(value + low, 0.0), value + high)


def halves(a: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    """A set of features in two: every other clip, as many in both, and no least number of them."""
    n = len(a.values) // 2 * 2
    first, second = a.values[0:n:2], a.values[1:n:2]
    return FeatureSet(first, a.network, 2), FeatureSet(second, a.network, 2)


def mean_figure(
    values: Tensor, seed: int = 0, of: Callable[[Tensor], Tensor] = lambda mean: mean
) -> Figure:
    """A figure of the mean over clips, such as bits a token, with its interval.

    Args:
        values: (n,) float, one a clip.
        seed: of the bootstrap.
        of: what becomes of a mean, such as decibels of a mean squared error.
    """
    values = values.double().cpu()
    drawn = of(torch.stack([values[rows].mean() for rows in draws(len(values), RESAMPLES, seed)]))
    low, high = drawn.quantile(bounds()).tolist()
    return Figure(of(values.mean()).item(), low, high)


def draws(n: int, count: int, seed: int) -> Tensor:
    """Rows drawn with replacement: (count, n) int64 in 0 … n - 1, the same for the same seed."""
    return torch.randint(n, (count, n), generator=torch.Generator().manual_seed(seed))


def bounds() -> Tensor:
    """Between which quantiles an interval lies, float64 (2,)."""
    return torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
