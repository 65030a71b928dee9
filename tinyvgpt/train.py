"""One training loop for both stages.

Chapters 06 and 09 build this file. Everything random in step k (its batch, dropout, restarted
codes, hidden labels) follows from (seed, k), so a run that is killed and resumed ends with the
weights that it would have had anyway.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinyvgpt import counter, video
from tinyvgpt.data import Dataset, batches
from tinyvgpt.data.tokens import Tokens
from tinyvgpt.gpt import GPT
from tinyvgpt.run import Log, Run
from tinyvgpt.videogpt import VideoGPT, evaluating
from tinyvgpt.vqvae import VQVAE

Batch = dict[str, Tensor]
PREVIEWED = 8  # clips in a preview
ENCODED_AT_A_TIME = 64  # clips


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    steps: int = 1000  # optimizer steps in all
    batch_size: int = 32  # clips a step
    lr: float = 3e-4  # peak learning rate of AdamW
    warmup: int = 100  # steps in which the learning rate rises linearly from 0
    final_lr: float = 0.0  # learning rate at the end of the cosine, as a share of `lr`
    beta2: float = 0.999  # AdamW's decay of squared gradients; its beta1 is 0.9
    weight_decay: float = 0.0  # on matrices and kernels, not on biases, gains or tables
    clip_norm: float = 1.0  # largest norm of the gradient; 0 for no clipping
    ema: float = 0.0  # decay of the averaged weights that are saved; 0 saves the last ones
    precision: str = (
        "auto"  # "float32", "bfloat16" (autocast) or "auto": bfloat16 on GPUs that have it
    )
    compile: bool = False  # torch.compile the loss: slow to start, faster afterwards
    device: str = "auto"  # "cpu", "cuda" or "auto": cuda where there is one
    workers: int = 0  # processes that load data
    encode_once: int = (
        0  # GPT: encode so many clips beforehand and train on those; 0: every step anew
    )
    seed: int = 0  # of batches, dropout and everything else random
    log_every: int = 25  # steps between lines of log.jsonl
    checkpoint_every: int = 500  # steps between checkpoints
    validate_every: int = 500  # steps between validations; 0 for none
    validation_clips: int = 256  # the first so many clips of the validation split
    preview_every: int = 0  # steps between preview clips; 0 for none

    def __post_init__(self) -> None:
        """Raises ValueError for settings that make no sense."""
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
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
        return torch.device(name)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Context in which losses are computed."""
        bf16 = self.precision == "bfloat16" or (
            self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage."""

    module: nn.Module  # what is trained
    loss: Callable[[Any, Batch], dict[str, Tensor]]  # scalars to log; "loss" is minimised
    unit: str  # what is counted a second
    units_per_clip: int
    preview: Callable[[Any, Batch], Tensor]  # clips to look at, uint8 (B, T, H, W, C)
    save: Callable[[Any, Path], None]  # writes the model


def train_vqvae(
    vqvae: VQVAE,
    data: Dataset,
    config: TrainConfig,
    out: str | Path,
    *,
    validation: Dataset | None = None,
) -> VQVAE:
    """Trains a tokenizer in place, going on from `out`'s checkpoint if there is one.

    Args:
        vqvae: fresh or trained.
        data: clips of the model's length, size and channels.
        config: how to train.
        out: the run's folder.
        validation: clips never trained on.

    Returns:
        The model that was saved in `out`: with averaged weights if `config.ema` is above 0.

    Raises:
        ValueError: for data that doesn't fit the model, or a checkpoint of another run.
    """
    check_data(data, vqvae)

    def loss(model: VQVAE, batch: Batch) -> dict[str, Tensor]:
        result = model(video.to_model(batch["video"]))
        names = ("loss", "recon_loss", "commitment_loss", "perplexity", "used")
        metrics = {name: getattr(result, name) for name in names}
        mse = metrics["recon_loss"].detach() * vqvae.config.data_variance
        return {**metrics, "psnr": -10 * torch.log10(mse)}

    def preview(model: VQVAE, batch: Batch) -> Tensor:
        x = video.to_model(batch["video"])
        originals, decoded = (
            batch["video"].cpu(),
            video.to_uint8(model.decode(model.encode(x))).cpu(),
        )
        return torch.cat([originals, decoded])

    return fit(Stage(vqvae, loss, "clips", 1, preview, VQVAE.save), data, config, out, validation)


def train_gpt(
    model: VideoGPT,
    data: Dataset,
    config: TrainConfig,
    out: str | Path,
    *,
    validation: Dataset | None = None,
) -> VideoGPT:
    """Trains a GPT in place on its (frozen) tokenizer's tokens, going on from `out`'s checkpoint.

    Args:
        model: with a trained tokenizer.
        data: clips of the model's length, size and channels, with the labels and actions it needs.
        config: how to train.
        out: the run's folder.
        validation: clips never trained on.

    Returns:
        The model that was saved in `out`: with averaged weights if `config.ema` is above 0.

    Raises:
        ValueError: for data that doesn't fit the model, or a checkpoint of another run.
    """
    check_data(data, model.vqvae)
    gpt_config = model.gpt.config
    labels = len(data.label_names or ())
    if gpt_config.classes and gpt_config.classes != labels:
        raise ValueError(f"the model has {gpt_config.classes} classes, the data {labels} labels")
    device = config.torch_device()
    model.vqvae.requires_grad_(False).eval().to(device)
    if config.encode_once:
        data = encode_dataset(model.vqvae, data, config.encode_once, device)

    def conditions(batch: Batch) -> dict[str, Tensor]:
        given = {}
        if gpt_config.classes:
            given["labels"] = batch["label"]
        if gpt_config.cond_frames:
            given["frames"] = video.to_model(batch["video"][:, : gpt_config.cond_frames])
        if gpt_config.action_dim:
            given["actions"] = batch["action"]
        return given

    def loss(gpt: GPT, batch: Batch) -> dict[str, Tensor]:
        tokens = batch["tokens"] if "tokens" in batch else encode(model.vqvae, batch)
        nats = gpt.loss(tokens, **conditions(batch))
        return {"loss": nats, "bits_per_token": nats.detach() / math.log(2)}

    def preview(gpt: GPT, batch: Batch) -> Tensor:
        # What the model is conditioned on comes from real clips.
        joined = VideoGPT(model.vqvae, gpt, model.label_names)
        actions = batch["action"] if gpt_config.action_dim else None
        frames = batch["video"][:, : gpt_config.cond_frames] if gpt_config.cond_frames else None
        labels_ = batch["label"] if gpt_config.classes else None
        return joined.sample(
            PREVIEWED, frames=frames, labels=labels_, actions=actions, seed=config.seed
        )

    def save(gpt: GPT, folder: Path) -> None:
        VideoGPT(model.vqvae, gpt, model.label_names).save(folder)

    stage = Stage(model.gpt, loss, "tokens", gpt_config.tokens, preview, save)
    return VideoGPT(model.vqvae, fit(stage, data, config, out, validation), model.label_names)


def encode(vqvae: VQVAE, batch: Batch) -> Tensor:
    """Tokens (B, t, h, w) of a batch's clips, in float32 whatever the precision of training."""
    with torch.autocast(batch["video"].device.type, enabled=False):
        return vqvae.encode(video.to_model(batch["video"]))


def encode_dataset(vqvae: VQVAE, data: Dataset, clips: int, device: torch.device) -> Tokens:
    """The first `clips` clips of a dataset as tokens, kept on `device`."""
    parts: dict[str, list[Tensor]] = {}
    for batch in tqdm(fixed_clips(data, clips, ENCODED_AT_A_TIME, device), desc="encoding"):
        tokens = encode(vqvae, batch).to(torch.int32)
        for name, value in {**batch, "video": tokens}.items():
            parts.setdefault("tokens" if name == "video" else name, []).append(value)
    about = {
        name: getattr(data, name) for name in ("channels", "frames", "resolution", "label_names")
    }
    return Tokens({name: torch.cat(values) for name, values in parts.items()}, **about)


def check_data(data: Dataset, vqvae: VQVAE) -> None:
    """Raises ValueError unless clips have the model's channels, length and size."""
    for name in ("channels", "frames", "resolution"):
        found, needed = getattr(data, name), getattr(vqvae.config, name)
        if found != needed:
            raise ValueError(f"the data has {name} {found}, the model needs {needed}")


def fit(
    stage: Stage, data: Dataset, config: TrainConfig, out: str | Path, validation: Dataset | None
) -> Any:
    """Trains `stage.module`; returns it, or its averaged copy, in evaluation mode."""
    out, device = Path(out), config.torch_device()
    out.mkdir(parents=True, exist_ok=True)
    module = stage.module.to(device).train()
    run = Run(module, config)
    run.resume(out)
    if config.compile:
        module.compile()
    stream = batches(
        data,
        config.batch_size,
        seed=config.seed,
        start=run.step,
        workers=config.workers,
        device=device,
    )
    units = config.batch_size * stage.units_per_clip
    log = Log(out / "log.jsonl", stage.unit, units, run.step)
    with log.progress(config.steps) as bar:
        while run.step < config.steps:
            step = run.step
            torch.manual_seed(int(counter.bits(config.seed, step) >> 1))
            with config.autocast(device):
                metrics = stage.loss(module, next(stream))
            run.optimize(metrics["loss"])
            bar.update()
            log.collect(metrics)
            last = run.step == config.steps
            if last or run.step % config.log_every == 0:
                bar.set_postfix_str(log.write(run.step, lr=config.lr_at(step)))
            if validation is not None and due(run.step, config.validate_every, last):
                log.write_line(run.step, validate(stage, run.best, validation, config, device))
            if due(run.step, config.preview_every, last):
                save_preview(stage, run.best, validation or data, out, run.step, device)
            if last or run.step % config.checkpoint_every == 0:
                run.save(out)
    stage.save(run.best, out)
    return run.best.eval()


def due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is to be done."""
    return every > 0 and (last or step % every == 0)


def fixed_clips(
    data: Dataset, count: int, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """The first `count` clips of a dataset, in batches."""
    for start in range(0, min(count, len(data)), batch_size):
        yield data.batch(range(start, min(start + batch_size, count, len(data))), device)


def validate(
    stage: Stage, module: nn.Module, data: Dataset, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Means of the metrics over the validation clips, as `val_…`."""
    sums: dict[str, Tensor] = {}
    clips = 0
    with torch.no_grad(), evaluating(module):
        for batch in fixed_clips(data, config.validation_clips, config.batch_size, device):
            size = len(next(iter(batch.values())))
            with config.autocast(device):
                for name, value in stage.loss(module, batch).items():
                    sums[name] = sums.get(name, 0) + value.float() * size
            clips += size
    return {f"val_{name}": (total / clips).item() for name, total in sums.items()}


def save_preview(
    stage: Stage, module: nn.Module, data: Dataset, out: Path, step: int, device: torch.device
) -> None:
    """Writes previews/<step>.mp4; where PyAV is missing, warns instead."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError:
        warnings.warn("previews need PyAV (pip install av); going on without them", stacklevel=2)
        return
    with torch.no_grad(), evaluating(module):
        clips = stage.preview(module, next(fixed_clips(data, PREVIEWED, PREVIEWED, device)))
    (out / "previews").mkdir(exist_ok=True)
    video.write(out / "previews" / f"{step:07d}.mp4", video.grid(clips, columns=PREVIEWED), fps=8)
