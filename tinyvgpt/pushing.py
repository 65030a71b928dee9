"""What clips of robot pushing show: whether the hand goes where it is commanded, and objects move.

A probe reads where the hand's fingertips are in the picture, and each object, which it knows by its
colour. The commanded way is where the simulator had the fingertips in the last given frame and all
actions from there on, as the camera sees it; how the hand's way follows it is a correlation over
time, of each axis of the picture. Beside samples with a clip's own actions stand those with another
clip's, with the opposite ones, and with none. Chapters 17 and 18 read with it.

Shapes: B clips · T frames · A = 4 numbers of an action · places are in pixels, down and right.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyvgpt.data import Dataset, RobotPush
from tinyvgpt.data.robot_push import COLOURS, SIDE, in_picture
from tinyvgpt.evaluate import AS_IT_IS, Batch, check, choose
from tinyvgpt.frechet import Figure, mean_figure
from tinyvgpt.probes import Probe, Readings
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.shown import (
    REAL,
    Groups,
    check_probe,
    continued,
    given_frames,
    ratio_figure,
    side_by_side,
    whole,
)
from tinyvgpt.videogpt import VideoGPT

CLASSES = ("hand", *COLOURS)  # of the probe
READ = 8  # peaks of a frame that the probe hands out: a hand and at most five objects, and room
OBJECTS = 2  # that must be read beside the hand; of three or more, as some are behind the arm
MOVES = 3.0  # pixels; along an axis with less commanded there is no way to compare
PUSHED = 4.0  # pixels by which an object has moved
LEAST = 5  # frames of a way
TRAY = (0.20, 0.26)  # metres from its middle to its rim along x and y
OWN = (REAL, "reconstructions", "samples")  # sets with their own actions
LENGTH, LATE = 64, 4  # frames of a rollout; those at its end, and at a window's end, that count


class Sights(NamedTuple):
    """What each frame shows."""

    hand: Tensor  # float32 (B, T, 2); NaN where there is none
    certain: Tensor  # float32 (B, T), the hand's score
    objects: Tensor  # float32 (B, T, 7, 2), one a colour; NaN where there is none
    scores: Tensor  # float32 (B, T, 7)


def sights(readings: Readings) -> Sights:
    """The most certain reading of the hand and of each colour; of shapes (…, n) as (…, ·)."""
    scores, places = [], []
    for kind in range(len(CLASSES)):
        found = torch.where(readings.classes == kind, readings.scores, 0)
        score, at = found.max(-1)
        place = readings.places.gather(-2, at[..., None, None].expand(*at.shape, 1, 2))[..., 0, :]
        scores.append(score)
        places.append(torch.where(score[..., None] > 0, place, torch.nan))
    return Sights(places[0], scores[0], torch.stack(places[1:], -2), torch.stack(scores[1:], -1))


def acceptance(seen: Sights) -> Tensor:
    """How certain it is that a frame shows the hand and `OBJECTS` objects, float32 (…)."""
    return torch.minimum(seen.certain, seen.scores.sort(-1, descending=True)[0][..., OBJECTS - 1])


# Ways ---------------------------------------------------------------------------------------------


def course(start: Tensor, actions: Tensor) -> Tensor:
    """Where actions (B, n, A) lead from places (B, 3) in metres, these first: (B, n + 1, 3)."""
    start = start[:, None]
    return torch.cat([start, start + actions[..., :3].cumsum(1)], 1)


def in_frames(points: Tensor, resolution: int) -> Tensor:
    """Points (…, 3) as the probe says places: pixels down and right, (…, 2)."""
    return in_picture(points).flip(-1) * (resolution / SIDE)


def inside(points: Tensor) -> Tensor:
    """How many frames of each course (B, n, 3) are over the tray, before it first leaves: (B,)."""
    x, y, z = points.unbind(-1)
    ok = (x.abs() <= TRAY[0]) & (y.abs() <= TRAY[1]) & (z >= 0)
    return ok.long().cumprod(1).sum(1)


def way(seen: Sights, given: int) -> Tensor:
    """Where the hand is from the last given frame on, (B, n, 2); there where it is not read."""
    hand = seen.hand[:, given - 1 :]
    return torch.where(hand.isfinite(), hand, hand[:, :1].nan_to_num(0))


def follows(ways: Tensor, commanded: Tensor, lengths: Tensor) -> np.ndarray:
    """Correlation over time of ways (B, n, 2) with commanded ones: float64 (B, 2), of each axis.

    Of each clip's first `lengths` (B,) frames; NaN where these are under `LEAST`, or less than
    `MOVES` is commanded. A hand that never moves has 0.
    """
    found = np.full((len(ways), 2), np.nan)
    for clip, n in enumerate(lengths.tolist()):
        a, b = (x[clip, :n].double() for x in (ways, commanded))
        if n < LEAST:
            continue
        a, b = a - a.mean(0), b - b.mean(0)
        likeness = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-6)
        enough = (b.amax(0) - b.amin(0)) >= MOVES
        found[clip] = torch.where(enough, likeness, torch.nan).numpy()
    return found


def steering(ways: Tensor, commanded: Tensor, lengths: Tensor) -> dict[str, np.ndarray]:
    """`follows` as measures (B,): the mean of both axes, and each by itself."""
    of = follows(ways, commanded, lengths)
    counted = np.isfinite(of)
    mean = np.where(counted, of, 0).sum(1) / np.where(counted.any(1), counted.sum(1), np.nan)
    return {"follows": mean, "follows down": of[:, 0], "follows right": of[:, 1]}


# Objects ------------------------------------------------------------------------------------------


def moved(seen: Sights, given: int, threshold: float) -> Tensor:
    """Which objects move from the last given frame to the last ones, float64 (B, 7): 1 or 0.

    NaN where one is not read there, or in none of the last `LATE` frames.
    """
    places = torch.where((seen.scores >= threshold)[..., None], seen.objects, torch.nan)
    last = places[:, -LATE:].nanmedian(1)[0]
    far = (last - places[:, given - 1]).norm(dim=-1)
    return torch.where(far.isfinite(), (far >= PUSHED).double(), torch.nan)


def pushing(made: Tensor, real: Tensor) -> dict[str, np.ndarray]:
    """Measures (B,) of what `moved` found (B, 7) in clips, and in the real ones that they follow.

    What is read in the end of the real clip only is not seen to move.
    """
    known, moves = real.isfinite(), (made == 1).double()
    some_move = torch.where(known.any(1), (moves * known).amax(1), torch.nan)

    def share(of: Tensor) -> np.ndarray:
        return torch.where(of, moves, torch.nan).nanmean(1).numpy()

    return {"moved": some_move.numpy(), "pushed": share(real == 1), "left": share(real == 0)}


# The whole ----------------------------------------------------------------------------------------


def show_pushing(
    model: VideoGPT,
    data: Dataset,
    probe: Probe,
    clips: int,
    *,
    rule: SamplingRule = AS_IT_IS,
    seed: int = 0,
) -> Groups:
    """Measures how a model's clips go on from real first frames as actions say.

    Args:
        model: steered by actions, and able to go on from frames; on the device where it computes.
        data: "robot-push", clips never trained on.
        probe: that of "robot-push".
        clips: how many; all, where there are fewer.
        rule: how clips are drawn.
        seed: of samples and intervals.

    Returns:
        "shown", measures by set, and "rollout", figures of clips of `LENGTH` frames.

    Raises:
        ValueError: for data, a probe or a model that don't fit, or fewer than 2 clips.
    """
    given = check_pushing(model, data, probe)
    chosen, _ = choose(len(data), clips)
    batch, tips = whole(data, chosen), data.endeffector(chosen)  # type: ignore[attr-defined]
    real, own, g = batch["video"], batch["action"], given - 1  # g: the last given frame
    led = {
        "samples": own,
        "another clip's actions": own.roll(1, 0),
        "opposite actions": -own,
        "no actions": torch.zeros_like(own),
    }
    sets = {REAL: real, "reconstructions": model.reconstruct(real)}
    for name, actions in led.items():
        told = {**batch, "action": torch.cat([own[:, :g], actions[:, g:]], 1)}
        sets[name] = continued(model, told, given, rule, seed)
    seen = {name: sights(probe.read(video)) for name, video in sets.items()}
    meant = in_frames(course(tips[:, g], own[:, g:-1]), data.resolution)
    until = {name: torch.full((len(real),), meant.shape[1]) for name in sets}
    until["opposite actions"] = inside(course(tips[:, g], -own[:, g:-1]))
    threshold = probe.config.threshold
    really = moved(seen[REAL], given, threshold)
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, sight in seen.items():
        ways = way(sight, given)
        values[name] = steering(ways, meant, until[name])
        if name in OWN:
            values[name] |= pushing(moved(sight, given, threshold), really)
            values[name]["off"] = (ways - meant)[:, 1:].norm(dim=-1).double().mean(1).numpy()
            accepted = acceptance(sight)[:, given:] >= threshold
            values[name]["accepted"] = accepted.double().mean(1).numpy()
    filled(values)
    figures = rollout(model, batch, tips, probe, given, rule, seed)
    return {"shown": dict(side_by_side(values, seed)), "rollout": dict(figures)}


def check_pushing(model: VideoGPT, data: Dataset, probe: Probe) -> int:
    """How many frames are given; ValueError for a model, data or a probe that don't fit."""
    check_probe(probe, "robot-push", data)
    check(model, data)
    given = given_frames(model)
    if not isinstance(data, RobotPush):
        raise ValueError("what robot clips show can be told of the data robot-push only")
    if not given or not model.gpt.config.action_dim:
        raise ValueError("the model can't go on from frames as actions say; nothing can be told")
    return given


