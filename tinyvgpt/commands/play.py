"""The command that lets a model be driven by keys.

Shapes: f frames of a latent frame · H W C pixels.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from tinyvgpt import VideoGPT
from tinyvgpt.commands.common import Positional, pick_device
from tinyvgpt.driving import Drive
from tinyvgpt.terminal import Terminal, opened

SIGNS = {"up": "↑", "down": "↓", "left": "←", "right": "→", "": "·"}


@dataclass(frozen=True)
class Play:
    """Drive the robot's arm with the arrow keys, in a terminal; the space bar stops it, q quits."""

    model: Annotated[str, Positional] = "robot-push"
    """Folder, shipped name or hub id of a model that takes actions."""
    data: str = "robot-push"
    """Dataset from which the first frames are taken."""
    clip: int = 10
    """Which of its test clips."""
    seed: int = 0
    """Of the random draws."""
    fps: float = 8.0
    """Frames a second to show, at most."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""

    def run(self) -> None:
        """Plays until q or Ctrl-C is pressed."""
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}, must be above 0")
        with suppress(KeyboardInterrupt), opened() as terminal:
            model = VideoGPT.from_pretrained(self.model).to(pick_device(self.device))
            self.play(Drive(model, self.data, self.clip, self.seed), terminal)

    def play(self, drive: Drive, terminal: Terminal) -> None:
        """Shows frames and takes keys until it is told to quit."""
        for frames in drive:
            for frame in frames:
                sign = SIGNS[drive.key]
                terminal.show(frame, f" {sign}  arrows push the hand, space stops it, q quits")
                for key in terminal.keys(1 / self.fps):
                    if key == "quit":
                        return
                    drive.press(key)
