"""Fréchet distances equal closed forms, whatever the rank; intervals tell what other clips give."""

import math
from itertools import pairwise

import pytest
import torch

from tinyvgpt.frechet import (
    FeatureSet,
    compare,
    distance,
    draws,
    gaussian_distance,
    halves,
    mean_figure,
    statistics,
    trace_of_root,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def covariance(size, rank, seed=0):
    root = randn(size, rank, seed=seed)
    return root @ root.mT


def feature_set(values, network="net", least=2):
    return FeatureSet(values, network, least)


# Gaussians ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 400])
def test_one_covariance_leaves_the_means(size):
    cov, mean, other = covariance(size, size + 3), randn(size, seed=1), randn(size, seed=2)
    expected = (mean - other).square().sum().item()
    assert gaussian_distance(mean, cov, other, cov) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_diagonal_covariances(size):
    a, b = randn(size, seed=1).square(), randn(size, seed=2).square()
    turn = torch.linalg.qr(randn(size, size))[0]  # the same axes for both, but not the features'
    rotated = [turn @ x.diag() @ turn.mT for x in (a, b)]
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    zero = torch.zeros(size, dtype=torch.float64)
    assert gaussian_distance(zero, rotated[0], zero, rotated[1]) == pytest.approx(
        expected, abs=1e-6
    )


def test_two_features():
    """tr (ab)^½ = (tr ab + 2 det^½ ab)^½ for 2 × 2."""
    for seed in range(20):
        a, b = covariance(2, 4, seed), covariance(2, 3, seed + 100)
        expected = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
        assert trace_of_root(a, b).item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_scaled_covariance(scale):
    cov, zero = covariance(30, 60) * scale, torch.zeros(30, dtype=torch.float64)
    expected = 4 * cov.trace().item()  # (3 - 1)²
    assert gaussian_distance(zero, cov, zero, 9 * cov) == pytest.approx(expected, rel=1e-9)


def test_rank_one():
    """tr (uuᵀ vvᵀ)^½ = |u · v|, though 399 dimensions are missing."""
    u, v = randn(400, seed=1), randn(400, seed=2)
    root = trace_of_root(torch.outer(u, u), torch.outer(v, v))
    assert root.item() == pytest.approx(abs((u @ v).item()), abs=1e-9)
    orthogonal = v - u * (u @ v) / (u @ u)
    assert trace_of_root(torch.outer(u, u), torch.outer(orthogonal, orthogonal)) < 1e-6
    assert trace_of_root(torch.zeros_like(torch.outer(u, u)), torch.outer(v, v)) == 0


def test_one_of_them_of_rank_one():
    """tr (a vvᵀ)^½ = (vᵀ a v)^½, whichever comes first."""
    a, v = covariance(400, 500), randn(400, seed=1)
    expected = pytest.approx((v @ a @ v).sqrt().item(), rel=1e-9)
    assert trace_of_root(a, torch.outer(v, v)).item() == expected
    assert trace_of_root(torch.outer(v, v), a).item() == expected


def test_against_the_product_s_own_eigenvalues():
    """Those of the product that isn't symmetric, by another algorithm."""
    a, b = covariance(40, 60, 1), covariance(40, 50, 2)
    expected = torch.linalg.eigvals(a @ b).real.sqrt().sum().item()
    assert trace_of_root(a, b).item() == pytest.approx(expected, rel=1e-10)
    assert trace_of_root(b, a).item() == pytest.approx(expected, rel=1e-10)


# Sets of features ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("clips", "others"), [(20, 20), (50, 300), (256, 256), (600, 500)])
def test_clips_fewer_than_features_and_more(clips, others):
    """tr (SS')^½ is the sum of the singular values of the product of the two centred matrices."""
    mix = randn(400, 400, seed=3)
    x, y = randn(clips, 400, seed=1) @ mix, randn(others, 400, seed=2) @ mix + 0.1
    centred = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].mT).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() - 2 * root
    expected += centred[0].square().sum() + centred[1].square().sum()
    assert distance(feature_set(x), feature_set(y)) == pytest.approx(expected.item(), rel=1e-9)


def test_statistics():
    x = randn(50, 6) + 1e4  # which float32's squares don't hold
    mean, cov = statistics(x)
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(cov, torch.cov(x.mT), rtol=1e-9)
    assert torch.allclose(cov, torch.cov(randn(50, 6).mT), atol=1e-9)


@pytest.mark.parametrize("clips", [10, 300])
def test_a_metric_of_where_sets_are(clips):
    x, y = randn(clips, 30, seed=1), 2 * randn(clips, 30, seed=2) + 1
    between = distance(feature_set(x), feature_set(y))
    assert distance(feature_set(x), feature_set(x)) == pytest.approx(0, abs=1e-9)
    assert distance(feature_set(y), feature_set(x)) == pytest.approx(between, rel=1e-9)
    turn = torch.linalg.qr(randn(30, 30))[0]
    moved = [feature_set(3 * z @ turn + 5) for z in (x, y)]
    assert distance(*moved) == pytest.approx(9 * between, rel=1e-9)