def rollout(
    model: VideoGPT,
    batch: Batch,
    tips: Tensor,
    probe: Probe,
    given: int,
    rule: SamplingRule,
    seed: int,
) -> dict[str, Figure]:
    """Figures of clips that go on to `LENGTH` frames, by their actions there and back again."""
    frames, g = batch["video"].shape[1], given - 1
    actions = back_and_forth(batch["action"], LENGTH)
    drawn = continued(model, {**batch, "action": actions}, given, rule, seed, length=LENGTH)
    seen = sights(probe.read(drawn))
    accepted = (acceptance(seen) >= probe.config.threshold).double()
    early, late = (accepted[:, end - LATE : end].mean(1) for end in (frames, LENGTH))
    meant = in_frames(course(tips[:, g], actions[:, g:-1]), drawn.shape[2])
    of = steering(way(seen, given), meant, torch.full((len(drawn),), meant.shape[1]))["follows"]
    found = {
        f"accepted, frames {frames - LATE + 1} to {frames}": mean_figure(early, seed),
        f"accepted, frames {LENGTH - LATE + 1} to {LENGTH}": mean_figure(late, seed),
    }
    ratio = ratio_figure(late.numpy(), early.numpy(), seed)
    if ratio:
        found["accepted, these over those"] = ratio
    if np.isfinite(of).any():
        found["follows"] = mean_figure(torch.from_numpy(of[np.isfinite(of)]), seed)
    return found


def back_and_forth(actions: Tensor, length: int) -> Tensor:
    """Actions (B, T, A), then what undoes them, and again: (B, length, A)."""
    there_and_back = torch.cat([actions, -actions.flip(1)], 1)
    times = -(-length // there_and_back.shape[1])
    return there_and_back.repeat(1, times, 1)[:, :length]


def filled(values: dict[str, dict[str, np.ndarray]]) -> None:
    """Gives every set the measures of real clips, NaN where it has none of its own."""
    for measure, real in values[REAL].items():
        for of in values.values():
            of.setdefault(measure, np.full(len(real), np.nan))
