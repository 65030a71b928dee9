"""What each part is worth: short, equal runs on Moving MNIST with and without it.

    python data_recipes/ablate.py --runs runs/ablations

trains tokenizers (with 512 codes and a local encoder; with an encoder that looks around, without
and with axial attention; with 128 and 2,048 codes; without restarts of unused codes) and, on the
tokenizers they belong to, GPTs (of 2, 4 and 8 layers; with strided attention; on the other
encoders' tokens, or on 128 and 2,048 codes), all for as many steps on as many clips, each from two
seeds. Unseen clips then tell: PSNR and SSIM of tokenizers, how many of their codes are in use, and
in how many frames the probe reads the right digits, as a share of that in real clips; bits a token
and a clip of GPTs. Bits are those of a tokenizer's own tokens: fewer codes take fewer of them, and
keep less. Figures go to book/results/ablations.json, their plot to ablations.png beside it: a line
a seed, since GPTs of one seed share their tokenizer.

A run that is finished is not repeated, one that was stopped goes on from its last checkpoint: type
the same command again. With --smoke everything is tiny and ends in a minute on a CPU; its figures
mean nothing, and go into the folder of runs.

Shapes: n clips.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from recipe import finished, run
from torch import Tensor

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, evaluate, open_dataset, video
from tinyvgpt.bench import device_name, exact_float32, record
from tinyvgpt.data import Dataset
from tinyvgpt.encode import encode
from tinyvgpt.measures import kept
from tinyvgpt.notebook import style
from tinyvgpt.presets import moving_mnist
from tinyvgpt.probes import Probe
from tinyvgpt.settings import TrainConfig
from tinyvgpt.shown import pairs_of
from tinyvgpt.store import write_atomically
from tinyvgpt.train import about_data, train_gpt, train_vqvae

BASE = "512 codes"
TOKENIZERS: dict[str, dict[str, Any]] = {  # what each changes of the base
    BASE: {},
    "wide encoder": {"local_encoder": False},
    "wide encoder, axial": {"local_encoder": False, "axial": True},
    "128 codes": {"codes": 128},
    "2048 codes": {"codes": 2048},
    "no restarts": {},
}
GPTS: dict[str, tuple[str, dict[str, Any]]] = {  # the tokenizer, and what is changed
    "8 layers": (BASE, {}),
    "4 layers": (BASE, {"layers": 4}),
    "2 layers": (BASE, {"layers": 2}),
    "strided attention": (BASE, {"attention": "strided"}),
    "on wide encoder": ("wide encoder", {}),
    "on wide encoder, axial": ("wide encoder, axial", {}),
    "on 128 codes": ("128 codes", {}),
    "on 2048 codes": ("2048 codes", {}),
}
ENCODERS = {BASE: "local", "wide encoder": "wide", "wide encoder, axial": "wide,\naxial"}
PANELS = (  # title, what is on the axis, a figure's name, the runs
    ("encoder", "PSNR, dB", "psnr", ENCODERS),
    (
        "encoder",
        "bits a clip",
        "bits_per_clip",
        {"8 layers": "local", **{f"on {n}": text for n, text in list(ENCODERS.items())[1:]}},
    ),
    ("encoder", "right digits, of real clips'", "right_digits", ENCODERS),
    ("codes", "PSNR, dB", "psnr", {"128 codes": "128", BASE: "512", "2048 codes": "2048"}),
    ("restarts", "codes in use", "codes_in_use", {BASE: "on", "no restarts": "off"}),
    ("layers", "bits a clip", "bits_per_clip", {f"{n} layers": str(n) for n in (2, 4, 8)}),
    (
        "attention",
        "bits a clip",
        "bits_per_clip",
        {"8 layers": "full", "strided attention": "strided"},
    ),
    (
        "codes",
        "bits a clip",
        "bits_per_clip",
        {"on 128 codes": "128", "8 layers": "512", "on 2048 codes": "2048"},
    ),
)
AT_A_TIME = 64  # clips measured together


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    vqvae: VQVAEConfig
    train_vqvae: TrainConfig
    gpt: GPTConfig
    train_gpt: TrainConfig
    seeds: int
    clips: int  # measured


def plan(steps: int, seeds: int, clips: int) -> Plan:
    """Runs of the preset's settings, but for the base's and their length."""
    preset = moving_mnist()
    base = {"codes": 512, "axial": False, "local_encoder": True}
    short = {
        "steps": steps,
        "batch_size": 64,
        "warmup": min(200, steps // 5),
        "compile": "off",  # it takes longer than it saves
        "ema": 0.99,
        "checkpoint_every": max(steps // 4, 1),
        "validate_every": 0,
        "keep": 1,
        "openings": 0.0,  # strided attention needs whole clips
    }
    return Plan(
        replace(preset.vqvae, **base),
        replace(preset.train_vqvae, **short),
        replace(preset.gpt, codes=512),
        replace(preset.train_gpt, encode_once=64 * steps, **short),
        seeds,
        clips,
    )


def smoke() -> Plan:
    """The same runs, with as little as there can be of everything else."""
    vqvae = replace(plan(1, 1, 1).vqvae, downsample=(4, 16, 16), hidden=8, res_blocks=1, code_dim=8)
    gpt = GPTConfig.for_vqvae(vqvae, width=12, heads=2, classes=55, label_dropout=0.2)
    train = TrainConfig(steps=2, batch_size=2, warmup=1, validate_every=0, tensorboard=False)
    return Plan(vqvae, train, gpt, replace(train, encode_once=4), seeds=1, clips=4)


# One run ------------------------------------------------------------------------------------------


def tokenizer_run(
    plan: Plan, name: str, seed: int, folder: Path, data: Dataset, test: Dataset
) -> dict[str, float]:
    """Trains a tokenizer and measures it."""
    torch.manual_seed(seed)
    vqvae = VQVAE(replace(plan.vqvae, **TOKENIZERS[name]))
    if name == "no restarts":
        vqvae.codebook._dead = partial(torch.zeros_like, dtype=torch.bool)
    train_vqvae(vqvae, data, replace(plan.train_vqvae, seed=seed), folder)
    vqvae = VQVAE.from_pretrained(folder).to(plan.train_vqvae.torch_device())
    device = vqvae.codebook.codes.device
    probe = Probe.from_pretrained("moving-mnist").to(device)
    errors, similar, used, right, of_real = [], [], set(), 0.0, 0.0
    with measuring():
        for clips in parts(test, plan.clips, device):
            tokens = encode(vqvae, clips)
            decoded = video.to_uint8(vqvae.decode(tokens))
            errors.append(evaluate.squared_error(clips["video"], decoded))
            similar.append(evaluate.ssim(clips["video"], decoded))
            used |= set(tokens.flatten().tolist())
            wanted = pairs_of(test, clips)
            right += kept(probe, decoded, wanted).right.sum()
            of_real += kept(probe, clips["video"], wanted).right.sum()
    found = evaluate.reconstruction(torch.cat(errors), torch.cat(similar), seed)
    figures = {name: f.value for name, f in found.items()}
    return {**figures, "codes_in_use": len(used), "right_digits": right / of_real}


def gpt_run(
    plan: Plan, name: str, seed: int, folders: tuple[Path, Path], data: Dataset, test: Dataset
) -> dict[str, float]:
    """Trains a GPT on the tokenizer in the first of two folders, and measures it."""
    torch.manual_seed(seed)
    vqvae = VQVAE.from_pretrained(folders[0])
    config = replace(plan.gpt, codes=vqvae.config.codes, **GPTS[name][1])
    model = VideoGPT(vqvae, GPT(config, vqvae.codebook.codes), data.label_names)
    train_gpt(model, data, replace(plan.train_gpt, seed=seed), folders[1])
    model = VideoGPT.from_pretrained(folders[1]).to(plan.train_gpt.torch_device())
    with measuring():
        nats = [
            evaluate.nats(model, encode(model.vqvae, clips), clips)
            for clips in parts(test, plan.clips, model.device)
        ]
    found = evaluate.likelihood(model, torch.cat(nats), seed)
    return {name: found[name].value for name in ("bits_per_token", "bits_per_clip")}


@contextmanager
def measuring() -> Iterator[None]:
    """Context in which figures are computed: exactly, and without gradients."""
    with torch.no_grad(), exact_float32(True):
        yield


def parts(data: Dataset, clips: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The first clips of a dataset, some at a time."""
    for start in range(0, min(clips, len(data)), AT_A_TIME):
        yield data.batch(range(start, min(start + AT_A_TIME, clips, len(data))), device)


