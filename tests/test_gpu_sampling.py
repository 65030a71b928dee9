"""Sampling on a CUDA device by the package's kernels: pytest -m gpu."""

import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, attention, open_dataset
from tinyvgpt.graph_decoder import STEPS, GraphDecoder
from tinyvgpt.kernels.step import draw
from tinyvgpt.sampling import Sampler, SamplingRule, sample_tokens

pytest.importorskip("cuda.core")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RELEASED = GPTConfig(latent_shape=(4, 32, 32))
KINDS = {
    "plain": {},
    "9 heads": {"heads": 9},
    "strided": {"attention": "strided"},
    "labels": {"classes": 3, "label_dropout": 0.1},
    "frames": {"cond_frames": 1},
    "actions": {"action_dim": 2},
}


def made(kind, batch=2):
    """A GPT of the released size on the GPU, and what its clips are conditioned on."""
    torch.manual_seed(0)
    config = replace(RELEASED, **KINDS[kind])
    gpt = GPT(config, torch.randn(config.codes, config.code_dim)).eval().cuda()
    torch.nn.init.normal_(gpt.token_out.weight, std=0.05)
    given = {
        "labels": {"labels": torch.arange(batch, device="cuda") % 3},
        "frames": {"frames": torch.rand(batch, 3, 1, 64, 64, device="cuda") - 0.5},
        "actions": {"actions": torch.randn(batch, 16, 2, device="cuda")},
    }
    return gpt, given.get(kind, {})


def nats(gpt, tokens, condition, start):
    """Mean cross-entropy in float32 of tokens from a position on."""
    with torch.no_grad(), attention.use("torch"):
        logits = gpt(tokens, **condition).flatten(1, 3)[:, start:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(1)[:, start:].flatten()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [0, 1000])
def test_whole_clips_teacher_forced(kind, given):
    """The loss of a clip, as the steps have it and as the forward pass in float32 does."""
    gpt, condition = made(kind)
    prefix = torch.randint(2048, (2, given), device="cuda")
    sampler = Sampler(gpt, 2, seed=1, prefix=prefix, **condition)
    decoder = sampler.decoder
    assert isinstance(decoder, GraphDecoder)
    decoder.prefill(given)
    total, count, step = 0.0, 0, decoder.step
    for i in range(given, RELEASED.tokens):
        step()
        if i % 64 == 0 or i > RELEASED.tokens - 20:
            logits = decoder.logits.log_softmax(-1)
            total += -logits.gather(1, sampler.tokens[:, i : i + 1]).mean().item()
            count += 1
            if count == 1 or i == RELEASED.tokens - 1:
                kept = (i, decoder.logits.clone())
    tokens = sampler.tokens.view(2, *RELEASED.latent_shape)
    with torch.no_grad(), attention.use("torch"):
        wanted = gpt(tokens, **condition).flatten(1, 3)
    i, logits = kept
    assert i == RELEASED.tokens - 1
    assert (logits - wanted[:, i]).norm() < 0.03 * wanted[:, i].norm()
    places = [i for i in range(given, RELEASED.tokens) if i % 64 == 0 or i > RELEASED.tokens - 20]
    exact = -wanted[:, places].log_softmax(-1).gather(2, sampler.tokens[:, places, None]).mean()
    assert total / count == pytest.approx(exact.item(), rel=5e-3)


def test_graphs_draw_what_steps_draw():
    gpt, _ = made("plain")
    graphs = Sampler(gpt, 2, seed=1).draw(100)
    one = Sampler(gpt, 2, seed=1)
    one.decoder.prefill(0)
    for _ in range(100):
        one.decoder.step()
    assert one.tokens[:, :100].equal(graphs)
    assert Sampler(gpt, 2, seed=1).draw(100).equal(graphs)
    some = Sampler(gpt, 2, seed=1)
    parts = [some.draw(n) for n in (1, STEPS, 3, 100 - STEPS - 4)]
    assert torch.cat(parts, dim=1).equal(graphs)


