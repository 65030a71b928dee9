"""What each command does: one dataclass a command, its fields the command's options.

Shapes: none of its own.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import torch
import tyro

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, __version__, open_dataset, video
from tinyvgpt.bench import device_name, record
from tinyvgpt.bench.data import loading
from tinyvgpt.bench.sampling import sampling
from tinyvgpt.data import Dataset
from tinyvgpt.encode import encode_folder
from tinyvgpt.presets import PRESETS
from tinyvgpt.store import SHIPPED, read_config, resolve
from tinyvgpt.train import TrainConfig, train_gpt, train_vqvae

TOKENIZER_FIELDS = ("latent_shape", "codes", "code_dim", "frames", "resolution", "channels")
Name = Annotated[str, tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]


class Command(Protocol):
    """What the commands have in common."""

    def run(self) -> None:
        """Does what the command says."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """How clips are cut from videos."""

    sample_fps: float | None = None
    """Frames a second to take, of a folder of videos; by default every frame."""
    stride: int | None = None
    """Frames from one clip's start to the next one's; by default 1 in training, else a clip's."""

    def open(self, data: str, split: str, config: VQVAEConfig) -> Dataset:
        """A dataset with clips of the length and size that a tokenizer was made for."""
        options = {"fps": self.sample_fps, "stride": self.stride}
        given = {name: value for name, value in options.items() if value is not None}
        shape = {"frames": config.frames, "resolution": config.resolution}
        return open_dataset(data, split, **shape, **given)


@dataclass(frozen=True, kw_only=True)
class TrainVQVAE(ClipOptions):
    """Train a tokenizer (stage 1), or go on with a run that was stopped."""

    out: Path
    """The run's folder: model, checkpoint, log and previews."""
    preset: str
    """Where all other defaults come from; tinyvgpt info lists the presets."""
    data: str
    """"moving-mnist", "robot-push", a folder of videos or an .h5 file."""
    vqvae: VQVAEConfig
    train: TrainConfig
    init: str | None = None
    """Trained tokenizer to start from, instead of --vqvae.…: folder, shipped name or hub id."""
    dry_run: bool = False
    """Print what would be trained, and stop."""

    def run(self) -> None:
        """Trains."""
        if self.dry_run:
            print(describe(self.vqvae, self.train))
            return
        data = self.open(self.data, "train", self.vqvae)
        torch.manual_seed(self.train.seed)
        vqvae = VQVAE.from_pretrained(self.init) if self.init else VQVAE(self.vqvae)
        validation = self.open(self.data, "val", self.vqvae)
        train_vqvae(vqvae, data, self.train, self.out, validation=validation)
        print(f"tokenizer in {self.out}")


@dataclass(frozen=True, kw_only=True)
class TrainGPT(ClipOptions):
    """Train a GPT on a tokenizer's tokens (stage 2), or go on with a run that was stopped."""

    out: Path
    """The run's folder: model, checkpoint, log and previews."""
    preset: str
    """Where all other defaults come from; tinyvgpt info lists the presets."""
    data: str
    """"moving-mnist", "robot-push", a folder of videos, an .h5 file or a folder of tokens."""
    gpt: GPTConfig
    """Fields that describe the tokenizer are taken from --vqvae."""
    train: TrainConfig
    vqvae: str | None = None
    """Trained tokenizer: folder, shipped name or hub id."""
    by_class: bool = False
    """Condition on the dataset's classes, as many as it has, instead of --gpt.classes."""
    init: str | None = None
    """Trained model to start from, instead of --gpt.…: folder, shipped name or hub id."""
    dry_run: bool = False
    """Print what would be trained, and stop."""

    def run(self) -> None:
        """Trains."""
        if self.dry_run:
            print(describe(self.gpt, self.train))
            return
        torch.manual_seed(self.train.seed)
        if bool(self.init) == bool(self.vqvae):
            raise ValueError("give --vqvae, a trained tokenizer, or --init, a trained model")
        vqvae = VQVAE.from_pretrained(self.init or self.vqvae or "")
        data = self.open(self.data, "train", vqvae.config)
        if self.init:
            model = VideoGPT.from_pretrained(self.init)
        else:
            model = self.new_model(vqvae, len(data.label_names or ()))
        if model.label_names is None and model.gpt.config.classes:
            model = VideoGPT(model.vqvae, model.gpt, data.label_names)
        validation = self.open(self.data, "val", model.vqvae.config)
        train_gpt(model, data, self.train, self.out, validation=validation)
        print(f"model in {self.out}")

    def new_model(self, vqvae: VQVAE, labels: int) -> VideoGPT:
        """A fresh GPT over a tokenizer, for data with so many labels."""
        of_tokenizer = GPTConfig.for_vqvae(vqvae.config)
        fields = {name: getattr(of_tokenizer, name) for name in TOKENIZER_FIELDS}
        if self.by_class and not labels:
            raise ValueError(f"--by-class: {self.data} has no classes")
        if self.by_class:
            fields["classes"] = labels
        config = replace(self.gpt, **fields)
        return VideoGPT(vqvae, GPT(config, vqvae.codebook.codes))


