"""One training loop for both stages.

Chapters 06 and 09 build this file. Everything random in step k (its batch, dropout, restarted
codes, hidden labels) follows from (seed, k), so a run that is killed and resumed ends with the
weights that it would have had anyway.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyvgpt import counter, video
from tinyvgpt.data import Dataset, batches
from tinyvgpt.data.tokens import TokenFolder, Tokens
from tinyvgpt.encode import check_data, encode, encode_dataset, fingerprint
from tinyvgpt.gpt import GPT
from tinyvgpt.run import Log, Run, TrainConfig
from tinyvgpt.videogpt import VideoGPT, evaluating
from tinyvgpt.vqvae import VQVAE

Batch = dict[str, Tensor]
PREVIEWED = 8  # clips in a preview


@dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage."""

    module: nn.Module  # what is trained
    about: dict[str, Any]  # its settings, which a checkpoint must share
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
    for clips in (data,) if validation is None else (data, validation):
        check_data(clips, vqvae)
        if isinstance(clips, Tokens | TokenFolder):
            raise ValueError("the data are tokens; a tokenizer is trained on clips")

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

    stage = Stage(vqvae, asdict(vqvae.config), loss, "clips", 1, preview, VQVAE.save)
    return fit(stage, data, config, out, validation)


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
    gpt_config = model.gpt.config
    for clips in (data,) if validation is None else (data, validation):
        check_data(clips, model.vqvae)
        check_conditions(clips, model)
    device = config.torch_device()
    model.vqvae.requires_grad_(False).eval().to(device)
    if config.encode_once and not isinstance(data, Tokens | TokenFolder):
        first = gpt_config.cond_frames
        data = encode_dataset(model.vqvae, data, config.encode_once, first, device)
        config = replace(config, workers=0)  # nothing is left to be done by other processes

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
        labels = batch["label"] if gpt_config.classes else None
        n = len(next(iter(batch.values())))
        return joined.sample(n, frames=frames, labels=labels, actions=actions, seed=config.seed)

    def save(gpt: GPT, folder: Path) -> None:
        VideoGPT(model.vqvae, gpt, model.label_names).save(folder)

    about = {**asdict(gpt_config), "codebook": fingerprint(model.gpt.codes)}
    stage = Stage(model.gpt, about, loss, "tokens", gpt_config.tokens, preview, save)
    return VideoGPT(model.vqvae, fit(stage, data, config, out, validation), model.label_names)


def check_conditions(data: Dataset, model: VideoGPT) -> None:
    """Raises ValueError unless clips have the labels and actions that the model needs."""
    config, names = model.gpt.config, data.label_names
    if isinstance(data, TokenFolder):
        check_tokens(data, model)
    if config.classes and config.classes != len(names or ()):
        raise ValueError(
            f"the model has {config.classes} classes, the data {len(names or ())} labels"
        )
    if config.classes and model.label_names and tuple(names or ()) != tuple(model.label_names):
        raise ValueError("the data's labels have other names, or another order, than the model's")
    if config.action_dim:
        action = data.batch([0]).get("action")
        found = "no actions" if action is None else f"actions of shape {tuple(action.shape[1:])}"
        if action is None or action.shape[1:] != (config.frames, config.action_dim):
            needed = (config.frames, config.action_dim)
            raise ValueError(f"the data has {found}, the model needs {needed} (frames, action_dim)")


def check_tokens(data: TokenFolder, model: VideoGPT) -> None:
    """Raises ValueError unless tokens are of the model's tokenizer and have its first frames."""
    needed = fingerprint(model.vqvae.codebook.codes)
    if data.codebook != needed:
        raise ValueError(
            f"{data.folder} was encoded by another tokenizer: its codebook is {data.codebook}, "
            f"the model's {needed}"
        )
    stored = data.about.get("first_frames", 0)
    if stored < model.gpt.config.cond_frames:
        raise ValueError(
            f"{data.folder} has the first {stored} frames of each clip, the model is conditioned "
            f"on {model.gpt.config.cond_frames} (tinyvgpt encode --first-frames)"
        )


def fit(
    stage: Stage, data: Dataset, config: TrainConfig, out: str | Path, validation: Dataset | None
) -> Any:
    """Trains `stage.module`; returns it, or its averaged copy, in evaluation mode."""
    out, device = Path(out), config.torch_device()
    out.mkdir(parents=True, exist_ok=True)
    module = stage.module.to(device).train()
    run = Run(module, config, stage.about)
    run.resume(out)
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
            metrics["grad_norm"] = run.optimize(metrics["loss"])
            bar.update()
            log.collect(metrics)
            last = run.step == config.steps
            saving = due(run.step, config.checkpoint_every, last)
            if saving or due(run.step, config.log_every, last):
                log.check(run.step)  # waits for the device, so not every step
            if due(run.step, config.log_every, last):
                bar.set_postfix_str(log.write(run.step, lr=config.lr_at(step)))
            if validation is not None and due(run.step, config.validate_every, last):
                log.write_line(run.step, validate(stage, run.best, validation, config, device))
            if due(run.step, config.preview_every, last):
                save_preview(stage, run.best, validation or data, out, run.step, device)
            if saving:
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
