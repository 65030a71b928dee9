"""Clips as files: laid out as a grid, written as mp4, webm or gif.

`tinyvgpt.video` offers `grid` and `write` under its own name. Chapter 01 builds them.

Shapes: B batch, T frames, H W pixels, C channels. A clip is uint8 (T, H, W, C) or (B, T, H, W, C).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinyvgpt.store import write_atomically

Clip = Tensor | np.ndarray

# The colour of 2 × 2 pixels is stored once; chromaloc=1 says that it belongs to their middle.
_CODECS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": ("libx264", {"preset": "slow", "x264-params": "chromaloc=1"}),
    ".webm": ("libvpx-vp9", {"b": "0"}),
    ".gif": ("gif", {}),
}
_LONGEST = {".mp4": 16384, ".webm": 16384, ".gif": 65535}  # pixels of a side
_GIF_MAX_FPS = 50  # browsers slow a GIF with shorter delays down to 10 frames a second
_GREY = 128  # between a grid's cells: visible beside black and beside white


def import_av() -> ModuleType:
    """PyAV, imported only where it is used.

    Raises:
        ImportError: it isn't installed; the message says how to install it.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "video files need PyAV, which is not installed: pip install av"
        ) from error
    return av


def batched(clip: Clip) -> Tensor:
    """A clip or a batch of clips, checked, as a batch.

    Args:
        clip: uint8 (T, H, W, C) or (B, T, H, W, C), tensor or array.

    Returns:
        uint8 (B, T, H, W, C), on the clip's device; B is 1 for a single clip.

    Raises:
        ValueError: another dtype or rank, no frames or pixels, or axes in another order.
    """
    if not isinstance(clip, Tensor):
        clip = torch.from_numpy(np.require(clip, requirements=["C", "W"]))
    if clip.dtype != torch.uint8:
        raise ValueError(
            f"clip is {clip.dtype}, uint8 is needed (video.to_uint8 makes it from model floats)"
        )
    if clip.ndim not in (4, 5) or clip.numel() == 0:
        raise ValueError(
            f"clip has shape {tuple(clip.shape)}, (T, H, W, C) or (B, T, H, W, C) is needed, "
            "none of them 0"
        )
    *_, height, width, channels = clip.shape
    check_channels(channels, height, width)
    return clip if clip.ndim == 5 else clip[None]


def check_channels(channels: int, height: int, width: int) -> None:
    """Raise ValueError where so many channels on so small a frame mean that axes were swapped."""
    if channels > 4 and channels > min(height, width):
        raise ValueError(
            f"clip has {channels} channels on frames of {height}×{width}: are its axes in order? "
            "(B, T, H, W, C) is for uint8, (B, C, T, H, W) for model floats"
        )


def grid(clips: Clip, columns: int | None = None, pad: int = 2) -> Tensor:
    """Lay a batch of clips out as one clip, row by row.

    Args:
        clips: uint8 (B, T, H, W, C); a single clip (T, H, W, C) is returned as it is.
        columns: clips a row; the smallest square that holds them all unless told.
        pad: grey pixels between neighbours; cells left over are grey too.

    Returns:
        uint8 (T, H', W', C).

    Raises:
        ValueError: clips of another dtype or rank, columns below 1, pad below 0.
    """
    clips = batched(clips)
    count = len(clips)
    if (columns is not None and columns < 1) or pad < 0:
        raise ValueError(f"columns is {columns} and pad {pad}, at least 1 and 0 are needed")
    columns = columns_of(count, columns)
    empty = -count % columns
    # F.pad counts axes from the last: C, then right of W, below H, T, behind B.
    clips = F.pad(clips, (0, 0, 0, pad, 0, pad, 0, 0, 0, empty), value=_GREY)
    sheet = rearrange(clips, "(rows columns) t h w c -> t (rows h) (columns w) c", columns=columns)
    return sheet[:, : sheet.shape[1] - pad, : sheet.shape[2] - pad]


def columns_of(count: int, columns: int | None) -> int:
    """Columns of a grid of so many clips: those asked for, else of the smallest square."""
    return min(math.ceil(math.sqrt(count)) if columns is None else columns, count)


def write(path: str | Path, clip: Clip, fps: float = 8.0, scale: int = 1, crf: int = 12) -> None:
    """Write a clip as .mp4 (H.264), .webm (VP9) or .gif, or several clips as a grid.

    The file appears whole or not at all: it is written beside its place, then renamed. H.264 needs
    even sides: an odd one repeats its last row or column.

    Args:
        path: where to; the ending decides the format.
        clip: uint8 (T, H, W, C) or (B, T, H, W, C), C of 1 or 3, tensor or array.
        fps: frames a second; at most 50 in a GIF.
        scale: each pixel becomes scale × scale of them. mp4 and webm store colour, unlike
            brightness, once for 2 × 2 pixels: from 2 on each pixel of the clip has its own.
        crf: constant rate factor of mp4 and webm, 0 to 51: the lower, the truer and the larger. At
            12 nothing of the loss can be seen, and clips are small.

    Raises:
        ValueError: an unknown ending, or a clip, fps or scale that cannot be.
        OSError: the disk is full or the folder missing; an older file stays as it was.
        ImportError: PyAV is not installed.
    """
    path = Path(path)
    check_target(path, fps, scale)
    kind = path.suffix.lower()
    if not 0 <= crf <= 51:
        raise ValueError(f"crf is {crf}, it must be 0 to 51")
    frames, rate = rgb(clip, scale), frame_rate(fps)
    check_sides(path, *frames.shape[1:3])
    if kind == ".gif":
        save(path, lambda temporary: _encode_gif(temporary, frames, rate))
    else:
        save(path, lambda temporary: _encode_video(temporary, kind, frames, rate, crf))


