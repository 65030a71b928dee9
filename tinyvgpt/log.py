"""What a training run tells: its progress, lines of log.jsonl, and events for TensorBoard.

Metrics are summed on the device and fetched only when a line is due. With several processes all
collect, the sums are reduced, and rank 0 writes. MFU is model FLOP utilisation (Chowdhery et al.
2022, appendix B): what the model needs over what the devices could have done in that time. Chapter
06 reads the log, chapter 16 MFU.

Shapes: none of its own.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyvgpt import distributed
from tinyvgpt.progress import Progress, gist
from tinyvgpt.store import write_atomically


@dataclass(frozen=True)
class Rates:
    """What a step amounts to, over all processes."""

    unit: str  # what is counted a second
    units: float  # a step
    flops: float  # a step
    peak_flops: float | None  # a second, of all devices together; None if unknown


# Steps in a row that a run skips before it gives up. float16 skips some at the start, until its
# loss's scale, 2^16, has been halved often enough: 16 times at most to leave the loss as it is.
PATIENCE = 20


class Log:
    """Means of the metrics between two lines of log.jsonl."""

    def __init__(
        self,
        out: Path,
        rates: Rates,
        step: int,
        steps: int,
        device: torch.device,
        *,
        tensorboard: bool,
        skipping: bool,
    ):
        """Goes on after `step` of `steps`; lines of later steps are dropped.

        With `skipping`, steps whose loss or gradient isn't finite are counted and left out.
        """
        self.path, self.rates, self.device = out / "log.jsonl", rates, device
        self.skipping, self.good = skipping, step  # good: the last step that was finite
        self.begun, self.steps = step, steps
        self.sums: dict[str, Tensor] = {}
        self.finite: list[Tensor] = []
        self.writer: Any = None
        if distributed.rank() == 0:
            if self.path.exists():
                lines = self.path.read_text().splitlines()
                kept = "".join(line + "\n" for line in lines if _step_of(line) <= step)
                write_atomically({self.path: lambda temporary: temporary.write_text(kept)})
            if tensorboard:
                self.writer = event_writer(out / "tensorboard", step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.progress = Progress(step, steps)
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time doesn't count against the steps' speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

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

        Where such steps are skipped, only if the last `PATIENCE` ones were, or all up to the run's
        end. Waits for the device.

        Args:
            step: steps done.
            seed: of the run.
            saved: the last good checkpoint.
        """
        if not self.finite:
            return
        finite = distributed.mean({"": torch.stack(self.finite).float()})[""] == 1
        if finite.any():
            self.good = step - int(finite.flip(0).int().argmax())
        in_vain = step == self.steps and self.good == self.begun
        if finite.all() or (self.skipping and step - self.good < PATIENCE and not in_vain):
            return
        bad = step - len(finite) + int(finite.int().argmin()) + 1
        bad = self.good + 1 if self.skipping else bad
        left = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint"
        raise ValueError(
            f"the loss or its gradient is not finite at step {bad} (batch {bad - 1} of seed "
            f"{seed}); {left}. Try a lower lr, a longer warmup or float32"
        )

    def write(self, step: int, **more: float) -> None:
        """Writes and shows speed and the means since the last call."""
        counted = torch.stack(self.finite).sum() if self.skipping else len(self.finite)
        sums = distributed.mean(self.sums)
        means = {name: (total / counted).item() for name, total in sums.items()}
        seconds = (time.perf_counter() - self.since) / len(self.finite)
        if self.skipping:
            means["skipped"] = len(self.finite) - int(counted)
        means[f"{self.rates.unit}_per_second"] = self.rates.units / seconds
        if self.rates.peak_flops:
            means["mfu"] = self.rates.flops / seconds / self.rates.peak_flops
        if self.device.type == "cuda":
            means["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._append(step, {**means, **more})
        self.progress.tell(step, means)
        self.sums, self.finite, self.since = {}, [], time.perf_counter()

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """Writes and shows means over the validation clips, as `val_…`."""
        self._append(step, {f"val_{name}": value for name, value in values.items()})
        self.progress.line(step, f"validation {gist(values)}")

    def _append(self, step: int, values: dict[str, float]) -> None:
        """Appends one line of JSON, and the same as TensorBoard's scalars."""
        if distributed.rank() != 0:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        # JSON has no NaN or infinity.
        valid = {name: value if math.isfinite(value) else None for name, value in rounded.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **valid}) + "\n")
        if self.writer:
            for name, value in rounded.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # or what a killed run has resumed from would be missing

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
        """Ends the progress bar; writes what TensorBoard's events still wait for."""
        self.progress.close()
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