def test_fewer_clips_are_farther_apart():
    """Two sets of the same kind don't have 0: that is why it stands beside every result."""
    found = [
        distance(feature_set(randn(n, 10, seed=n)), feature_set(randn(n, 10, seed=n + 1)))
        for n in (20, 200, 2000)
    ]
    assert all(more > 5 * less > 0 for more, less in pairwise(found))


def test_halves():
    x = torch.arange(14, dtype=torch.float64).view(7, 2)
    first, second = halves(feature_set(x, least=5))
    assert first.values.tolist() == x[[0, 2, 4]].tolist()
    assert second.values.tolist() == x[[1, 3, 5]].tolist()


# Intervals ----------------------------------------------------------------------------------------


def test_interval_of_a_mean():
    x = 3 + 2 * randn(400)
    value, low, high = mean_figure(x)
    assert value == pytest.approx(x.mean().item(), rel=1e-12)
    half = 1.96 * x.std().item() / 20
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)
    assert mean_figure(x) == (value, low, high)
    assert mean_figure(x, seed=1) != (value, low, high)
    decibels = mean_figure(x, of=lambda mean: -10 * torch.log10(mean))
    expected = [-10 * math.log10(bound) for bound in (value, high, low)]
    assert sorted(decibels) == pytest.approx(sorted(expected))


def test_interval_of_a_distance():
    """As wide as distances of fresh sets differ, where clips are many and sets are not alike."""
    sets = [
        (
            feature_set(randn(200, 3, seed=2 * i)),
            feature_set(1.5 * randn(200, 3, seed=2 * i + 1) + 1),
        )
        for i in range(200)
    ]
    found = torch.tensor([distance(*pair) for pair in sets])
    figures = [compare(*pair) for pair in sets[:10]]
    widths = torch.tensor([figure.high - figure.low for figure in figures])
    assert widths.mean().item() == pytest.approx(2 * 1.96 * found.std().item(), rel=0.2)
    assert sum(low <= found.mean() <= high for _, low, high in figures) >= 8
    assert all(low < value < high for value, low, high in figures)
    assert figures[0].value == distance(*sets[0])
    assert compare(*sets[0]) == figures[0]
    assert compare(*sets[0], seed=1) != figures[0]


def test_interval_is_around_the_value_of_few_clips():
    """Though sets drawn with replacement are farther apart, nearly always."""
    value, low, high = compare(
        feature_set(randn(10, 30, seed=1)), feature_set(randn(10, 30, seed=2))
    )
    assert value - low == pytest.approx(high - value, rel=0.5)
    assert low < value < high


def test_versions_of_the_same_clips_are_drawn_together():
    """A shift by one vector is the same for whichever clips."""
    x = randn(50, 3)
    value, low, high = compare(feature_set(x), feature_set(x + 1))
    assert (value, low, high) == pytest.approx((3, 3, 3), abs=1e-9)


def test_no_interval_below_zero():
    x = randn(300, 2)
    assert compare(feature_set(x[:150]), feature_set(x[150:])).low == 0


def test_draws():
    rows = draws(10, 2000, seed=3)
    assert rows.shape == (2000, 10)
    assert torch.equal(rows, draws(10, 2000, seed=3))
    assert rows.flatten().bincount(minlength=10).float().std() < 100  # around 2000 each
    assert any(len(set(row)) < 10 for row in rows.tolist())


# Refusals -----------------------------------------------------------------------------------------


def with_nan():
    x = randn(6, 3)
    x[2, 1] = math.nan
    x[4] = math.inf
    return x


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: feature_set(with_nan()), "features of net are not finite for 2 of 6 clips"),
        (lambda: feature_set(randn(1, 3)), "a covariance needs 2 clips, 1 are given"),
        (lambda: feature_set(randn(6, 3).float()), r"float32 of shape \(6, 3\), float64 \(n, D\)"),
        (lambda: feature_set(randn(6)), r"of shape \(6,\), float64 \(n, D\) is needed"),
        (
            lambda: distance(feature_set(randn(6, 3)), feature_set(randn(6, 3), "other")),
            "features are of different networks: net and other",
        ),
        (
            lambda: distance(feature_set(randn(6, 3)), feature_set(randn(6, 4))),
            "one set has 3 features of net, the other 4",
        ),
        (
            lambda: compare(feature_set(randn(8, 8), least=9), feature_set(randn(8, 8))),
            "8 clips are too few for a distance between 8 features of net: at least 9 are needed",
        ),
        (
            lambda: compare(feature_set(randn(9, 8)), feature_set(randn(6, 8), least=9)),
            "6 clips are too few .* at least 9 are needed",
        ),
        (
            lambda: compare(feature_set(randn(6, 3)), feature_set(randn(7, 3))),
            "one set has 6 clips, the other 7; as many are needed",
        ),
    ],
)
def test_refusals(made, message):
    with pytest.raises(ValueError, match=message):
        made()
