"""Clips shown in a notebook and in the book: looping video that any browser plays.

`tinyvgpt.video` offers `show` under its own name. Chapter 01 builds it.

Shapes: B batch, T frames, H W pixels, C channels. A clip is uint8 (T, H, W, C) or (B, T, H, W, C).
"""

import base64
import hashlib
import html
import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np

from tinyvgpt.write import (
    Clip,
    batched,
    check_gif_rate,
    check_scale,
    frame_rate,
    grid,
    import_av,
    rgb,
    save,
    write,
)


@dataclass(frozen=True)
class Player:
    """A moving clip for a notebook: the last value of a cell shows itself."""

    html: str  # what a browser plays
    text: str  # what a terminal or a screen reader says

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<{self.text}>"


def show(
    clip: Clip,
    fps: float = 8.0,
    scale: int | None = None,
    columns: int | None = None,
    alt: str | None = None,
) -> Player:
    """A clip, or several as a grid, playing in a loop in a notebook or in the book.

    In a live notebook the video is part of the page. While the book is built, the environment names
    a folder, TINYVGPT_BOOK_MEDIA, that takes the video and its poster under a name made from their
    content, and TINYVGPT_BOOK_MEDIA_URL, the folder's address as the page sees it (the folder's own
    name unless set). Without PyAV a GIF is shown, if Pillow is there to make it.

    Args:
        clip: uint8 (T, H, W, C) or (B, T, H, W, C), C of 1 or 3, tensor or array.
        fps: frames a second.
        scale: screen pixels a pixel; as large as fits unless told.
        columns: clips a row, as in `grid`.
        alt: what is to be seen, for those who cannot; the clip's measures unless told.

    Raises:
        ValueError: a clip, fps, scale or columns that cannot be.
        ImportError: neither PyAV nor Pillow is installed.
    """
    clips = batched(clip)
    count, length, height, width, _ = clips.shape
    sheet = grid(clips, columns)
    if scale is None:
        scale = max(1, min(256 // width, 720 // sheet.shape[2]))
    check_scale(scale)
    measures = f"{length} frames of {width}×{height} pixels, {float(fps):g} a second"
    text = f"{count} clips, {measures}" if count > 1 else f"a clip, {measures}"
    # Twice the pixels where needed: mp4 halves the resolution of colour, and has even sides.
    once = sheet.shape[3] == 1 and not any(side % 2 for side in sheet.shape[1:3])
    frames = rgb(sheet, 1 if once else 2)
    name = hashlib.sha256(f"{frames.shape} {fps}".encode() + frames.tobytes()).hexdigest()[:16]
    look = (
        f'width="{sheet.shape[2] * scale}" height="{sheet.shape[1] * scale}" '
        'style="image-rendering: pixelated; max-width: 100%; height: auto; '
        'filter: none; background: none; border-radius: 0"'  # dark themes alter pictures: not data
    )
    label = html.escape(alt or text)
    try:
        video, poster = _mp4_and_poster(frames, fps)
    except ImportError:
        source = address(_pillow_gif(frames, fps), name + ".gif", "image/gif")
        return Player(f'<img src="{source}" alt="{label}" {look}>', text)
    source = address(video, name + ".mp4", "video/mp4")
    still = address(poster, name + ".jpg", "image/jpeg")
    return Player(
        f'<video src="{source}" poster="{still}" {look} aria-label="{label}" title="{label}" '
        f"autoplay loop muted playsinline>{label}</video>",
        text,
    )


def _mp4_and_poster(frames: np.ndarray, fps: float) -> tuple[bytes, bytes]:
    """The frames as an mp4 file's bytes, and the first of them as a JPEG file's.

    Both lose what is hardly seen, so that a page of many clips stays light.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write(path, frames, fps, crf=19)
        return path.read_bytes(), _jpeg(frames[0])


def _jpeg(frame: np.ndarray) -> bytes:
    """A frame, uint8 (H, W, 3), as a JPEG file's bytes."""
    av = import_av()
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1)
    encoder.qmin = encoder.qmax = 5  # of 31, 1 the best
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
    packets = encoder.encode(picture.reformat(format="yuvj420p", dst_colorspace="ITU601"))
    return b"".join(bytes(packet) for packet in packets)


def png(frame: np.ndarray) -> bytes:
    """A frame, uint8 (H, W, 3), as a PNG file's bytes.

    Raises:
        ImportError: PyAV is not installed.
    """
    av = import_av()
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    return b"".join(bytes(packet) for packet in packets)


def _pillow_gif(frames: np.ndarray, fps: float) -> bytes:
    """The frames as a looping GIF's bytes, made without PyAV."""
    try:
        from PIL import Image
    except ImportError:
        import_av()  # says what is missing
    check_gif_rate(frame_rate(fps))
    images = [Image.fromarray(frame).quantize(256) for frame in frames]
    file = BytesIO()
    images[0].save(
        file, "gif", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0
    )
    return file.getvalue()


def webp(picture: np.ndarray) -> str:
    """Where a page finds a picture, uint8 (H, W, C), C of 1 or 3: a lossless WebP file.

    Raises:
        ImportError: Pillow is not installed.
    """
    from PIL import Image

    file = BytesIO()
    image = Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture)
    image.save(file, "webp", lossless=True, quality=80)
    data = file.getvalue()
    return address(data, f"{hashlib.sha256(data).hexdigest()[:16]}.webp", "image/webp")


def address(data: bytes, name: str, kind: str) -> str:
    """Where a page finds the data: inside itself, or in the folder of the book being built."""
    folder = os.environ.get("TINYVGPT_BOOK_MEDIA")
    if not folder:
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    target = Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    save(target, lambda temporary: temporary.write_bytes(data))
    url = os.environ.get("TINYVGPT_BOOK_MEDIA_URL") or target.parent.name
    return f"{url.rstrip('/')}/{name}"
