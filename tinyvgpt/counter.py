"""Random numbers without a state: every draw is a pure function of a seed and its indices.

A generator with a state hands out numbers in the order of asking, so what item 7 gets depends on
who asked before. A counter-based one (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") hashes the place of the draw instead: `uniform(seed, clip, position)` is the same number
on every machine, in every worker, in any order. The hash is the output function of splitmix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 3), applied
once for the seed and once more for each index. Chapter 02 builds it.

Draws with different numbers of indices never share a sequence: `uniform(0, 5)` and
`uniform(0, 5, 0)` have nothing to do with each other.

Shapes: seed and indices are integers or integer arrays that broadcast; the result has their
common shape, and is a numpy scalar where all are plain integers.
"""

import numpy as np
from numpy.typing import ArrayLike

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's step
SHUFFLE_ROUNDS = 8  # of the Feistel network; with 4, some orders come up more often than others
SHUFFLE_BITS = 3  # least bits in a half; with 2, all orders of the 16 values are even permutations


def _uint64(value: ArrayLike, name: str) -> np.ndarray:
    """`value` as uint64; negative integers wrap around, so -1 is 2**64 - 1."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {value!r}, it must be an integer that fits in 64 bits")
    return array.astype(np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's output function: a bijection in which each input bit flips half the output."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(seed: ArrayLike, *indices: ArrayLike) -> np.ndarray:
    """Return 64 random bits for every combination of `seed` and broadcast `indices`.

    `bits(seed, i)` for i = 0, 1, … is the splitmix64 sequence that starts at the hashed seed.

    Args:
        seed: integer or integer array.
        *indices: integers or integer arrays, broadcast against each other.

    Returns:
        uint64 of the broadcast shape.

    Raises:
        ValueError: a seed or index is not an integer, or takes more than 64 bits.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what we want
        state = _mix(_uint64(seed, "seed") + GOLDEN)
        for index in indices:
            state = _mix(state + GOLDEN * (_uint64(index, "index") + np.uint64(1)))
    return state


def uniform(seed: ArrayLike, *indices: ArrayLike) -> np.ndarray:
    """Return uniform random numbers in [0, 1): multiples of 2**-53, all equally likely.

    Args:
        seed: integer or integer array.
        *indices: integers or integer arrays, broadcast against each other.

    Returns:
        float64 of the broadcast shape.

    Raises:
        ValueError: a seed or index is not an integer, or takes more than 64 bits.
    """
    return (bits(seed, *indices) >> np.uint64(11)) * 2.0**-53


def integers(high: int, seed: ArrayLike, *indices: ArrayLike) -> np.ndarray:
    """Return uniform random integers in [0, high).

    Args:
        high: exclusive upper bound, 1 … 2**32 (beyond, the unevenness of rounding would grow).
        seed: integer or integer array.
        *indices: integers or integer arrays, broadcast against each other.

    Returns:
        int64 of the broadcast shape.

    Raises:
        ValueError: `high` is out of its range, or a seed or index is not a 64-bit integer.
    """
    if not 1 <= high <= 2**32:
        raise ValueError(f"high is {high}, it must be 1 … 2**32")
    return (uniform(seed, *indices) * high).astype(np.int64)


def shuffled(positions: ArrayLike, size: int, seed: ArrayLike, *indices: ArrayLike) -> np.ndarray:
    """Return the items at `positions` of a random permutation of 0 … size - 1.

    The permutation belongs to (seed, indices) and is never written down: a Feistel network (Luby &
    Rackoff 1988) over the next power of four, at least 64, is a bijection whatever its round
    function, and results beyond `size` are sent through again until they fall inside (cycle
    walking, Black & Rogaway 2002). So a batch of a shuffled epoch costs as much as its own length.

    Args:
        positions: integers in [0, size).
        size: length of the permutation, 1 … 2**62.
        seed: integer or integer array.
        *indices: integers or integer arrays (an epoch, say), broadcast against `positions`.

    Returns:
        int64 in [0, size), of the broadcast shape.

    Raises:
        ValueError: a position is outside [0, size), or something is not a 64-bit integer.
    """
    if not 1 <= size <= 2**62:
        raise ValueError(f"size is {size}, it must be 1 … 2**62")
    key = bits(seed, *indices)
    position, key = np.broadcast_arrays(_uint64(positions, "positions"), key)
    if (position >= size).any():
        raise ValueError(f"a position is outside the permutation of {size} (0 … {size - 1})")
    half = max(SHUFFLE_BITS, ((size - 1).bit_length() + 1) // 2)  # bits in each half of the network
    item = _feistel(position, key, half)
    while (outside := item >= size).any():
        item = np.where(outside, _feistel(item, key, half), item)
    return item.astype(np.int64)


def _feistel(value: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
    """Permute [0, 4**half), each element of `value` under its own `key`."""
    mask = np.uint64(2**half - 1)
    left, right = value >> np.uint64(half), value & mask
    for round_ in range(SHUFFLE_ROUNDS):
        left, right = right, left ^ (bits(key, round_, right) & mask)
    return (left << np.uint64(half)) | right
