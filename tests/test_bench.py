"""The reference loop decodes the same logits as ours, so timing one against the other is fair."""

import json

import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VQVAEConfig
from tinyvgpt.bench import data, record
from tinyvgpt.bench.gpu_sampling import UsualDecoder, bytes_of_a_clip
from tinyvgpt.bench.sampling import ReferenceDecoder, sampling
from tinyvgpt.data import MovingMNIST
from tinyvgpt.encode import encode_folder
from tinyvgpt.sampling import Decoder

SMALL = GPTConfig(latent_shape=(2, 8, 8), codes=32, code_dim=8, width=24, heads=2, layers=2)


@pytest.mark.parametrize("attention", ["full", "strided"])
def test_reference_and_ours_agree(attention):
    config = GPTConfig(**{**SMALL.__dict__, "attention": attention})
    torch.manual_seed(0)
    gpt = GPT(config, torch.randn(32, 8)).eval()
    torch.nn.init.normal_(gpt.token_out.weight, std=0.5)
    tokens = torch.randint(32, (3, config.tokens))
    with torch.no_grad():
        condition = gpt.condition(3)
        reference, ours = ReferenceDecoder(gpt, 3, condition), Decoder(gpt, 3, condition)
        full = gpt(tokens.view(3, *config.latent_shape)).flatten(1, 3)
        for i in range(config.tokens):
            seen = tokens[:, i - 1 : i] if i else tokens[:, :0]
            expected = full[:, i]
            assert torch.allclose(reference.step(seen), expected, atol=2e-5)
            assert torch.allclose(ours.step(seen), expected, atol=2e-5)


def test_sampling_counts_tokens():
    result = sampling(SMALL, batch=2, tokens=5)
    assert (result["batch"], result["tokens_of_each_clip"]) == (2, 5)
    rates = result["ours_tokens_per_second"], result["reference_tokens_per_second"]
    assert result["ratio"] == pytest.approx(rates[0] / rates[1], rel=0.02)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_the_usual_way_draws_from_the_same_model(filled, merged):
    torch.manual_seed(0)
    gpt = GPT(SMALL, torch.randn(32, 8)).eval()
    torch.nn.init.normal_(gpt.token_out.weight, std=0.5)
    drawn, u = torch.zeros(3, SMALL.tokens, dtype=torch.int64), torch.rand(3, SMALL.tokens)
    with torch.no_grad():
        decoder = UsualDecoder(gpt, 3, filled=filled)
        decoder = torch.compile(decoder, backend="aot_eager") if merged else decoder
        for i in range(20):  # it begins with a token in the place of the start
            last = drawn[:, max(i - 1, 0)]
            drawn[:, i] = decoder(last, torch.tensor([i]), u[:, i])
        caches = Decoder(gpt, 3, gpt.condition(3)).caches
        x = gpt.token_in(gpt.codes)[torch.cat([drawn[:, :1] * 0, drawn[:, :19]], dim=1)]
        x = x + gpt.offsets(gpt.condition(3))[:, :20]
        p = gpt.decode(x, gpt.condition(3), caches).softmax(-1).cumsum(-1)
    assert drawn[:, :20].equal(torch.searchsorted(p, u[:, :20, None])[..., 0].clamp_max(31))


def test_bytes_that_must_be_read():
    """Of the released size: 66 MB of weights, at batch 1 on average 37 MB of cache."""
    config = GPTConfig(latent_shape=(4, 32, 32))
    one, two = (bytes_of_a_clip(config, batch) / config.tokens for batch in (1, 2))
    assert two - one == pytest.approx(37.8e6, rel=1e-2)
    assert 2 * one - two == pytest.approx(66e6, rel=2e-2)


def test_loading_tokens_that_have_no_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WARM_UP", 0.05)
    monkeypatch.setattr(data, "LEAST", 0.1)
    config = VQVAEConfig(
        channels=1, frames=8, resolution=32, downsample=(4, 8, 8), hidden=8, res_blocks=0
    )
    clips = MovingMNIST(frames=8, resolution=32, size=4)
    encode_folder(VQVAE(config), clips, tmp_path / "train", first_frames=0)
    result = data.loading(str(tmp_path), batch_size=2, workers=0)
    assert (result["frames"], result["resolution"]) == (8, 32)
    assert result["clips_per_second"][str(tmp_path)] > 0


def test_record_says_where_it_comes_from(tmp_path):
    path = record({"ratio": 2.0}, "example", "tinyvgpt bench sampling", tmp_path / "results")
    content = json.loads(path.read_text())
    assert content["ratio"] == 2.0
    assert content["torch"] == torch.__version__
    assert {"date", "command", "python", "machine"} <= content.keys()
