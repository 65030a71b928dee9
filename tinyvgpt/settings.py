"""What a training run is told; chapter 06 goes through it.

Shapes: none of its own.
"""

import contextlib
import math
import warnings
from dataclasses import dataclass

import torch

from tinyvgpt import counter
from tinyvgpt.compiling import lacking

# Settings that may change between a run's parts: its weights don't depend on them, or, for the last
# row, by no more than rounding, the batches that batch norms see, and which clips are openings.
FREE = {
    *("device", "workers", "checkpointing", "log_every", "checkpoint_every", "keep"),
    *("validate_every", "validation_clips", "preview_every", "tensorboard", "non_finite"),
    *("compile", "accumulate"),
}
COMPILING_PAYS = 2000  # steps in which a GPU wins back the half to two minutes of compiling
CHOICES = {
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "on", "off"),
    "non_finite": ("stop", "skip"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    steps: int = 1000  # optimizer steps in all
    batch_size: int = 32  # clips a step, of all processes together
    accumulate: int = 1  # parts in which each process computes its share, to save memory
    lr: float = 3e-4  # peak learning rate of AdamW
    warmup: int = 100  # steps in which the learning rate rises linearly from 0
    final_lr: float = 0.0  # learning rate at the end of the cosine, as a share of `lr`
    beta2: float = 0.999  # AdamW's decay of squared gradients; its beta1 is 0.9
    weight_decay: float = 0.0  # on parameters of two axes or more, not on biases and gains
    clip_norm: float = 1.0  # largest norm of the gradient; 0 for no clipping
    ema: float = 0.0  # decay of the averaged weights that are saved; 0 saves the last ones
    # "float32", "bfloat16", "float16"; "auto": float32 on CPUs, 16 bits on GPUs, see `dtype`
    precision: str = "auto"
    # torch.compile: "on", "off"; "auto": on a GPU, for long runs, see `compiled`
    compile: str = "auto"
    # "stop" or "skip": what to do about a loss or gradient that isn't finite
    non_finite: str = "stop"
    device: str = "auto"  # "cpu", "cuda" or "auto": cuda where there is one
    workers: int = 0  # processes that load data
    encode_once: int = 0  # GPT: train on so many clips, encoded first; 0: new ones each step
    openings: float = 0.0  # GPT: share of a step's clips that end after their first latent frame
    seed: int = 0  # of batches, dropout and everything else random
    log_every: int = 25  # steps between lines of log.jsonl
    checkpoint_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept, the last ones
    validate_every: int = 500  # steps between validations; 0 for none
    validation_clips: int = 256  # the first so many clips of the validation split
    preview_every: int = 0  # steps between preview clips; 0 for none
    tensorboard: bool = True  # also write events for TensorBoard, where it is installed

    def __post_init__(self) -> None:
        """Raises ValueError for settings that make no sense."""
        least_1 = ("steps", "batch_size", "accumulate", "keep")
        for name in (*least_1, "log_every", "checkpoint_every", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("ema", "beta2", "openings"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0 and below 1")
        least_0 = ("lr", "final_lr", "clip_norm", "weight_decay", "warmup")
        for name in (*least_0, "encode_once", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        counter.bits(self.seed)  # ValueError unless it fits in 64 bits
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {' or '.join(known)}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine down to `final_lr`·`lr`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def torch_device(self) -> torch.device:
        """The device to train on; ValueError if CUDA is asked for where there is none."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device is cuda, but this machine has no CUDA device; use cpu or auto")
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device is {name!r}, must be auto, cpu or cuda")
        try:
            return torch.device(name)
        except RuntimeError:
            raise ValueError(f"device is {name!r}, must be auto, cpu or cuda") from None

    def dtype(self, device: torch.device) -> torch.dtype:
        """The precision of products and convolutions; weights and sums are float32.

        "auto" is bfloat16 on GPUs that have it, float16 on other GPUs (such as the T4), and
        float32 on CPUs.
        """
        if self.precision != "auto":
            return getattr(torch, self.precision)
        if device.type != "cuda":
            return torch.float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Context in which losses are computed."""
        dtype = self.dtype(device)
        if dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype)

    def compiled(self, device: torch.device) -> bool:
        """Whether losses are compiled.

        "auto" is on for runs on a GPU that are long enough, if what compiling needs is there; if
        not, it warns.

        Raises:
            ValueError: compile is "on", and this machine can't.
        """
        pays = device.type == "cuda" and self.steps >= COMPILING_PAYS
        if self.compile == "off" or (self.compile == "auto" and not pays):
            return False
        if missing := lacking(device):
            if self.compile == "on":
                raise ValueError(f"compile is on, but {missing}; use auto or off")
            warnings.warn(f"training isn't compiled: {missing}", stacklevel=2)
        return not missing
