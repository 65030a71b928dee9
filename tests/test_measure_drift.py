"""The measurement of drift: what it compares, and what it writes."""

import json
import sys

import measure_drift
import pytest
import torch
from test_play import build

from tinyvgpt import VideoGPT, open_dataset, video
from tinyvgpt.pushing import back_and_forth


def test_back_and_forth_comes_back():
    actions = torch.randn(2, 5, 3)
    course = back_and_forth(actions, 27)
    assert course.shape == (2, 27, 3)
    assert torch.equal(course[:, :5], actions)
    assert torch.equal(course[:, 10:15], actions)
    for end in (10, 20):
        assert torch.allclose(course[:, :end].sum(1), torch.zeros(2, 3), atol=1e-5)


def test_the_figures_of_a_window():
    model = VideoGPT.from_pretrained("robot-push")
    clip = open_dataset("robot-push", "test").batch([0])["video"]
    figures = measure_drift.look(model, clip, 8)
    again = model.reconstruct(clip[:, :8]).float()
    psnr = 20 * torch.log10(255 / (again - clip[:, :8]).square().mean().sqrt()).item()
    assert figures["psnr_of_its_beginning"] == pytest.approx(psnr, abs=0.05)
    assert figures["codes"] == len(set(model.vqvae.encode(video.to_model(clip)).flatten().tolist()))
    assert figures["mean_pixel"] == pytest.approx(clip.float().mean().item(), abs=0.05)


def test_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(VideoGPT, "from_pretrained", lambda name: model)
    monkeypatch.setattr(
        measure_drift,
        "open_dataset",
        lambda name, split: open_dataset(name, split, frames=8, resolution=32),
    )
    model = build()
    words = ["robot-push", "--clips", "2", "--length", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["measure_drift.py", *words])
    measure_drift.main()
    record = json.loads((tmp_path / "drift-robot-push.json").read_text())
    assert record["overlap"] == 4
    assert len(record["windows"]) == 4
    assert record["command"].endswith(" ".join(words))
    assert json.loads(capsys.readouterr().out)["windows"] == record["windows"]
