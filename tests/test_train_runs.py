"""Training runs of some length: killed and resumed, and a codebook that stays in use."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import QUICK, Clips, fresh_gpt, fresh_vqvae, lines, replace, same

from tinyvgpt import VQVAE, VideoGPT, VQVAEConfig, open_dataset, video
from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.train import TrainConfig, train_gpt, train_vqvae

LONG = replace(QUICK, steps=240, checkpoint_every=3, validate_every=10)
CHILD = "import test_train_runs; test_train_runs.run({stage!r}, {out!r})"


def run(stage, out):
    """A whole training run, or what is left of it."""
    torch.set_num_threads(1)
    data, validation = Clips(), Clips("val")
    if stage == "vqvae":
        return train_vqvae(fresh_vqvae(), data, LONG, out, validation=validation)
    model = fresh_gpt(classes=10, label_dropout=0.3)
    return train_gpt(model, data, LONG, out, validation=validation)


def newest(out):
    """Step of the newest checkpoint; 0 if there is none."""
    path = Checkpoints(out, 1).newest()
    return int(path.stem.split("-")[1]) if path else 0


@pytest.mark.parametrize("stage", ["vqvae", "gpt"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_uninterrupted_ones(tmp_path, stage, kills):
    """SIGKILLs at random moments, saving included, change no bit of the weights."""
    threads = torch.get_num_threads()
    try:
        expected = run(stage, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    out, moments = tmp_path / "killed", random.Random(f"{stage} {kills}")
    command = [sys.executable, "-c", CHILD.format(stage=stage, out=str(out))]
    reached = []
    for _ in range(kills):
        seen = newest(out)
        reached.append(seen)
        child = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
        started = time.perf_counter()
        while child.poll() is None and time.perf_counter() - started < 60:
            if newest(out) > seen:
                break
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert 0 < newest(out) < LONG.steps, "the process was killed while it trained"
    assert len(set(reached)) > kills // 3
    subprocess.run(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, check=True)
    saved = VQVAE.from_pretrained(out) if stage == "vqvae" else VideoGPT.from_pretrained(out)
    assert same(saved, expected)
    steps = [line["step"] for line in lines(out) if "loss" in line]
    assert steps == list(range(2, 241, 2))
    assert not list(out.glob(".*"))


def test_codebook_stays_in_use(tmp_path):
    """Most of 512 codes serve clips that were never trained on: no collapse, from scratch."""
    torch.manual_seed(0)
    size = {"channels": 1, "frames": 4, "resolution": 32, "downsample": (4, 4, 4)}
    small = {"hidden": 16, "res_blocks": 1, "axial": False, "code_dim": 16}
    vqvae = VQVAE(VQVAEConfig(**size, **small, codes=512))
    options = {"frames": 4, "resolution": 32, "digits_per_clip": 1}
    config = TrainConfig(steps=150, batch_size=16, warmup=10, lr=3e-3, device="cpu")
    vqvae = train_vqvae(vqvae, open_dataset("moving-mnist", **options), config, tmp_path)
    x = video.to_model(open_dataset("moving-mnist", "val", **options).batch(range(256))["video"])
    tokens = vqvae.encode(x)
    counts = torch.bincount(tokens.flatten(), minlength=512)
    share = counts / counts.sum()
    assert (counts > 0).float().mean() >= 0.6
    assert torch.exp(-torch.xlogy(share, share).sum()) >= 0.25 * 512
    assert (vqvae.decode(tokens) - x).square().mean() < 0.5 * x.var()
