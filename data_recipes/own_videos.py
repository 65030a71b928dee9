"""What `book/own_videos.md` shows of longer trainings: figures, and clips to look at.

    python data_recipes/own_videos.py --runs runs/own-videos

trains on all the films that the page has, in colour at 64 x 64, before they are written to files:
two tokenizers and the GPTs on them, of the preset's sizes and finer; a GPT that goes on for too
long; and GPTs on a part of the films. Figures go to book/results/own-videos.json, clips to
book/_static/own-videos-*.mp4: reconstructions, samples, and continued films. Needs PyAV.

A run that is finished is not repeated, one that was stopped goes on from its last checkpoint: type
the same command again. With --smoke everything is tiny and ends in a minute on a CPU; its figures
mean nothing, and go into the folder of runs, as its clips do.

Shapes: n films · L frames of a film · B clips · T frames of a clip.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe import finished, run
from torch import Tensor

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, evaluate, open_dataset, video
from tinyvgpt.bench import device_name, exact_float32, record
from tinyvgpt.data.windows import Windows, default_stride
from tinyvgpt.encode import encode
from tinyvgpt.presets import own_videos
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import train_gpt, train_vqvae

LENGTH, FPS = 20, 10  # frames of a film, and how many are a second
SIDES = ("left", "right")
BITS = ("bits_per_token", "val_bits_per_token")  # in a log
MEASURED = 64  # clips of a split, at most


@dataclass(frozen=True)
class Kind:
    """Sizes, and how long they are trained."""

    vqvae: VQVAEConfig
    train_vqvae: TrainConfig
    gpt: GPTConfig
    train_gpt: TrainConfig


@dataclass(frozen=True)
class Plan:
    """All runs."""

    kinds: dict[str, Kind]
    long: int  # steps of a GPT of the preset's sizes that learns by heart
    short: int  # of those on a part of the films
    parts: tuple[int, ...]  # how many films each of these has


def plan() -> Plan:
    """The preset's sizes and finer ones, as the page's commands set them."""
    own = own_videos()
    fine = {"downsample": (4, 4, 4), "hidden": 128, "res_blocks": 2, "codes": 512, "code_dim": 64}
    pixels = replace(own.train_vqvae, batch_size=32, lr=1e-3, warmup=200, ema=0.999)
    tokens = replace(own.train_gpt, batch_size=32, lr=1e-3, warmup=100, ema=0.99)
    return Plan(
        {
            "preset": kind(own.vqvae, replace(pixels, steps=4000), replace(tokens, steps=1200)),
            "finer": kind(
                replace(own.vqvae, **fine),
                replace(pixels, steps=3000),
                replace(tokens, steps=1800),
                width=240, layers=6, dropout=0.2,
            ),
        },
        long=2400,
        short=800,
        parts=(15, 58, 231),
    )  # fmt: skip


def kind(
    vqvae: VQVAEConfig, train_vqvae: TrainConfig, train_gpt: TrainConfig, **changes: Any
) -> Kind:
    """Sizes with the preset's GPT, but for changes, and its labels."""
    own = own_videos().gpt
    kept = ("width", "heads", "layers", "dropout", "attn_dropout", "label_dropout")
    sizes = {name: getattr(own, name) for name in kept}
    gpt = GPTConfig.for_vqvae(vqvae, **(sizes | changes), classes=len(SIDES))
    every = max(train_gpt.steps // 20, 1)
    often = {"validate_every": every, "log_every": every, "keep": 1, "preview_every": 0}
    return Kind(
        vqvae,
        replace(train_vqvae, validate_every=0, keep=1, preview_every=0),
        gpt,
        replace(train_gpt, **often),
    )


def smoke() -> Plan:
    """The same runs, with as little as there can be of everything."""
    vqvae = replace(own_videos().vqvae, downsample=(4, 16, 16), hidden=8, code_dim=8, codes=16)
    train = TrainConfig(steps=2, batch_size=2, warmup=1, tensorboard=False, validation_clips=2)
    tiny = kind(vqvae, train, train, width=12, heads=2, layers=1)
    return Plan({"preset": tiny, "finer": tiny}, long=3, short=2, parts=(2, 231))


class Films:
    """Clips from films, (n, L, 64, 64, 3), that each belong to a side; a `data.Dataset`."""

    channels, frames, resolution, label_names = 3, 16, 64, SIDES

    def __init__(self, split: str, count: int | None = None):
        """Two seconds of each of the first clips of robot-push, those that go furthest aside."""
        clips = open_dataset("robot-push", split, frames=30)
        takes = clips.batch(range(count or len(clips)))
        sideways = takes["action"][..., 1] - takes["action"][..., 0]  # metres, right and away
        ways = sideways.unfold(1, LENGTH, 1).sum(-1)  # from each start
        starts = ways.abs().argmax(1)
        rows = torch.arange(len(starts))
        self.films = takes["video"][rows[:, None], starts[:, None] + torch.arange(LENGTH)]
        self.labels = (ways[rows, starts] > 0).long()
        lengths = [LENGTH] * len(self.films)
        self.windows = Windows(lengths, self.frames, default_stride(split, self.frames))

    def __len__(self) -> int:
        """How many clips there are."""
        return len(self.windows)

    def batch(
        self, indices: Sequence[int] | np.ndarray | Tensor, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Clips by their numbers: video (B, T, 64, 64, 3) and label (B,)."""
        films, starts = (torch.from_numpy(x) for x in self.windows.locate(indices))
        clips = self.films[films[:, None], starts[:, None] + torch.arange(self.frames)]
        return {"video": clips.to(device), "label": self.labels[films].to(device)}


# One run ------------------------------------------------------------------------------------------


def lines_of(folder: Path, *names: str) -> list[dict[str, float]]:
    """Lines of a run's log that have all these measurements."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if all(name in line for name in names)]


def minutes(folder: Path, unit: str, units: int) -> float:
    """What a run's steps took, of so many units each, without validation."""
    rate = f"{unit}_per_second"
    lines = lines_of(folder, rate)
    steps = np.diff([0, *(line["step"] for line in lines)])
    return sum(n * units / line[rate] for n, line in zip(steps, lines, strict=True)) / 60


def memory() -> dict[str, float]:
    """Most memory that was taken on the GPU, in 10⁹ bytes, since it was asked for last."""
    if not torch.cuda.is_available():
        return {}
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return {"memory_gb": most}


def tokenizer_run(of: Kind, folder: Path, data: dict[str, Films]) -> dict[str, float]:
    """Trains a tokenizer and measures it."""
    torch.manual_seed(0)
    memory()
    train_vqvae(VQVAE(of.vqvae), data["train"], of.train_vqvae, folder)
    figures = {
        "steps": of.train_vqvae.steps,
        "minutes": minutes(folder, "clips", of.train_vqvae.batch_size),
        **memory(),
    }
    vqvae = VQVAE.from_pretrained(folder).to(of.train_vqvae.torch_device())
    with torch.no_grad(), exact_float32(True):
        for split, clips in data.items():
            batch = clips.batch(spread(clips), vqvae.codebook.codes.device)
            tokens = encode(vqvae, batch)
            error = evaluate.squared_error(batch["video"], video.to_uint8(vqvae.decode(tokens)))
            figures[f"{split}_psnr"] = -10 * error.mean().log10().item()
            figures[f"{split}_codes_used"] = len(tokens.unique())
    return rounded(figures)


def gpt_run(
    of: Kind, steps: int, tokenizer: Path, folder: Path, data: dict[str, Films]
) -> dict[str, float]:
    """Trains a GPT for so many steps on a tokenizer's tokens, and measures it."""
    torch.manual_seed(0)
    vqvae = VQVAE.from_pretrained(tokenizer)
    model = VideoGPT(vqvae, GPT(of.gpt, vqvae.codebook.codes), SIDES)
    config = replace(of.train_gpt, steps=steps, encode_once=len(data["train"]))
    memory()
    train_gpt(model, data["train"], config, folder, validation=data["val"])
    units = config.batch_size * of.gpt.tokens
    figures = {"steps": steps, "minutes": minutes(folder, "tokens", units), **memory()}
    model = VideoGPT.from_pretrained(folder).to(config.torch_device())
    with torch.no_grad(), exact_float32(True):
        for split, clips in data.items():
            batch = clips.batch(spread(clips), model.device)
            nats = evaluate.nats(model, encode(model.vqvae, batch), batch)
            found = evaluate.likelihood(model, nats, seed=0)
            figures[f"{split}_bits"] = found["bits_per_token"].value
    return rounded(figures) | {"tokens_per_clip": of.gpt.tokens}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """The same to four digits behind the point."""
    return {name: round(value, 4) for name, value in figures.items()}


def spread(clips: Films) -> np.ndarray:
    """Some clips to measure on, of films from the first to the last."""
    count = min(MEASURED, len(clips))
    return np.linspace(0, len(clips) - 1, count).astype(np.int64)


# All runs -----------------------------------------------------------------------------------------


def train_all(plan: Plan, runs: Path) -> dict[str, Any]:
    """What all runs bring."""
    data = {split: Films(split) for split in ("train", "val", "test")}
    found: dict[str, Any] = {"films": about(data)}
    for name, of in plan.kinds.items():
        places = [runs / f"{stage}-{name}" for stage in ("tokenizer", "gpt")]
        work = partial(tokenizer_run, of, places[0], data)
        found[name] = {"tokenizer": finished(places[0], asdict(of), work)}
        work = partial(gpt_run, of, of.train_gpt.steps, *places, data)
        found[name]["gpt"] = finished(places[1], asdict(of), work)
    preset, tokenizer = plan.kinds["preset"], runs / "tokenizer-preset"
    folder, settings = runs / "gpt-long", {**asdict(preset), "steps": plan.long}
    finished(folder, settings, partial(gpt_run, preset, plan.long, tokenizer, folder, data))
    lines = zip(*(lines_of(folder, name) for name in BITS), strict=True)
    curve = [[seen["step"], *map(dict.get, (seen, unseen), BITS)] for seen, unseen in lines]
    found["preset"]["curves"] = {"gpt": curve}  # of the longest run
    found["data"] = []
    for count in plan.parts:
        folder, some = runs / f"gpt-{count}-films", {**data, "train": Films("train", count)}
        settings = {**asdict(preset), "steps": plan.short, "films": count}
        work = partial(gpt_run, preset, plan.short, tokenizer, folder, some)
        figures = finished(folder, settings, work)
        kept = {name: figures[name] for name in ("steps", "train_bits", "val_bits")}
        found["data"].append({"films": count, "minutes": length(count), **kept})
    return found


def about(data: dict[str, Films]) -> dict[str, Any]:
    """What the films are."""
    counts = {split: len(clips.films) for split, clips in data.items()}
    return {**counts, "minutes": length(counts["train"]), "clips": len(data["train"])}


def length(films: int) -> float:
    """Minutes of film."""
    return films * LENGTH / FPS / 60


def show(runs: Path, out: Path) -> None:
    """Writes clips: films and their reconstructions, samples, and films continued."""
    device = TrainConfig().torch_device()
    models = {
        name: VideoGPT.from_pretrained(runs / f"gpt-{name}").to(device)
        for name in ("preset", "finer")
    }
    films = Films("test").films[:8, :16]
    kept = [films, *(model.reconstruct(films) for model in models.values())]
    write(out / "own-videos-reconstructions.mp4", torch.cat(kept), 8)
    for name, model in models.items():
        samples = model.sample(labels=[0] * 8 + [1] * 8, seed=0)
        write(out / f"own-videos-samples-{name}.mp4", samples, 8)
    four = Films("test")
    given, labels = four.films[:4, :8], four.labels[:4].repeat_interleave(3)
    more = models["finer"].sample(frames=given.repeat_interleave(3, dim=0), labels=labels, seed=0)
    rows = torch.cat([four.films[:4, None, :16], more.unflatten(0, (4, 3))], dim=1)
    write(out / "own-videos-continuations-finer.mp4", rows.flatten(0, 1), 4)


def write(path: Path, clips: Tensor, columns: int) -> None:
    """A film of clips side by side, in which each pixel is there twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, video.grid(clips, columns), fps=FPS, scale=2, crf=20)


def main() -> None:
    """Trains what is missing, records, and writes clips."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, which mean nothing")
    parser.add_argument("--book", type=Path, default=Path("book"), help="where results belong")
    options = parser.parse_args()
    chosen, book = (smoke(), options.runs) if options.smoke else (plan(), options.book)
    found = train_all(chosen, options.runs)
    device = device_name(str(TrainConfig().torch_device()))
    smoke_word = " --smoke" if options.smoke else ""
    command = f"python data_recipes/own_videos.py --runs RUNS{smoke_word}"
    path = record({"device": device, **found}, "own-videos", command, book / "results")
    show(options.runs, book / "_static")
    print(f"record in {path}")


if __name__ == "__main__":
    run(main)
