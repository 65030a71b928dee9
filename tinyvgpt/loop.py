"""The training loop, for either stage, in one process or in many.

Chapters 06, 09 and 16 build this file. Everything random in step k (its batch, dropout, restarted
codes, hidden labels) follows from (seed, k), so a run that is killed and resumed ends with the
weights that it would have had anyway. With several processes each has its share of the batch, and
gradients are averaged (DistributedDataParallel, Li et al. 2020).

Shapes: B batch · T H W C frames, pixels, channels.
"""

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyvgpt import counter, distributed, video
from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.data import Dataset, batches
from tinyvgpt.estimate import peak_flops
from tinyvgpt.log import Log, Rates
from tinyvgpt.run import Run
from tinyvgpt.settings import TrainConfig
from tinyvgpt.signals import Stopped, Stopping
from tinyvgpt.videogpt import evaluating

Batch = dict[str, Tensor]
PREVIEWED = 8  # clips in a preview


@dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage."""

    module: nn.Module  # what is trained
    about: dict[str, Any]  # of model and data, which a checkpoint must share
    loss: Callable[[Any, Batch], Batch]  # scalars to log; "loss" is minimised
    unit: str  # what is counted a second
    units_per_clip: float
    flops_per_clip: float  # of a step
    preview: Callable[[Any, Batch], Tensor]  # clips to look at, uint8 (B, T, H, W, C)
    save: Callable[[Any, Path], None]  # writes the model
    prepare: Callable[[Batch], Batch] = lambda batch: batch  # what needs no gradient, first
    histograms: Callable[[Any], Batch] = lambda module: {}  # for TensorBoard


class Step(nn.Module):
    """A module whose forward pass is a stage's loss: what torch.compile and DDP wrap."""

    def __init__(self, stage: Stage, *, compiled: bool):
        super().__init__()
        self.module = stage.module
        self.loss = torch.compile(stage.loss, dynamic=False) if compiled else stage.loss

    def forward(self, batch: Batch) -> Batch:
        """Metrics (scalars) of a batch."""
        return self.loss(self.module, batch)


def fit(
    stage: Stage,
    data: Dataset,
    config: TrainConfig,
    out: str | Path,
    validation: Dataset | None,
    device: torch.device,
) -> Any:
    """Trains `stage.module`; returns it, or its averaged copy, in evaluation mode."""
    out = Path(out)
    distributed.check_batch(config.batch_size, distributed.world_size(), config.accumulate)
    make_writable(out)
    place(stage.module, device)
    run = Run(stage.module, config, stage.about)
    checkpoints = Checkpoints(out, config.keep)
    run.resume(checkpoints)
    distributed.check_same("step", run.step, f"{out} must be a folder that all machines share")
    log = Log(
        out,
        rates(stage, config, device),
        run.step,
        config.steps,
        device,
        tensorboard=config.tensorboard,
        skipping=run.skipping,
    )
    try:
        with fastest_convolutions(device), layouts_unremarked(), Stopping() as stopping:
            train(stage, run, log, checkpoints, data, validation, stopping, device)
    finally:
        log.close()
    if distributed.rank() == 0:
        stage.save(run.best, out)
    return run.best.eval()


def place(module: nn.Module, device: torch.device) -> None:
    """Moves a module to where it trains, in the layout in which it trains fastest there."""
    module.to(device).train()
    if device.type == "cuda":  # cuDNN's convolutions are faster with channels last
        module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def train(
    stage: Stage,
    run: Run,
    log: Log,
    checkpoints: Checkpoints,
    data: Dataset,
    validation: Dataset | None,
    stopping: Stopping,
    device: torch.device,
) -> None:
    """Steps, and what is due after them, until the last one or a request to stop."""
    config, out = run.config, checkpoints.folder
    step_of = wrapped(stage, config, device)
    stream = share_of(data, config, run.step, device)
    while run.step < config.steps:
        log.collect(take_step(stage, step_of, run, next(stream), device))
        log.progress.update()
        step, last = run.step, run.step == config.steps
        stop = distributed.any_rank(stopping.requested is not None)
        saving = stop or due(step, config.checkpoint_every, last)
        if saving or due(step, config.log_every, last):
            log.check(step, config.seed, checkpoints.newest())
        if due(step, config.log_every, last):
            log.write(step, lr=config.lr_at(step - 1))
        with log.paused():
            if due(step, config.log_every, last):
                log.write_histograms(step, stage.histograms(run.module))
            if validation is not None and due(step, config.validate_every, last):
                log.write_validation(step, validate(stage, run.best, validation, config, device))
            if due(step, config.preview_every, last) and distributed.rank() == 0:
                save_preview(stage, run.best, validation or data, out, step, log, device)
            if saving and distributed.rank() == 0:
                run.save(checkpoints)
        if stop and not last:
            distributed.any_rank(False)  # nobody ends before rank 0 has saved
            name = stopping.requested or "another process"
            raise Stopped(name, step, config.steps, checkpoints.newest())


