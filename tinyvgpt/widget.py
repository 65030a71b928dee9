"""Driving a model in a notebook, by buttons. It takes a live kernel and ipywidgets.

Chapter 17 plays with it.

Shapes: f frames of a latent frame · H W C pixels.
"""

import time
from typing import Any

from torch import Tensor

from tinyvgpt.driving import Drive
from tinyvgpt.show import png
from tinyvgpt.videogpt import VideoGPT
from tinyvgpt.write import rgb

LABELS = {"left": "←", "up": "↑", "space": "·", "down": "↓", "right": "→"}


def play(
    model: VideoGPT,
    data: str = "robot-push",
    clip: int = 10,
    *,
    seed: int = 0,
    fps: float = 8.0,
    scale: int = 4,
) -> Any:
    """A picture with arrow buttons: each press draws one latent frame of what is commanded.

    Args:
        model: takes actions, and has a `causal_time` tokenizer.
        data: dataset from which the first frames are taken.
        clip: which of its test clips.
        seed: of the random draws.
        fps: frames a second to show, at most.
        scale: screen pixels a pixel.

    Returns:
        A widget for the notebook to show.

    Raises:
        ValueError: as `Drive`.
        ImportError: ipywidgets or PyAV is not installed.
    """
    try:
        import ipywidgets
    except ImportError:
        raise ImportError("play needs ipywidgets: pip install ipywidgets") from None
    drive = Drive(model, data, clip, seed)
    pieces = iter(drive)
    picture = ipywidgets.Image(format="png")

    def show(frame: Tensor) -> None:
        picture.value = png(rgb(frame[None], scale)[0])

    def pressed(button: Any) -> None:
        drive.press(next(key for key, label in LABELS.items() if label == button.description))
        for frame in next(pieces):
            show(frame)
            time.sleep(1 / fps)

    for _ in range(drive.given // drive.factor):  # the beginning, of which the end is seen
        show(next(pieces)[-1])
    buttons = []
    for label in LABELS.values():
        buttons.append(ipywidgets.Button(description=label, layout={"width": "3em"}))
        buttons[-1].on_click(pressed)
    return ipywidgets.VBox([picture, ipywidgets.HBox(buttons)])
