"""Trains the probe of a dataset, which reads its frames, and measures how far it can be trusted.

    python data_recipes/train_probes.py --probe moving-mnist --mnist FOLDER
    python data_recipes/train_probes.py --probe robot-push

`--trained FOLDER` chooses the score of a probe that was trained before, and measures that.

The probe sees frames as they are, and spoilt ones (`digit_frames`, `push_frames`), whose spoilt
parts it must not take for what they were. A frame is accepted that shows both digits, or the hand
and two objects, with a score that is chosen on validation frames: the one at which real ones are
accepted as often as the spoilt kind that looks most like them is rejected. At that score test
frames are read: how many real ones are accepted, how many spoilt ones of each kind rejected, how
right readings are, how far off places.

Shapes: N frames.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from digit_frames import REAL, DigitFrames, Truth
from push_frames import PushFrames
from recipe import run
from torch import Tensor

from tinyvgpt.bench import device_name, record
from tinyvgpt.probes import FOLDER, Probe, ProbeConfig, Readings, loss, targets


class Frames(Protocol):
    """What training asks of a dataset's frames."""

    config: ProbeConfig  # of the probe
    kinds: tuple[str, ...]  # of spoilt frames
    about: str  # what they are made of

    def batch(self, step: int) -> Truth: ...  # to train on
    def of_kind(self, kind: int) -> Truth: ...  # to measure on
    def score(self, readings: Readings) -> Tensor: ...  # how certain a frame is (N,)
    def told(
        self, readings: Readings, classes: Tensor, places: Tensor, threshold: float
    ) -> dict[str, float]: ...  # how right readings are


def weathered(frames: Tensor) -> Tensor:
    """Floats (N, C, H, W) of frames, some softened and with noise, as tokenizers leave them."""
    x = frames.movedim(-1, 1).float() / 255
    soft = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    share = 0.6 * torch.rand(len(x), 1, 1, 1, device=x.device)
    x = (1 - share) * x + share * soft
    return (x + 0.04 * torch.rand_like(share) * torch.randn_like(x)).clamp(0, 1)


def train(frames: Frames, steps: int, device: torch.device) -> Probe:
    """A probe, trained on `frames`."""
    torch.manual_seed(0)
    probe = Probe(frames.config).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        seen, classes, places = frames.batch(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            marks, shifts = probe(weathered(seen))
        wanted = targets(classes, places, len(frames.config.classes), marks.shape[-1])
        value = loss(marks.float(), shifts.float(), wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}, loss {value.item():.3f}", flush=True)
    return probe.eval()


def scores(probe: Probe, frames: Frames, kind: int) -> Tensor:
    """How certain each frame of a kind is, (N,)."""
    return frames.score(probe.read(frames.of_kind(kind)[0]))


def balanced_score(probe: Probe, frames: Frames) -> float:
    """The score, to three digits, with the best of the worst share that is judged rightly.

    Shares are of real frames accepted, and of spoilt ones of each kind rejected.

    Raises:
        ValueError: at no score more than half of each.
    """
    real = scores(probe, frames, REAL)
    spoilt = [scores(probe, frames, kind) for kind in range(len(frames.kinds))]
    candidates = torch.cat([real, *spoilt]).unique()
    right = 1 - share_below(candidates, real)
    for of_kind in spoilt:
        right = torch.minimum(right, share_below(candidates, of_kind))
    if right.max() <= 0.5:
        raise ValueError("the probe can't tell real frames from spoilt ones: give more steps")
    return float(f"{candidates[right.argmax()].item():.3g}")


def share_below(candidates: Tensor, found: Tensor) -> Tensor:
    """The share of scores (N,) that is below each candidate (n,)."""
    return torch.searchsorted(found.sort()[0], candidates) / len(found)


def trusted(probe: Probe, frames: Frames) -> dict[str, object]:
    """What test frames show of the probe."""
    threshold = probe.config.threshold
    real, classes, places = frames.of_kind(REAL)
    readings = probe.read(real)
    accepted = frames.score(readings) >= threshold
    told = frames.told(readings, classes.cpu(), places.cpu(), threshold)
    return {
        "frames": len(real),
        "real frames accepted": round(accepted.float().mean().item(), 4),
        **{name: round(value, 4) for name, value in told.items()},
        "spoilt frames rejected": {
            name: round((scores(probe, frames, i) < threshold).float().mean().item(), 4)
            for i, name in enumerate(frames.kinds)
        },
    }


def main() -> None:
    """Trains, chooses the score, tests, saves and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--probe", choices=("moving-mnist", "robot-push"), required=True)
    parser.add_argument("--mnist", help="folder with all of MNIST; else the package's digits")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--trained", help="folder of a probe that is not to be trained again")
    parser.add_argument("--clips", type=int, default=512, help="of digits, of each test")
    parser.add_argument("--out", type=Path, help="by default where shipped probes are")
    parser.add_argument("--results", type=Path, default=Path("book/results"))
    args = parser.parse_args()
    for name in ("steps", "clips"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, it must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits: list[Frames] = [
        PushFrames(split, device)
        if args.probe == "robot-push"
        else DigitFrames(split, device, args.mnist, args.clips)
        for split in ("train", "val", "test")
    ]
    training, held_out, test = splits
    if args.trained:
        probe = Probe.from_pretrained(args.trained).to(device)
    else:
        probe = train(training, args.steps, device)
    torch.manual_seed(1)  # frames are spoilt alike, whether it was trained now or before
    threshold = balanced_score(probe, held_out)
    accepted = (scores(probe, held_out, REAL) >= threshold).float().mean().item()
    print(f"from a score of {threshold}: {accepted:.1%} of real validation frames accepted")
    chosen = Probe(replace(probe.config, threshold=threshold))
    chosen.load_state_dict(probe.state_dict())
    out = args.out or FOLDER / args.probe
    chosen.to(device).eval().save(out)
    result = {
        "device": device_name(str(device)),
        "trained on": training.about,
        "tested on": test.about,
        **({} if args.trained else {"steps": args.steps}),
        "threshold": threshold,
        "real validation frames accepted": round(accepted, 4),
        **trusted(Probe.from_pretrained(out).to(device), test),
    }
    words = ["--probe", args.probe]
    words += ["--trained", "FOLDER"] if args.trained else ["--steps", args.steps]
    words += ["--mnist", "FOLDER"] if args.mnist else []
    words += [] if args.clips == parser.get_default("clips") else ["--clips", args.clips]
    command = " ".join(["python data_recipes/train_probes.py", *map(str, words)])
    print(result)
    record(result, f"{args.probe}-probe", command, args.results)


if __name__ == "__main__":
    run(main)