def take_step(
    stage: Stage, step_of: nn.Module, run: Run, batch: Batch, device: torch.device
) -> Batch:
    """One step of the optimizer on this process's share of a batch; returns its metrics."""
    config, former = run.config, run.buffers()
    seed = counter.bits(config.seed, run.step, distributed.rank())
    torch.manual_seed(int(seed >> 1))
    batch = stage.prepare(batch)
    metrics: dict[str, Tensor] = {}
    for number, part in enumerate(parts_of(batch, config.accumulate), 1):
        last = number == config.accumulate
        with contextlib.nullcontext() if last else without_reduction(step_of):
            with config.autocast(device):
                values = step_of(part)
            run.backward(values["loss"])
        for name, value in values.items():
            metrics[name] = metrics.get(name, 0) + value.detach() / config.accumulate
    metrics["grad_norm"] = run.update(former)
    return metrics


def parts_of(batch: Batch, count: int) -> Iterator[Batch]:
    """A batch in `count` equal parts."""
    size = len(next(iter(batch.values()))) // count
    for start in range(0, count * size, size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def wrapped(stage: Stage, config: TrainConfig, device: torch.device) -> nn.Module:
    """A stage's loss as a module: compiled by choice, its gradients averaged over processes."""
    step = Step(stage, compiled=config.compiled(device))
    if distributed.world_size() == 1:
        return step
    ids = [device.index] if device.type == "cuda" else None
    if config.compiled(device):
        # Cutting graphs for DDP's buckets may be refused where they hold an autograd.Function.
        torch._dynamo.config.optimize_ddp = False
    # Buffers need no broadcast: batch norms and codebooks reduce what moves them.
    parameters = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in parameters  # in PyTorch 2.13
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(step, device_ids=ids, gradient_as_bucket_view=True, **options)


def without_reduction(step_of: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which gradients add up in each process for itself."""
    if isinstance(step_of, DistributedDataParallel):
        return step_of.no_sync()
    return contextlib.nullcontext()


def share_of(
    data: Dataset, config: TrainConfig, start: int, device: torch.device
) -> Iterator[Batch]:
    """This process's share of batch `start` and those after it."""
    return batches(
        data,
        config.batch_size,
        seed=config.seed,
        start=start,
        workers=config.workers,
        device=device,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def rates(stage: Stage, config: TrainConfig, device: torch.device) -> Rates:
    """What a step amounts to, over all processes."""
    peak = peak_flops(device, config.dtype(device))
    return Rates(
        stage.unit,
        config.batch_size * stage.units_per_clip,
        config.batch_size * stage.flops_per_clip,
        peak and peak * distributed.world_size(),
    )


def due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is to be done."""
    return every > 0 and (last or step % every == 0)


def make_writable(out: Path) -> None:
    """Makes a folder, of a run or a record; OSError if nothing can be written there."""
    if out.exists() and not out.is_dir():
        raise OSError(f"the folder {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"the folder {out} can't be written to: {error.strerror}") from None


@contextlib.contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Context in which cuDNN tries its kernels for each new shape and keeps the fastest."""
    former = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = former or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = former


@contextlib.contextmanager
def layouts_unremarked() -> Iterator[None]:
    """Context in which DDP says nothing about strides.

    Weights of one channel have strides that name the same bytes in two ways, and it warns of that
    in every process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


def memory_advice(config: TrainConfig) -> str:
    """What to lower when memory runs out in training, for `memory_explained`."""
    clips = config.batch_size // distributed.world_size() // config.accumulate
    return (
        f"with {clips} clips at a time: raise accumulate (now {config.accumulate}), so that a step "
        "takes its clips in smaller parts, set the model's checkpointing, or lower batch_size "
        f"(now {config.batch_size})"
    )


def validate(
    stage: Stage, module: nn.Module, data: Dataset, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Means of the metrics over the validation clips; each process takes batches.

    One for which none is left takes the first, and counts none of its clips: so all have sums.
    """
    sums: dict[str, Tensor] = {}
    processes = distributed.world_size()
    size, count = config.batch_size // processes, min(config.validation_clips, len(data))
    starts = range(0, count, size)[distributed.rank() :: processes]
    with torch.no_grad(), evaluating(module):
        for start in starts or (0,):
            part = range(start, min(start + size, count))
            batch = data.batch(part, device)
            with config.autocast(device):
                values = stage.loss(module, stage.prepare(batch))
            counted = torch.tensor(len(part) if starts else 0, device=device)
            for name, value in {**values, "clips": torch.ones_like(counted)}.items():
                sums[name] = sums.get(name, 0) + value.float() * counted
    sums = distributed.sum_(sums)
    clips = sums.pop("clips")
    return {name: (total / clips).item() for name, total in sums.items()}


def save_preview(
    stage: Stage,
    module: nn.Module,
    data: Dataset,
    out: Path,
    step: int,
    log: Log,
    device: torch.device,
) -> None:
    """Writes previews/<step>.mp4; where PyAV is missing, warns instead."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError:
        warnings.warn("previews need PyAV (pip install av); going on without them", stacklevel=2)
        return
    with torch.no_grad(), evaluating(module):
        clips = stage.preview(module, data.batch(range(min(PREVIEWED, len(data))), device))
    grid = video.grid(clips, columns=PREVIEWED)
    (out / "previews").mkdir(exist_ok=True)
    video.write(out / "previews" / f"{step:07d}.mp4", grid, fps=8)
    with tempfile.TemporaryDirectory() as folder:
        video.write(Path(folder, "preview.gif"), grid, fps=8)
        log.write_preview(step, Path(folder, "preview.gif"))
