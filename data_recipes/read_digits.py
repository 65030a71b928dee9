"""How many of a model's clips show a digit: a classifier trained on MNIST reads frame 8 of each.

    python data_recipes/read_digits.py moving-mnist --out sheet.png

The classifier sees 28 × 28 windows and knows eleven classes: the ten digits, and "none", learnt
from blank and off-centre windows, parts of strokes, and blends of two digits. A frame shows a digit
if some window is read as one with a probability over 0.8. The same measure on real test clips, on
their reconstructions and on frames whose 8 × 8 blocks are shuffled stands beside it.

Shapes: B windows or clips · T frames · H W pixels.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvgpt import VideoGPT, open_dataset, video
from tinyvgpt.bench import record
from tinyvgpt.data.mnist import load

NONE = 10  # the class of windows without a digit
FRAME, THRESHOLD, CLIPS = 7, 0.8, 64  # the eighth frame


def classifier() -> nn.Sequential:
    """A small convolutional network from (B, 1, 28, 28) to logits (B, 11)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 11),
    )


def shift(images: Tensor, low: int, high: int) -> Tensor:
    """Moves each image (B, 28, 28) by low … high pixels along each axis, to a random side."""
    n, size = len(images), images.shape[-1]
    steps = torch.randint(low, high + 1, (2, n, 1)) * (torch.randint(2, (2, n, 1)) * 2 - 1)
    rows, columns = high + torch.arange(size) - steps  # each (B, 28), into the padded images
    padded = F.pad(images, (high,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def scramble(images: Tensor) -> Tensor:
    """Images (B, 28, 28) whose sixteen 7 × 7 blocks change places: strokes without a digit."""
    n = len(images)
    blocks = images.view(n, 4, 7, 4, 7).transpose(2, 3).reshape(n, 16, 7, 7)
    order = torch.rand(n, 16).argsort(1)
    blocks = blocks[torch.arange(n)[:, None], order].view(n, 4, 4, 7, 7)
    return blocks.transpose(2, 3).reshape(n, 28, 28)


def halve(images: Tensor) -> Tensor:
    """Images (B, 28, 28) with one half, at a random side, blank."""
    ramp = torch.arange(28).expand(len(images), 28, 28)
    first = torch.where(ramp < 14, images, 0)
    half = torch.where(torch.rand(len(images), 1, 1) < 0.5, first, images - first)
    upright = torch.where(ramp.mT < 14, images, 0)
    other = torch.where(torch.rand(len(images), 1, 1) < 0.5, upright, images - upright)
    return torch.where(torch.rand(len(images), 1, 1) < 0.5, half, other)


def examples(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (B, 1, 28, 28) in [0, 1] and their classes: of four, two digits and two of none."""
    n = len(images)
    other = images[torch.randperm(n)]
    digits = shift(images, 0, 2)
    # What a window on a real frame also holds: a bit of the other digit near the border.
    cluttered = torch.maximum(digits, shift(other, 10, 22))
    blank = 0.1 * torch.rand(n, 28, 28)
    blends = torch.maximum(images, shift(other, 0, 4))
    kinds = torch.stack([shift(images, 8, 18), blends, halve(images), scramble(images), blank])
    none = [kinds[torch.randint(5, (n,)), torch.arange(n)] for _ in range(2)]
    windows = torch.cat([digits, cluttered, *none])[:, None]
    return windows, torch.cat([labels, labels, torch.full((2 * n,), NONE)])


def train(steps: int, mnist: str | None) -> tuple[nn.Module, float]:
    """A trained classifier, and its accuracy on shifted test digits."""
    torch.manual_seed(0)
    digits = load("train", mnist)
    images = torch.tensor(digits.images).float() / 255
    labels = torch.tensor(digits.labels).long()
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (64,))
        windows, classes = examples(images[chosen], labels[chosen])
        loss = F.cross_entropy(model(windows), classes, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval()
    held_out = load("test", mnist)
    tested = shift(torch.tensor(held_out.images).float() / 255, 0, 2)[:, None]
    with torch.no_grad():
        read = torch.cat([model(part).argmax(1) for part in tested.split(500)])
    return model, (read == torch.tensor(held_out.labels)).float().mean().item()


def best_reading(model: nn.Module, frames: Tensor) -> Tensor:
    """Highest probability of a digit in any window of each frame (B, H, W), uint8."""
    windows = frames.float().unfold(1, 28, 2).unfold(2, 28, 2) / 255  # (B, y, x, 28, 28)
    flat = windows.reshape(-1, 1, 28, 28)
    with torch.no_grad():
        p = torch.cat([model(part).softmax(1)[:, :NONE].amax(1) for part in flat.split(2000)])
    return p.view(len(frames), -1).amax(1)


def share(model: nn.Module, clips: Tensor) -> float:
    """Share of clips (B, T, H, W, 1) in whose frame 8 a digit is read."""
    return (best_reading(model, clips[:, FRAME, ..., 0]) > THRESHOLD).float().mean().item()


def shuffled_blocks(clips: Tensor) -> Tensor:
    """Clips whose frames have their 8 × 8 blocks in random order: strokes without digits."""
    b, t, h, w, c = clips.shape
    blocks = clips.view(b, t, h // 8, 8, w // 8, 8, c).transpose(3, 4).reshape(b, t, -1, 8, 8, c)
    blocks = blocks[:, :, torch.randperm(blocks.shape[2])]
    return blocks.view(b, t, h // 8, w // 8, 8, 8, c).transpose(3, 4).reshape(b, t, h, w, c)


def sheet(clips: Tensor) -> Tensor:
    """Frame 8 of all clips as one picture (H', W', C)."""
    return video.grid(clips[:, FRAME : FRAME + 1])[0]


def main() -> None:
    """Trains the classifier, samples, reads, and writes the sheet and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, shipped name or hub id")
    parser.add_argument("--mnist", help="folder of the full MNIST; the embedded subset if left out")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    reader, accuracy = train(options.steps, options.mnist)
    model = VideoGPT.from_pretrained(options.model)
    rule = {"temperature": options.temperature, "top_p": options.top_p}
    samples = model.sample(CLIPS, seed=0, progress=True, **rule)
    real = open_dataset("moving-mnist", "test").batch(range(256))["video"]
    figures = {
        "classifier_accuracy_on_test_digits": accuracy,
        "clips": CLIPS,
        "seed": 0,
        **rule,
        "digit_read_in_frame_8_of_samples": share(reader, samples),
        "of_real_test_clips": share(reader, real),
        "of_their_reconstructions": share(reader, model.reconstruct(real)),
        "of_shuffled_blocks": share(reader, shuffled_blocks(real)),
    }
    print(json.dumps(figures, indent=2))
    command = f"python {' '.join(['data_recipes/read_digits.py', *sys.argv[1:]])}"
    record(figures, "moving-mnist-digits", command, Path("book/results"))
    from PIL import Image

    picture = sheet(samples)[..., 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    Image.fromarray(picture.numpy()).save(options.out)


if __name__ == "__main__":
    main()
