"""What must be the same on a CUDA device as on a CPU: pytest -m gpu."""

import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, open_dataset, video
from tinyvgpt.sampling import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL = VQVAEConfig(
    channels=1,
    hidden=32,
    res_blocks=1,
    codes=64,
    code_dim=16,
    causal_time=True,
    downsample=(4, 8, 8),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vqvae = VQVAE(SMALL)
    vqvae.train()(torch.rand(4, 1, 16, 64, 64) - 0.5)  # initialises the codebook
    gpt = GPT(GPTConfig.for_vqvae(SMALL, width=48, heads=3, layers=2), vqvae.codebook.codes)
    torch.nn.init.normal_(gpt.token_out.weight, std=0.1)
    return VideoGPT(vqvae, gpt).eval()


@pytest.fixture(scope="module")
def clips():
    return open_dataset("moving-mnist", "val").batch(range(8))["video"]


def test_moving_mnist_renders_the_same():
    data = open_dataset("moving-mnist")
    here, there = data.batch(range(64)), data.batch(range(64), device="cuda")
    for name in here:
        assert torch.equal(here[name], there[name].cpu()), name


def test_both_stages_agree(model, clips):
    x = video.to_model(clips)
    with torch.no_grad():
        z, tokens = model.vqvae.features(x), model.vqvae.encode(x)
        logits, decoded = model.logits(tokens), model.vqvae.decode(tokens)
        model.cuda()
        torch.backends.cudnn.allow_tf32 = False
        z_gpu, tokens_gpu = model.vqvae.features(x.cuda()).cpu(), model.vqvae.encode(x.cuda()).cpu()
        logits_gpu = model.logits(tokens.cuda()).cpu()
        decoded_gpu = model.vqvae.decode(tokens.cuda()).cpu()
        torch.backends.cudnn.allow_tf32 = True
    model.cpu()
    assert torch.allclose(z, z_gpu, atol=1e-4)
    assert (tokens == tokens_gpu).float().mean() > 0.999
    assert torch.allclose(logits, logits_gpu, atol=1e-4)
    assert torch.allclose(decoded, decoded_gpu, atol=1e-4)


def test_cached_decoding(model):
    gpt = model.cuda().gpt
    tokens = torch.randint(64, (2, 4, 8, 8), device="cuda")
    with torch.no_grad():
        full = gpt(tokens).flatten(1, 3)
        decoder = Decoder(gpt, 2, gpt.condition(2))
        flat = tokens.flatten(1)
        steps = [decoder.step(flat[:, :0])] + [decoder.step(flat[:, i : i + 1]) for i in range(255)]
    model.cpu()
    assert torch.allclose(torch.stack(steps, 1), full, atol=2e-5)


def test_samples_repeat(model):
    model.cuda()
    first, again = model.sample(3, seed=1), model.sample(3, seed=1)
    model.cpu()
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
