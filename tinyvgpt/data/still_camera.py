"""Lossless packing of colour clips from a camera that does not move, for clips that ship inside.

Most pixels of such clips are as they were a frame before, and many others show the background
again that something hid. So a frame is packed as one byte a pixel that says which of the two it
is, or neither (`change`); the others' colours (`colour`) are given as differences to the pixel
above them in the same frame, with green taken from red and blue, because brightness changes all
three alike. Both streams are compressed by LZMA. Colours take four bytes, of which one is always
zero: LZMA keeps statistics for each position in a group of four, not of three.

Unpacking goes frame by frame and row by row, in each for all clips at once.

Shapes: N clips · T frames · H W pixels · k pixels that are neither. All arithmetic is modulo 256.
"""

import lzma
from collections.abc import Mapping

import numpy as np

SAME, BACKGROUND, OTHER = range(3)
KEYS = ("shape", "background", "change", "colour")  # of a packed set of clips


def _filters(**positions: int) -> list[dict]:
    """LZMA's settings; `positions` are its literal and position bits."""
    preset = 9 | lzma.PRESET_EXTREME
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 1 << 26, **positions}]


CHANGE, COLOUR = _filters(lc=4, lp=0, pb=0), _filters(lc=2, lp=2, pb=2)


def _squeeze(array: np.ndarray, filters: list[dict]) -> np.ndarray:
    packed = lzma.compress(array.tobytes(), format=lzma.FORMAT_RAW, filters=filters)
    return np.frombuffer(packed, np.uint8)


def _expand(packed: np.ndarray, filters: list[dict]) -> np.ndarray:
    content = lzma.decompress(packed.tobytes(), format=lzma.FORMAT_RAW, filters=filters)
    return np.frombuffer(content, np.uint8)


def _above(video: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The pixel above each of (N, T, H, W, 3); above the first row the background's first row."""
    above = np.empty_like(video)
    above[:, :, 1:] = video[:, :, :-1]
    above[:, :, 0] = background[0]
    return above


def pack(video: np.ndarray) -> dict[str, np.ndarray]:
    """Packs clips.

    Args:
        video: uint8 (N, T, H, W, 3), N and T at least 1.

    Returns:
        shape: int64 (5,). background: uint8 (H, W, 3), the pixels' medians.
        change and colour: uint8, compressed.
    """
    background = np.median(video[:, :: max(1, video.shape[1] // 4)], axis=(0, 1)).astype(np.uint8)
    before = np.concatenate(
        [np.broadcast_to(background, video[:, :1].shape), video[:, :-1]], axis=1
    )
    same, hidden = (video == before).all(-1), (video == background).all(-1)
    change = np.where(same, SAME, np.where(hidden, BACKGROUND, OTHER)).astype(np.uint8)
    other = change == OTHER
    difference = video[other] - _above(video, background)[other]  # (k, 3)
    red, green, blue = difference.T
    colour = np.stack([green, red - green, blue - green, np.zeros_like(green)], axis=1)
    return {
        "shape": np.array(video.shape),
        "background": background,
        "change": _squeeze(change, CHANGE),
        "colour": _squeeze(colour, COLOUR),
    }


def unpack(packed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the clips that `pack` was given: uint8 (N, T, H, W, 3)."""
    shape, background = tuple(packed["shape"]), packed["background"]
    change = _expand(packed["change"], CHANGE).reshape(shape[:-1])
    colour = _expand(packed["colour"], COLOUR).reshape(-1, 4)
    video = np.zeros(shape, np.uint8)
    green = colour[:, 0]
    other = change == OTHER
    video[other] = np.stack([colour[:, 1] + green, green, colour[:, 2] + green], axis=1)
    same, hidden = (change == SAME)[..., None], (change == BACKGROUND)[..., None]
    for frame in range(shape[1]):
        before = (
            video[:, frame - 1] if frame else np.broadcast_to(background, shape[:1] + shape[2:])
        )
        for row in range(shape[2]):
            above = video[:, frame, row - 1] if row else background[0]
            seen = np.where(hidden[:, frame, row], background[row], video[:, frame, row] + above)
            video[:, frame, row] = np.where(same[:, frame, row], before[:, row], seen)
    return video
