"""What a training run tells: a progress bar, lines of log.jsonl, and events for TensorBoard.

Metrics are summed on the device and fetched only when a line is due. With several processes all
collect, the sums are reduced, and rank 0 writes. MFU is model FLOP utilisation (Chowdhery et al.
2022, appendix B): what the model needs over what the devices could have done in that time.

Shapes: none of its own.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinyvgpt import distributed
from tinyvgpt.store import write_atomically


@dataclass(frozen=True)
class Rates:
    """What a step amounts to, over all processes."""

    unit: str  # what is counted a second
    units: int  # a step
    flops: float  # a step
    peak_flops: float | None  # a second, of all devices together; None if unknown


class Log:
    """Means of the metrics between two lines of log.jsonl."""

    def __init__(self, out: Path, rates: Rates, step: int, *, tensorboard: bool, skipping: bool):
        """Goes on after `step`; lines of later steps are dropped.

        With `skipping`, steps whose loss or gradient isn't finite are counted and left out.
        """
        self.path, self.rates, self.start, self.skipping = out / "log.jsonl", rates, step, skipping
        self.sums: dict[str, Tensor] = {}
        self.finite: list[Tensor] = []
        self.writer: Any = None
        self.since = time.perf_counter()
        if distributed.rank() != 0:
            return
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = "".join(line + "\n" for line in lines if _step_of(line) <= step)
            write_atomically({self.path: lambda temporary: temporary.write_text(kept)})
        if tensorboard:
            self.writer = event_writer(out / "tensorboard", step)

    def progress(self, steps: int) -> tqdm:
        """A progress bar over all steps, on a terminal or in a notebook, of rank 0."""
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        hidden = distributed.rank() != 0 or not watched
        return tqdm(
            total=steps, initial=self.start, unit="step", dynamic_ncols=True, disable=hidden
        )

    def collect(self, metrics: dict[str, Tensor]) -> None:
        """Adds a step's metrics, without waiting for the device."""
        finite = torch.stack([metrics["loss"].detach(), metrics["grad_norm"].detach()])
        finite = finite.isfinite().all()
        for name, value in metrics.items():
            value = value.detach().float()
            value = torch.where(finite, value, 0) if self.skipping else value
            self.sums[name] = self.sums.get(name, 0) + value
        self.finite.append(finite)

    def check(self, step: int, seed: int, saved: Path | None) -> None:
        """Raises ValueError if a loss or gradient since the last line isn't finite, in any process.

        Where such steps are skipped, only if there was no other since the last line. Waits for the
        device.

        Args:
            step: steps done.
            seed: of the run.
            saved: the last good checkpoint.
        """
        if not self.finite:
            return
        finite = distributed.mean({"": torch.stack(self.finite).float()})[""] == 1
        if finite.all() or (self.skipping and finite.any()):
            return
        bad = step - len(finite) + int(finite.int().argmin()) + 1
        left = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint"
        raise ValueError(
            f"the loss or its gradient is not finite at step {bad} (batch {bad - 1} of seed "
            f"{seed}); {left}. Try a lower lr, a longer warmup or float32"
        )

    def write(self, step: int, **more: float) -> str:
        """Writes speed and the means since the last call; returns the gist for the progress bar."""
        counted = torch.stack(self.finite).sum() if self.skipping else len(self.finite)
        sums = distributed.mean(self.sums)
        means = {name: (total / counted).item() for name, total in sums.items()}
        seconds = (time.perf_counter() - self.since) / len(self.finite)
        if self.skipping:
            means["skipped"] = len(self.finite) - int(counted)
        means[f"{self.rates.unit}_per_second"] = self.rates.units / seconds
        if self.rates.peak_flops:
            means["mfu"] = self.rates.flops / seconds / self.rates.peak_flops
        if torch.cuda.is_initialized():
            means["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.write_line(step, {**means, **more})
        self.sums, self.finite, self.since = {}, [], time.perf_counter()
        return ", ".join(f"{name} {value:.4g}" for name, value in means.items())

    def write_line(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of JSON, and the same as TensorBoard's scalars."""
        if distributed.rank() != 0:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in rounded.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Adds distributions of tensors to TensorBoard's events."""
        for name, tensor in values.items() if self.writer else ():
            self.writer.add_histogram(name, tensor.float().cpu(), step)

    def write_preview(self, step: int, gif: Path) -> None:
        """Adds an animated GIF to TensorBoard's events, among its images."""
        if not self.writer:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=gif.read_bytes())
        summary = Summary(value=[Summary.Value(tag="preview", image=image)])
        self.writer.file_writer.add_summary(summary, step)

    def close(self) -> None:
        """Writes what TensorBoard's events still wait for."""
        if self.writer:
            self.writer.close()


def event_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which hides events of later steps; None where it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _step_of(line: str) -> float:
    """Step of a line of log.jsonl; beyond all steps for a line that was cut off by a crash."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
