"""How good a model is, in figures: likelihood, reconstruction, Fréchet distances.

Likelihood is what the GPT gives the tokens of real clips: nats, and bits, which are nats / log 2.
Bits a pixel-channel are the same bits over T·H·W·C; they leave out what the tokenizer lost, so they
are no likelihood of pixels. Reconstruction compares clips that were encoded and decoded with what
they were: PSNR, of the squared error's mean over all clips, and SSIM (Wang et al. 2004), a mean
over frames. Distances are between sets of clips (`frechet`): R-FVD is that of reconstructions, FVD
that of samples, both from real clips; FVD* that of samples from reconstructions (Yan et al. 2021).
With a probe's features they are R-FD, FD and FD*. Chapter 18 reads them.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid · N tokens.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from tinyvgpt import video
from tinyvgpt.data import Dataset
from tinyvgpt.data.tokens import TokenFolder, Tokens
from tinyvgpt.encode import check_data, encode
from tinyvgpt.features import Features, feature_set
from tinyvgpt.frechet import Figure, check_enough, compare, halves, mean_figure
from tinyvgpt.progress import hidden
from tinyvgpt.sampling import SamplingRule, sample_tokens
from tinyvgpt.train import check_conditions, conditions
from tinyvgpt.videogpt import VideoGPT, evaluating

Batch = dict[str, Tensor]
AT_A_TIME = 16  # clips
AS_IT_IS = SamplingRule()  # from the model's own distribution
# Which sets of clips each distance is between, by what is put around its name.
DISTANCES = {
    "{}": ("samples", "real"),
    "R-{}": ("reconstructions", "real"),
    "{}*": ("samples", "reconstructions"),
}
REAL = "{}, real from real"  # between two sets of real clips
SETS = ("real", "reconstructions", "samples")


def evaluate(
    model: VideoGPT,
    data: Dataset,
    clips: int,
    *,
    features: Sequence[Features] = (),
    given: int | None = None,
    rule: SamplingRule = AS_IT_IS,
    seed: int = 0,
) -> dict[str, dict[str, Figure]]:
    """Measures a model on clips that are spread evenly over a dataset.

    Args:
        model: on the device where it is to compute.
        data: clips never trained on, of the model's length, size and channels, with the labels and
            actions it needs; it is told the real ones, in samples too.
        clips: how many; all, where there are fewer.
        features: networks for Fréchet distances; without one there are none, and no samples.
        given: first frames that samples go on from; by default what the model's frame encoder
            takes, else none. In the samples they are as the model makes them, not as they were.
        rule: how samples are drawn.
        seed: of samples and intervals.

    Returns:
        Figures by name, in groups: "likelihood", "reconstruction" and, with `features`,
        "distances". Of these `REAL` is between the real clips that were measured and as many
        others, or between halves of them, where the dataset has too few.

    Raises:
        ValueError: for data that don't fit, fewer than 2 clips, too few for a distance, or first
            frames that the model can't take.
        ImportError: torchmetrics is missing.
    """
    check(model, data)
    given = check_given(model, given)
    chosen, others = choose(len(data), clips)
    for network in features:
        check_enough(network.name, network.size, network.least, len(chosen))
    parts: dict[str, list[Tensor]] = defaultdict(list)
    with evaluating(model), torch.no_grad():
        for start, batch in batches_of(data, chosen, model.device, "clips"):
            real, tokens = batch["video"], encode(model.vqvae, batch)
            decoded = video.to_uint8(model.vqvae.decode(tokens))
            parts["nats"].append(nats(model, tokens, batch))
            parts["error"].append(squared_error(real, decoded))
            parts["ssim"].append(ssim(real, decoded))
            if features:
                drawn = regenerate(model, batch, given, rule=rule, seed=seed, first_clip=start)
                keep(parts, features, dict(zip(SETS, (real, decoded, drawn), strict=True)))
        for _, batch in batches_of(data, others if features else [], model.device, "others"):
            keep(parts, features, {"others": batch["video"]})
    result = {
        "likelihood": likelihood(model, torch.cat(parts["nats"]), seed),
        "reconstruction": reconstruction(torch.cat(parts["error"]), torch.cat(parts["ssim"]), seed),
    }
    if not features:
        return result
    found = (distances(network, parts, seed) for network in features)
    return {**result, "distances": {name: fig for of in found for name, fig in of.items()}}


# What is measured of a batch ----------------------------------------------------------------------


def nats(model: VideoGPT, tokens: Tensor, batch: Batch) -> Tensor:
    """Minus the log likelihood (B,), float64, of tokens (B, t, h, w) given a batch's conditions."""
    logits = model.logits(tokens, **conditions(model.gpt.config, batch))
    each = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none")
    return each.view(len(tokens), -1).double().sum(1)


