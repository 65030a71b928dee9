"""Some frames of a video file, exactly those that decoding it from its beginning would show.

Decoding begins at the last key frame that is on screen before them. On the way, frames that
nothing refers to are not decoded, and only the frames asked for are converted to RGB. Where seeking
turns out wrong, as with files that call a frame a key frame that needs others, decoding begins at
the file's beginning. Chapter 02 uses it.

Shapes: T frames · H W pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.container import explained, opened, to_rgb
from tinyvgpt.data.video_index import Timeline
from tinyvgpt.video import resize_crop
from tinyvgpt.write import import_av

Decode = Callable[[Any, Any], Iterator[tuple[int, Any]]]  # (container, stream) → (number, frame) …
SKIPPING = {"h264", "hevc", "mpeg4"}  # codecs whose decoder takes skip_frame packet by packet
UNASKED = -1  # number of a frame that is decoded, but wasn't asked for


def read_frames(path: Path, timeline: Timeline, frames: np.ndarray, resolution: int) -> Tensor:
    """Read frames by their numbers.

    Args:
        path: the file.
        timeline: what `scan` found in it.
        frames: int64 (T,), increasing or staying the same.
        resolution: side of the square to `resize_crop` each frame to, in pixels.

    Returns:
        uint8 (T, resolution, resolution, 3), RGB.

    Raises:
        ValueError: the file is damaged, or no longer the one that was scanned.
        OSError: the file is missing or may not be read.
    """
    wanted = np.unique(frames)
    converter = import_av().video.reformatter.VideoReformatter()
    with explained(path):
        for decode in _ways(timeline, wanted):
            with opened(path) as (container, stream):
                pictures = {
                    number: resize_crop(to_rgb(frame, converter), resolution)
                    for number, frame in decode(container, stream)
                }
            if len(pictures) == len(wanted):
                return torch.stack([pictures[number] for number in frames.tolist()])
    missing = next(number for number in wanted.tolist() if number not in pictures)
    raise ValueError(f"{path} is damaged or has changed: its frame {missing} cannot be decoded")


def _ways(timeline: Timeline, wanted: np.ndarray) -> Iterator[Decode]:
    """How to decode the wanted frames, the quickest way first."""
    if not timeline.keys:
        yield lambda container, stream: _counted(container, stream, wanted)
        return
    numbers = dict(zip(timeline.stamps(wanted).tolist(), wanted.tolist(), strict=True))
    before = timeline.key_frames[timeline.key_frames <= wanted[0]]
    if len(before) and before[-1] > 0:
        key = int(timeline.stamps(before[-1:])[0])
        yield lambda container, stream: _from_key(container, stream, numbers, key)
    yield lambda container, stream: _stamped(container.demux(stream), stream, numbers)


def _counted(container: Any, stream: Any, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yield the wanted frames, counting from the file's beginning."""
    chosen = set(wanted.tolist())
    frames = (frame for packet in container.demux(stream) for frame in packet.decode())
    for number, frame in enumerate(frames):
        if number in chosen:
            yield number, frame
        if number == wanted[-1]:
            return


def _from_key(
    container: Any, stream: Any, numbers: dict[int, int], key: int
) -> Iterator[tuple[int, Any]]:
    """Yield the wanted frames, decoding from the key frame with this timestamp; fewer if it fails.

    A key frame refers to no other; that it is one says the decoded frame, the container only
    promises.
    """
    with suppress(import_av().FFmpegError):
        container.seek(key, stream=stream)
        packets = dropwhile(lambda packet: packet.pts != key, container.demux(stream))
        clean = False
        for number, frame in _stamped(packets, stream, {key: UNASKED} | numbers):
            clean = clean or (frame.pts == key and frame.key_frame)
            if not clean:
                return
            if number != UNASKED:
                yield number, frame


def _stamped(
    packets: Iterable[Any], stream: Any, numbers: dict[int, int]
) -> Iterator[tuple[int, Any]]:
    """Yield (number, frame) for the timestamps in `numbers`, in order of display."""
    context, left = stream.codec_context, set(numbers)
    skips = context.codec.canonical_name in SKIPPING
    for packet in packets:
        context.skip_frame = "NONREF" if skips and packet.pts not in numbers else "DEFAULT"
        frames = packet.decode()
        if not packet.is_discard:
            left.discard(packet.pts)
        if not left and packet.size:  # what the decoder still holds needs no further packet
            frames += context.decode(None)
        for frame in frames:
            if frame.pts in numbers:
                yield numbers[frame.pts], frame
        if not left:
            return
