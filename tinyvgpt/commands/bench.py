"""The command that times, and keeps a record of it.

Shapes: none of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinyvgpt.bench import device_name, earlier, record
from tinyvgpt.bench.data import loading
from tinyvgpt.bench.gpu_sampling import sampling_on_gpu
from tinyvgpt.bench.kernels import kernels
from tinyvgpt.bench.learning import learning
from tinyvgpt.bench.sampling import RELEASED_BAIR, sampling
from tinyvgpt.bench.scaling import scaling
from tinyvgpt.bench.train import training
from tinyvgpt.commands.common import Name, pick_device
from tinyvgpt.kernels import why_not
from tinyvgpt.loop import make_writable


@dataclass(frozen=True)
class Bench:
    """Time decoding, loading or training, against the original's loop; write a JSON record."""

    what: Name = "sampling"
    """What to time: sampling, data, train (steps of both stages against the original's), scaling
    (over this machine's GPUs), learning (loss curves against float32's) or kernels (attention's,
    against PyTorch's)."""
    batch: int | None = None
    """Sampling on a CPU, and data: clips decoded or loaded together; by default 1 or 32."""
    tokens: int | None = None
    """Sampling on a CPU: tokens of each clip to draw; by default all 4096, which takes minutes."""
    data: str | None = None
    """Data: what train-vqvae takes; by default files made for the purpose."""
    workers: int = 2
    """Data: processes that load clips."""
    stage: str | None = None
    """Train: "gpt" or "vqvae" alone. What the record has of the other stays there, if device and
    versions are the same."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"; training at the released size takes a GPU."""
    out: Path = Path("book/results")
    """Folder for the record."""

    def run(self) -> None:
        """Times, records and prints."""
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it must be at least 1")
        timings: dict[str, Callable[[], tuple[dict[str, Any], list[Any]]]] = {
            "sampling": self.sampling,
            "data": self.loading,
            "train": lambda: self.training(partial(training, stage=self.stage)),
            "scaling": lambda: self.training(scaling),
            "learning": lambda: self.training(learning),
            "kernels": self.kernels,
        }
        if self.what not in timings:
            raise ValueError(f"no benchmark {self.what!r}; known are {', '.join(timings)}")
        device = "cpu" if self.what == "data" else pick_device(self.device)
        make_writable(self.out)
        result, words = timings[self.what]()
        command = " ".join(["tinyvgpt bench", self.what, *map(str, words)])
        name = device_name(device)
        file_name = f"{self.what}-{name}".lower().replace(",", "").replace(" ", "-")
        if self.what == "train" and self.stage:
            result = earlier(self.out / f"{file_name}.json", {"device": name}) | result
        result = {"device": name, **result}
        path = record(result, file_name, command, self.out)
        for key, value in result.items():
            print(f"{key}: {value}")
        print(f"record in {path}")

    def sampling(self) -> tuple[dict[str, Any], list[Any]]:
        """Decoding, and the words of the command."""
        device, batch = pick_device(self.device), self.batch or 1
        if device == "cuda":
            return sampling_on_gpu(), ["--device", device]
        most = RELEASED_BAIR.tokens
        if self.tokens is not None and not 1 <= self.tokens <= most:
            raise ValueError(f"tokens is {self.tokens}, must be from 1 to {most}")
        words = ["--batch", batch, "--device", device]
        words += ["--tokens", self.tokens] if self.tokens else []
        return sampling(batch=batch, tokens=self.tokens, device=device), words

    def loading(self) -> tuple[dict[str, Any], list[Any]]:
        """Loading, and the words of the command."""
        batch = self.batch or 32
        words = ["--batch", batch, "--workers", self.workers]
        words += ["--data", self.data] if self.data else []
        return loading(self.data, batch_size=batch, workers=self.workers), words

    def kernels(self) -> tuple[dict[str, Any], list[Any]]:
        """The kernels, and the words of the command."""
        device = torch.device(pick_device(self.device))
        if reason := why_not(device):
            raise ValueError(f"the kernels can't be timed: {reason}")
        return kernels(), []

    def training(self, what: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
        """Training, and the words of the command."""
        device = pick_device(self.device)
        return what(device=device), ["--device", device]
