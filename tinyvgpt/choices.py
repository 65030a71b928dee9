"""A clip that goes on where its reader says, in a page without a kernel: every choice is there.

Chapter 17 draws such a tree of clips and plays with it; `widget.play` draws as one plays.

Shapes: f frames of a choice · H W pixels · C channels.
"""

import html
import json
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tinyvgpt.show import Player, webp

# What a button does: goes on to the clip of its choice, a strip of frames, and plays it. A player
# has no script of its own and no identifier, so it works in every notebook, and twice in a page.
_PRESS = """
const box = this.closest('.choices'), strip = box.querySelector('.strip');
const clips = box.clips ||= JSON.parse(box.dataset.clips), frames = +box.dataset.frames;
box.loaded ||= Object.values(clips).map(src => Object.assign(new Image(), {src}));
box.path = this.value ? [...(box.path || []), this.value] : [];
const count = box.path.length ? frames : 1;
let frame = 0;
const step = () => {
  strip.style.backgroundPositionX = `${count > 1 ? 100 * frame / (count - 1) : 0}%`;
  if (++frame >= count) clearInterval(box.timer);
};
clearInterval(box.timer);
strip.style.backgroundImage = `url("${clips[box.path.join(' ')]}")`;
strip.style.backgroundSize = `${100 * count}% 100%`;
box.timer = setInterval(step, INTERVAL);
step();
const pressed = [];
for (const button of box.querySelectorAll('button[value]:not([value=""])'))
  button.disabled = !([...box.path, button.value].join(' ') in clips);
for (const key of box.path)
  pressed.push(box.querySelector(`button[value="${key}"]`).textContent);
box.querySelector('output').value = pressed.join(' ');
"""


def choices(
    clips: Mapping[tuple[str, ...], np.ndarray | Tensor],
    first: np.ndarray | Tensor,
    keys: Mapping[str, str],
    *,
    alt: str,
    fps: float = 8.0,
    scale: float = 4.0,
) -> Player:
    """A picture with a button for each key, which go on to clips that were made beforehand.

    Args:
        clips: uint8 (f, H, W, C), C of 1 or 3, by the keys that lead there; all of one shape.
        first: the picture at the beginning, uint8 (H, W, C).
        keys: names of keys, without spaces, and what their buttons say.
        alt: what is to be seen, for those who cannot.
        fps: frames a second.
        scale: screen pixels a pixel.

    Raises:
        ValueError: clips that don't fit, or that no buttons lead to; fps or scale not above 0.
        ImportError: Pillow is not installed.
    """
    arrays = {path: np.asarray(clip) for path, clip in clips.items()}
    opening = np.asarray(first)
    _check(arrays, opening, keys)
    if not 0 < fps <= 60 or not scale > 0:
        raise ValueError(f"fps is {fps} and scale {scale}: fps must be 0 to 60, scale above 0")
    frames = len(next(iter(arrays.values())))
    height, width = opening.shape[:2]
    sources = {"": webp(opening)}
    for path, clip in arrays.items():
        sources[" ".join(path)] = webp(np.concatenate(list(clip), axis=1))  # a strip of frames
    press, label = html.escape(_PRESS.replace("INTERVAL", f"{1000 / fps:.0f}")), html.escape(alt)
    buttons = "".join(
        f'<button type="button" value="{html.escape(key)}" aria-label="{html.escape(key)}" '
        f'style="min-width: 2.2em; height: 2.4em" onclick="{press}">{html.escape(sign)}</button>'
        for key, sign in keys.items()
    )
    return Player(
        f'<div class="choices" role="group" aria-label="{label}" data-frames="{frames}" '
        f'data-clips="{html.escape(json.dumps(sources))}" style="max-width: {width * scale:g}px; '
        f'background: #fff; color: #222; color-scheme: light"><div class="strip" role="img" '
        f'aria-label="{label}" style="aspect-ratio: {width} / {height}; background-repeat: '
        f"no-repeat; background-size: 100% 100%; image-rendering: pixelated; "
        f"background-image: url('{sources['']}')\"></div>"
        '<div style="display: flex; flex-wrap: wrap; gap: 0.4em; align-items: center; '
        f'padding: 0.4em">{buttons}<button type="button" value="" style="height: 2.4em" '
        f'onclick="{press}">again</button><output aria-live="polite"></output></div></div>',
        f"{len(arrays)} clips of {frames} frames of {width}×{height} pixels to choose from",
    )


def _check(
    clips: Mapping[tuple[str, ...], np.ndarray], first: np.ndarray, keys: Mapping[str, str]
) -> None:
    """Raises ValueError unless buttons lead to all of these clips, and pixels fit."""
    shapes: Sequence[tuple[int, ...]] = sorted({clip.shape for clip in clips.values()})
    if len(shapes) != 1 or shapes[0][1:] != first.shape or first.shape[2:] not in ((1,), (3,)):
        raise ValueError(
            f"clips have the shapes {shapes}, the first picture {first.shape}: "
            "one (f, H, W, C), C of 1 or 3, and its (H, W, C) are needed"
        )
    if any(x.dtype != np.uint8 for x in (first, *clips.values())):
        raise ValueError("pictures must be uint8")
    if any(not key or " " in key for key in keys):
        raise ValueError(f"keys are {list(keys)}, they must be names without spaces")
    for path in clips:
        known = len(path) == 1 or (len(path) > 1 and path[:-1] in clips)
        if not known or not set(path) <= set(keys):
            raise ValueError(f"no buttons lead to {path!r}")