@dataclass(frozen=True)
class Sample:
    """Generate clips and write them as one grid."""

    model: Name
    """Folder, shipped name or hub id."""
    n: int = 16
    """Number of clips."""
    out: Path = Path("sample.mp4")
    """Video file to write: .mp4, .gif or .webm."""
    labels: str | None = None
    """Class of all clips, by name ("37") or index."""
    frames: Path | None = None
    """Video file whose first frames all clips continue."""
    given: int | None = None
    """How many frames to take of it; by default what the model conditions on, or half a clip."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    guidance: float = 1.0
    """Strength of the label; 1 is off."""
    seed: int | None = 0
    """Of the random draws; None for a new one."""
    columns: int | None = None
    """Clips a row of the grid; by default the smallest square."""
    fps: float = 8.0
    """Frames a second of the file."""
    scale: int = 3
    """Screen pixels a pixel."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""

    def run(self) -> None:
        """Samples and writes."""
        model = VideoGPT.from_pretrained(self.model).to(pick_device(self.device))
        clips = model.sample(
            self.n,
            frames=None if self.frames is None else self.first_frames(model, self.frames),
            labels=self.labels
            if self.labels is None or not self.by_index(model)
            else int(self.labels),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance=self.guidance,
            seed=self.seed,
            progress=True,
        )
        video.write(self.out, video.grid(clips, self.columns), fps=self.fps, scale=self.scale)
        print(f"{len(clips)} clips in {self.out}")

    def by_index(self, model: VideoGPT) -> bool:
        """Whether the label is an index: a number, to a model whose classes have no names."""
        return model.label_names is None and str(self.labels).isdigit()

    def first_frames(self, model: VideoGPT, path: Path) -> torch.Tensor:
        """Uint8 (n, H, W, C): the beginning of the file at `path`, as the model needs it."""
        config = model.vqvae.config
        count = self.given or model.gpt.config.cond_frames or config.frames // 2
        return read_clip(path, count, config)


@dataclass(frozen=True, kw_only=True)
class Reconstruct(ClipOptions):
    """Encode and decode clips: originals above, what the tokenizer keeps of them below."""

    model: Name
    """Folder, shipped name or hub id."""
    data: str = "moving-mnist"
    """Video file, or what train-vqvae takes, of which the first test clips are taken."""
    n: int = 8
    """Number of clips of a dataset."""
    out: Path = Path("reconstruction.mp4")
    """Video file to write: .mp4, .gif or .webm."""
    fps: float = 8.0
    """Frames a second of the file."""
    scale: int = 3
    """Screen pixels a pixel."""

    def run(self) -> None:
        """Reconstructs, writes, and prints how close it is."""
        vqvae = VQVAE.from_pretrained(self.model)
        if Path(self.data).is_file():
            clips = read_clip(Path(self.data), vqvae.config.frames, vqvae.config)[None]
        else:
            clips = self.open(self.data, "test", vqvae.config).batch(range(self.n))["video"]
        x = video.to_model(clips)
        decoded = vqvae.decode(vqvae.encode(x)).clamp(-0.5, 0.5)
        psnr = -10 * torch.log10((decoded - x).square().mean()).item()
        both = torch.cat([clips, video.to_uint8(decoded)])
        video.write(self.out, video.grid(both, columns=len(clips)), fps=self.fps, scale=self.scale)
        print(f"{len(clips)} clips in {self.out}, PSNR {psnr:.2f} dB")


@dataclass(frozen=True, kw_only=True)
class Encode(ClipOptions):
    """Turn clips into tokens once, for train-gpt to read; goes on where it was stopped."""

    model: Name
    """Trained tokenizer: folder, shipped name or hub id."""
    data: str
    """"moving-mnist", "robot-push", a folder of videos or an .h5 file."""
    out: Path
    """Folder for the tokens; each split gets a folder in it."""
    splits: tuple[str, ...] = ("train", "val")
    """Which splits to encode."""
    clips: int | None = None
    """The first so many clips of each split; by default all."""
    first_frames: int = 1
    """Frames of each clip that are kept as pixels, for a GPT with --gpt.cond-frames."""
    workers: int = 0
    """Processes that load clips."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""

    def run(self) -> None:
        """Encodes."""
        vqvae = VQVAE.from_pretrained(self.model)
        data = {split: self.open(self.data, split, vqvae.config) for split in self.splits}
        for split, clips in data.items():
            count = encode_folder(
                vqvae,
                clips,
                self.out / split,
                clips=self.clips,
                first_frames=self.first_frames,
                workers=self.workers,
                device=pick_device(self.device),
                source=f"{self.data}, fps {self.sample_fps}, stride {self.stride}",
            )
            print(f"{count:,} clips of {split} in {self.out / split}")


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the original VideoGPT into a model folder."""

    checkpoint: File
    """The original's .ckpt file, of a VQ-VAE or a GPT; nothing in it is executed."""
    folder: File
    """Where to write the model."""

    def run(self) -> None:
        """Converts."""
        from tinyvgpt import upstream

        model = upstream.load(self.checkpoint)
        model.save(self.folder)
        print(f"{type(model).__name__} in {self.folder}")


