"""Figures equal what they are defined as, on models and clips small enough to compute by hand."""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, evaluate, video
from tinyvgpt.encode import encode_dataset
from tinyvgpt.evaluate import REAL, choose, nats, regenerate, squared_error, ssim
from tinyvgpt.frechet import compare, distance, halves, mean_figure

TOKENIZER = VQVAEConfig(
    channels=3, frames=4, resolution=16, downsample=(2, 8, 8), hidden=8, res_blocks=1, codes=8,
    code_dim=4, axial=False, causal_time=True,
)  # fmt: skip
CONDITIONS = {"classes": 3, "action_dim": 2}
FRAME_ENCODER = {"cond_frames": 1, "cond_depth": 10, "cond_width": 8}


def build(causal=True, spread=0.3, **fields):
    torch.manual_seed(0)
    vqvae = VQVAE(replace(TOKENIZER, causal_time=causal))
    with torch.no_grad():  # its codes become what clips have, around 0, so that none are near ties
        x = video.to_model(Clips().batch(range(20))["video"])
        vqvae.to_code.bias -= vqvae.eval().features(x).mean((0, 2, 3, 4))
        vectors = vqvae.features(x).movedim(1, -1).flatten(0, -2)
        vqvae.codebook.codes.copy_(vectors[vectors[:, 0].argsort()[10::20]])
    config = GPTConfig.for_vqvae(vqvae.config, width=24, heads=2, layers=1, dropout=0.3, **fields)
    gpt = GPT(config, vqvae.codebook.codes)
    if spread:
        torch.nn.init.normal_(gpt.token_out.weight, std=spread)
    return VideoGPT(vqvae, gpt).train()  # in training mode, with dropout


@dataclass
class Clips:
    """Random clips, blocks of noise, with labels and actions."""

    size: int = 40
    frames: int = 4
    channels: int = 3
    resolution: int = 16
    label_names: tuple[str, ...] | None = ("a", "b", "c")

    def __len__(self):
        return self.size

    def batch(self, indices, device="cpu"):
        made: dict[str, list[torch.Tensor]] = {"video": [], "label": [], "action": []}
        for index in indices:
            g = torch.Generator().manual_seed(int(index))
            size = (self.frames, self.resolution, self.resolution, self.channels)
            blocks = torch.rand(self.frames, 2, 2, self.channels, generator=g) * 255
            wide = blocks.repeat_interleave(size[1] // 2, 1).repeat_interleave(size[2] // 2, 2)
            made["video"].append((wide * torch.rand(size, generator=g)).to(torch.uint8))
            made["label"].append(torch.randint(3, (), generator=g))
            made["action"].append(torch.randn(self.frames, 2, generator=g))
        return {name: torch.stack(values).to(device) for name, values in made.items()}


class Brightness:
    """Features: the mean of each frame."""

    name, distance, size, least, protocol = "brightness", "FVD", 4, 5, {}

    def __call__(self, clips):
        return clips.float().mean((2, 3, 4))


# Figures of clips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, CONDITIONS, FRAME_ENCODER])
def test_nats_of_clips(fields):
    """Their mean is the loss that training has; each is its clip's, whoever else is there."""
    model = build(**fields).eval()
    batch = Clips().batch(range(6))
    tokens = model.vqvae.encode(video.to_model(batch["video"]))
    with torch.no_grad():
        found = nats(model, tokens, batch)
        given = (
            {"labels": batch["label"], "actions": batch["action"]} if fields == CONDITIONS else {}
        )
        if fields == FRAME_ENCODER:
            given["frames"] = video.to_model(batch["video"][:, :1])
        loss = model.gpt.loss(tokens, **given)
        alone = nats(model, tokens[4:5], {name: x[4:5] for name, x in batch.items()})
    assert found.shape == (6,)
    assert found.mean().item() == pytest.approx(model.gpt.config.tokens * loss.item(), rel=1e-5)
    assert alone.item() == pytest.approx(found[4].item(), rel=1e-5)
    assert found.std() > 0


def test_an_even_guess():
    """A GPT without preferences takes log K a token."""
    found = evaluate.evaluate(build(spread=0), Clips(label_names=None), 4)["likelihood"]
    tokens, values = 2 * 2 * 2, 4 * 16 * 16 * 3
    expected = {
        "bits_per_token": 3,
        "nats_per_token": math.log(8),
        "bits_per_clip": 3 * tokens,
        "nats_per_clip": math.log(8) * tokens,
        "bits_per_pixel_channel": 3 * tokens / values,
    }
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(expected)


def test_squared_error():
    clips = torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8)
    others = clips.clone()
    others[0] += 51
    others[1, 1] = 255
    assert squared_error(clips, others).tolist() == pytest.approx([0.04, 0.25])
    assert squared_error(others, clips).tolist() == pytest.approx([0.04, 0.25])


