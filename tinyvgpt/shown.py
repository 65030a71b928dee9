"""What clips of Moving MNIST show: samples, reconstructions and real clips, side by side.

A probe reads them (`measures`). What it reads in real clips is the scale: each figure of the
others is given as a share of it, too. How a model goes on from first frames is compared with what
really followed, beside the last given frame held, which is right wherever nothing moves. Chapter 18
reads with it.

Shapes: n clips · T H W C frames, pixels, channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data import Dataset
from tinyvgpt.evaluate import (
    AS_IT_IS,
    AT_A_TIME,
    Batch,
    batches_of,
    check,
    choose,
    regenerate,
    squared_error,
)
from tinyvgpt.frechet import RESAMPLES, Figure, bounds, draws, mean_figure
from tinyvgpt.measures import apart, both_read, kept
from tinyvgpt.probes import Probe, Readings
from tinyvgpt.progress import hidden
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.videogpt import VideoGPT, evaluating

REAL = "real clips"  # the set that others are compared with
GIVEN = 4  # first frames to go on from
FRAME = 8  # counted from 1, whose places are compared
AT_ONCE = {"cpu": AT_A_TIME, "cuda": 64}  # clips sampled together
Values = Mapping[str, np.ndarray]  # by measure, (n,) float64, one a clip; NaN where there is none


class Shown(NamedTuple):
    """A measure's mean over a set of clips, and its ratio to that of real ones."""

    figure: Figure
    of_real: Figure | None  # none for real clips, or where theirs is 0
    clips: int  # that have a value


Table = dict[str, dict[str, Shown]]  # by measure and set
Groups = dict[str, dict[str, Figure | dict[str, Shown]]]


def show_digits(
    model: VideoGPT,
    data: Dataset,
    probe: Probe,
    clips: int,
    *,
    rule: SamplingRule = AS_IT_IS,
    seed: int = 0,
) -> Groups:
    """Measures what a model's clips show, and how it goes on from first frames.

    Args:
        model: on the device where it is to compute.
        data: clips never trained on, as `evaluate` takes them; their labels are asked for in
            samples. A model with a null label also draws samples without.
        probe: that of "moving-mnist".
        clips: how many of each set; all, where there are fewer.
        rule: how clips are drawn; without a label there is no guidance.
        seed: of samples and intervals.

    Returns:
        "shown", the measures of `measures.Kept` by set, and "going on", the figures of `going_on`,
        if the model can go on from frames.

    Raises:
        ValueError: for data or a probe that don't fit, or fewer than 2 clips.
    """
    check_probe(probe, "moving-mnist", data)
    check(model, data)
    chosen, _ = choose(len(data), clips)
    batch = whole(data, chosen)
    wanted = pairs_of(data, batch)
    real, told = batch["video"], model.gpt.config.classes > 0
    sets = {
        REAL: (real, wanted),
        "reconstructions": (model.reconstruct(real), wanted),
        "samples": (draw(model, batch, rule, seed), wanted if told else None),
    }
    if told and model.gpt.config.label_dropout:
        free = {**batch, "label": torch.full_like(batch["label"], model.gpt.config.classes)}
        unguided = replace(rule, guidance=1.0)
        sets["samples, no label"] = draw(model, free, unguided, seed), None
    values = {name: kept(probe, *of)._asdict() for name, of in sets.items()}
    groups: Groups = {"shown": dict(side_by_side(values, seed))}
    given = given_frames(model)
    if given:
        groups["going on"] = dict(going_on(model, batch, probe, given, rule, seed))
    return groups


def going_on(
    model: VideoGPT, batch: Batch, probe: Probe, given: int, rule: SamplingRule, seed: int
) -> dict[str, Figure]:
    """How clips that begin with `given` real frames go on, against real ones.

    PSNR is over all frames that were not given, in decibels; places are those that the probe reads
    in frame `FRAME`, in pixels, over clips in whose real frame it reads both digits.
    """
    real = batch["video"]
    drawn = continued(model, batch, given, replace(rule, guidance=1.0), seed)
    held = real[:, given - 1 : given].expand_as(real)
    error, other = (squared_error(x[:, given:], real[:, given:]) for x in (drawn, held))

    def decibels(mean: Tensor) -> Tensor:
        return -10 * mean.log10()

    found = {
        "psnr": mean_figure(error, seed, of=decibels),
        "psnr, last frame held": mean_figure(other, seed, of=decibels),
        "psnr, gained": gained(error, other, seed),
    }
    if not given < FRAME <= real.shape[1]:
        return found
    true, made, stays = (frame(probe, x) for x in (real, drawn, held))
    ok = both_read(true, probe.config.threshold)[:, 0]
    if ok.any():
        found["places off"] = mean_figure(apart(made, true)[ok, 0], seed)
        found["places off, last frame held"] = mean_figure(apart(stays, true)[ok, 0], seed)
    return found


