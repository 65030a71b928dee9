"""Driving a model: its clip goes on for ever, to where the last key says.

Chapter 17 plays with it.

Shapes: n given frames · f frames of a latent frame · H W C pixels · A action dim.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tinyvgpt.data import open_dataset
from tinyvgpt.videogpt import VideoGPT

# Which number of an action a key sets, and its sign. Those of robot-push are the way towards the
# camera, to the right and up, and a turn.
KEYS = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
STEP = 1.5  # how far a key goes a frame, in standard deviations of the data's actions


class Drive:
    """A clip that goes where it is told to, after a beginning from a dataset.

    Attributes:
        key: what it is told: one of `KEYS`, or "" to rest.
    """

    def __init__(self, model: VideoGPT, data: str = "robot-push", clip: int = 0, seed: int = 0):
        """Begins as a test clip of a dataset does.

        Raises:
            ValueError: if the model can't be driven, or the dataset is not for it.
        """
        vqvae, gpt = model.vqvae.config, model.gpt.config
        if not gpt.action_dim or not vqvae.causal_time:
            lacks = "its tokenizer isn't causal_time" if gpt.action_dim else "it takes no actions"
            raise ValueError(f"the model can't be driven: {lacks} (robot-push can)")
        source = open_dataset(data, "test", frames=vqvae.frames, resolution=vqvae.resolution)
        if not 0 <= clip < len(source):
            raise ValueError(f"clip is {clip}, {data} has 0 to {len(source) - 1}")
        begun = source.batch([clip])
        if "action" not in begun or begun["action"].shape[-1] != gpt.action_dim:
            raise ValueError(f"{data} doesn't have the {gpt.action_dim} numbers of an action")
        factor = vqvae.downsample[0]
        self.given = gpt.cond_frames or max(vqvae.frames // factor // 2, 1) * factor
        following = begun["action"][0, : self.given - 1]  # action i leads from frame i to i + 1
        self.leading = torch.cat([torch.zeros(1, gpt.action_dim), following])
        std = gpt.action_std or (1.0,) * gpt.action_dim
        self.moves = {
            key: STEP * sign * std[number] * torch.eye(gpt.action_dim)[number]
            for key, (number, sign) in KEYS.items()
            if number < gpt.action_dim
        }
        self.key, self.factor = "", factor
        frames = begun["video"][:, : self.given]
        self._stream = model.stream(frames=frames, actions=self.lead, seed=seed)

    def press(self, key: str) -> None:
        """Takes a key: one of `KEYS`, which goes on until another, or "space", which stops it."""
        if key in self.moves or key == "space":
            self.key = key if key in self.moves else ""

    def lead(self, frame: int) -> Tensor:
        """What leads to the latent frame that begins with this frame: (f, A), or (A,)."""
        if frame < self.given:
            return self.leading[frame : frame + self.factor]
        return self.moves.get(self.key, torch.zeros(self.leading.shape[-1]))

    def __iter__(self) -> Iterator[Tensor]:
        """The clip so far and on: uint8 (f, H, W, C) at a time."""
        return (piece[0] for piece in self._stream)
