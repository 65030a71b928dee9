"""The training loop: what it saves, logs and shows, and what reaches the model."""

import json
import math
import sys
import warnings
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, loop, open_dataset, video
from tinyvgpt.train import TrainConfig, check_openings, train_gpt, train_vqvae

SMALL = VQVAEConfig(
    channels=1, frames=4, resolution=32, downsample=(2, 8, 8), hidden=8, res_blocks=1, codes=16,
    code_dim=4, axial_heads=2,
)  # fmt: skip
STRIDED = replace(SMALL, resolution=64)  # 2 × 8 × 8 tokens, as its blocks need
LAST = "checkpoint-0000006.pt"  # of QUICK
QUICK = TrainConfig(
    steps=6, batch_size=4, warmup=2, ema=0.9, log_every=2, checkpoint_every=2, validate_every=3,
    validation_clips=6, lr=3e-3, device="cpu", weight_decay=0.1,
)  # fmt: skip


class Clips:
    """Moving MNIST, small, with actions and without what a test leaves out."""

    channels, frames, resolution = 1, 4, 32

    def __init__(self, split="train", size=40, labels=True, actions=0):
        options = {"frames": 4, "resolution": 32, "size": size, "digits_per_clip": 1}
        self.inner, self.actions = open_dataset("moving-mnist", split, **options), actions
        self.label_names = self.inner.label_names if labels else None
        self.asked = []

    def __len__(self):
        return len(self.inner)

    def batch(self, indices, device="cpu"):
        self.asked.append(list(indices))
        batch = self.inner.batch(indices, device)
        if self.label_names is None:
            del batch["label"]
        if self.actions:
            index = torch.as_tensor([int(i) for i in indices])
            batch["action"] = index[:, None, None].expand(-1, 4, self.actions) / len(self)
        return batch


def fresh_vqvae():
    torch.manual_seed(0)
    return VQVAE(SMALL)


def fresh_gpt(**fields):
    vqvae = fresh_vqvae().eval()
    x = video.to_model(Clips().batch(range(16))["video"])
    with torch.no_grad():  # codes that lie where clips are, so that tokens differ
        vqvae.codebook.codes.copy_(vqvae.features(x).movedim(1, -1).flatten(0, -2)[5::32][:16])
    assert len(vqvae.encode(x).unique()) > 8
    config = GPTConfig.for_vqvae(
        SMALL, **{"width": 12, "heads": 2, "layers": 1, "dropout": 0.1, **fields}
    )
    torch.nn.init.normal_(gpt_out := GPT(config, vqvae.codebook.codes).token_out.weight, std=0.1)
    gpt = GPT(config, vqvae.codebook.codes)
    gpt.token_out.weight.data.copy_(gpt_out)
    return VideoGPT(vqvae, gpt)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Stop(Exception):
    """Stands for whatever ends a run."""