# All runs -----------------------------------------------------------------------------------------


def folder_of(runs: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return runs / f"{name.replace(',', '').replace(' ', '-')}-seed-{seed}"


def ablate(plan: Plan, runs: Path, data: Dataset, test: Dataset) -> dict[str, dict[str, list]]:
    """The figures of all runs, by name, each with a value a seed."""
    results: dict[str, dict[str, list]] = {}
    shared = {"clips": plan.clips, "data": about_data(data), "test": about_data(test)}
    for seed, name in product(range(plan.seeds), (*TOKENIZERS, *GPTS)):
        folder, given = folder_of(runs, name, seed), (plan, name, seed)
        if name in TOKENIZERS:
            settings = {**asdict(plan.vqvae), **asdict(plan.train_vqvae), **TOKENIZERS[name]}
            work = partial(tokenizer_run, *given, folder, data, test)
        else:
            tokenizer, changes = GPTS[name]
            settings = {**asdict(plan.gpt), **asdict(plan.train_gpt), **changes}
            of = folder_of(runs, tokenizer, seed)
            work = partial(gpt_run, *given, (of, folder), data, test)
        figures = finished(folder, {**settings, "seed": seed, **shared}, work)
        for figure, value in figures.items():
            results.setdefault(name, {}).setdefault(figure, []).append(value)
    return results


def table(results: dict[str, dict[str, list]]) -> str:
    """A line a run: the means of its figures over seeds, and their range."""
    lines = []
    for name, figures in results.items():
        lines.append(f"{name:23}")
        for figure, values in figures.items():
            mean, low, high = (f"{f(values):.4g}" for f in (fmean, min, max))
            lines[-1] += f"   {figure.replace('_', ' ')} {mean} ({low} … {high})"
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list]], path: Path) -> None:
    """A panel a question, in it a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style()
    figure = Figure(figsize=(11, 5))
    for axes, (title, label, name, of) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        values = [results[one][name] for one in of]
        for seed, line in enumerate(zip(*values, strict=True)):
            axes.plot(range(len(of)), line, "o-", markersize=4, label=f"seed {seed}")
        axes.set(title=title, ylabel=label, xticks=range(len(of)), xlim=(-0.5, len(of) - 0.5))
        axes.set_xticklabels(of.values())
    figure.axes[0].legend()
    canvas = FigureCanvasAgg(figure)
    write_atomically({path: partial(canvas.print_png)})


def main() -> None:
    """Trains what is missing, prints, records and plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=1000, help="of each run (1000)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (2)")
    parser.add_argument("--clips", type=int, default=512, help="unseen ones, to measure on (512)")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, which mean nothing")
    parser.add_argument("--out", type=Path, default=Path("book/results"), help="for the record")
    options = parser.parse_args()
    for name in ("steps", "seeds", "clips"):
        if getattr(options, name) < 2 - (name != "clips"):
            raise ValueError(f"--{name} is {getattr(options, name)}, it is too small")
    chosen = smoke() if options.smoke else plan(options.steps, options.seeds, options.clips)
    out = options.runs if options.smoke else options.out
    device = chosen.train_vqvae.torch_device()
    data, test = (open_dataset("moving-mnist", split) for split in ("train", "test"))
    results = ablate(chosen, options.runs, data, test)
    print(table(results))
    about = {
        "device": device_name(str(device)),
        "data": f"moving-mnist, {about_data(data)}",
        "measured_on": f"the first {chosen.clips} test clips",
        "steps": chosen.train_vqvae.steps,
        "batch_size": chosen.train_vqvae.batch_size,
        "seeds": list(range(chosen.seeds)),
        "smoke": options.smoke,
    }
    words = f"--steps {options.steps} --seeds {options.seeds} --clips {options.clips}"
    command = f"python data_recipes/ablate.py --runs RUNS {'--smoke' if options.smoke else words}"
    path = record({**about, "runs": results}, "ablations", command, out)
    plot(results, out / "ablations.png")
    print(f"record in {path}")


if __name__ == "__main__":
    run(main)
