"""Driving by buttons: each press moves the picture on, to where the button says."""

import io
import sys

import numpy as np
import pytest
import torch
from test_play import build

from tinyvgpt import open_dataset, widget
from tinyvgpt.driving import Drive

SCALE = 2


def pixels(data):
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(data)))[::SCALE, ::SCALE]


def test_buttons():
    pytest.importorskip("ipywidgets")
    model = build()
    torch.nn.init.normal_(model.gpt.action_embedding.project.weight)
    made = widget.play(model, clip=3, fps=1000, scale=SCALE)
    picture, row = made.children
    buttons = {button.description: button for button in row.children}
    assert list(buttons) == ["←", "↑", "·", "↓", "→"]
    real = open_dataset("robot-push", "test", frames=8, resolution=32).batch([3])["video"]
    assert np.array_equal(pixels(picture.value), real[0, 3].numpy())
    drive = Drive(model, clip=3)
    pieces = iter(drive)
    for _ in range(2):
        next(pieces)
    for label, key in [("→", "right"), ("↑", "up"), ("·", "space"), ("←", "left")]:
        buttons[label].click()
        drive.press(key)
        assert np.array_equal(pixels(picture.value), next(pieces)[-1].numpy())


def test_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="play needs ipywidgets: pip install ipywidgets"):
        widget.play(build())
