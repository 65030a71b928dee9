"""What the book's chapters share: budgets, the check against the package, figures, records.

Every chapter starts with `versions()` and ends its "Against the package" with `check`. Nothing else
in the package imports this module.
"""

import html
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tinyvgpt import __version__
from tinyvgpt.show import Player, webp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Values = Tensor | np.ndarray | float | int | list | tuple

BUDGETS = ("smoke", "cpu", "gpu")

# Okabe and Ito's colours without yellow and black: told apart by every kind of eye.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]

# What `step_through` does in the browser. A viewer has no script of its own and no identifier, so
# it works in every notebook, twice in a page, and where no kernel is.
_SHOW = """
const box = this.closest('.step-through'), steps = box.querySelectorAll('.step');
steps.forEach((step, n) => step.hidden = n != this.value);
box.querySelector('output').value = `${+this.value + 1} / ${steps.length}`;
this.ariaValueText = steps[this.value].lastElementChild.textContent;
"""
_PLAY = """
const box = this.closest('.step-through'), bar = box.querySelector('input');
clearInterval(box.timer);
box.playing = !box.playing;
this.textContent = box.playing ? 'Pause' : 'Play';
if (box.playing) box.timer = setInterval(() => {
  if (!box.isConnected) return clearInterval(box.timer);
  bar.value = (+bar.value + 1) % (+bar.max + 1);
  bar.dispatchEvent(new Event('input'));
}, INTERVAL);
"""


def budget_name() -> str:
    """Name the budget in force: "smoke" (tests), "cpu" (the built book) or "gpu".

    The environment variable TINYVGPT_BUDGET decides; without it, "gpu" where PyTorch sees a CUDA
    device and "cpu" elsewhere.

    Raises:
        ValueError: TINYVGPT_BUDGET is set to something else.
    """
    name = os.environ.get("TINYVGPT_BUDGET") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in BUDGETS:
        raise ValueError(f"TINYVGPT_BUDGET is {name!r}, it can be {', '.join(BUDGETS)}")
    return name


def budget(*, smoke: T, cpu: T, gpu: T) -> T:
    """Choose a value by the budget in force, such as a number of training steps.

    Raises:
        ValueError: TINYVGPT_BUDGET names no budget.
    """
    return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[budget_name()]


def versions() -> None:
    """Print what this chapter runs on: Python, PyTorch, tinyvgpt, the device and the budget."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        threads = torch.get_num_threads()
        device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    print(f"python    {platform.python_version()}")
    print(f"torch     {torch.__version__}")
    print(f"tinyvgpt  {__version__}")
    print(f"device    {device}")
    print(f"budget    {budget_name()}")


def check(name: str, yours: Values, package: Values, atol: float = 0.0) -> None:
    """Assert that what a chapter built gives what the package gives, and print how close it is.

    Args:
        name: What is compared, for the line that is printed.
        yours: The chapter's result: a tensor or array of any dtype and device, or numbers.
        package: The package's result, of the same shape.
        atol: The largest absolute difference allowed; 0 asks for equal values.

    Raises:
        AssertionError: The shapes differ, there is nothing to compare, or two values differ by more
            than `atol` or are not numbers; the message shows the two that differ most.
    """
    a, b = (_float64(x) for x in (yours, package))
    if a.shape != b.shape:
        raise AssertionError(
            f"{name}: yours has shape {tuple(a.shape)}, the package's {tuple(b.shape)}"
        )
    if a.numel() == 0:
        raise AssertionError(f"{name}: nothing to compare, the shape is {tuple(a.shape)}")
    # Equal infinities (masked scores) differ by 0; a value that is not a number, by infinity.
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    worst = int(difference.argmax())
    largest = float(difference.flatten()[worst])
    if largest > atol:
        index = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        raise AssertionError(
            f"{name}: yours is {float(a[index]):.9g}, the package's {float(b[index]):.9g} at index "
            f"{index}; they differ by {largest:.3g}, more than {atol:g}"
        )
    agreement = "equal" if largest == 0 else f"largest difference {largest:.1e}"
    print(f"✓ {name}: {agreement} ({a.numel():,} values)")


def _float64(values: Values) -> torch.Tensor:
    """Values as float64; by way of numpy where they are Python's, which torch would round first."""
    values = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    return values.detach().cpu().double()