class StopsAfter(Clips):
    """A dataset that ends the run when it is asked for one batch too many."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches + 1  # the first shows which data these are

    def batch(self, indices, device="cpu"):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return super().batch(indices, device)


# What is saved and logged -------------------------------------------------------------------------


def test_averaged_weights_are_saved(tmp_path, monkeypatch):
    """Decay-weighted weights of all steps, computed here; early on, over the last few only."""
    plain = []
    original = loop.Run.update

    def spy(run, former):
        norm = original(run, former)
        plain.append({n: p.detach().clone() for n, p in run.module.named_parameters()})
        return norm

    monkeypatch.setattr(loop.Run, "update", spy)
    vqvae = fresh_vqvae()
    config = replace(QUICK, ema=0.3)
    returned = train_vqvae(vqvae, Clips(), config, tmp_path)
    averaged = plain[0]
    for decay, weights in zip((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3), plain[1:], strict=True):
        averaged = {n: decay * averaged[n] + (1 - decay) * weights[n] for n in averaged}
    saved = VQVAE.from_pretrained(tmp_path)
    for name, parameter in saved.named_parameters():
        assert torch.allclose(parameter, averaged[name], atol=1e-6), name
    assert same(returned, saved)
    assert not same(vqvae, saved), "the last weights are others"
    assert torch.equal(saved.codebook.codes, vqvae.codebook.codes), "the codebook averages itself"
    assert not returned.training


def test_without_averaging_the_last_weights_are_saved(tmp_path):
    model = fresh_gpt()
    train_gpt(model, Clips(), replace(QUICK, ema=0.0), tmp_path)
    assert same(VideoGPT.from_pretrained(tmp_path).gpt, model.gpt)


def test_tokenizer_is_frozen(tmp_path):
    model = fresh_gpt()
    model.train()
    before = {n: t.clone() for n, t in model.vqvae.state_dict().items()}
    train_gpt(model, Clips(), QUICK, tmp_path)
    after = model.vqvae.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_loss_falls(tmp_path):
    """Both stages learn: the overfitting of one batch of 4 clips."""
    config = replace(QUICK, steps=60, lr=1e-2, ema=0.0, log_every=1, warmup=5, weight_decay=0.0)
    train_vqvae(fresh_vqvae(), Clips(size=4), config, tmp_path / "vqvae")
    losses = [line["recon_loss"] for line in lines(tmp_path / "vqvae")]
    assert losses[-1] < 0.5 * losses[0]
    model = fresh_gpt(width=48, dropout=0.0)
    model.gpt.token_out.weight.data.zero_()
    train_gpt(model, Clips(size=4), config, tmp_path / "gpt")
    losses = [line["loss"] for line in lines(tmp_path / "gpt")]
    assert losses[0] == pytest.approx(math.log(16), abs=1e-3), "uniform before it learns"
    assert losses[-1] < 0.3 * losses[0]


def test_log(tmp_path):
    """Means over the steps since the line before, the learning rate, the speed; validation."""
    every = train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, log_every=1), tmp_path / "1")
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "2", validation=Clips("val"))
    each = lines(tmp_path / "1")
    second = [line for line in lines(tmp_path / "2") if "loss" in line]
    assert [line["step"] for line in second] == [2, 4, 6]
    for i, line in enumerate(second):
        for name in ("loss", "recon_loss", "commitment_loss", "perplexity", "used", "psnr"):
            mean = (each[2 * i][name] + each[2 * i + 1][name]) / 2
            assert line[name] == pytest.approx(mean, rel=1e-5), name
        assert line["clips_per_second"] > 0
        assert line["lr"] == pytest.approx(QUICK.lr_at(2 * i + 1), rel=1e-5)
        assert line["grad_norm"] > 0
    validation = [line for line in lines(tmp_path / "2") if "val_loss" in line]
    assert [line["step"] for line in validation] == [3, 6]
    with torch.no_grad():  # six clips in batches of four: the mean is over clips
        x = video.to_model(Clips("val").batch(range(6))["video"])
        expected = torch.nn.functional.mse_loss(every(x).reconstruction, x) / SMALL.data_variance
    assert validation[-1]["val_recon_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_learning_rate():
    config = TrainConfig(steps=110, warmup=10, lr=2.0, final_lr=0.1)
    assert config.lr_at(0) == pytest.approx(0.2)
    assert config.lr_at(9) == config.lr_at(10) == pytest.approx(2.0)
    assert config.lr_at(60) == pytest.approx(2.0 * 0.55)
    assert config.lr_at(110) == pytest.approx(0.2)
    original = TrainConfig(steps=100, warmup=0, lr=1.0)  # cosine to 0, stepped every iteration
    assert original.lr_at(50) == pytest.approx(0.5)
    assert original.lr_at(100) == pytest.approx(0.0)


def test_previews_play(tmp_path):
    """Originals over reconstructions; samples, for fewer clips than a preview would show, too."""
    pytest.importorskip("av")
    config = replace(QUICK, preview_every=4)
    train_vqvae(fresh_vqvae(), Clips(size=5), config, tmp_path / "a")
    files = sorted(path.name for path in (tmp_path / "a" / "previews").iterdir())
    assert files == ["0000004.mp4", "0000006.mp4"]
    clip = video.read(tmp_path / "a" / "previews" / files[-1])
    assert len(clip) == 4
    assert clip.shape[1] >= 2 * 32
    fields = {"classes": 10, "cond_frames": 1, "cond_depth": 10, "cond_width": 8, "action_dim": 2}
    for once in (0, 5):
        folder = tmp_path / f"b{once}"
        data = Clips(size=5, actions=2)
        train_gpt(fresh_gpt(**fields), data, replace(config, encode_once=once), folder)
        assert len(video.read(folder / "previews" / "0000006.mp4")) == 4


def test_previews_do_not_change_the_weights(tmp_path):
    first = train_gpt(fresh_gpt(), Clips(), replace(QUICK, preview_every=1), tmp_path / "a")
    assert same(first, train_gpt(fresh_gpt(), Clips(), QUICK, tmp_path / "b"))


def test_warns_without_av(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.warns(UserWarning, match="PyAV"):
        train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, preview_every=3), tmp_path)
    assert not (tmp_path / "previews").exists()
    assert (tmp_path / "vqvae.safetensors").exists()


# What the model is conditioned on -----------------------------------------------------------------


class Spy(GPT):
    """Keeps what its loss was given, the last time and in all."""

    def loss(self, tokens, **condition):
        self.given = {"tokens": tokens, **condition}
        self.calls = [*getattr(self, "calls", []), (self.training, tokens, condition["labels"])]
        return super().loss(tokens, **condition)


@pytest.mark.parametrize("encode_once", [0, 4])
def test_conditions_reach_the_model(tmp_path, encode_once):
    fields = {"classes": 10, "cond_frames": 2, "cond_depth": 10, "cond_width": 8, "action_dim": 3}
    model = fresh_gpt(**fields)
    model.gpt.__class__ = Spy
    data = Clips(size=4, actions=3)
    config = replace(QUICK, steps=1, encode_once=encode_once, ema=0.0)
    train_gpt(model, data, config, tmp_path)
    batch = data.batch(range(4))  # one step sees all four, in some order
    given = model.gpt.given
    x = video.to_model(batch["video"])
    tokens = model.vqvae.encode(x)
    place = {float(a): i for i, a in enumerate(batch["action"][:, 0, 0])}
    where = [place[float(a)] for a in given["actions"][:, 0, 0]]
    assert sorted(where) == [0, 1, 2, 3]
    assert torch.equal(given["tokens"], tokens[where])
    assert torch.equal(given["labels"], batch["label"][where])
    assert torch.equal(given["actions"], batch["action"][where])
    assert torch.equal(given["frames"], x[where][:, :, :2])


def test_openings(tmp_path):
    """Three of four clips end after the first latent frame; not in validation."""
    model, data = fresh_gpt(classes=10, dropout=0.0, attn_dropout=0.0), Clips(size=4)
    model.gpt.__class__ = Spy
    config = replace(QUICK, steps=1, openings=0.75, ema=0.0, log_every=1)
    tokens = model.vqvae.encode(video.to_model(data.batch(range(4))["video"]))
    with torch.no_grad():  # before the step
        logits = model.gpt.eval()(tokens, labels=data.batch(range(4))["label"])
    nats = F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none").flatten(2)  # (4, 2, hw)
    train_gpt(model, data, config, tmp_path, validation=data)
    (_, whole, label), (_, first, labels), (training, checked, _) = model.gpt.calls
    assert whole.shape == (1, 2, 4, 4)
    assert first.shape == (3, 1, 4, 4)
    assert not training
    assert torch.equal(checked, tokens)
    row = next(i for i in range(4) if torch.equal(tokens[i], whole[0]))
    others = [i for i in range(4) if i != row]
    assert label == data.batch([row])["label"]
    assert sorted(labels.tolist()) == sorted(data.batch(others)["label"].tolist())
    expected = torch.cat([nats[row].flatten(), nats[others, 0].flatten()]).mean()
    logged = lines(tmp_path)[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"openings": 0.3}, {}, "openings is 0.3, which is 1.2 of the 4 clips"),
        ({"openings": 0.75, "accumulate": 2}, {}, "which is 1.5 of the 2 clips"),
        ({"openings": 0.9999999}, {}, "and not all of them"),
        ({"openings": 0.5}, {"attention": "strided"}, "strided attention takes whole clips"),
    ],
)
def test_openings_that_are_refused(tmp_path, settings, fields, message):
    model = GPTConfig.for_vqvae(STRIDED if fields else SMALL, width=12, heads=2, **fields)
    with pytest.raises(ValueError, match=message):
        check_openings(model, replace(QUICK, **settings))


def test_encode_once_trains_the_same(tmp_path):
    """As many clips as there are: the same tokens in the same order, so the same weights."""
    first = train_gpt(fresh_gpt(), Clips(), QUICK, tmp_path / "a")
    data = Clips()
    second = train_gpt(fresh_gpt(), data, replace(QUICK, encode_once=40), tmp_path / "b")
    assert same(first, second)
    assert data.asked[1:] == [list(range(40))], "every clip is read once"


def test_clipping(tmp_path):
    """The logged norm is the gradient's own; without clipping a step of plain size is made."""
    norms = []
    for limit in (0.0, 1e-3):
        out = tmp_path / str(limit)
        train_vqvae(
            fresh_vqvae(), Clips(), replace(QUICK, clip_norm=limit, steps=1, log_every=1), out
        )
        norms.append(lines(out)[0]["grad_norm"])
    assert norms[0] == norms[1] > 1e-2


def test_workers_train_the_same(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = replace(QUICK, steps=2)
        first = train_vqvae(fresh_vqvae(), Clips(), config, tmp_path / "a")
        second = train_vqvae(fresh_vqvae(), Clips(), replace(config, workers=1), tmp_path / "b")
    assert same(first, second)


def test_about_is_in_the_checkpoint(tmp_path):
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    about = torch.load(tmp_path / LAST)["model"]
    assert about == {**asdict(SMALL), "data": about["data"]}
    assert about["data"].startswith("40 clips ")
