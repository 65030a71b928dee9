"""Trains the probe that reads Moving MNIST, and measures how far it can be trusted.

    python data_recipes/train_probes.py --mnist FOLDER

The probe sees frames as they are, and frames in which digits were spoilt: two blended into one, one
blurred, its strokes in disorder. These it must not take for digits. The score that counts is then
chosen on validation frames: the lowest at which 95 % of the spoilt ones are rejected. At that score
test frames are read: how many real ones are accepted, how many spoilt ones of each kind rejected,
how often a digit that is marked is the right one, how far off its middle is.

Shapes: B clips · T frames · N = B·T frames · n = 2 digits of a clip.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from read_digits import scramble, shift
from recipe import run
from torch import Tensor

from tinyvgpt.bench import device_name, record
from tinyvgpt.data import MovingMNIST
from tinyvgpt.data.mnist import SIDE, load
from tinyvgpt.data.moving_mnist import render
from tinyvgpt.probes import FOLDER, Probe, ProbeConfig, loss, targets

KINDS = ("blend", "blur", "strokes")  # of spoilt digits
CLIPS = 32  # of a step
REJECTED = 0.95  # of spoilt validation frames


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images (B, 28, 28) through a Gaussian of width `sigma` pixels (B,) each."""
    line = torch.arange(-12, 13)
    weights = torch.exp(-(line**2) / (2 * sigma[:, None] ** 2))
    weights = weights / weights.sum(1, keepdim=True)  # (B, 25)
    for axis in (2, 3):
        kernel = weights[:, None].unsqueeze(axis)  # (B, 1, 1, 25) or (B, 1, 25, 1)
        padding = [0, 12] if axis == 2 else [12, 0]
        images = F.conv2d(images[None], kernel, padding=padding, groups=len(images))[0]
    return images


def spoilt(images: Tensor, others: Tensor, kind: str) -> Tensor:
    """What is no digit, made of digits (B, 28, 28) in 0 … 1."""
    if kind == "blend":
        return torch.maximum(images, shift(others, 0, 4))
    if kind == "blur":
        return blurred(images, 2.5 + 1.5 * torch.rand(len(images)))
    return scramble(images)


