"""Video files for tests and benchmarks, encoded with PyAV."""

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


def write_test_videos(folder, count, *, gop=30, seconds=10, fps=25, height=240, width=320, seed=0):
    """Write h264 mp4s as cameras make them: texture that moves, something in front of it, noise.

    Args:
        folder: where to; made if missing. Files are called 0000.mp4, 0001.mp4, …
        count: how many files.
        gop: frames from one key frame to the next.
        seconds: length of each.
        fps: frames a second.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        seed: of the pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    for number in range(count):
        random = np.random.default_rng((seed, number))
        clip = _camera(random, int(seconds * fps), height, width, number)
        path = folder / f"{number:04d}.mp4"
        encode(path, clip, "libx264", tick=Fraction(1, fps), rate=fps, **options)


def _camera(random, frames, height, width, number):
    """A textured wall seen by a swaying camera, a bright square that crosses it, and noise."""
    cells = random.integers(0, 256, (height // 8 + 9, width // 8 + 9, 3), np.uint8)
    wall = 0.6 * cells.repeat(8, 0).repeat(8, 1)
    wall = np.clip(wall + random.normal(40, 12, wall.shape), 0, 255)
    clip = np.empty((frames, height, width, 3), np.uint8)
    side = height // 4
    for t in range(frames):
        y, x = int(32 + 30 * np.sin(t / 17)), int(32 + 30 * np.cos(t / 23))
        frame = wall[y : y + height, x : x + width].copy()
        top = int((height - side) * (0.5 + 0.5 * np.sin(t / 9 + number)))
        left = int((width - side) * (0.5 + 0.5 * np.cos(t / 13)))
        square = np.s_[top : top + side, left : left + side]
        frame[square] = 255 - frame[square]
        clip[t] = np.clip(frame + random.integers(-6, 7, frame.shape), 0, 255)
    return clip
