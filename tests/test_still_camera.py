"""Packing of clips from a still camera: nothing is lost, and what stands still is free."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvgpt.data import still_camera


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(*(st.integers(1, most) for most in (3, 4, 5, 6))),
    st.sampled_from([2, 3, 256]),
    st.integers(0, 2**32 - 1),
)
def test_unpacks_what_was_packed(shape, colours, seed):
    """Few colours give many pixels that stay or fall back to the background, 256 give none."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, colours, (*shape, 3)).astype(np.uint8) * np.uint8(255 // (colours - 1))
    unpacked = still_camera.unpack(still_camera.pack(video))
    assert unpacked.dtype == np.uint8
    assert np.array_equal(unpacked, video)


def test_what_moves_comes_back_and_what_stands_still_is_free():
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    still = np.broadcast_to(background, (4, 10, 32, 32, 3))
    moving = still.copy()
    for frame in range(10):
        moving[:, frame, 3 * frame : 3 * frame + 4, 5:9] = (200, 30, 60)
    packed = {name: still_camera.pack(video) for name, video in (("s", still), ("m", moving))}
    assert np.array_equal(packed["m"]["background"], background)
    assert np.array_equal(still_camera.unpack(packed["m"]), moving)
    bytes_of = {name: p["change"].size + p["colour"].size for name, p in packed.items()}
    assert bytes_of["s"] < 100
    assert bytes_of["s"] < bytes_of["m"] < moving.size / 100


def test_damage_is_not_passed_over():
    packed = still_camera.pack(np.zeros((1, 2, 4, 4, 3), np.uint8))
    packed["shape"] = np.array([1, 2, 4, 5, 3])
    with pytest.raises(ValueError, match="reshape"):
        still_camera.unpack(packed)
