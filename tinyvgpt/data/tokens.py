"""Clips that have been encoded already, as a dataset; chapter 09 trains from it.

Shapes: n clips · B batch · t h w latent grid · T A actions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Tokens:
    """Tokens of n clips in memory, with the labels and actions that came with them.

    Its attributes are those of the clips' dataset; `batch` gives `tokens`, and of `video` no more
    than the first frames that a model may be conditioned on.
    """

    def __init__(
        self,
        batch: dict[str, Tensor],
        *,
        channels: int,
        frames: int,
        resolution: int,
        label_names: Sequence[str] | None = None,
    ):
        """Takes all clips as one batch: tokens (n, t, h, w), and what came with them.

        Raises:
            ValueError: if their lengths differ.
        """
        lengths = {name: len(value) for name, value in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a batch must have as many of everything, found {lengths}")
        self.channels, self.frames, self.resolution = channels, frames, resolution
        self.label_names = label_names
        self._all = batch

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._all["tokens"])

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Return tokens (B, t, h, w) int64, and the rest, of the clips with these indices."""
        chosen = torch.as_tensor(np.asarray(indices), device=self._all["tokens"].device)
        batch = {name: value[chosen].to(device) for name, value in self._all.items()}
        return {**batch, "tokens": batch["tokens"].long()}