def squared_error(clips: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference (B,), float64, of uint8 clips (B, T, H, W, C), as parts of 255².

    Raises:
        ValueError: for clips of different shapes.
    """
    _check_alike(clips, others)
    return ((clips.double() - others.double()) / 255).square().flatten(1).mean(1)


def ssim(clips: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (B,), means over frames, of uint8 clips (B, T, H, W, C).

    Of each frame in a Gaussian window of 11 × 11 pixels, σ = 1.5 (Wang et al. 2004).

    Raises:
        ValueError: for clips of different shapes.
        ImportError: torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError(
            "SSIM needs torchmetrics, which is not installed: pip install torchmetrics"
        ) from error
    _check_alike(clips, others)
    images, targets = (
        rearrange(x, "b t h w c -> (b t) c h w").float() / 255 for x in (clips, others)
    )
    each = structural_similarity_index_measure(images, targets, data_range=1.0, reduction="none")
    assert isinstance(each, Tensor)  # a pair only where its gradient is asked for, too
    return each.view(len(clips), -1).mean(1)


def regenerate(
    model: VideoGPT,
    batch: Batch,
    given: int,
    *,
    rule: SamplingRule = AS_IT_IS,
    seed: int,
    first_clip: int = 0,
) -> Tensor:
    """Samples, uint8 (B, T, H, W, C), with a batch's conditions and first `given` frames.

    A frame encoder only steers, so all frames are drawn; else the given ones are decoded from their
    tokens. `VideoGPT.sample` puts the given frames themselves there instead.
    """
    told, prefix = conditions(model.gpt.config, batch), None
    if given and "frames" not in told:
        prefix = model.vqvae.encode(video.to_model(batch["video"][:, :given])).flatten(1)
    tokens = sample_tokens(
        model.gpt,
        len(batch["video"]),
        seed=seed,
        rule=rule,
        first_clip=first_clip,
        prefix=prefix,
        labels=told.get("labels"),
        frames=told.get("frames"),
        actions=told.get("actions"),
    )
    return video.to_uint8(model.vqvae.decode(tokens))


def keep(
    parts: dict[str, list[Tensor]], features: Sequence[Features], sets: dict[str, Tensor]
) -> None:
    """Adds what each network makes of sets of clips, under the network's name and the set's."""
    for network in features:
        for name, clips in sets.items():
            parts[f"{network.name}, {name}"].append(network(clips))


# From clips to figures ----------------------------------------------------------------------------


def likelihood(model: VideoGPT, nats_of_clips: Tensor, seed: int) -> dict[str, Figure]:
    """Nats of clips (n,) as nats and bits a token, a clip, a pixel-channel."""
    config, tokens = model.vqvae.config, model.gpt.config.tokens
    values = config.frames * config.resolution**2 * config.channels
    bits = nats_of_clips / math.log(2)
    of_each = {
        "bits_per_token": bits / tokens,
        "nats_per_token": nats_of_clips / tokens,
        "bits_per_clip": bits,
        "nats_per_clip": nats_of_clips,
        "bits_per_pixel_channel": bits / values,
    }
    return {name: mean_figure(values, seed) for name, values in of_each.items()}


def reconstruction(errors: Tensor, similarities: Tensor, seed: int) -> dict[str, Figure]:
    """PSNR in decibels, and SSIM, from `squared_error` and `ssim` of clips, each (n,)."""
    psnr = mean_figure(errors, seed, of=lambda mean: -10 * torch.log10(mean))
    return {"psnr": psnr, "ssim": mean_figure(similarities, seed)}


def distances(features: Features, parts: dict[str, list[Tensor]], seed: int) -> dict[str, Figure]:
    """Fréchet distances between sets of clips, whose features come part after part, each (B, D).

    `parts` has them by the network's name and the set's.
    """
    of = {name: parts[f"{features.name}, {name}"] for name in (*SETS, "others")}
    sets = {name: feature_set(features, of[name]) for name in SETS}
    pairs = {name: (sets[a], sets[b]) for name, (a, b) in DISTANCES.items()}
    if of["others"]:
        pairs[REAL] = sets["real"], feature_set(features, of["others"])
    else:
        pairs[REAL] = halves(sets["real"])
    return {name.format(features.distance): compare(*pair, seed) for name, pair in pairs.items()}


# Which clips, and whether they fit ----------------------------------------------------------------


def choose(size: int, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `clips` clips, spread evenly over `size`, and of as many others, or of none.

    Raises:
        ValueError: fewer than two clips are asked for, or there.
    """
    if min(clips, size) < 2:
        raise ValueError(f"clips is {clips}, of {size}; an interval needs at least 2")
    count = min(clips, size)
    chosen = spread(size, count)
    rest = np.setdiff1d(np.arange(size), chosen)
    return chosen, rest[spread(len(rest), count)] if len(rest) >= count else rest[:0]


def spread(size: int, count: int) -> np.ndarray:
    """`count` of the indices 0 … size - 1, evenly spread; both at least 2."""
    return np.arange(count) * (size - 1) // (count - 1)


def batches_of(
    data: Dataset, chosen: Sequence[int] | np.ndarray, device: torch.device, what: str
) -> Iterator[tuple[int, Batch]]:
    """The chosen clips, `AT_A_TIME`, each batch with the number of its first; with a bar."""
    with tqdm(
        total=len(chosen), unit="clip", desc=what, disable=hidden() or not len(chosen)
    ) as bar:
        for start in range(0, len(chosen), AT_A_TIME):
            batch = data.batch(chosen[start : start + AT_A_TIME], device)
            yield start, batch
            bar.update(len(batch["video"]))


def check(model: VideoGPT, data: Dataset) -> None:
    """Raises ValueError unless data are clips that fit a model, with what it is conditioned on."""
    if isinstance(data, Tokens | TokenFolder):
        raise ValueError("the data are tokens, clips are needed")
    check_data(data, model.vqvae)
    check_conditions(data, model)


def check_given(model: VideoGPT, given: int | None) -> int:
    """How many first frames samples go on from; ValueError for a number the model can't take."""
    gpt, vqvae = model.gpt.config, model.vqvae.config
    if given is None or given == gpt.cond_frames:
        return gpt.cond_frames
    if gpt.cond_frames:
        raise ValueError(f"given is {given}, the model's frame encoder takes {gpt.cond_frames}")
    if not vqvae.causal_time:
        raise ValueError(f"given is {given}, but the model can't go on from frames; give 0")
    factor = vqvae.downsample[0]
    if given % factor or not 0 <= given < vqvae.frames:
        raise ValueError(
            f"given is {given}, must be a multiple of {factor} from 0 to {vqvae.frames - factor}"
        )
    return given


def _check_alike(clips: Tensor, others: Tensor) -> None:
    if clips.shape != others.shape:
        raise ValueError(
            f"clips of different shapes: {tuple(clips.shape)} and {tuple(others.shape)}"
        )
