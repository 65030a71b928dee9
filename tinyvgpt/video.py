"""Clips as arrays: reading files, the frame size, and the doors between pixels and the models.

Outside the models a clip is uint8 (B, T, H, W, C), as files and screens have it. Inside it is float
(B, C, T, H, W) in [-0.5, 0.5], as in VideoGPT (Yan et al. 2021, arXiv 2104.10157). `to_model` and
`to_uint8` are the only doors. Chapter 01 builds this module.

Shapes: B batch, T frames, H W pixels, C channels.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinyvgpt.container import explained, rounding, timed, to_rgb, video_stream
from tinyvgpt.show import Player, show
from tinyvgpt.write import Clip, batched, check_channels, frame_rate, grid, import_av, write

__all__ = ["Player", "grid", "read", "resize_crop", "show", "to_model", "to_uint8", "write"]


def to_model(clip: Clip) -> Tensor:
    """Pixels to model floats: pixel / 255 - 0.5.

    Args:
        clip: uint8 (B, T, H, W, C) or (T, H, W, C), tensor or array.

    Returns:
        float32 (B, C, T, H, W) in [-0.5, 0.5], on the clip's device.

    Raises:
        ValueError: another dtype or rank, or axes in another order.
    """
    return rearrange(batched(clip), "b t h w c -> b c t h w").contiguous() / 255 - 0.5


def to_uint8(x: Tensor) -> Tensor:
    """Model floats to pixels, clamped to [-0.5, 0.5] first: the inverse of `to_model`.

    Args:
        x: float (B, C, T, H, W).

    Returns:
        uint8 (B, T, H, W, C), on the same device.

    Raises:
        ValueError: another dtype or rank, or axes in another order.
    """
    if not x.is_floating_point() or x.ndim != 5:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, model floats (B, C, T, H, W) are needed"
        )
    check_channels(x.shape[1], *x.shape[3:])
    pixels = (x.detach().float().clamp(-0.5, 0.5) + 0.5).mul(255).round().to(torch.uint8)
    return rearrange(pixels, "b c t h w -> b t h w c").contiguous()


def resize_crop(clip: Clip, resolution: int) -> Tensor:
    """Resize the shorter side to the resolution, and cut the middle square out.

    As VideoGPT does it: bilinear between pixel centres, without antialiasing, the longer side
    rounded up. VideoGPT works on pixel / 255 and never rounds: floats given here stay floats and
    agree with it. uint8 is resized in float32 and rounded, half a level from it at most.

    Args:
        clip: uint8 or float (..., H, W, C), tensor or array.
        resolution: side of the square, in pixels.

    Returns:
        (..., resolution, resolution, C), of the clip's dtype.

    Raises:
        ValueError: resolution below 1, or a clip of another dtype or too few axes.
    """
    if not isinstance(clip, Tensor):
        clip = torch.from_numpy(np.require(clip, requirements=["C", "W"]))
    if clip.ndim < 3 or not (clip.dtype == torch.uint8 or clip.is_floating_point()):
        raise ValueError(
            f"clip is {clip.dtype} of shape {tuple(clip.shape)}, uint8 or float (..., H, W, C) "
            "is needed"
        )
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, at least 1 pixel is needed")
    *leading, height, width, channels = clip.shape
    if height == width == resolution:
        return clip
    scale = resolution / min(height, width)
    long_side = math.ceil(max(height, width) * scale)
    size = (resolution, long_side) if height < width else (long_side, resolution)
    frames = clip.reshape(-1, height, width, channels).movedim(-1, 1)  # (N, C, H, W)
    frames = frames.float() if clip.dtype == torch.uint8 else frames
    frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    frames = frames[:, :, top : top + resolution, left : left + resolution]
    if clip.dtype == torch.uint8:
        frames = frames.round().to(torch.uint8)
    return frames.movedim(1, -1).reshape(*leading, resolution, resolution, channels)


def read(
    path: str | Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    frames: int | None = None,
    resolution: int | None = None,
) -> Tensor:
    """Read a clip from any video file that PyAV (FFmpeg) can decode.

    Time counts from the file's first frame, by its timestamps, so that a variable frame rate comes
    out right: what is read at a given moment is the frame on screen then.

    Args:
        path: the file.
        fps: frames a second to sample; every frame of the file unless told.
        start: seconds; the first frame read is the one on screen then.
        frames: how many to read; up to the end of the file unless told.
        resolution: side of the square to `resize_crop` each frame to; the file's size unless told.

    Returns:
        uint8 (T, H, W, 3), RGB.

    Raises:
        ValueError: the file is empty, damaged, truncated (told by its header: MPEG streams have
            none), no video, or too short for start and frames; or an argument is out of range.
        OSError: the file is missing or may not be read.
        ImportError: PyAV is not installed.
    """
    import_av()
    rate = None if fps is None else frame_rate(fps)
    if not 0 <= start < math.inf or (frames is not None and frames < 1):
        raise ValueError(f"start is {start} and frames {frames}, at least 0 and 1 are needed")
    begin = Fraction(float(start)).limit_denominator(1_000_000)
    path = Path(path)
    with explained(path):
        clip, end = _sample(_on_screen(path, begin), begin, rate, frames, resolution)
    if not clip or (frames is not None and len(clip) < frames):
        wanted = "at least 1 is" if frames is None else f"{frames} are"
        every = "" if rate is None else f" at {float(rate):g} a second"
        raise ValueError(
            f"{path} lasts {float(end):.3f} s and has {len(clip)} frames{every} from {start:g} s "
            f"on, {wanted} needed"
        )
    if len({frame.shape for frame in clip}) > 1:
        raise ValueError(f"{path} changes its frame size midway, resolution=… makes it one")
    return torch.stack(clip)


def _sample(
    shown: Iterator[tuple[Fraction, Any]],
    begin: Fraction,
    rate: Fraction | None,
    length: int | None,
    resolution: int | None,
) -> tuple[list[Tensor], Fraction]:
    """Frames as uint8 (H, W, 3): every one, or rate a second; and when the last one seen ends."""
    clip: list[Tensor] = []
    end = Fraction(0)
    converter = import_av().video.reformatter.VideoReformatter()
    for end, frame in shown:
        picture = None
        while begin + (len(clip) / rate if rate else 0) < end - rounding(frame.time_base):
            if picture is None:
                picture = to_rgb(frame, converter)
                picture = picture if resolution is None else resize_crop(picture, resolution)
            clip.append(picture)
            if len(clip) == length:
                return clip, end
            if rate is None:
                break
    return clip, end


def _on_screen(path: Path, begin: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Yield (the second when it leaves the screen, frame), from begin or somewhat earlier on."""
    shown, end = None, Fraction(0)
    for time, length, frame in _decode(path, begin):
        if shown is not None:
            yield time, shown
        shown, end = frame, time + length - rounding(frame.time_base)  # the length is rounded, too
    if shown is not None:
        yield end, shown


def _decode(path: Path, begin: Fraction) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yield (time, length, frame), in seconds since the file's first frame, in order of display.

    They begin with a key frame at or before begin; or with the first frame, where seeking lands too
    late, or in a container whose timestamps may jump or be missing.
    """
    av = import_av()
    flags = av.format.Flags
    unsure = flags.no_timestamps | flags.ts_discont
    for seek in (True, False) if begin else (False,):
        with av.open(f"file:{path}") as container:  # "file:", or "a:b.mp4" is of protocol "a"
            if seek and flags(container.format.flags) & unsure:
                continue
            stream = video_stream(container, path)
            frames = timed(container, stream, path)
            first = next(frames, None)
            if first is None:
                raise ValueError(f"{path} has no frame that can be decoded")
            origin = first[0]
            if seek:
                try:
                    container.seek(int((origin + begin) / stream.time_base), stream=stream)
                    frames = timed(container, stream, path)
                    first = next(found for found in frames if found[2].key_frame)
                except (av.FFmpegError, StopIteration, ValueError):
                    continue
                if first[0] > origin + begin:
                    continue
            for time, length, frame in chain([first], frames):
                yield time - origin, length, frame
            return
