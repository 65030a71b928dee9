"""What clips show, side by side: shares, intervals, and clips that go on, on readings made up."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, open_dataset, shown
from tinyvgpt.probes import ProbeConfig, Readings
from tinyvgpt.sampling import SamplingRule

TINY = VQVAEConfig(
    channels=1, frames=16, resolution=64, downsample=(4, 16, 16), hidden=8, res_blocks=1, codes=8,
    code_dim=4, axial=False, causal_time=True,
)  # fmt: skip
CLIPS = 6


def build(vqvae=TINY, **fields):
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    config = GPTConfig.for_vqvae(vqvae, width=12, heads=2, layers=1, **fields)
    names = open_dataset("moving-mnist").label_names if fields.get("classes") else None
    return VideoGPT(tokenizer, GPT(config, tokenizer.codebook.codes), names)


@pytest.fixture(scope="module")
def data():
    return open_dataset("moving-mnist", "test", size=CLIPS)


class Knowing:
    """Reads in any set of clips what the data's first clips show, moved by as much as they are."""

    config = ProbeConfig("moving-mnist", tuple("0123456789"), 2)

    def __init__(self, data):
        path = data.trajectories(range(CLIPS))
        self.real = data.batch(range(CLIPS))["video"]
        self.classes = torch.from_numpy(path.classes)[:, None].expand(-1, 16, -1)
        self.places = torch.from_numpy(path.positions).float() + 14

    def check(self, channels):
        assert channels == 1

    def read(self, clips):
        part = slice(None)
        if clips.shape[1] == 1:  # the eighth frame, or one that is held there
            same = [(clips == self.real[:, i : i + 1]).all() for i in range(16)]
            at = same.index(True) if True in same else 7
            part = slice(at, at + 1)
        places = self.places[:, part]
        return Readings(self.classes[:, part], torch.ones(places.shape[:-1]), places)


# Shares and intervals -----------------------------------------------------------------------------


def test_side_by_side():
    nan = np.nan
    real = {"a": np.array([1, 1, 0, 1.0]), "b": np.full(4, nan), "c": np.zeros(4)}
    made = {"a": np.array([1, 0, nan, 0.0]), "b": np.full(4, nan), "c": np.ones(4)}
    table = shown.side_by_side({shown.REAL: real, "samples": made}, seed=0)
    assert table.keys() == {"a", "c"}  # nobody has b
    figure, of_real, clips = table["a"]["samples"]
    assert (clips, table["a"][shown.REAL].clips) == (3, 4)
    assert figure.value == pytest.approx(1 / 3)
    assert of_real.value == pytest.approx(1 / 3 / 0.75)
    assert table["a"][shown.REAL].figure.value == 0.75
    assert table["a"][shown.REAL].of_real is None
    assert table["c"]["samples"].of_real is None  # of nothing


def test_a_share_s_interval_is_of_pairs():
    """Half of what real clips have, in each: no choice of clips makes it another share."""
    real = np.random.default_rng(0).random(50)
    share = shown.ratio_figure(real / 2, real, seed=1)
    assert tuple(share) == pytest.approx((0.5, 0.5, 0.5))
    low, high = shown.ratio_figure(real[::-1].copy() / 2, real, seed=1)[1:]
    assert low < 0.49
    assert high > 0.51


def test_decibels_gained():
    errors = torch.tensor([0.01, 0.03])
    figure = shown.gained(errors, 10 * errors, seed=0)
    assert tuple(figure) == pytest.approx((10, 10, 10), abs=1e-5)
    assert shown.gained(errors, errors, seed=0).value == 0


# The whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "samples"),
    [
        ({}, ["samples"]),
        ({"classes": 55}, ["samples"]),
        ({"classes": 55, "label_dropout": 0.1}, ["samples", "samples, no label"]),
    ],
)
def test_show_digits(fields, samples, data, monkeypatch):
    """Sets and what is asked of each; of the labels the digits that are wanted follow."""
    model, drawn, rules = build(**fields), [], []

    def draw(model, batch, rule, seed):
        drawn.append(batch["label"])
        rules.append(rule)
        return torch.zeros_like(batch["video"])

    monkeypatch.setattr(shown, "draw", draw)
    guided = SamplingRule(temperature=0.5, guidance=2.0)
    groups = shown.show_digits(model, data, Knowing(data), CLIPS, rule=guided)
    table, told = groups["shown"], bool(fields)
    assert list(table["read"]) == ["real clips", "reconstructions", *samples]
    asked = ["real clips", "reconstructions", *samples[: 1 * told]]
    assert list(table["right"]) == list(table["asked"]) == asked
    assert all(of.figure.value == 1 for of in table["right"].values())
    assert torch.equal(drawn[0], data.batch(range(CLIPS))["label"])
    assert rules[0] == guided
    if len(samples) > 1:
        assert (drawn[1] == 55).all()
        assert rules[1] == SamplingRule(temperature=0.5)
    assert "going on" in groups