@dataclass(frozen=True)
class Bench:
    """Time decoding against the original's loop, or loading; writes a JSON record."""

    what: Name = "sampling"
    """What to time: sampling or data."""
    batch: int | None = None
    """Clips decoded or loaded together; by default 1 or 32."""
    tokens: int | None = None
    """Sampling: tokens of each clip to draw; by default all 4096 (minutes on a CPU)."""
    data: str | None = None
    """Data: what train-vqvae takes; by default files made for the purpose."""
    workers: int = 2
    """Data: processes that load clips."""
    device: str = "auto"
    """Sampling: "cpu", "cuda" or "auto"."""
    out: Path = Path("book/results")
    """Folder for the record."""

    def run(self) -> None:
        """Times, records and prints."""
        if self.what == "sampling":
            device, batch = pick_device(self.device), self.batch or 1
            result = sampling(batch=batch, tokens=self.tokens, device=device)
            words = ["--batch", batch, "--device", device]
            words += ["--tokens", self.tokens] if self.tokens else []
            name = f"sampling-{device_name(device)}"
        elif self.what == "data":
            batch = self.batch or 32
            result = loading(self.data, batch_size=batch, workers=self.workers)
            words = ["--batch", batch, "--workers", self.workers]
            words += ["--data", self.data] if self.data else []
            name = f"data-{device_name('cpu')}"
        else:
            raise ValueError(f"no benchmark {self.what!r}; known are sampling, data")
        command = " ".join(["tinyvgpt bench", self.what, *map(str, words)])
        path = record(result, name, command, self.out)
        for key, value in result.items():
            print(f"{key}: {value}")
        print(f"record in {path}")


@dataclass(frozen=True)
class Info:
    """What is installed here, which models and presets there are; or what a model is."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, shipped name or hub id to describe."""

    def run(self) -> None:
        """Prints."""
        if self.model is not None:
            folder = resolve(self.model)
            for stage, values in read_config(folder).items():
                shown = values if not isinstance(values, dict) else ""
                print(f"{stage}: {shown}" if stage != "label_names" else f"classes: {len(values)}")
                for name, value in values.items() if isinstance(values, dict) else ():
                    print(f"  {name} = {value}")
            return
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"tinyvgpt {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
        print(f"CUDA device: {gpu}; CPU threads: {torch.get_num_threads()}")
        print("attention: PyTorch's scaled_dot_product_attention")
        shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
        print(f"shipped models: {', '.join(shipped)}")
        print("presets:")
        for name, function in PRESETS.items():
            print(f"  {name}: {(function.__doc__ or '').splitlines()[0]}")


def describe(config: VQVAEConfig | GPTConfig, train: TrainConfig) -> str:
    """Parameters and tokens of a configuration, without making its weights."""
    with torch.device("meta"):
        model = VQVAE(config) if isinstance(config, VQVAEConfig) else GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    t, h, w = config.latent_shape
    size, tokens, batch = config.resolution, t * h * w, train.batch_size
    return "\n".join(
        [
            f"parameters: {parameters:,}",
            f"clip: {config.frames} frames of {size} × {size} × {config.channels}",
            f"tokens: {t} × {h} × {w} = {tokens:,} a clip, of {config.codes:,} codes",
            f"training: {train.steps:,} steps of {batch} clips, {batch * tokens:,} tokens a step",
        ]
    )


def pick_device(name: str) -> str:
    """The device that `name` ("auto", "cpu", "cuda") stands for."""
    return str(replace(TrainConfig(), device=name).torch_device())


def read_clip(path: Path, count: int, config: VQVAEConfig) -> torch.Tensor:
    """The first `count` frames of a video file as uint8 (n, H, W, C), resized for a model."""
    clip = video.read(path, frames=count, resolution=config.resolution)
    if config.channels == 1:  # the luma of ITU-R BT.601
        clip = (
            (clip.float() @ torch.tensor([0.299, 0.587, 0.114])).round().to(torch.uint8)[..., None]
        )
    return clip


COMMANDS: dict[str, type[Command]] = {
    "train-vqvae": TrainVQVAE,
    "train-gpt": TrainGPT,
    "encode": Encode,
    "sample": Sample,
    "reconstruct": Reconstruct,
    "convert": Convert,
    "bench": Bench,
    "info": Info,
}
