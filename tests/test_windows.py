"""Windows: every clip that fits, none that doesn't, and splits without an overlap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvgpt.data.windows import HELD_OUT, Windows, check_split, default_stride, rows_of


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    frames=st.integers(1, 20),
    stride=st.integers(1, 25),
)
def test_clips_are_all_starts_that_fit(lengths, frames, stride):
    expected = [
        (video, start)
        for video, length in enumerate(lengths)
        for start in range(0, length, stride)
        if start + frames <= length
    ]
    if not expected:
        with pytest.raises(ValueError, match=f"no video has {frames} frames"):
            Windows(lengths, frames, stride)
        return
    windows = Windows(lengths, frames, stride)
    assert len(windows) == len(expected)
    video, start = windows.locate(range(len(windows)))
    assert list(zip(video.tolist(), start.tolist(), strict=True)) == expected
    last = windows.locate([len(windows) - 1, 0])
    assert (last[0][0], last[1][0]) == expected[-1]
    with pytest.raises(IndexError, match=f"no clip {len(windows)}"):
        windows.locate([0, len(windows)])


def test_a_video_as_long_as_a_clip_is_one():
    windows = Windows([16], 16, 1)
    assert len(windows) == 1
    assert [int(x) for (x,) in windows.locate([0])] == [0, 0]


@given(count=st.integers(2, 200))
def test_a_tenth_is_held_out(count):
    train, val = rows_of("train", count), rows_of("val", count)
    assert sorted([*train, *val]) == list(range(count))
    assert len(val) == max(count // HELD_OUT, 1)
    assert (np.diff(val) == HELD_OUT).all()


def test_one_video_is_for_training():
    assert rows_of("train", 1).tolist() == [0]
    with pytest.raises(ValueError, match="needs two, there is 1"):
        rows_of("val", 1)


def test_validation_and_test_clips_lie_side_by_side():
    assert default_stride("train", 16) == 1
    assert default_stride("val", 16) == default_stride("test", 16) == 16


@pytest.mark.parametrize(
    ("frames", "stride", "message"),
    [(0, 1, "frames is 0, it must be at least 1"), (4, 0, "stride is 0"), (9, 1, "longest has 8")],
)
def test_bad_windows(frames, stride, message):
    with pytest.raises(ValueError, match=message):
        Windows([3, 8], frames, stride)


def test_bad_split():
    with pytest.raises(ValueError, match="split is 'training', it must be one of train, val, test"):
        check_split("training")