def test_ssim():
    """Of flat frames (2ab + c) / (a² + b² + c) with c = 0.01²; a clip's is its frames' mean."""
    clips = torch.full((2, 4, 16, 16, 3), 51, dtype=torch.uint8)
    others = clips.clone()
    others[0, 3] = 102
    a, b, c = 0.2, 0.4, 1e-4
    flat = (2 * a * b + c) / (a**2 + b**2 + c)
    assert ssim(clips, others).tolist() == pytest.approx([(3 + flat) / 4, 1], abs=1e-5)


def test_ssim_in_windows():
    """(2 cov + c) / (var + var' + c), c = 0.03², where means agree, by a Gaussian of σ 1.5."""
    x = torch.randint(256, (1, 1, 32, 32, 1), dtype=torch.uint8, generator=torch.manual_seed(0))
    y = 255 - x
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    planes = [
        F.pad(z[0, 0, None, None, ..., 0].double() / 255, (5,) * 4, "reflect") for z in (x, y)
    ]

    def mean(z):
        return F.conv2d(z, window[None, None].double())

    a, b = planes
    va, vb, ab = (
        mean(a * a) - mean(a) ** 2,
        mean(b * b) - mean(b) ** 2,
        mean(a * b) - mean(a) * mean(b),
    )
    c1, c2 = 1e-4, 9e-4
    every = (2 * mean(a) * mean(b) + c1) * (2 * ab + c2)
    every /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (va + vb + c2)
    assert ssim(x, y).item() == pytest.approx(every.mean().item(), abs=1e-4)


# Samples ------------------------------------------------------------------------------------------


def test_samples_from_nothing_are_the_model_s():
    model = build(**CONDITIONS).eval()
    batch = Clips().batch(range(5))
    made = regenerate(model, batch, 0, seed=3)
    told = {"labels": batch["label"], "actions": batch["action"]}
    assert torch.equal(made, model.sample(**told, seed=3))
    second = {name: x[2:] for name, x in batch.items()}
    assert torch.equal(regenerate(model, second, 0, seed=3, first_clip=2), made[2:])


def test_given_frames_are_decoded_from_their_tokens():
    model = build().eval()
    batch = Clips().batch(range(3))
    made, tokens = regenerate(model, batch, 2, seed=0), []
    decode = model.vqvae.decode
    model.vqvae.decode = lambda x: (tokens.append(x), decode(x))[1]
    again = model.sample(frames=batch["video"][:, :2], seed=0)
    assert torch.equal(made, video.to_uint8(decode(tokens[0])))
    assert torch.equal(made[:, 2:], again[:, 2:])
    assert not torch.equal(made[:, :2], again[:, :2])


@pytest.mark.parametrize("causal", [True, False])
def test_frames_of_an_encoder_only_steer(causal):
    model = build(causal=causal, **FRAME_ENCODER).eval()
    batch = Clips().batch(range(3))
    made = regenerate(model, batch, 1, seed=0)
    assert not torch.equal(made[:, :1], batch["video"][:, :1])
    assert torch.equal(made[:, 1:], model.sample(frames=batch["video"][:, :1], seed=0)[:, 1:])


# The whole ----------------------------------------------------------------------------------------


