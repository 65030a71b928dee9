"""The command that measures a model, prints a table and keeps a record.

Shapes: none of its own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tinyvgpt import GPTConfig, VideoGPT, __version__, counter
from tinyvgpt.bench import device_name, exact_float32, record
from tinyvgpt.commands.common import ClipOptions, Name, pick_device
from tinyvgpt.data import EMBEDDED
from tinyvgpt.encode import looks
from tinyvgpt.evaluate import DISTANCES, REAL, check, check_given, choose, evaluate
from tinyvgpt.features import Features, I3DFeatures
from tinyvgpt.frechet import DISTANCE_RESAMPLES, LEVEL, RESAMPLES, Figure, check_enough
from tinyvgpt.loop import make_writable
from tinyvgpt.probes import Probe, ProbeFeatures
from tinyvgpt.pushing import LENGTH, show_pushing
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.shown import Shown, given_frames, show_digits

WORDS = {
    "bits_per_token": "bits a token",
    "nats_per_token": "nats a token",
    "bits_per_clip": "bits a clip",
    "nats_per_clip": "nats a clip",
    "bits_per_pixel_channel": "bits a pixel-channel",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "read": "frames with both digits read",
    "identities": "clips that keep both digits",
    "right": "frames with the right digits",
    "asked": "clips of the right digits",
    "speed": "change of speed, pixels",
    "bounces": "turns that are at a wall",
    "psnr, last frame held": "PSNR, last frame held, dB",
    "psnr, gained": "PSNR, gained, dB",
    "places off": "places off, pixels",
    "follows": "the hand follows commands, correlation",
    "follows down": "  down the picture",
    "follows right": "  to the right",
    "off": "hand off its commanded way, pixels",
    "moved": "clips in which an object moves",
    "pushed": "of objects that really move, those that move",
    "left": "of objects that really rest, those that move",
    "accepted": "frames with hand and objects",
}
TITLES = {
    "going on": "going on from given frames",
    "rollout": f"clips of {LENGTH} frames, by their actions there and back",
}
SHOW = {"moving-mnist": show_digits, "robot-push": show_pushing}  # by the probe's name


@dataclass(frozen=True, kw_only=True)
class Evaluate(ClipOptions):
    """Measure a model on held-out clips: bits a token, PSNR, SSIM, distances, what clips show."""

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
    probe: bool = False
    """Fréchet distances (FD, R-FD, FD*) with the features of the data's probe."""
    read: bool = False
    """What samples, reconstructions and real clips show, as the data's probe reads them."""
    probe_from: str | None = None
    """Folder of the probe, or the name of another data set's; by default the data's own."""
    given: int | None = None
    """First frames that samples for distances go on from; by default what the model's frame encoder
    takes, else none."""
    temperature: float = 1.0
    """Of samples; choose it, as the next two, on --split val."""
    top_p: float | None = None
    """Samples: draw among the likeliest tokens that together have this probability."""
    guidance: float = 1.0
    """Strength of labels in samples; 1 is off."""
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
        make_writable(self.out.parent)
        counter.bits(self.seed)  # ValueError unless it fits in 64 bits
        device = pick_device(self.device)
        model = VideoGPT.from_pretrained(self.model).to(device)
        rule = self.rule(model.gpt.config)
        name = self.data or (self.model if self.model in EMBEDDED else None)
        if name is None:
            raise ValueError("give --data, the clips to measure the model on")
        data = self.open_for(model.vqvae.config, name, self.split)
        check(model, data)
        chosen, others = choose(len(data), self.clips)
        probe = self.open_probe(name, data.channels, device)
        features: list[Features] = [] if self.i3d is None else [I3DFeatures(self.i3d, device)]
        features += [ProbeFeatures(probe)] if probe and self.probe else []
        for network in features:
            check_enough(network.name, network.size, network.least, len(chosen))
        options: dict[str, Any] = {"rule": rule, "seed": self.seed}
        given = check_given(model, self.given)
        with exact_float32(True):
            shown: dict[str, Any] = {}
            if probe and self.read:
                shown = dict(SHOW[probe.config.name](model, data, probe, self.clips, **options))
            figures: dict[str, Any] = dict(
                evaluate(model, data, self.clips, features=features, given=given, **options)
            )
        told = [what for what, is_told in conditioned(model.gpt.config).items() if is_told]
        about = self.about(name, device, told) | {
            "split_clips": len(data),
            "split_fingerprint": looks(data, len(data)),
            "clips": len(chosen),
        }
        if features:
            about |= protocol(features, len(chosen), len(others), given)
        if features or self.read:
            about["sampling"] = asdict(rule)
        if self.read:
            about["first_frames_gone_on_from"] = given_frames(model)
        if probe:
            about["probe"] = asdict(probe.config) | {"name": ProbeFeatures(probe).name}
        figures |= shown
        path = record({**about, **as_json(figures)}, self.out.stem, self.command(), self.out.parent)
        given_words = f", told their {' and '.join(told)}" if told else ""
        title = f"{self.model} on {len(chosen)} clips of {name} {self.split}{given_words}"
        print(table(figures, title, len(chosen)))
        print(f"record in {path}")

    def rule(self, config: GPTConfig) -> SamplingRule:
        """How samples are drawn; ValueError for what makes no sense, or a model can't do."""
        if self.guidance != 1 and not config.label_dropout:
            raise ValueError(
                f"guidance is {self.guidance}, but the model has no null label (label_dropout is 0)"
            )
        return SamplingRule(self.temperature, None, self.top_p, self.guidance)

    def open_probe(self, data: str, channels: int, device: str) -> Probe | None:
        """The probe, if one is needed.

        Raises:
            ValueError: there is none, it reads other clips, or it can't tell what they show.
        """
        if not (self.probe or self.read):
            if self.probe_from:
                raise ValueError("--probe-from is given, but neither --probe nor --read")
            return None
        try:
            probe = Probe.from_pretrained(self.probe_from or data).to(device)
        except ValueError as error:
            asked = "" if self.probe_from else f"{data} has no probe, give --probe-from: "
            raise ValueError(f"{asked}{error}") from None
        probe.check(channels)
        if self.read and probe.config.name not in SHOW:
            raise ValueError(
                f"what clips show is read by probes of {', '.join(SHOW)}, this one is of "
                f"{probe.config.name}"
            )
        return probe

    def about(self, data: str, device: str, told: list[str]) -> dict[str, Any]:
        """What is measured, for the record."""
        return {
            "device": device_name(device),
            "tinyvgpt": __version__,
            "torchmetrics": version("torchmetrics"),
            "model": self.model,
            "data": data,
            "split": self.split,
            "told": told,
            "seed": self.seed,
            "interval": f"{LEVEL * 100:.0f} % of {RESAMPLES} bootstrap resamples of the clips",
        }

    def command(self) -> str:
        """What to type to measure the same."""
        given = {
            "data": self.data,
            "split": self.split,
            "sample-fps": self.sample_fps,
            "stride": self.stride,
            "clips": self.clips,
            "i3d": self.i3d,
            "probe-from": self.probe_from,
            "given": self.given,
            "temperature": None if self.temperature == 1 else self.temperature,
            "top-p": self.top_p,
            "guidance": None if self.guidance == 1 else self.guidance,
            "seed": self.seed,
        }
        flags = [f"--{name}" for name in ("probe", "read") if getattr(self, name)]
        words = [f"--{name} {value}" for name, value in given.items() if value is not None]
        return " ".join(["tinyvgpt evaluate", self.model, *words, *flags])


