"""Training each stage: what its loss is, what it needs of the data, what it shows.

Chapters 06 and 09 build this file; `loop` has the steps. Under torchrun the same calls train in
several processes.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from tinyvgpt import video
from tinyvgpt.cost import clip_work, step_flops
from tinyvgpt.data import Dataset
from tinyvgpt.data.tokens import TokenFolder, Tokens
from tinyvgpt.distributed import joined, world_size
from tinyvgpt.encode import check_data, encode, encode_dataset, fingerprint, looks
from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.loop import Batch, Stage, fit, make_writable, memory_advice
from tinyvgpt.memory import memory_explained
from tinyvgpt.settings import TrainConfig
from tinyvgpt.videogpt import VideoGPT
from tinyvgpt.vqvae import VQVAE

__all__ = ["TrainConfig", "train_gpt", "train_vqvae"]


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

    with joined(config.torch_device()) as device, memory_explained(memory_advice(config)):
        return fit(vqvae_stage(vqvae, about_data(data)), data, config, out, validation, device)


def vqvae_stage(vqvae: VQVAE, data: str) -> Stage:
    """The first stage, on what `about_data` says of the data."""

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

    return Stage(
        module=vqvae,
        about={**asdict(vqvae.config), "data": data},
        loss=loss,
        unit="clips",
        units_per_clip=1,
        flops_per_clip=step_flops(vqvae.config, 1),
        preview=preview,
        save=VQVAE.save,
        histograms=lambda model: {"codebook/count": model.codebook.count},
    )


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
    with joined(config.torch_device()) as device, memory_explained(memory_advice(config)):
        check_openings(gpt_config, config)
        make_writable(Path(out))  # before anything is encoded
        model.vqvae.requires_grad_(False).eval().to(device)
        stage = gpt_stage(model, config, about_data(data))
        if config.encode_once and not isinstance(data, Tokens | TokenFolder):
            first = gpt_config.cond_frames
            data = encode_dataset(model.vqvae, data, config.encode_once, first, device)
            config = replace(config, workers=0)  # nothing is left to be done by other processes
        gpt = fit(stage, data, config, out, validation, device)
    return VideoGPT(model.vqvae, gpt, model.label_names)


def gpt_stage(model: VideoGPT, config: TrainConfig, data: str) -> Stage:
    """The second stage, on what `about_data` says of the data."""
    gpt_config = model.gpt.config
    tokens, flops = clip_work(gpt_config, config.openings)

    def prepare(batch: Batch) -> Batch:
        return batch if "tokens" in batch else {**batch, "tokens": encode(model.vqvae, batch)}

    def loss(gpt: GPT, batch: Batch) -> dict[str, Tensor]:
        nats = clips_loss(gpt, batch, config.openings if gpt.training else 0.0)
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

    return Stage(
        module=model.gpt,
        about={**asdict(gpt_config), "codebook": fingerprint(model.gpt.codes), "data": data},
        loss=loss,
        unit="tokens",
        units_per_clip=tokens,
        flops_per_clip=flops,
        preview=preview,
        save=save,
        prepare=prepare,
    )


def check_openings(gpt: GPTConfig, config: TrainConfig) -> None:
    """Raises ValueError unless a model can learn from openings, and a part's are a whole number."""
    if not config.openings:
        return
    if gpt.attention == "strided":
        raise ValueError("openings need full attention: strided attention takes whole clips")
    clips = config.batch_size / world_size() / config.accumulate
    share = config.openings * clips
    if abs(share - round(share)) > 1e-6 or round(share) == clips:
        raise ValueError(
            f"openings is {config.openings}, which is {share:g} of the {clips:g} clips in a "
            "forward pass; it must be a whole number, and not all of them"
        )


def clips_loss(gpt: GPT, batch: Batch, openings: float) -> Tensor:
    """Mean cross-entropy, nats a token, of a batch of which a share are openings.

    Those end after their first latent frame. It has to be made up, while later ones mostly follow
    from it, and costs a t-th of a clip's tokens or less: so a step can learn from more of them.
    """
    cut = round(openings * len(batch["tokens"]))
    if not cut:
        return gpt.loss(batch["tokens"], **conditions(gpt.config, batch))
    first, whole = (
        {n: x[part] for n, x in batch.items()} for part in (slice(cut), slice(cut, None))
    )
    first["tokens"] = first["tokens"][:, :1]
    total, count = torch.zeros((), device=gpt.codes.device), 0
    for clips in (whole, first):
        size = clips["tokens"].numel()
        total = total + size * gpt.loss(clips["tokens"], **conditions(gpt.config, clips))
        count += size
    return total / count


def conditions(config: GPTConfig, batch: Batch) -> dict[str, Tensor]:
    """What of a batch a GPT is told besides tokens, as `GPT.forward` takes it."""
    given = {}
    if config.classes:
        given["labels"] = batch["label"]
    if config.cond_frames:
        given["frames"] = video.to_model(batch["video"][:, : config.cond_frames])
    if config.action_dim:
        given["actions"] = batch["action"]
    return given


def about_data(data: Dataset) -> str:
    """How many clips there are, and a fingerprint of sixteen of them."""
    return f"{len(data):,} clips (fingerprint {looks(data, len(data))})"


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
