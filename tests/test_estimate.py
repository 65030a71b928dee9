"""Estimates of memory and time, peaks of GPUs, and what a dry run prints."""

from dataclasses import replace
from itertools import accumulate, cycle

import pytest
import torch

from tinyvgpt import GPT, GPTConfig, VQVAEConfig, estimate, settings
from tinyvgpt.cost import clip_work, forward_flops, step_flops
from tinyvgpt.estimate import (
    describe,
    in_units,
    in_words,
    memory,
    peak_flops,
    product_rate,
    time_per_step,
)
from tinyvgpt.settings import TrainConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = GPTConfig(
    latent_shape=(2, 4, 8),
    codes=16,
    code_dim=8,
    frames=4,
    resolution=16,
    width=24,
    heads=2,
    layers=2,
)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181.05, 90.5),
        ("NVIDIA L40S", 362.05, 91.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("Tesla T4", None, 8.1),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("Radeon RX 7900", None, None),
    ],
)
def test_peaks(name, bfloat16, float32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = [peak_flops(CUDA, dtype) for dtype in (torch.bfloat16, torch.float32)]
    expected = [None if tera is None else tera * 1e12 for tera in (bfloat16, float32)]
    assert found == expected
    assert peak_flops(CUDA, torch.int8) is None
    assert peak_flops(CPU, torch.float32) is None


def test_t4_has_half_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert peak_flops(CUDA, torch.float16) == 65e12


def test_memory_of_weights_and_optimizer():
    model = GPT(SMALL)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    codes = 4 * SMALL.codes * SMALL.code_dim
    needed = memory(SMALL, TrainConfig(), 2)
    assert needed[:4] == (parameters + codes, parameters, 2 * parameters, 0)
    averaged = memory(SMALL, TrainConfig(ema=0.99), 2)
    assert averaged == needed._replace(average=parameters + codes)


def test_memory_with_checkpointing_and_at_half_precision():
    config = replace(SMALL, layers=12)
    full = memory(config, TrainConfig(), 8).activations
    assert memory(replace(config, checkpointing=True), TrainConfig(), 8).activations < full / 3
    assert memory(config, TrainConfig(), 8, dtype=torch.bfloat16).activations < 0.8 * full


def test_time_is_work_over_rate(monkeypatch):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(estimate, "UTILISATION", {"cpu": {GPTConfig: 0.5, VQVAEConfig: 0.25}})
    train = TrainConfig(batch_size=8)
    work = step_flops(SMALL, 8)
    assert time_per_step(SMALL, train, CPU) == pytest.approx(work / 0.5e9)
    assert time_per_step(SMALL, train, CPU, clips=2) == pytest.approx(work / 4 / 0.5e9)
    again = 8 * forward_flops(SMALL)
    checkpointing = time_per_step(replace(SMALL, checkpointing=True), train, CPU)
    assert checkpointing == pytest.approx((work + again) / 0.5e9)
    tokenizer = VQVAEConfig(frames=4, resolution=8, hidden=8, res_blocks=1)
    expected = step_flops(tokenizer, 8) / 0.25e9
    assert time_per_step(tokenizer, train, CPU) == pytest.approx(expected)


def test_product_rate_is_that_of_the_fastest(monkeypatch):
    ticks = accumulate(cycle([0.05, 0.02, 0.04, 0.03]))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(ticks))
    assert product_rate(CPU, torch.float32, seconds=0.9) == pytest.approx(2 * 1024**3 / 0.02)


def test_describe(monkeypatch):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(estimate, "UTILISATION", {"cpu": {GPTConfig: 0.5}})
    train = TrainConfig(steps=2000, batch_size=8, ema=0.9)
    lines = describe(SMALL, train, CPU, clips=4, at_once=2).splitlines()
    needed = memory(SMALL, train, 2)
    work = step_flops(SMALL, 4)
    assert lines[0] == f"parameters: {sum(p.numel() for p in GPT(SMALL).parameters()):,}"
    assert lines[1] == "clip: 4 frames of 16 × 16 × 3"
    assert lines[2] == "tokens: 2 × 4 × 8 = 64 a clip, of 16 codes"
    assert lines[3] == "training: 2,000 steps of 8 clips, 512 tokens a step"
    assert (
        lines[4] == "on this CPU: float32, not compiled, 2 processes of 4 clips, 2 clips at a time"
    )
    assert lines[5] == f"memory (estimate): {in_units(sum(needed), 1024)}B"
    assert f"average {in_units(needed.average, 1024)}B, activations" in lines[6]
    assert lines[7] == f"work: {in_units(work)}FLOP a step, {in_units(2000 * work)}FLOP in all"
    a_step, in_all = (in_words(float(f"{n * work / 0.5e9:.2g}")) for n in (1, 2000))
    assert lines[8] == f"time (estimate): {a_step} a step, {in_all} in all"


def test_describe_in_one_process(monkeypatch):
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(settings, "lacking", lambda device: None)
    train = TrainConfig(batch_size=8, precision="bfloat16", compile="on")
    lines = describe(SMALL, train, CPU).splitlines()
    assert lines[4] == "on this CPU: bfloat16, compiled"


def test_describe_clips_that_end_early(monkeypatch):
    """Two of eight are whole; six have half of the tokens, so memory is that of five clips."""
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 1e9)
    train = TrainConfig(steps=10, batch_size=8, openings=0.75)
    lines = describe(SMALL, train, CPU).splitlines()
    ending = "(6 of them end after the first latent frame)"
    assert lines[3] == f"training: 10 steps of 8 clips {ending}, 320 tokens a step"
    assert lines[5] == f"memory (estimate): {in_units(sum(memory(SMALL, train, 5)), 1024)}B"
    assert lines[7].startswith(f"work: {in_units(8 * clip_work(SMALL, 0.75)[1])}FLOP a step")
    vqvae = VQVAEConfig(resolution=8, frames=4, downsample=(2, 4, 4), hidden=8)
    assert "8 clips, 64 tokens" in describe(vqvae, train, CPU)


def test_units():
    assert [in_units(x) for x in (5, 1500, 10.2e12)] == ["5 ", "1.5 k", "10.2 T"]
    assert in_units(1010 * 2**20, 1024) == "0.986 Gi"
    assert [in_words(x) for x in (0.0351, 12, 180, 7500)] == [
        "35.1 ms",
        "12 s",
        "3 min",
        "2 h 5 min",
    ]
    assert in_words(800 * 86400) == "2 years"