def conditioned(config: GPTConfig) -> dict[str, int]:
    """What a model may be told of a clip, by name, and whether it is."""
    return {
        "labels": config.classes,
        "first frames": config.cond_frames,
        "actions": config.action_dim,
    }


def protocol(features: list[Features], clips: int, others: int, given: int) -> dict[str, Any]:
    """How distances were measured."""
    real = f"{clips} clips and {others} others" if others else f"halves of {clips} clips"
    names = [network.distance for network in features]
    pairs: dict[str, Any] = {**DISTANCES, REAL: real}
    return {
        "distances_between": {n.format(name): pair for name in names for n, pair in pairs.items()},
        "features": {
            network.distance: {"name": network.name, "size": network.size, **network.protocol}
            for network in features
        },
        "first_frames_given": given,
        "first_frames_in_samples": "as the model makes them",
        "distance_resamples": DISTANCE_RESAMPLES,
    }


def as_json(figures: Any) -> Any:
    """Figures by group and name, each with its interval; those of sets with their ratios, too."""
    if isinstance(figures, Figure):
        return {"value": figures.value, "interval": [figures.low, figures.high]}
    if isinstance(figures, Shown):
        of_real = {} if figures.of_real is None else {"of_real": as_json(figures.of_real)}
        return {**as_json(figures.figure), **of_real, "clips": figures.clips}
    return {name: as_json(of) for name, of in figures.items()}


def table(figures: Mapping[str, Mapping[str, Any]], title: str, clips: int) -> str:
    """Figures a line each with their intervals, and how many times real clips' they are.

    Where fewer than `clips` clips have a value, how many they are.
    """
    lines = [title, f"{'':42}   {LEVEL * 100:.0f} % interval"]
    for group, of in figures.items():
        if group in TITLES:
            lines.append(TITLES[group])
        for name, figure in of.items():
            words = WORDS.get(name, name)
            if isinstance(figure, Figure):
                lines.append(f"{words:32}{in_digits(figure)}")
                continue
            lines.append(words)
            for of_clips, shown in figure.items():
                ratio = f"   of real clips' {in_digits(shown.of_real)}" if shown.of_real else ""
                some = f"   ({shown.clips} clips)" if shown.clips < clips else ""
                lines.append(f"  {of_clips:30}{in_digits(shown.figure)}{ratio}{some}")
    return "\n".join(lines)


def in_digits(figure: Figure) -> str:
    """A figure and its interval, to four digits."""
    value, low, high = (f"{x:#,.4g}".rstrip(".") for x in figure)
    return f"{value:>10}   {low} … {high}"
