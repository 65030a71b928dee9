"""Counter-based random numbers: the right numbers, and numbers that look random."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvgpt import counter

MASK = 2**64 - 1


def splitmix64(state):
    """splitmix64's output after one step from `state`, in plain Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def looks_uniform(counts):
    """Whether `counts` are within five standard deviations of chi-square's mean."""
    counts = np.asarray(counts).ravel()
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def squares(first, second, cells=32):
    """How many pairs fall in each cell of a grid over the unit square."""
    return np.histogram2d(first, second, bins=cells, range=[[0, 1], [0, 1]])[0]


def test_bits_are_splitmix64_of_seed_then_of_each_index():
    assert int(counter.bits(1234567)) == 6457827717110365317  # its published first output
    for seed, index, other in [(0, 0, 0), (1, 2, 3), (MASK, 10**12, MASK), (7, MASK, 0)]:
        state = splitmix64(seed)
        for value in (index, other):
            state = splitmix64((state + 0x9E3779B97F4A7C15 * value) & MASK)
        assert int(counter.bits(seed, index, other)) == state


def test_golden_values():
    assert counter.uniform(0) == 0.8833108082136426
    assert counter.uniform(0, [0, 1, 2]).tolist() == [
        0.6524484863740322,
        0.7012121095215252,
        0.3871241409757855,
    ]
    assert counter.uniform(2026, 3, 4, 5) == 0.8701559667652309
    assert counter.integers(10, 0, np.arange(8)).tolist() == [6, 7, 3, 6, 7, 1, 7, 2]
    assert counter.shuffled(np.arange(8), 8, 0, 1).tolist() == [6, 1, 2, 0, 4, 5, 3, 7]


def test_each_draw_depends_on_its_own_indices_alone():
    rows, columns = np.arange(5)[:, None], np.arange(7)
    grid = counter.uniform(3, rows, columns)
    assert grid.shape == (5, 7)
    assert grid.dtype == np.float64
    for row, column in itertools.product(range(5), range(7)):
        assert grid[row, column] == counter.uniform(3, row, column)
    seeds = counter.uniform(np.arange(4), 9)
    assert seeds.tolist() == [counter.uniform(seed, 9) for seed in range(4)]
    assert counter.uniform(np.int32(-1), np.uint8(9)) == counter.uniform(MASK, 9)


def test_uniform_stays_below_one():
    draws = counter.uniform(0, np.arange(200_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    top = 1 - 2.0**-53  # the largest draw there is
    assert all(int(top * high) == high - 1 for high in (1, 3, 10, 55, 2**31 + 1, 2**32))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_in_one_dimension(seed):
    draws = counter.uniform(seed, np.arange(100_000))
    assert looks_uniform(np.histogram(draws, bins=500, range=(0, 1))[0])


def test_neighbours_are_independent():
    n = np.arange(100_000)
    clip, position = n // 400, n % 400
    here = counter.uniform(0, clip, position)
    assert looks_uniform(squares(here, counter.uniform(0, clip, position + 1)))
    assert looks_uniform(squares(here, counter.uniform(0, clip + 1, position)))
    assert looks_uniform(squares(here, counter.uniform(1, clip, position)))
    assert looks_uniform(squares(here, counter.uniform(0, position, clip)))
    assert looks_uniform(squares(here, counter.uniform(0, clip, position, 0)))
    # the check itself must see a dependence: a pair of equal draws lies on the diagonal
    assert not looks_uniform(squares(here, here))


def test_neighbouring_seeds_and_indices_never_collide():
    values = np.arange(64)
    grid = counter.bits(values[:, None, None], values[:, None], values)
    assert np.unique(grid).size == 64**3


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_input_bit_flips_half_the_output_bits(place):
    n = np.arange(2_000, dtype=np.uint64)
    inputs = [n, n + np.uint64(10**6), n * np.uint64(3)]
    before = counter.bits(*inputs)
    for bit in range(64):
        flipped = list(inputs)
        flipped[place] = inputs[place] ^ np.uint64(1 << bit)
        changed = before ^ counter.bits(*flipped)
        rates = [(changed >> np.uint64(out) & np.uint64(1)).mean() for out in range(64)]
        assert min(rates) > 0.43  # 0.5 within six standard deviations
        assert max(rates) < 0.57


@pytest.mark.parametrize("high", [1, 2, 7, 10, 55])
def test_integers_are_uniform_below_high(high):
    draws = counter.integers(high, 5, np.arange(50_000))
    counts = np.bincount(draws, minlength=high)
    assert counts.size == high
    assert high == 1 or looks_uniform(counts)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**32), epoch=st.integers(0, 2**32))
def test_shuffled_is_a_permutation(size, seed, epoch):
    order = counter.shuffled(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_shuffled_makes_every_permutation_equally_often():
    orders = counter.shuffled(np.arange(5), 5, 0, np.arange(60_000)[:, None])
    codes, counts = np.unique(orders @ 10 ** np.arange(5), return_counts=True)
    assert codes.size == 120
    assert looks_uniform(counts)


def test_shuffled_places_look_independent():
    size = 100_000
    order = counter.shuffled(np.arange(size), size, 0, 0)
    assert looks_uniform(squares(order[:-1] / size, order[1:] / size))
    other = counter.shuffled(np.arange(size), size, 0, 1)
    assert looks_uniform(squares(order / size, other / size))


def test_shuffled_asks_for_no_more_than_it_needs():
    positions = np.array([0, 10**15, 2**61])
    batch = counter.shuffled(positions, 2**62, 4, 9)
    assert batch.tolist() == [int(counter.shuffled(int(p), 2**62, 4, 9)) for p in positions]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counter.uniform(0.5), "seed is 0.5"),
        (lambda: counter.uniform(None), "seed is None"),
        (lambda: counter.uniform(2**64), "64 bits"),
        (lambda: counter.uniform(0, [1.0, 2.0]), "index is"),
        (lambda: counter.integers(0, 1), "high is 0"),
        (lambda: counter.shuffled(5, 5, 0), "outside the permutation of 5"),
        (lambda: counter.shuffled(-1, 5, 0), "outside the permutation of 5"),
        (lambda: counter.shuffled(0, 0, 0), "size is 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
