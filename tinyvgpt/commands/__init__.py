"""What each command does: one dataclass a command, its fields the command's options.

Shapes: none of its own.
"""

from typing import Protocol

from tinyvgpt.commands.about import Info, Look
from tinyvgpt.commands.bench import Bench
from tinyvgpt.commands.evaluate import Evaluate
from tinyvgpt.commands.models import Convert, Encode, Reconstruct, Sample
from tinyvgpt.commands.play import Play
from tinyvgpt.commands.training import TrainGPT, TrainVQVAE


class Command(Protocol):
    """What the commands have in common."""

    def run(self) -> None:
        """Does what the command says."""


COMMANDS: dict[str, type[Command]] = {
    "look": Look,
    "train-vqvae": TrainVQVAE,
    "train-gpt": TrainGPT,
    "encode": Encode,
    "sample": Sample,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "play": Play,
    "convert": Convert,
    "bench": Bench,
    "info": Info,
}
