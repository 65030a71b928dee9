"""The command that measures a model, prints a table and keeps a record.

Shapes: none of its own.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tinyvgpt import GPTConfig, VideoGPT, __version__
from tinyvgpt.bench import device_name, exact_float32, record
from tinyvgpt.commands.common import ClipOptions, Name, pick_device
from tinyvgpt.data import EMBEDDED
from tinyvgpt.encode import looks
from tinyvgpt.evaluate import DISTANCES, REAL, check, check_given, choose, evaluate
from tinyvgpt.features import Features, I3DFeatures
from tinyvgpt.frechet import DISTANCE_RESAMPLES, LEVEL, RESAMPLES, Figure

WORDS = {
    "bits_per_token": "bits a token",
    "nats_per_token": "nats a token",
    "bits_per_clip": "bits a clip",
    "nats_per_clip": "nats a clip",
    "bits_per_pixel_channel": "bits a pixel-channel",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
}


@dataclass(frozen=True, kw_only=True)
class Evaluate(ClipOptions):
    """Measure a model on held-out clips: bits a token, PSNR, SSIM, and FVD with an I3D file."""

    model: Name
    """Folder, shipped name or hub id."""
    data: str | None = None
    """What train-vqvae takes; by default the shipped model's own."""
    split: str = "test"
    """Split of the dataset: "train", "val" or "test"."""
    clips: int = 256
    """Number of clips, spread evenly over the split; all of it, where it has fewer."""
    i3d: Path | None = None
    """I3D's weights for FVD, R-FVD and FVD*: a TorchScript file, or a state dict of its port to
    PyTorch. Of a TorchScript file the program is run: take it from where you trust."""
    given: int | None = None
    """First frames that samples for FVD go on from; by default what the model's frame encoder
    takes, else none."""
    seed: int = 0
    """Of samples and intervals."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""
    out: Path = Path("evaluation.json")
    """File for the record."""

    def run(self) -> None:
        """Measures, prints and records."""
        if self.out.suffix != ".json":
            raise ValueError(f"--out is {self.out}, its name must end in .json")
        device = pick_device(self.device)
        model = VideoGPT.from_pretrained(self.model).to(device)
        name = self.data or (self.model if self.model in EMBEDDED else None)
        if name is None:
            raise ValueError("give --data, the clips to measure the model on")
        data = self.open_for(model.vqvae.config, name, self.split)
        check(model, data)
        chosen, others = choose(len(data), self.clips)
        features = None if self.i3d is None else I3DFeatures(self.i3d, device)
        with exact_float32(True):
            figures = evaluate(
                model, data, self.clips, features=features, given=self.given, seed=self.seed
            )
        told = [what for what, is_told in conditioned(model.gpt.config).items() if is_told]
        about = {
            "device": device_name(device),
            "tinyvgpt": __version__,
            "torchmetrics": version("torchmetrics"),
            "model": self.model,
            "data": name,
            "split": self.split,
            "split_clips": len(data),
            "split_fingerprint": looks(data, len(data)),
            "clips": len(chosen),
            "told": told,
            "seed": self.seed,
            "interval": f"{LEVEL * 100:.0f} % of {RESAMPLES} bootstrap resamples of the clips",
        }
        if features is not None:
            about |= protocol(features, len(chosen), len(others), check_given(model, self.given))
        path = record({**about, **as_json(figures)}, self.out.stem, self.command(), self.out.parent)
        given = f", told their {' and '.join(told)}" if told else ""
        print(table(figures, f"{self.model} on {len(chosen)} clips of {name} {self.split}{given}"))
        print(f"record in {path}")

    def command(self) -> str:
        """What to type to measure the same."""
        given = {
            "data": self.data,
            "split": self.split,
            "sample-fps": self.sample_fps,
            "stride": self.stride,
            "clips": self.clips,
            "i3d": self.i3d,
            "given": self.given,
            "seed": self.seed,
        }
        words = [f"--{name} {value}" for name, value in given.items() if value is not None]
        return " ".join(["tinyvgpt evaluate", self.model, *words])


def conditioned(config: GPTConfig) -> dict[str, int]:
    """What a model may be told of a clip, by name, and whether it is."""
    return {
        "labels": config.classes,
        "first frames": config.cond_frames,
        "actions": config.action_dim,
    }


def protocol(features: Features, clips: int, others: int, given: int) -> dict[str, Any]:
    """How distances were measured."""
    return {
        "distances_between": {
            **DISTANCES,
            REAL: f"{clips} clips and {others} others" if others else f"halves of {clips} clips",
        },
        "features": {"name": features.name, "size": features.size, **features.protocol},
        "first_frames_given": given,
        "first_frames_in_samples": "as the model makes them",
        "distance_resamples": DISTANCE_RESAMPLES,
    }


def as_json(figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    """Figures by group and name, each with its interval."""
    return {
        group: {n: {"value": f.value, "interval": [f.low, f.high]} for n, f in of.items()}
        for group, of in figures.items()
    }


def table(figures: dict[str, dict[str, Figure]], title: str) -> str:
    """Figures a line each, to four digits, with their intervals."""
    lines = [title, f"{'':32}   {LEVEL * 100:.0f} % interval"]
    for of in figures.values():
        for name, figure in of.items():
            value, low, high = (f"{x:#,.4g}".rstrip(".") for x in figure)
            lines.append(f"{WORDS.get(name, name):22}{value:>10}   {low} … {high}")
    return "\n".join(lines)