def style() -> None:
    """Give matplotlib the book's look: white cards that read the same in both of its themes."""
    from cycler import cycler
    from matplotlib import rcParams

    rcParams.update(
        {
            "figure.facecolor": "white",
            "figure.figsize": (7.0, 3.2),
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "axes.facecolor": "white",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "grid.color": "#dddddd",
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            # One pixel of a clip stays one square, black to white.
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )


def code_colours(codes: Tensor) -> Tensor:
    """A colour for each code, alike for codes that are alike: their three principal components.

    The components' ranks make red, green and blue, so that all of each is used.

    Args:
        codes: (K, D) vectors, D of at least 3.

    Returns:
        uint8 (K, 3); `code_colours(codes)[tokens]` paints a grid of tokens.
    """
    centred = (codes - codes.mean(0)).double().cpu()
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    ranks = (centred @ axes.T).argsort(0).argsort(0)  # (K, 3)
    return (40 + 215 * ranks / max(len(codes) - 1, 1)).round().to(torch.uint8)


def lit(clip: Tensor, weights: Tensor) -> Tensor:
    """A clip with light on it where attention goes: orange, the brightest where it is strongest.

    Args:
        clip: uint8 (T, H, W, 1 or 3).
        weights: (t, h, w) of at least 0, for equal boxes of pixels; t, h, w divide T, H, W.

    Returns:
        uint8 (T, H, W, 3).

    Raises:
        ValueError: the boxes are not whole pixels.
    """
    sizes = clip.shape[:3]
    if any(size % n for size, n in zip(sizes, weights.shape, strict=True)):
        raise ValueError(f"weights {tuple(weights.shape)} don't divide a clip of {tuple(sizes)}")
    for axis, (size, n) in enumerate(zip(sizes, weights.shape, strict=True)):
        weights = weights.repeat_interleave(size // n, axis)
    share = weights.float() / weights.max().clamp(min=1e-12)
    orange = torch.tensor([230.0, 159.0, 0.0])
    share = 0.85 * share[..., None].cpu()
    return ((1 - share) * clip.cpu() + share * orange).round().to(torch.uint8)


def picture(figure: "Figure") -> np.ndarray:
    """Return what a matplotlib figure shows, uint8 (H, W, 3), and close it."""
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    pyplot.close(figure)
    return pixels


def step_through(
    pictures: Sequence[np.ndarray] | np.ndarray | Tensor,
    captions: Sequence[str] | None = None,
    *,
    alt: str,
    fps: float = 4.0,
    scale: float = 1.0,
) -> Player:
    """Pictures to look at one by one, with a slider and a button that plays them.

    The pictures are made beforehand and the page does the rest, so this works in the built book as
    in a notebook. Like clips (see `show.show`), they are part of the page in a live notebook and
    files of their own in the book: lossless WebP.

    Args:
        pictures: uint8 (n, H, W, C) or n of (H, W, C), C of 1 or 3.
        captions: a line below each picture, plain text.
        alt: what is to be seen in all of them, for those who cannot; with it goes the caption.
        fps: pictures a second while they play.
        scale: screen pixels a pixel.

    Raises:
        ValueError: no picture, pictures of other dtypes or shapes, another number of captions, or
            fps or scale that cannot be.
    """
    arrays = [np.asarray(picture) for picture in pictures]
    captions = [""] * len(arrays) if captions is None else captions
    _check_steps(arrays, captions, fps, scale)
    height, width = arrays[0].shape[:2]
    # Pixels stay squares where there is more than one screen pixel for each.
    look = "image-rendering: pixelated; " if scale > 1 else ""
    look = f"{look}display: block; width: 100%; height: auto; filter: none"
    steps = []
    for number, (array, caption) in enumerate(zip(arrays, captions, strict=True)):
        label = html.escape(", ".join(filter(None, [alt, caption])))
        size = f'width="{width * scale:g}" height="{height * scale:g}" style="{look}"'
        steps.append(
            f'<div class="step"{" hidden" if number else ""}>'
            f'<img src="{webp(array)}" alt="{label}" {size}>'
            f'<div style="padding: 0.3em 0.6em">{html.escape(caption)}</div></div>'
        )
    play = html.escape(_PLAY.replace("INTERVAL", f"{1000 / fps:.0f}"))
    return Player(
        f'<div class="step-through" role="group" aria-label="{html.escape(alt)}" '
        f'style="max-width: {width * scale:g}px; background: #fff; color: #222; '
        f'color-scheme: light">{"".join(steps)}'
        '<div style="display: flex; gap: 0.8em; align-items: center; padding: 0.3em 0.6em">'
        f'<button type="button" style="width: 4.5em" onclick="{play}">Play</button>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="0" aria-label="picture" '
        f'style="flex: 1; min-width: 0" oninput="{html.escape(_SHOW)}">'
        f"<output>1 / {len(steps)}</output></div></div>",
        f"{len(steps)} pictures of {width}×{height} pixels to step through",
    )


def _check_steps(
    arrays: Sequence[np.ndarray], captions: Sequence[str], fps: float, scale: float
) -> None:
    """Raises ValueError unless these pictures can be stepped through."""
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"pictures have the shapes {sorted(shapes)}, one or more of one is needed")
    shape = shapes.pop()
    if len(shape) != 3 or shape[2] not in (1, 3) or any(a.dtype != np.uint8 for a in arrays):
        raise ValueError(f"a picture is {arrays[0].dtype} {shape}, uint8 (H, W, 1 or 3) is needed")
    if len(captions) != len(arrays):
        raise ValueError(f"there are {len(captions)} captions for {len(arrays)} pictures")
    if not 0 < fps <= 60:
        raise ValueError(f"fps is {fps}, it must be above 0 and at most 60")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, it must be above 0")


def recorded(name: str) -> dict[str, Any] | None:
    """Return a measured record of the book, book/results/`name`.json; None if there is none.

    In a wheel the records are in the package.
    """
    package = Path(__file__).parent
    for folder in (package.parent / "book" / "results", package / "results"):
        path = folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None
