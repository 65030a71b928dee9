"""Trains a video model on a folder of films: `python train.py [config.toml]`.

The start of a project of your own: copy this file and config.toml, and change both. Stopped at any
point, it goes on from its last checkpoint when you run it again.
"""

import json
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, open_dataset, video
from tinyvgpt.train import TrainConfig, train_gpt, train_vqvae


@dataclass(frozen=True)
class Project:
    """What the package's own configurations don't have."""

    folder: str = "videos"
    out: str = "runs/first"
    fps: float = 10.0  # frames a second that are taken of the films
    by_class: bool = False
    shown: int = 8  # clips in a row of what is drawn in the end
    given: int = 8  # frames of a clip that is continued


def main(path: Path) -> None:
    """Trains both stages, then shows what they can do."""
    config = read(path)
    project, stage1, stage2 = config["project"], config["tokenizer"], config["gpt"]
    folder, out = path.parent / project.folder, path.parent / project.out
    last = "test" if (folder / "test").is_dir() else "val"
    shape = {"frames": stage1.frames, "resolution": stage1.resolution, "fps": project.fps}
    data = {split: open_dataset(folder, split, **shape) for split in ("train", "val", last)}
    names = data["train"].label_names if project.by_class else None
    if project.by_class and not names:
        raise ValueError(f"by_class is true, but {folder} has no class folders")
    print(", ".join(f"{len(clips):,} clips of {split}" for split, clips in data.items()))

    # Stage 1. Another tokenizer than the package's goes here.
    torch.manual_seed(config["train_tokenizer"].seed)
    splits = {"data": data["train"], "validation": data["val"]}
    training = {"config": config["train_tokenizer"], "out": out / "tokenizer"}
    vqvae = train_vqvae(VQVAE(stage1), **splits, **training)

    # Stage 2. Another model of its tokens goes here.
    torch.manual_seed(config["train_gpt"].seed)
    gpt = GPT(replace(stage2, classes=len(names or ())), vqvae.codebook.codes)
    training = {"config": config["train_gpt"], "out": out / "model"}
    model = train_gpt(VideoGPT(vqvae, gpt, names), **splits, **training)

    # What else you want to see of it, and to measure, goes here.
    batch = data[last].batch(range(min(project.shown, len(data[last]))))
    real, labels = batch["video"], batch["label"] if names else None
    classes = [n % len(names) for n in range(len(real))] if names else None
    begun = real[:, : project.given]
    drawn = {
        "reconstructions": torch.cat([real, model.reconstruct(real)]),
        "samples": model.sample(len(real), labels=classes, seed=0),
        "continuations": torch.cat([real, model.sample(frames=begun, labels=labels, seed=0)]),
    }
    for name, clips in drawn.items():
        sheet = video.grid(clips, columns=len(real))
        video.write(out / f"{name}.mp4", sheet, fps=project.fps, scale=3)
    figures = {stage: last_of_each(out / stage / "log.jsonl") for stage in ("tokenizer", "model")}
    figures["config"] = {name: asdict(section) for name, section in config.items()}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"tokenizer/, model/, {', '.join(drawn)} (mp4) and figures.json are in {out}")


def last_of_each(log: Path) -> dict[str, float]:
    """The last value of each measurement in a run's log."""
    lines = log.read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def read(path: Path) -> dict:
    """The sections of a configuration as dataclasses; ValueError says what is wrong with one."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    training = {"train_tokenizer": TrainConfig(), "train_gpt": TrainConfig()}
    config = {"project": Project(), "tokenizer": VQVAEConfig(), "gpt": None, **training}
    check(path, sections, {name: {} for name in config})
    for name, default in config.items():
        default = default or GPTConfig.for_vqvae(config["tokenizer"])
        check(f"{path} [{name}]", sections.get(name, {}), asdict(default))
        try:
            config[name] = replace(default, **sections.get(name, {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} [{name}]: {error}") from None
    return config


def check(place: object, given: dict, default: dict) -> None:
    """Refuses names that there are not, and values of another type than the default's."""
    for name, value in given.items():
        if name not in default:
            near = get_close_matches(name, default, 1) or default
            raise ValueError(f"{place}: there is no {name!r}; did you mean {', '.join(near)}?")
        like = list(default[name]) if isinstance(default[name], tuple) else default[name]
        if type(value) is not type(like) and (type(value), type(like)) != (int, float):
            raise ValueError(f"{place}: {name} is {value!r}, something like {like!r} is needed")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "config.toml"))
    except (ValueError, OSError, ImportError) as mistake:
        print(f"train.py: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)
