"""The GPU's decoder: its steps, with their kernels run on a CPU, against the plain forward pass."""

from dataclasses import replace

import cuda_on_cpu
import pytest
import torch

from tinyvgpt import GPT, GPTConfig, graph_decoder, sampling
from tinyvgpt.graph_decoder import can_decode
from tinyvgpt.kernels import build
from tinyvgpt.sampling import Sampler, SamplingRule

PLAIN = GPTConfig(
    latent_shape=(2, 4, 4), codes=20, code_dim=6, frames=4, resolution=8, width=48, heads=2,
    layers=2, mlp_ratio=2.0,
)  # fmt: skip
KINDS = {
    "plain": {},
    "strided": {"latent_shape": (2, 8, 8), "attention": "strided"},
    "labels": {"classes": 3, "label_dropout": 0.1},
    "frames": {"cond_frames": 1, "cond_depth": 10, "cond_width": 8},
    "actions": {"action_dim": 2},
}


@pytest.fixture
def on_cpu(kernel_folder, monkeypatch):
    """Kernels are run on the CPU, attention by its reference; new tensors start as NaN."""
    emulate = cuda_on_cpu.in_place_of_launch(kernel_folder, "product.cu", "draw.cu")
    monkeypatch.setattr(build, "launch", emulate)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def made(kind, batch=2):
    """A GPT of a kind with weights that say something, and what its clips are conditioned on."""
    config = replace(PLAIN, **KINDS[kind])
    gpt = GPT(config, torch.randn(config.codes, config.code_dim)).eval()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.ndim > 1 and "gain" not in name:
                p.normal_(std=0.3)
    given = {
        "labels": {"labels": torch.arange(batch) % 3},
        "frames": {"frames": torch.rand(batch, 3, 1, 8, 8) - 0.5},
        "actions": {"actions": torch.randn(batch, 4, 2)},
    }
    return gpt, given.get(kind, {})


def sampler_of(gpt, monkeypatch, **arguments):
    """A Sampler that takes the GPU's decoder."""
    monkeypatch.setattr(sampling, "can_decode", lambda gpt: True)
    return Sampler(gpt, 2, seed=1, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [0, 1, 13])
def test_logits_are_those_of_the_forward_pass(on_cpu, monkeypatch, kind, given):
    gpt, condition = made(kind)
    prefix = torch.randint(20, (2, given))
    sampler = sampler_of(gpt, monkeypatch, prefix=prefix, **condition)
    decoder = sampler.decoder
    decoder.prefill(given)
    logits = []
    for _ in range(given, min(given + 12, gpt.config.tokens)):
        decoder.step()
        logits.append(decoder.logits.clone())
    assert sampler.tokens[:, :given].equal(prefix)
    unseen = len(logits) + given
    whole = torch.where(torch.arange(gpt.config.tokens) < unseen, sampler.tokens, 0)
    with torch.no_grad():
        wanted = gpt(whole.view(2, *gpt.config.latent_shape), **condition).flatten(1, 3)
    wanted = wanted[:, given:unseen]
    found = torch.stack(logits, dim=1)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    p = found.flatten(0, 1).softmax(-1)
    u = sampler.u[:, given:unseen].flatten()
    assert sampler.tokens[:, given:unseen].flatten().equal(sampling.draw(p, u))


def test_guided(on_cpu, monkeypatch):
    gpt, condition = made("labels")
    rule = SamplingRule(guidance=3.0)
    decoder = sampler_of(gpt, monkeypatch, rule=rule, **condition).decoder
    decoder.prefill(0)
    for _ in range(5):
        decoder.step()
    with_label, without = decoder.logits.chunk(2)
    both = without + 3 * (with_label - without)
    assert decoder.tokens[:, 4].equal(sampling.draw(both.softmax(-1), decoder.u[:, 4]))
    assert not torch.allclose(with_label, without)
    assert (decoder.lengths == 6).all()


def test_actions_that_come_late(on_cpu, monkeypatch):
    gpt, condition = made("actions")
    early = sampler_of(gpt, monkeypatch, **condition)
    late = sampler_of(gpt, monkeypatch, actions=torch.zeros(2, 4, 2))
    first = condition["actions"].clone()
    first[:, 1:] = 0  # what leads to the second latent frame is not known yet
    for sampler in (early, late):
        sampler.decoder.prefill(0)
    late.steer(first)
    for i in range(20):
        if i == 16:
            late.decoder.position = 16
            late.steer(condition["actions"])
        for sampler in (early, late):
            sampler.decoder.step()
    assert early.tokens[:, :20].equal(late.tokens[:, :20])


def test_a_prefix_that_is_the_whole_clip(monkeypatch):
    gpt, _ = made("plain")
    prefix = torch.randint(20, (2, gpt.config.tokens))
    sampler = sampler_of(gpt, monkeypatch, prefix=prefix)
    assert sampler.draw(0).shape == (2, 0)
    assert sampler.tokens.equal(prefix)


def test_what_it_can_decode(monkeypatch):
    monkeypatch.setattr(graph_decoder, "own_kernel", lambda *_: True)
    assert can_decode(made("plain")[0])
    odd = replace(PLAIN, width=30, heads=1)
    assert not can_decode(GPT(odd))
    assert not can_decode(GPT(replace(PLAIN, codes=20000)))
    frames = replace(PLAIN, width=96, heads=1, **KINDS["frames"])
    assert can_decode(GPT(frames))
    assert not can_decode(GPT(replace(frames, cond_width=64)))  # values of 240 numbers
    monkeypatch.setattr(graph_decoder, "own_kernel", lambda *_: False)
    assert not can_decode(made("plain")[0])