def gained(errors: Tensor, others: Tensor, seed: int) -> Figure:
    """Decibels by which the mean of errors (n,) is below that of others of the same clips."""
    rows = draws(len(errors), RESAMPLES, seed)
    drawn = 10 * (others[rows].mean(1) / errors[rows].mean(1)).log10()
    value = 10 * (others.mean() / errors.mean()).log10()
    return Figure(value.item(), *drawn.double().quantile(bounds()).tolist())


def frame(probe: Probe, clips: Tensor) -> Readings:
    """What the probe reads in frame `FRAME` of clips, of shapes (n, 1, …)."""
    return probe.read(clips[:, FRAME - 1 : FRAME])


def pairs_of(data: Dataset, batch: Batch) -> Tensor | None:
    """The two digits of each clip by its label, as `measures.pairs` numbers them; (n,) int64."""
    names = data.label_names or ()
    if "label" not in batch or not all(len(name) == 2 and name.isdigit() for name in names):
        return None
    return torch.tensor([int(names[label]) for label in batch["label"].tolist()])


# Sets of clips ------------------------------------------------------------------------------------


def whole(data: Dataset, chosen: np.ndarray) -> Batch:
    """The chosen clips as one batch on the CPU."""
    parts = [batch for _, batch in batches_of(data, chosen, torch.device("cpu"), "clips")]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def draw(model: VideoGPT, batch: Batch, rule: SamplingRule, seed: int) -> Tensor:
    """Samples with a batch's conditions, as `evaluate.regenerate` draws them."""
    size, parts = AT_ONCE[model.device.type], []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(batch["video"]), size):
            part = {n: x[start : start + size].to(model.device) for n, x in batch.items()}
            given = model.gpt.config.cond_frames
            made = regenerate(model, part, given, rule=rule, seed=seed, first_clip=start)
            parts.append(made.cpu())
    return torch.cat(parts)


def given_frames(model: VideoGPT) -> int:
    """How many frames a model goes on from: `GIVEN`, or what it needs; 0 if it can't."""
    config, factor = model.vqvae.config, model.vqvae.config.downsample[0]
    given = model.gpt.config.cond_frames
    if not given and config.causal_time:
        given = -(-GIVEN // factor) * factor
    return given if given < config.frames else 0


def continued(
    model: VideoGPT,
    batch: Batch,
    given: int,
    rule: SamplingRule,
    seed: int,
    length: int | None = None,
) -> Tensor:
    """Clips that begin as a batch's do; the model is told no label if it does without."""
    config = model.gpt.config
    return model.sample(
        frames=batch["video"][:, :given],
        labels=batch["label"] if config.classes and not config.label_dropout else None,
        actions=batch["action"] if config.action_dim else None,
        temperature=rule.temperature,
        top_k=rule.top_k,
        top_p=rule.top_p,
        guidance=rule.guidance,
        seed=seed,
        length=length,
        batch_size=AT_ONCE[model.device.type],
        progress=not hidden(),
    )


def check_probe(probe: Probe, name: str, data: Dataset) -> None:
    """Raises ValueError unless a probe is that of `name` and reads clips such as the data's."""
    if probe.config.name != name:
        raise ValueError(f"the probe is of {probe.config.name}, what {name} shows it can't tell")
    probe.check(data.channels)


# From clips to figures ----------------------------------------------------------------------------


def side_by_side(values: Mapping[str, Values], seed: int) -> Table:
    """Means over clips, and their ratios to real clips' means, with intervals.

    Args:
        values: by set, of which `REAL` is one, and measure; sets have as many clips, clip i of all
            under the same conditions, so that they are drawn together.
        seed: of the bootstrap.
    """
    table: Table = {}
    for measure, real in values[REAL].items():
        table[measure] = {}
        for name, of in values.items():
            count = int(np.isfinite(of[measure]).sum())
            if count:
                ratio = None if name == REAL else ratio_figure(of[measure], real, seed)
                table[measure][name] = Shown(mean_of(of[measure], seed), ratio, count)
    return {measure: of for measure, of in table.items() if of}


def mean_of(values: np.ndarray, seed: int) -> Figure:
    """The mean (n,) over clips that have a value, with its interval."""
    return mean_figure(torch.from_numpy(values[np.isfinite(values)]), seed)


def ratio_figure(values: np.ndarray, others: np.ndarray, seed: int) -> Figure | None:
    """The ratio of means (n,) over clips with values, with its interval; None if that of 0."""
    a, b = torch.from_numpy(values), torch.from_numpy(others)
    rows = draws(len(a), RESAMPLES, seed)
    if not b.nanmean() > 0:
        return None
    drawn = a[rows].nanmean(1) / b[rows].nanmean(1)
    low, high = drawn[drawn.isfinite()].quantile(bounds()).tolist()
    return Figure((a.nanmean() / b.nanmean()).item(), low, high)
