"""Every reference case of the original: the package gives its numbers, weight for weight."""

import json
from pathlib import Path

import pytest
import torch
from parity.weights import clip, fill
from safetensors import safe_open

from tinyvgpt import upstream
from tinyvgpt.sampling import Decoder

FOLDER = Path(__file__).parent / "parity"
VQVAES = ["vqvae_444", "vqvae_422_two_blocks"]
GPTS = ["gpt_uncond", "gpt_class", "gpt_frame", "gpt_sparse"]


class Case:
    """A reference case: its tensors as attributes, its settings, and the original's state dict."""

    def __init__(self, name):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                setattr(self, key, file.get_tensor(key))
            meta = file.metadata()
        self.args = json.loads(meta["args"])
        self.vqvae_args = json.loads(meta["vqvae_args"]) if "vqvae_args" in meta else None
        self.state = {
            key: fill(key, tuple(shape)) for key, shape in json.loads(meta["shapes"]).items()
        }
        prefix = "vqvae." if self.vqvae_args else ""
        count = self.state[f"{prefix}codebook.N"]
        self.state[f"{prefix}codebook.embeddings"] = self.embeddings_buffer
        self.state[f"{prefix}codebook.z_avg"] = self.embeddings_buffer * count[:, None]

    def gpt(self):
        return upstream.gpt_from(self.args, self.vqvae_args, self.state)

    def condition(self):
        frames = self.args["n_cond_frames"]
        return {
            "labels": getattr(self, "label", None),
            "frames": self.x[:, :, :frames] if frames else None,
        }


@pytest.fixture(scope="module")
def case():
    cache = {}
    return lambda name: cache.setdefault(name, Case(name))


@pytest.mark.parametrize("name", VQVAES)
def test_vqvae(case, name):
    c = case(name)
    vqvae = upstream.vqvae_from(c.args, c.state)
    with torch.no_grad():
        out = vqvae(c.x)
        assert torch.allclose(vqvae.features(c.x), c.z, atol=1e-5)
    assert torch.equal(out.tokens, c.codes)
    assert torch.equal(vqvae.encode(c.x), c.codes)
    assert torch.allclose(out.reconstruction, c.recon, atol=1e-5)
    assert torch.allclose(vqvae.decode(c.codes), c.decoded, atol=1e-5)
    assert torch.allclose(out.recon_loss, c.recon_loss[0], atol=1e-5)
    assert torch.allclose(out.commitment_loss, c.commitment_loss[0], atol=1e-5)
    assert torch.allclose(out.perplexity, c.perplexity[0], rtol=1e-5)


@pytest.mark.parametrize("name", VQVAES)
def test_codebook_update(case, name):
    c = case(name)
    codebook = upstream.vqvae_from(c.args, c.state).codebook.train()
    codebook.count.fill_(50.0)
    codebook.total.copy_(50.0 * c.embeddings_buffer)
    codebook(c.z)
    assert torch.allclose(codebook.count, c.ema_N, rtol=1e-5)
    assert torch.allclose(codebook.total, c.ema_z_avg, rtol=1e-5, atol=1e-6)
    assert torch.allclose(codebook.codes, c.ema_embeddings, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GPTS)
def test_gpt(case, name):
    c = case(name)
    model = c.gpt()
    assert torch.equal(model.vqvae.encode(c.x), c.codes)
    with torch.no_grad():
        logits = model.logits(c.codes, **c.condition())
        loss = model.gpt.loss(c.codes, **c.condition())
    assert torch.allclose(logits, c.logits, rtol=0, atol=5e-5)
    assert torch.allclose(loss, c.loss[0], atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("name", GPTS)
def test_cached_decoding(case, name, prefix):
    """Step by step with a cache, from nothing or behind a prefix, logits are the full forward's."""
    c = case(name)
    gpt = c.gpt().gpt
    tokens = c.codes.flatten(1)
    prefix = min(prefix, tokens.shape[1] // 2)
    with torch.no_grad():
        full = gpt(c.codes, **c.condition()).flatten(1, 3)
        decoder = Decoder(gpt, len(tokens), gpt.condition(len(tokens), **c.condition()))
        steps = [decoder.step(tokens[:, :prefix])]
        steps += [decoder.step(tokens[:, i : i + 1]) for i in range(prefix, tokens.shape[1] - 1)]
    assert torch.allclose(torch.stack(steps, 1), full[:, prefix:], rtol=0, atol=2e-5)


def test_sparse_layout(case):
    c = case("gpt_sparse")
    assert torch.equal(c.gpt().gpt.layout.blocks, c.sparse_layout.bool())


def test_reference_clips(case):
    """The stored clips are what `clip` makes of the case's name, so the cases can be made again."""
    for name in VQVAES + GPTS:
        x = case(name).x
        assert torch.equal(x, clip(name, len(x), x.shape[2], x.shape[3])), name


def test_checkpoint_file(case):
    """The unconditional case, read from a file of the original's kind, settings inferred."""
    c = case("gpt_uncond")
    model = upstream.load(FOLDER / "gpt_uncond.ckpt")
    expected = c.gpt()
    assert model.vqvae.config == expected.vqvae.config
    assert model.gpt.config == expected.gpt.config
    with torch.no_grad():
        assert torch.allclose(model.logits(c.codes), c.logits, rtol=0, atol=5e-5)
