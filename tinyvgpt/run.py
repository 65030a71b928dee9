"""What a training run keeps: its state and the checkpoint that holds it, and its log.

A run's folder holds the model (config.json, *.safetensors), `checkpoint.pt` to resume from,
`log.jsonl` with one line a measurement, and `previews/`. Chapter 06 reads them.

Shapes: none of its own.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from tinyvgpt.store import write_atomically

if TYPE_CHECKING:
    from tinyvgpt.train import TrainConfig


class Run:
    """Model, optimizer, averaged weights and step: what a checkpoint holds."""

    def __init__(self, module: nn.Module, config: "TrainConfig"):
        """Starts at step 0."""
        self.module, self.config, self.step = module, config, 0
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

    def optimize(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.ema:
            self.ema.update_parameters(self.module)
        self.step += 1

    def save(self, out: Path) -> None:
        """Writes checkpoint.pt, atomically."""
        content = {
            "step": self.step,
            "config": asdict(self.config),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }
        write_atomically({out / "checkpoint.pt": lambda path: torch.save(content, path)})

    def resume(self, out: Path) -> None:
        """Continues from checkpoint.pt, if there is one.

        Raises:
            ValueError: if it is damaged, or of a run with other settings (names them).
        """
        path = out / "checkpoint.pt"
        if not path.exists():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved = content["config"]
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise ValueError(f"{path} is damaged ({error}); remove it to start again") from None
        now = asdict(self.config)
        free = {"device", "workers", "log_every", "checkpoint_every", "preview_every", "compile"}
        changed = [k for k in now if k not in free and saved.get(k) != now[k]]
        if changed:
            differences = ", ".join(f"{k} was {saved.get(k)}, is {now[k]}" for k in changed)
            raise ValueError(f"{path} is of a run with other settings: {differences}")
        try:
            self.module.load_state_dict(content["module"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema:
                self.ema.load_state_dict(content["ema"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} is of another model: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.step = content["step"]


class Log:
    """Means of the metrics between two lines of log.jsonl, and the progress bar."""

    def __init__(self, path: Path, unit: str, units: int, step: int):
        """Goes on after `step`, with `units` of `unit` a step; lines of later steps are dropped."""
        self.path, self.unit, self.units, self.start = path, unit, units, step
        self.sums: dict[str, Tensor] = {}
        self.count, self.since = 0, time.perf_counter()
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
        self.count += 1

    def write(self, step: int, **more: float) -> str:
        """Writes speed and the means since the last call; returns the gist for the progress bar."""
        means = {name: (total / self.count).item() for name, total in self.sums.items()}
        elapsed = time.perf_counter() - self.since
        means[f"{self.unit}_per_second"] = self.count * self.units / elapsed
        self.write_line(step, {**means, **more})
        self.sums, self.count, self.since = {}, 0, time.perf_counter()
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