def test_evaluate():
    """All groups, by hand from all the clips at once; the mode of the model is as it was."""
    model, data = build(**CONDITIONS), Clips()
    found = evaluate.evaluate(model, data, 20, features=[Brightness()], seed=2)
    assert model.training
    model.eval()
    chosen = [i * 39 // 19 for i in range(20)]
    batch = data.batch(chosen)
    with torch.no_grad():
        tokens = model.vqvae.encode(video.to_model(batch["video"]))
        of_each = nats(model, tokens, batch)
    bits = of_each / math.log(2) / 8
    figure = found["likelihood"]["bits_per_token"]
    assert tuple(figure) == pytest.approx(tuple(mean_figure(bits, 2)), rel=1e-5)
    decoded = model.reconstruct(batch["video"])
    error = ((decoded.float() - batch["video"].float()) / 255).square().mean()
    assert found["reconstruction"]["psnr"].value == pytest.approx(-10 * math.log10(error), rel=1e-5)
    similar = ssim(decoded, batch["video"])
    figure = found["reconstruction"]["ssim"]
    assert tuple(figure) == pytest.approx(tuple(mean_figure(similar, 2)), rel=1e-5)
    samples = model.sample(labels=batch["label"], actions=batch["action"], seed=2)
    rest = data.batch([i for i in range(40) if i not in chosen])["video"]
    sets = [of_brightness(clips) for clips in (batch["video"], decoded, samples, rest)]
    real, reconstructions, drawn, others = sets
    expected = {
        "FVD": compare(drawn, real, 2),
        "R-FVD": compare(reconstructions, real, 2),
        "FVD*": compare(drawn, reconstructions, 2),
        REAL.format("FVD"): compare(real, others, 2),
    }
    assert found["distances"].keys() == expected.keys()
    for name, figure in expected.items():
        assert tuple(found["distances"][name]) == pytest.approx(tuple(figure), rel=1e-3), name
    assert evaluate.evaluate(model, data, 20, features=[Brightness()], seed=2) == found


def of_brightness(clips):
    return evaluate.feature_set(Brightness(), [Brightness()(clips)])


def test_halves_of_real_clips_where_there_are_no_others():
    found = evaluate.evaluate(build(), Clips(30, label_names=None), 16, features=[Brightness()])
    real = of_brightness(Clips().batch([i * 29 // 15 for i in range(16)])["video"])
    assert found["distances"][REAL.format("FVD")].value == pytest.approx(
        distance(*halves(real)), rel=1e-4
    )


def test_given_frames_are_in_samples():
    fields = {"features": [Brightness()], "seed": 0}
    model, data = build(), Clips(label_names=None)
    none, some = (evaluate.evaluate(model, data, 6, given=n, **fields) for n in (None, 2))
    assert none["distances"]["FVD"] != some["distances"]["FVD"]
    assert none["distances"]["R-FVD"] == some["distances"]["R-FVD"]


@pytest.mark.parametrize(("size", "clips"), [(2, 2), (7, 3), (7, 4), (40, 20), (41, 20), (1000, 3)])
def test_clips_are_spread(size, clips):
    chosen, others = choose(size, clips)
    assert len(np.unique(chosen)) == clips
    assert (chosen[0], chosen[-1]) == (0, size - 1)
    assert np.ptp(np.diff(chosen)) <= 1
    assert len(np.unique(others)) == (clips if size >= 2 * clips else 0)
    assert not set(others) & set(chosen)
    assert all(0 <= i < size for i in others)
    assert np.array_equal(choose(size, size + 5)[0], np.arange(size))


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ({}, {"frames": 8}, {}, "the data has frames 8, the model needs 4"),
        ({}, {"channels": 1}, {}, "the data has channels 1, the model needs 3"),
        ({"classes": 5}, {}, {}, "the model has 5 classes, the data 3 labels"),
        ({"action_dim": 3}, {}, {}, r"actions of shape \(4, 2\), the model needs \(4, 3\)"),
        ({}, {}, {"clips": 1}, "clips is 1, of 40; an interval needs at least 2"),
        ({}, {"size": 1}, {}, "clips is 20, of 1; an interval needs at least 2"),
        (
            {},
            {},
            {"clips": 4, "features": [Brightness()]},
            "4 clips are too few for a distance between 4 features of brightness: at least 5 are",
        ),
        ({}, {}, {"given": 3}, "given is 3, must be a multiple of 2 from 0 to 2"),
        ({}, {}, {"given": 4}, "given is 4, must be a multiple of 2 from 0 to 2"),
        ({}, {}, {"given": -2}, "given is -2, must be a multiple of 2 from 0 to 2"),
        ({"causal": False}, {}, {"given": 2}, "given is 2, but the model can't go on from frames"),
        (FRAME_ENCODER, {}, {"given": 2}, "given is 2, the model's frame encoder takes 1"),
    ],
)
def test_refusals(model, data, options, message):
    model = build(**model)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(model, Clips(**data), **{"clips": 20, **options})


def test_tokens_are_refused():
    tokens = encode_dataset(build().vqvae, Clips(), 4, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="the data are tokens, clips are needed"):
        evaluate.evaluate(build(), tokens, 4)


@pytest.mark.parametrize("measure", [squared_error, ssim])
def test_clips_of_other_lengths(measure):
    clips = torch.zeros(2, 4, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"different shapes: \(2, 4, 16, 16, 3\) and \(2, 3, 16"):
        measure(clips, clips[:, :3])


def test_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match="SSIM needs torchmetrics, which is not installed: pip"):
        evaluate.evaluate(build(), Clips(label_names=None), 4)
