"""A run's state: steps that are skipped leave nothing behind, float16's scale is kept."""

from dataclasses import fields

import pytest
import torch
from test_train import LAST, QUICK, SMALL, Clips, fresh_vqvae, lines, replace, same
from torch import nn

from tinyvgpt import GPTConfig, VQVAEConfig
from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.run import Run
from tinyvgpt.settings import FREE, TrainConfig
from tinyvgpt.train import train_vqvae

SKIP = replace(QUICK, non_finite="skip", log_every=3)


class Bad(nn.Module):
    """A parameter, and a buffer that every forward pass moves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, factor):
        self.seen += 1
        return (self.weight * factor).square().sum()


def state(run):
    """Copies of all that a step moves, but for the learning rate."""
    moments = [v.clone() for s in run.optimizer.state.values() for v in s.values()]
    tensors = [*run.module.state_dict().values(), *run.average.state_dict().values(), *moments]
    return [t.clone() for t in tensors]


def step(run, factor, constant=0.0):
    former = run.buffers()
    run.backward(run.module(factor) + constant)
    return run.update(former)


@pytest.mark.parametrize(
    ("factor", "constant"), [(float("nan"), 0.0), (float("inf"), 0.0), (1.0, float("inf"))]
)
def test_a_skipped_step_leaves_nothing_behind(factor, constant):
    run = Run(Bad(), SKIP, {})
    for _ in range(3):
        step(run, 1.0)
    before = state(run)
    assert not step(run, factor, constant).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, state(run), strict=True))
    assert run.step == 4
    step(run, 1.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, state(run), strict=True)]
    assert all(moved)


class Sometimes(Clips):
    """Clips whose batches of some steps are marked, by a clip that is all white."""

    def batch(self, indices, device="cpu"):
        batch = super().batch(indices, device)
        if 7 in list(indices):
            batch["video"] = torch.full_like(batch["video"], 255)
        return batch


def poisoned():
    """A tokenizer whose loss is infinite for white clips."""
    vqvae = fresh_vqvae()
    forward = vqvae.forward

    def bad(x):
        out = forward(x)
        white = (x >= 0.5).all()
        return out._replace(loss=torch.where(white, torch.inf, out.loss))

    vqvae.forward = bad
    return vqvae


def test_a_resumed_run_with_skips_ends_as_an_uninterrupted_one(tmp_path):
    config = replace(SKIP, steps=12, checkpoint_every=1, keep=20, log_every=4, ema=0.9)
    expected = train_vqvae(poisoned(), Sometimes(), config, tmp_path / "a")
    skipped = [line["skipped"] for line in lines(tmp_path / "a") if "skipped" in line]
    assert sum(skipped) == 1, "the clip comes once in 12 batches of 4 of 40 clips, or twice"
    for file in sorted((tmp_path / "a").glob("*.pt"))[:12:4]:
        out = tmp_path / file.stem
        out.mkdir()
        (out / file.name).write_bytes(file.read_bytes())
        assert same(train_vqvae(poisoned(), Sometimes(), config, out), expected), file.name


def test_float16_scales_its_loss(tmp_path):
    config = replace(QUICK, precision="float16", checkpoint_every=1, keep=9, log_every=1)
    train_vqvae(fresh_vqvae(), Clips(), config, tmp_path)
    scale = torch.load(tmp_path / LAST)["scale"]
    assert scale["growth_interval"] == 2000
    assert scale["scale"] in [2.0**n for n in range(4, 17)]
    plain = tmp_path / "float32"
    train_vqvae(fresh_vqvae(), Clips(), QUICK, plain)
    assert torch.load(plain / LAST)["scale"] is None
    half = [line["loss"] for line in lines(tmp_path) if line.get("loss") is not None]
    full = [line["loss"] for line in lines(plain) if "loss" in line]
    assert half[0] == pytest.approx(full[0], rel=0.2), "before it has learnt"
    assert half[-1] < half[0]


def test_the_scale_is_resumed(tmp_path):
    run = Run(Bad(), replace(QUICK, precision="float16"), {})
    step(run, 1.0)
    step(run, float("inf"))
    assert run.scaler.get_scale() == 2.0**15
    checkpoints = Checkpoints(tmp_path, 2)
    run.save(checkpoints)
    again = Run(Bad(), run.config, {})
    again.resume(checkpoints)
    assert again.scaler.state_dict() == run.scaler.state_dict()
    # Of float32, which may skip, no scale is kept that float16 would then start from.
    plain = Run(Bad(), replace(QUICK, non_finite="skip"), {})
    step(plain, 1.0)
    assert plain.scaler.get_scale() == 1.0


def test_free_settings_exist():
    known = {f.name for kind in (TrainConfig, VQVAEConfig, GPTConfig) for f in fields(kind)}
    assert known >= FREE


def test_another_stage_is_named_in_a_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    Run(Bad(), QUICK, {"hidden": SMALL.hidden}).save(checkpoints)
    with pytest.raises(ValueError, match=r"another kind of model, without width, heads$"):
        Run(Bad(), QUICK, {"width": 12, "heads": 2, "hidden": 8}).resume(checkpoints)
