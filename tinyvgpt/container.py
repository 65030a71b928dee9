"""Inside a video file: its moving picture, the time of each frame, whether the file is whole, RGB.

`tinyvgpt.video.read` reads a file from end to end with it, `tinyvgpt.data.folder` picks clips out
of many. Chapter 01 builds the reading.

Shapes: H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.write import import_av


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within it, what FFmpeg finds wrong with a file is a ValueError that names the file.

    Raises:
        ValueError: the file is empty, or FFmpeg cannot read it.
        OSError: the file is missing or may not be read.
    """
    with path.open("rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty (0 bytes), a video file is needed")
    try:
        yield
    except import_av().FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read: it is no video that FFmpeg knows, or is damaged or truncated "
            f"({error.strerror})"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file for decoding with one thread, as suits many files: (container, stream)."""
    with import_av().open(f"file:{path}") as container:  # "file:", or "a:b.mp4" is of protocol "a"
        stream = video_stream(container, path)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def frame_length(stream: Any) -> Fraction:
    """How long a frame that doesn't say is on screen, in seconds."""
    return 1 / (stream.average_rate or Fraction(25))


def rounding(tick: Fraction) -> Fraction:
    """How late a timestamp counted in ticks of so many seconds may be: containers round it.

    A tick as long as a frame, as AVI has it, counts frames and rounds nothing.
    """
    return tick / 2 if tick <= Fraction(1, 100) else Fraction(0)


def to_rgb(frame: Any, converter: Any) -> Tensor:
    """A decoded frame as uint8 (H, W, 3), upright.

    Args:
        frame: as PyAV decodes it.
        converter: a `VideoReformatter`; one for all frames of a file saves setting it up for each.
    """
    flags = import_av().video.reformatter.Interpolation
    # FFmpeg's quick conversion to RGB is a level too dark and repeats colours instead of blending.
    exact = flags.BILINEAR | flags.ACCURATE_RND | flags.FULL_CHR_H_INT
    picture = converter.reformat(frame, format="rgb24", interpolation=exact, threads=1)
    pixels = np.rot90(picture.to_ndarray(), frame.rotation // 90)  # phones film sideways
    return torch.from_numpy(np.ascontiguousarray(pixels))


def video_stream(container: Any, path: Path) -> Any:
    """The container's first moving picture: an audio file's cover is a stream, too."""
    cover = import_av().stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            if stream.codec_context is None:
                raise ValueError(f"{path} is of a codec that PyAV {import_av().__version__} lacks")
            return stream
    kinds = {"cover" if stream.type == "video" else stream.type for stream in container.streams}
    raise ValueError(f"{path} has no video stream, it holds {', '.join(sorted(kinds)) or 'none'}")


def timed(container: Any, stream: Any, path: Path) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Yield (time, length, frame) in seconds; ValueError if the file ends before it should."""
    step = frame_length(stream)
    time = length = Fraction(0)
    last = None
    for packet in container.demux(stream):
        last = packet if packet.size else last
        for frame in packet.decode():
            tick = frame.time_base
            time = time + length if frame.pts is None else frame.pts * tick
            length = frame.duration * tick if frame.duration else step
            yield time, length, frame
    if last is None or last.is_corrupt or cut_short(path, stream):
        raise ValueError(f"{path} is truncated: it ends before its last frame")


def cut_short(path: Path, stream: Any) -> bool:
    """Whether the file is shorter than its header or its index says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(-min(size, 64), 2)
        tail = file.read()
    if head.startswith(b"GIF8"):
        return not tail.rstrip(b"\0").endswith(b"\0;")  # a block's end, and the file's
    if head.startswith(b"RIFF"):  # avi
        return size < 8 + int.from_bytes(head[4:8], "little")
    index = stream.index_entries
    indexed = index[-1].pos + index[-1].size if len(index) else 0
    return size < max(indexed, _matroska_size(head))


def _matroska_size(head: bytes) -> int:
    """The size a Matroska file has by its own account: header and segment; 0 if it doesn't say."""
    end = 0
    for element in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        field = end + len(element)
        if head[end:field] != element or field >= len(head):
            return 0
        width = 9 - head[field].bit_length()  # leading zero bits tell how wide the size is
        size = int.from_bytes(head[field : field + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # all ones: a live recording, unknown
            return 0
        end = field + width + size
    return end
