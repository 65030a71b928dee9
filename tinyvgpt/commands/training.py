"""The commands that train: one for each stage.

Shapes: none of its own.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, estimate
from tinyvgpt.commands.common import ClipOptions, check_apart
from tinyvgpt.distributed import check_batch
from tinyvgpt.store import built
from tinyvgpt.train import TrainConfig, train_gpt, train_vqvae

TOKENIZER_FIELDS = ("latent_shape", "codes", "code_dim", "frames", "resolution", "channels")


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
        self.train.torch_device()  # refused before large data are opened
        check_apart(self.out, self.data)
        torch.manual_seed(self.train.seed)
        if self.dry_run and not self.init:
            print(describe(self.vqvae, self.train))
            return
        if self.init:
            vqvae = VQVAE.from_pretrained(self.init)
        else:
            vqvae = built(lambda: VQVAE(self.vqvae), "--vqvae")
        if self.dry_run:
            print(describe(vqvae.config, self.train))
            return
        data = self.open_for(vqvae.config, self.data, "train")
        validation = self.open_for(vqvae.config, self.data, "val")
        train_vqvae(vqvae, data, self.train, self.out, validation=validation)
        print_once(f"tokenizer in {self.out}")


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
        self.train.torch_device()  # refused before large data are opened
        check_apart(self.out, self.data)
        torch.manual_seed(self.train.seed)
        if self.dry_run and not (self.init or self.vqvae):
            print(describe(self.gpt, self.train))
            return
        if bool(self.init) == bool(self.vqvae):
            raise ValueError("give --vqvae, a trained tokenizer, or --init, a trained model")
        if self.init and self.by_class:
            raise ValueError("--by-class is for a new model; one of --init has the classes it has")
        if self.dry_run and self.vqvae:
            vqvae = VQVAE.from_pretrained(self.vqvae)
            print(describe(self.config_for(vqvae.config), self.train))
            return
        model = VideoGPT.from_pretrained(self.init) if self.init else self.new_model()
        if self.dry_run:
            print(describe(model.gpt.config, self.train))
            return
        data = self.open_for(model.vqvae.config, self.data, "train")
        if model.label_names is None and model.gpt.config.classes:
            model = VideoGPT(model.vqvae, model.gpt, data.label_names)
        validation = self.open_for(model.vqvae.config, self.data, "val")
        train_gpt(model, data, self.train, self.out, validation=validation)
        print_once(f"model in {self.out}")

    def new_model(self) -> VideoGPT:
        """A fresh GPT over the tokenizer."""
        vqvae = VQVAE.from_pretrained(self.vqvae or "")
        config = self.config_for(vqvae.config)
        return VideoGPT(vqvae, built(lambda: GPT(config, vqvae.codebook.codes), "--gpt"))

    def config_for(self, vqvae: VQVAEConfig) -> GPTConfig:
        """The GPT's settings with those of its tokenizer, and as many classes as asked for."""
        of_tokenizer = GPTConfig.for_vqvae(vqvae)
        fields = {name: getattr(of_tokenizer, name) for name in TOKENIZER_FIELDS}
        if self.by_class:
            data = self.open_for(vqvae, self.data, "train")
            fields["classes"] = len(data.label_names or ())
            if not fields["classes"]:
                raise ValueError(f"--by-class: {self.data} has no classes")
        return replace(self.gpt, **fields)


def print_once(line: str) -> None:
    """Prints in the first of torchrun's processes, or in the only one."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def describe(config: VQVAEConfig | GPTConfig, train: TrainConfig) -> str:
    """What would be trained, and what it would cost each process that torchrun would start."""
    device, processes = train.torch_device(), int(os.environ.get("WORLD_SIZE", 1))
    check_batch(train.batch_size, processes, train.accumulate)
    clips = train.batch_size // processes
    return estimate.describe(config, train, device, clips=clips, at_once=clips // train.accumulate)
