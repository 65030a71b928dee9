"""The commands that use a trained model: sample, reconstruct, encode, convert.

Shapes: n frames · H W pixels · C channels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tinyvgpt import VQVAE, VideoGPT, VQVAEConfig, video
from tinyvgpt.commands.common import (
    ClipOptions,
    File,
    Name,
    check_apart,
    check_count,
    check_outside,
    pick_device,
    read_clip,
)
from tinyvgpt.data import TokenFolder
from tinyvgpt.data.video_files import SUFFIXES
from tinyvgpt.encode import check_data, encode_folder
from tinyvgpt.write import check_sides, check_target, columns_of


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
    """Class of all clips, by name ("37"), or by index where classes have no names; or classes that
    take turns: "37,05,14"."""
    frames: str | None = None
    """Video file that all clips continue, or what train-vqvae takes, such as "robot-push", whose
    first test clips are continued, one each, and by their actions if the model takes actions."""
    given: int | None = None
    """How many frames to take of them; by default what the model conditions on, or half a clip."""
    sample_fps: float | None = None
    """Frames a second to take of it; by default every frame."""
    length: int | None = None
    """Frames of a clip, by default as many as the model was trained on; longer clips go on from
    their own end."""
    overlap: int | None = None
    """Of a clip longer than that: how many frames to go on from; by default half of those the model
    was trained on."""
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
        check_target(self.out, self.fps, self.scale)  # before the work is done
        check_count(1 if self.columns is None else self.columns, "columns")
        if self.frames is not None:
            check_outside(self.out, self.frames)
        model = VideoGPT.from_pretrained(self.model).to(pick_device(self.device))
        begun = {} if self.frames is None else self.beginnings(model, self.frames)
        if model.gpt.config.action_dim and "actions" not in begun:
            raise ValueError("the model is steered by actions: --frames takes them from a dataset")
        each = "frames" in begun and begun["frames"].ndim == 5  # a beginning for each clip
        count = len(begun["frames"]) if each else self.n
        check_sides(self.out, *grid_sides(count, self.columns, model.vqvae.config, self.scale))
        clips = model.sample(
            None if each else count,
            frames=begun.get("frames"),
            actions=begun.get("actions"),
            labels=self.each_label(model, count),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance=self.guidance,
            seed=self.seed,
            length=self.length,
            overlap=self.overlap,
            progress=True,
        )
        video.write(self.out, video.grid(clips, self.columns), fps=self.fps, scale=self.scale)
        print(f"{len(clips)} clips in {self.out}")

    def each_label(self, model: VideoGPT, count: int) -> list[int | str] | None:
        """A label for each of `count` clips; indices are numbers, where classes have no names."""
        if self.labels is None:
            return None
        named = self.labels in (model.label_names or ())  # a name may have commas
        words = [self.labels] if named else [word.strip() for word in self.labels.split(",")]
        indices = model.label_names is None and all(word.isdigit() for word in words)
        labels = [int(word) if indices else word for word in words]
        return [labels[n % len(labels)] for n in range(count)]

    def beginnings(self, model: VideoGPT, source: str) -> dict[str, torch.Tensor]:
        """How the clips begin, and what actions go on from there, as `VideoGPT.sample` takes it."""
        config = model.vqvae.config
        count = self.given
        if count is None:
            count = model.gpt.config.cond_frames or config.frames // 2
        most = min(config.frames, (self.length or config.frames) - 1)  # one is left to draw
        if not 1 <= count <= most:
            raise ValueError(f"given is {count} frames, must be from 1 to {most}")
        if Path(source).suffix.lower() in SUFFIXES:
            return {"frames": read_clip(Path(source), count, config, self.sample_fps)}
        check_count(self.n)
        options = ClipOptions(sample_fps=self.sample_fps)
        data = options.open_for(config, source, "test")
        check_data(data, model.vqvae)
        if isinstance(data, TokenFolder):
            raise ValueError(f"{source} holds tokens, clips are needed")
        if model.gpt.config.action_dim and self.length:  # actions for every frame
            data = options.open(source, "test", self.length, config.resolution)
        batch = data.batch(range(min(self.n, len(data))))
        given = {"frames": batch["video"][:, :count]}
        if model.gpt.config.action_dim and "action" in batch:
            given["actions"] = batch["action"]
        return given


def grid_sides(count: int, columns: int | None, config: VQVAEConfig, scale: int) -> tuple[int, int]:
    """Height and width, in pixels, of a grid of a model's clips as `video.write` writes it."""
    across = columns_of(count, columns)
    rows, side = -(-count // across), config.resolution + 2
    return scale * (rows * side - 2), scale * (across * side - 2)


@dataclass(frozen=True, kw_only=True)
class Reconstruct(ClipOptions):
    """Encode and decode clips: originals above, what the tokenizer keeps of them below."""

    model: Name
    """Folder, shipped name or hub id."""
    data: str = "moving-mnist"
    """Video file, or what train-vqvae takes, of which the first clips are taken."""
    split: str = "test"
    """Split of a dataset: "train", "val" or "test"."""
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
        check_count(self.n)
        check_target(self.out, self.fps, self.scale)
        check_outside(self.out, self.data)
        vqvae = VQVAE.from_pretrained(self.model)
        config, path = vqvae.config, Path(self.data)
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            clips = read_clip(path, config.frames, config, self.sample_fps)[None]
        else:
            data = self.open_for(config, self.data, self.split)
            check_data(data, vqvae)
            if isinstance(data, TokenFolder):
                raise ValueError(f"{self.data} holds tokens, clips are needed")
            clips = data.batch(range(min(self.n, len(data))))["video"]
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
        if not self.splits:
            raise ValueError("--splits is empty, give train, val or test")
        check_apart(self.out, self.data)
        vqvae = VQVAE.from_pretrained(self.model)
        data = {split: self.open_for(vqvae.config, self.data, split) for split in self.splits}
        for split, clips in data.items():
            count = encode_folder(
                vqvae,
                clips,
                self.out / split,
                clips=self.clips,
                first_frames=self.first_frames,
                workers=self.workers,
                device=pick_device(self.device),
                source=f"{Path(self.data)}, fps {self.sample_fps}, stride {self.stride}",
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
