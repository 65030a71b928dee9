"""What a training run is told and what it keeps: settings, state and checkpoint, log.

A run's folder holds the model (config.json, *.safetensors), `checkpoint.pt` to resume from,
`log.jsonl` with one line a measurement, and `previews/`. Chapter 06 reads them.

Shapes: none of its own.
"""

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from tinyvgpt.store import write_atomically

FREE = {  # settings that may change between a run's parts, as its weights don't depend on them
    *("device", "workers", "checkpointing", "log_every", "checkpoint_every"),
    *("validate_every", "validation_clips", "preview_every"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    steps: int = 1000  # optimizer steps in all
    batch_size: int = 32  # clips a step
    lr: float = 3e-4  # peak learning rate of AdamW
    warmup: int = 100  # steps in which the learning rate rises linearly from 0
    final_lr: float = 0.0  # learning rate at the end of the cosine, as a share of `lr`
    beta2: float = 0.999  # AdamW's decay of squared gradients; its beta1 is 0.9
    weight_decay: float = 0.0  # on parameters of two axes or more, not on biases and gains
    clip_norm: float = 1.0  # largest norm of the gradient; 0 for no clipping
    ema: float = 0.0  # decay of the averaged weights that are saved; 0 saves the last ones
    precision: str = "auto"  # "float32", "bfloat16" (autocast), "auto": bfloat16 on GPUs with it
    device: str = "auto"  # "cpu", "cuda" or "auto": cuda where there is one
    workers: int = 0  # processes that load data
    encode_once: int = 0  # GPT: train on so many clips, encoded first; 0: new ones each step
    seed: int = 0  # of batches, dropout and everything else random
    log_every: int = 25  # steps between lines of log.jsonl
    checkpoint_every: int = 500  # steps between checkpoints
    validate_every: int = 500  # steps between validations; 0 for none
    validation_clips: int = 256  # the first so many clips of the validation split
    preview_every: int = 0  # steps between preview clips; 0 for none

    def __post_init__(self) -> None:
        """Raises ValueError for settings that make no sense."""
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0 and below 1")
        for name in ("lr", "clip_norm", "weight_decay", "warmup", "encode_once", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}, must be auto, float32 or bfloat16")

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

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Context in which losses are computed."""
        bf16 = self.precision == "bfloat16" or (
            self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


class Run:
    """Model, optimizer, averaged weights and step: what a checkpoint holds."""

    def __init__(self, module: nn.Module, config: TrainConfig, model: dict[str, Any]):
        """Starts at step 0; `model` holds the model's settings, which a checkpoint must share."""
        self.module, self.config, self.model, self.step = module, config, model, 0
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = next(module.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=fused)
        average = get_ema_multi_avg_fn(config.ema)
        self.ema = AveragedModel(module, multi_avg_fn=average) if config.ema else None

    @property
    def best(self) -> nn.Module:
        """The weights to use: averaged ones if there are any."""
        return self.ema.module if self.ema else self.module

    def optimize(self, loss: Tensor) -> Tensor:
        """One step down the gradient of `loss`; returns the gradient's norm (before clipping)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(self.module)
        self.step += 1
        return norm

    def save(self, out: Path) -> None:
        """Writes checkpoint.pt, atomically; OSError if that fails (the former one survives)."""
        content = {
            "step": self.step,
            "config": asdict(self.config),
            "model": self.model,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }
        try:
            write_atomically({out / "checkpoint.pt": lambda path: torch.save(content, path)})
        except RuntimeError as error:  # how torch says that the disk is full
            reason = str(error).splitlines()[0]
            raise OSError(f"{out / 'checkpoint.pt'} could not be written: {reason}") from None

    def resume(self, out: Path) -> None:
        """Continues from checkpoint.pt, if there is one.

        Raises:
            ValueError: if it is damaged, or of a run with other settings (names them).
        """
        for left_over in out.glob(".checkpoint.pt.*"):  # by a process killed while saving
            left_over.unlink()
        path = out / "checkpoint.pt"
        if not path.exists():
            return
        damaged = f"{path} is damaged; remove it to start again"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved = {**content["model"], **content["config"]}
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise ValueError(f"{damaged} ({type(error).__name__})") from None
        now = {**self.model, **asdict(self.config)}
        changed = [k for k in now if k not in FREE and saved.get(k) != now[k]]
        if changed:
            differences = ", ".join(f"{k} was {saved.get(k)}, is {now[k]}" for k in changed)
            raise ValueError(f"{path} is of a run with other settings: {differences}")
        try:
            self.module.load_state_dict(content["module"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema:
                self.ema.load_state_dict(content["ema"])
            self.step = content["step"]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{damaged} ({type(error).__name__})") from None


class Log:
    """Means of the metrics between two lines of log.jsonl, and the progress bar."""

    def __init__(self, path: Path, unit: str, units: int, step: int):
        """Goes on after `step`, with `units` of `unit` a step; lines of later steps are dropped."""
        self.path, self.unit, self.units, self.start = path, unit, units, step
        self.sums: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []
        self.since = time.perf_counter()
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically({path: lambda p: p.write_text("".join(line + "\n" for line in kept))})

    def progress(self, steps: int) -> tqdm:
        """A progress bar over all steps, on the error stream."""
        return tqdm(total=steps, initial=self.start, unit="step", dynamic_ncols=True)

    def collect(self, metrics: dict[str, Tensor]) -> None:
        """Adds a step's metrics, without waiting for the device."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.losses.append(metrics["loss"].detach() + 0 * metrics["grad_norm"])

    def check(self, step: int) -> None:
        """Raises ValueError if a loss or gradient since the last line isn't finite."""
        if not self.losses or (finite := torch.stack(self.losses).isfinite()).all():
            return
        first = step - len(self.losses) + int(finite.int().argmin()) + 1
        saved = self.path.with_name("checkpoint.pt")
        left = (
            f"the last good checkpoint is {saved}" if saved.exists() else "there is no checkpoint"
        )
        raise ValueError(
            f"the loss or its gradient is not finite at step {first}; {left}. "
            "Try a lower lr, a longer warmup or float32"
        )

    def write(self, step: int, **more: float) -> str:
        """Writes speed and the means since the last call; returns the gist for the progress bar."""
        count = len(self.losses)
        means = {name: (total / count).item() for name, total in self.sums.items()}
        elapsed = time.perf_counter() - self.since
        means[f"{self.unit}_per_second"] = count * self.units / elapsed
        self.write_line(step, {**means, **more})
        self.sums, self.losses, self.since = {}, [], time.perf_counter()
        return ", ".join(f"{name} {value:.4g}" for name, value in means.items())

    def write_line(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of JSON."""
        with open(self.path, "a") as file:
            file.write(
                json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in values.items()}})
                + "\n"
            )


def _step_of(line: str) -> float:
    """Step of a line of log.jsonl; beyond all steps for a line that was cut off by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
