"""Video files for tests, encoded with PyAV."""

import tempfile
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np


def waves(count=60, height=48, width=64):
    """A clip of waves that drift, no frame as another: uint8 (count, height, width, 3)."""
    t, y, x = np.mgrid[:count, :height, :width]
    each = [np.sin(x / 9 + t / 5), np.cos(y / 8 + t / 4), np.sin((x + y) / 15 + t / 9)]
    return (127 + 120 * np.stack(each, -1)).astype(np.uint8)


def encode(
    path, clip, codec, times=None, tick=Fraction(1, 30), rate=30, pixels="yuv420p", **options
):
    """Write frames at their times, in ticks; one a tick unless told. Returns the path.

    The rate, in frames a second, is what the file says of itself.
    """
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pixels
        stream.codec_context.time_base = tick
        for time, array in zip(range(len(clip)) if times is None else times, clip, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time, tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@lru_cache
def film(frames=20):
    """The bytes of an mp4, 16 × 24 pixels, in which every fifth frame is a key frame."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"g": "5", "x264-params": "scenecut=0:bframes=0"}
        return encode(
            Path(folder, "a.mp4"), waves(frames, 16, 24), "libx264", **options
        ).read_bytes()


def fill(folder, *names, frames=20):
    """Put films at places in a folder, making sub-folders for them. Returns the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(film(frames))
    return folder