def test_a_steered_stream_can_be_repeated():
    arm = VideoGPT.from_pretrained("robot-push").cuda()
    frames = open_dataset("robot-push", split="test").batch([10])["video"][:, :8]

    def drawn():
        stream = arm.stream(frames=frames, actions=lambda at: [0, 0.002 * at, 0, 0], seed=3)
        return torch.cat(list(islice(stream, 6)), dim=1)  # of two windows

    first = drawn()
    for _ in range(4):
        assert drawn().equal(first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_a_device_that_is_not_the_current_one():
    gpt, _ = made("plain")
    wanted = Sampler(gpt, 1, seed=0).draw(20).cpu()
    gpt.to("cuda:1")
    for _ in range(2):
        assert Sampler(gpt, 1, seed=0).draw(20).cpu().equal(wanted)
        assert torch.cuda.current_device() == 0


def test_a_clip_allocates_nothing():
    gpt, _ = made("plain")
    sampler = Sampler(gpt, 1, seed=0)
    sampler.draw(1 + STEPS + 1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    sampler.draw(2 * STEPS + 3)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= 1
    in_use = torch.cuda.memory_allocated()
    del sampler
    assert torch.cuda.memory_allocated() < in_use - 30e6  # its cache


def test_two_threads():
    gpt, _ = made("plain")
    wanted = [Sampler(gpt, 1, seed=seed).draw(200).clone() for seed in range(2)]
    found = {}

    def run(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[seed] = Sampler(gpt, 1, seed=seed).draw(200).clone()
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[seed].equal(wanted[seed]) for seed in range(2))


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(),
        SamplingRule(temperature=0.7),
        SamplingRule(top_k=30),
        SamplingRule(top_p=0.8),
        SamplingRule(guidance=2.0),
        SamplingRule(temperature=1.3, top_k=100, top_p=0.9),
    ],
)
def test_frequencies(rule):
    """20,000 draws against the rule's probabilities: a chi-square test at 1 in 10,000."""
    torch.manual_seed(0)
    clips, codes = 20_000, 2048
    both = 2 * torch.randn(2, codes, device="cuda")
    guided = rule.guidance != 1
    rows = 2 * clips if guided else clips
    logits = both.repeat_interleave(clips, 0)[:rows].contiguous()
    tokens = torch.zeros(clips, 1, dtype=torch.int64, device="cuda")
    lengths = torch.ones(rows, dtype=torch.int32, device="cuda")
    u = torch.rand(clips, 1, dtype=torch.float64, device="cuda")
    table, offsets = torch.zeros(codes, 8, device="cuda"), torch.zeros(1, 1, 8, device="cuda")
    draw(
        logits, u, tokens, lengths, table, offsets, torch.zeros(rows, 8, device="cuda"),
        guidance=rule.guidance, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p,
    )  # fmt: skip
    z = both[1:] + rule.guidance * (both[:1] - both[1:]) if guided else both[:1]
    p = rule.probabilities(z)[0].double().cpu()
    counts = torch.bincount(tokens[:, 0].cpu(), minlength=codes).double()
    assert not counts[p == 0].any()
    often = p * clips >= 10
    expected = torch.cat([p[often], p[~often].sum()[None]]) * clips
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    expected, seen = expected[expected > 0], seen[expected > 0]
    chi2, free = ((seen - expected) ** 2 / expected).sum().item(), len(expected) - 1
    spread = 2 / (9 * free)  # Wilson and Hilferty
    assert (chi2 / free) ** (1 / 3) < 1 - spread + 3.72 * spread**0.5


def test_greedy_clips_take_the_likeliest_tokens():
    """Each token's logit is the plain forward pass's highest, or as near as bfloat16 can tell."""
    vqvae = VQVAE(VQVAEConfig(downsample=(4, 4, 4), hidden=32, res_blocks=1, codes=64, code_dim=16))
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.for_vqvae(vqvae.config, width=48, heads=3, layers=2), vqvae.codebook.codes)
    torch.nn.init.normal_(gpt.token_out.weight, std=3.0)
    model = VideoGPT(vqvae, gpt).eval().cuda()
    tokens = sample_tokens(model.gpt, 2, seed=0, rule=SamplingRule(temperature=0))
    with torch.no_grad(), attention.use("torch"):
        logits = model.gpt(tokens)
    behind = logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
    assert behind.max() < 0.1 * logits.std()
    assert (behind == 0).float().mean() > 0.9
    assert model.sample(2, seed=0).equal(model.sample(2, seed=0))