def frames_of(
    data: MovingMNIST, indices: Tensor, kinds: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of clips whose digits are as they are, or spoilt.

    Args:
        data: the clips.
        indices: B of them.
        kinds: int64 (B, n), -1 for a digit as it is, or an index into KINDS.
        device: where to render.

    Returns:
        Frames uint8 (N, H, W, 1), and for `targets` classes (N, n) and middles (N, n, 2).
    """
    path = data.trajectories(indices)
    digits = load(data.split, data.digits)
    images = torch.from_numpy(digits.images[path.digits]).float() / 255  # (B, n, 28, 28)
    flat, which = images.flatten(0, 1), kinds.flatten()
    others = flat[torch.randperm(len(flat))]
    for i, kind in enumerate(KINDS):
        chosen = which == i
        if chosen.any():
            flat[chosen] = spoilt(flat[chosen], others[chosen], kind)
    drawn = (255 * flat.clamp(0, 1)).round().byte().view(images.shape).to(device)
    places = torch.from_numpy(path.positions)  # (B, T, n, 2)
    frames = render(drawn, places.to(device), data.resolution).flatten(0, 1)
    classes = torch.where(kinds < 0, torch.from_numpy(path.classes), -1)
    classes = classes[:, None].expand(-1, data.frames, -1).flatten(0, 1)
    return frames, classes.to(device), (places.flatten(0, 1) + SIDE / 2).float().to(device)


def weathered(frames: Tensor) -> Tensor:
    """Floats (N, 1, H, W) of frames, some softened and with noise, as tokenizers leave them."""
    x = frames.movedim(-1, 1).float() / 255
    soft = F.avg_pool2d(x, 3, stride=1, padding=1)
    share = 0.6 * torch.rand(len(x), 1, 1, 1, device=x.device)
    x = (1 - share) * x + share * soft
    return (x + 0.04 * torch.rand_like(share) * torch.randn_like(x)).clamp(0, 1)


def train(mnist: str | None, steps: int, device: torch.device) -> Probe:
    """A probe, trained on clips of which every third digit is spoilt."""
    torch.manual_seed(0)
    data = MovingMNIST("train", digits=mnist)
    probe = Probe(ProbeConfig("moving-mnist", tuple("0123456789"), 2)).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        indices = torch.arange(step * CLIPS, (step + 1) * CLIPS) % len(data)
        kinds = torch.randint(3 * len(KINDS), (CLIPS, 2))
        kinds[kinds >= len(KINDS)] = -1
        frames, classes, places = frames_of(data, indices, kinds, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            marks, shifts = probe(weathered(frames))
        wanted = targets(classes, places, 10, marks.shape[-1])
        value = loss(marks.float(), shifts.float(), wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}, loss {value.item():.3f}", flush=True)
    return probe.eval()


def second_scores(probe: Probe, data: MovingMNIST, kind: int) -> Tensor:
    """The less certain digit's score in each frame (N,) of clips whose digits are of a kind."""
    device = probe.marks.weight.device
    kinds = torch.full((len(data), 2), kind)
    frames, _, _ = frames_of(data, torch.arange(len(data)), kinds, device)
    return probe.read(frames).scores[:, 1]


def trusted(probe: Probe, data: MovingMNIST) -> dict[str, object]:
    """What test clips show of the probe."""
    threshold, device = probe.config.threshold, probe.marks.weight.device
    real = torch.full((len(data), 2), -1)
    frames, classes, places = frames_of(data, torch.arange(len(data)), real, device)
    readings = probe.read(frames)
    classes, places = classes.cpu(), places.cpu()
    accepted = readings.scores[:, 1] >= threshold
    right = readings.classes.sort(1)[0] == classes.sort(1)[0]
    order, wanted = readings.classes.argsort(1), classes.argsort(1)
    at = [x.gather(1, i[..., None].expand(-1, -1, 2)) for x, i in
          ((readings.places, order), (places, wanted))]  # fmt: skip
    apart = (at[0] - at[1]).norm(dim=-1)
    clear = accepted & right.all(1) & (classes[:, 0] != classes[:, 1])
    return {
        "frames": len(frames),
        "real frames accepted": round(accepted.float().mean().item(), 4),
        "of these with both digits right": round(right[accepted].all(1).float().mean().item(), 4),
        "middles off by, pixels": round(apart[clear].mean().item(), 2),
        "spoilt frames rejected": {
            name: round((second_scores(probe, data, i) < threshold).float().mean().item(), 4)
            for i, name in enumerate(KINDS)
        },
    }


def main() -> None:
    """Trains, chooses the score, tests, saves and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mnist", help="folder with all of MNIST; else the package's digits")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--clips", type=int, default=512, help="of each test; 16 frames each")
    parser.add_argument("--out", type=Path, default=FOLDER / "moving-mnist")
    parser.add_argument("--results", type=Path, default=Path("book/results"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = train(args.mnist, args.steps, device)
    held_out, test = (
        MovingMNIST(split, digits=args.mnist, size=args.clips) for split in ("val", "test")
    )
    scores = torch.cat([second_scores(probe, held_out, kind) for kind in range(len(KINDS))])
    threshold = float(f"{scores.quantile(REJECTED).item():.3g}")
    accepted = (second_scores(probe, held_out, -1) >= threshold).float().mean().item()
    print(f"from a score of {threshold}: {accepted:.1%} of real validation frames accepted")
    chosen = Probe(ProbeConfig("moving-mnist", tuple("0123456789"), 2, threshold=threshold))
    chosen.load_state_dict(probe.state_dict())
    chosen.to(device).eval().save(args.out)
    found = trusted(Probe.from_pretrained(args.out).to(device), test)
    result = {
        "device": device_name(str(device)),
        "steps": args.steps,
        "threshold": threshold,
        **found,
    }
    words = ["--steps", args.steps] + (["--mnist", "FOLDER"] if args.mnist else [])
    command = " ".join(["python data_recipes/train_probes.py", *map(str, words)])
    print(result)
    record(result, "moving-mnist-probe", command, args.results)


if __name__ == "__main__":
    run(main)