def check_target(path: Path, fps: float, scale: int) -> None:
    """Raise what `write` would, for all that can be told before there is a clip."""
    import_av()
    if path.suffix.lower() not in _CODECS:
        raise ValueError(f"{path} ends in {path.suffix!r}, one of {', '.join(_CODECS)} is needed")
    rate = frame_rate(fps)
    if path.suffix.lower() == ".gif":
        check_gif_rate(rate)
    check_scale(scale)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} was not written: there is no folder {path.parent}")


def check_sides(path: Path, height: int, width: int) -> None:
    """Raise ValueError for more pixels than the format has in a row or column."""
    kind = path.suffix.lower()
    if max(height, width) > _LONGEST[kind]:
        raise ValueError(
            f"{width}×{height} pixels are too many: {kind} has {_LONGEST[kind]} a side at most; "
            "lower scale, or give other columns"
        )


def frame_rate(fps: float) -> Fraction:
    """Frames a second as the fraction meant: 29.97002997 is 30000/1001. ValueError if not > 0."""
    rate = Fraction(float(fps)).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise ValueError(f"fps is {fps}, a positive number of frames a second is needed")
    if rate > 1000:
        raise ValueError(f"fps is {fps}, at most 1000 frames a second can be written")
    return rate


def check_gif_rate(rate: Fraction) -> None:
    """Raise ValueError for more frames a second than browsers play a GIF at."""
    if rate > _GIF_MAX_FPS:
        raise ValueError(f"fps is {float(rate):g}, a GIF plays at most {_GIF_MAX_FPS}")


def check_scale(scale: int) -> None:
    """Raise ValueError for a scale that is no whole number from 1 on."""
    if scale != int(scale) or scale < 1:
        raise ValueError(f"scale is {scale}, a whole number of at least 1 is needed")


def rgb(clip: Clip, scale: int) -> np.ndarray:
    """A clip, or a batch as a grid, as uint8 (T, scale·H, scale·W, 3), its pixels repeated."""
    check_scale(scale)
    frames = grid(clip).cpu()
    channels = frames.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"clip has {channels} channels, 1 (grey) or 3 (RGB) can be shown")
    frames = frames.repeat_interleave(int(scale), 1).repeat_interleave(int(scale), 2)
    return frames.expand(-1, -1, -1, 3).contiguous().numpy()


def save(path: Path, writer: Callable[[Path], object]) -> None:
    """Have writer write a file that takes path's place once it is whole."""
    try:
        write_atomically({path: writer})
    except OSError as error:
        reason = f"{path} was not written, and is as it was before: {error.strerror or error}"
        raise OSError(error.errno, reason) from error


def _encode_video(path: Path, kind: str, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    """Encode uint8 (T, H, W, 3) as yuv420p, the one pixel format that every browser plays."""
    av = import_av()
    if kind == ".mp4":
        odd = [(0, side % 2) for side in frames.shape[1:3]]
        frames = np.pad(frames, ((0, 0), *odd, (0, 0)), "edge")
    flags = av.video.reformatter.Interpolation
    with _opened(path, kind, frames, rate, "yuv420p", crf=str(crf)) as (output, stream):
        # Untagged, players guess the colour matrix from the frame size, and guess differently.
        context = stream.codec_context
        context.color_range = av.video.reformatter.ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in each
        for frame in _av_frames(frames, rate):
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                interpolation=flags.AREA | flags.ACCURATE_RND | flags.FULL_CHR_H_INP,
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def _encode_gif(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    """Encode uint8 (T, H, W, 3) with one palette, exact where it has at most 256 colours."""
    height, width = frames.shape[1:3]
    graph = import_av().filter.Graph()
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base={1 / rate}")
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0")
    # Errors are diffused only where something moves, so that a still background stays still.
    apply = graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(sink)
    graph.configure()
    for frame in _av_frames(frames, rate):
        source.push(frame)
    source.push(None)
    with _opened(path, ".gif", frames, rate, "pal8") as (output, stream):
        for _ in frames:
            output.mux(stream.encode(sink.pull()))
        output.mux(stream.encode())


def _av_frames(frames: np.ndarray, rate: Fraction) -> Iterator[Any]:
    """Yield uint8 (T, H, W, 3) as PyAV's timed frames."""
    av = import_av()
    for index, array in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(array, format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


@contextmanager
def _opened(
    path: Path, kind: str, frames: np.ndarray, rate: Fraction, pixels: str, **more: str
) -> Iterator[tuple[Any, Any]]:
    """Open a file of a kind for frames like these: (container, video stream).

    `more` are options of the encoder.
    """
    codec, options = _CODECS[kind]
    early = {"movflags": "+faststart"} if kind == ".mp4" else {}  # plays before it is all there
    with import_av().open(f"file:{path}", "w", format=kind[1:], options=early) as output:
        stream = output.add_stream(codec, rate=rate, options=options | more)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        yield output, stream