def test_wrong_digits_are_seen(data, monkeypatch):
    model, probe = build(classes=55), Knowing(data)
    probe.classes = (probe.classes + 1) % 10
    monkeypatch.setattr(shown, "draw", lambda model, batch, rule, seed: batch["video"])
    table = shown.show_digits(model, data, probe, CLIPS)["shown"]
    assert table["asked"]["samples"].figure.value == 0
    assert table["identities"]["samples"].figure.value == 1


def test_samples_are_the_model_s(data, monkeypatch):
    """In parts, with the labels asked for and the same random numbers for the same clips."""
    model = build(classes=55, label_dropout=0.1).eval()
    torch.nn.init.normal_(model.gpt.token_out.weight)
    batch = data.batch(range(5))
    monkeypatch.setattr(shown, "AT_ONCE", {"cpu": 2})
    rule = SamplingRule(temperature=0.7, guidance=2.0)
    made = shown.draw(model, batch, rule, 3)
    again = model.sample(labels=batch["label"], temperature=0.7, guidance=2.0, seed=3)
    assert torch.equal(made, again)


def test_going_on(data, monkeypatch):
    """Clips that are 51 of 255 too bright from frame 5 on, against the fourth frame held."""
    probe, batch = Knowing(data), data.batch(range(CLIPS))
    real = batch["video"] // 2
    probe.real = real
    bright = real.clone()
    bright[:, 4:] += 51
    calls = []
    monkeypatch.setattr(shown, "continued", lambda *words: (calls.append(words), bright)[1])
    rule = SamplingRule(temperature=0.5, guidance=3.0)
    found = shown.going_on(build(), {**batch, "video": real}, probe, 4, rule, 9)
    assert calls[0][2:] == (4, replace(rule, guidance=1.0), 9)
    assert found["psnr"].value == pytest.approx(-20 * np.log10(0.2), abs=1e-5)
    error = ((real[:, 4:].double() - real[:, 3:4].double()) / 255).square().mean().item()
    held = -10 * np.log10(error)
    assert found["psnr, last frame held"].value == pytest.approx(held)
    assert found["psnr, gained"].value == pytest.approx(found["psnr"].value - held)
    assert found["places off"].value == 0
    straight, crossed = (
        (probe.places[:, 7] - x).norm(dim=-1).mean(-1)
        for x in (probe.places[:, 3], probe.places[:, 3].flip(-2))
    )
    expected = torch.minimum(straight, crossed).mean().item()
    assert found["places off, last frame held"].value == pytest.approx(expected)
    assert expected > 5


def test_how_many_frames_are_given():
    assert shown.given_frames(build()) == 4
    assert shown.given_frames(build(replace(TINY, causal_time=False))) == 0
    assert shown.given_frames(build(replace(TINY, downsample=(8, 16, 16)))) == 8
    assert shown.given_frames(build(replace(TINY, downsample=(16, 16, 16)))) == 0
    encoder = {"cond_frames": 1, "cond_depth": 10, "cond_width": 8}
    assert shown.given_frames(build(**encoder)) == 1


def test_no_label_is_told_to_clips_that_go_on(data):
    for dropout in (0.0, 0.1):
        model = build(classes=55, label_dropout=dropout).eval()
        batch = data.batch(range(2))
        made = shown.continued(model, batch, 4, SamplingRule(), 0)
        labels = None if dropout else batch["label"]
        again = model.sample(frames=batch["video"][:, :4], labels=labels, seed=0)
        assert torch.equal(made, again)


def test_another_probe(data):
    probe = Knowing(data)
    probe.config = replace(probe.config, name="robot-push")
    with pytest.raises(ValueError, match="the probe is of robot-push"):
        shown.show_digits(build(), data, probe, CLIPS)
