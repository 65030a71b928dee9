"""The clips of the landing page are what the shipped models draw, and its pictures show them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvgpt import VideoGPT, counter, open_dataset, video
from tinyvgpt.sampling import draw as choose

BOOK = Path(__file__).parents[1] / "book"
AGAIN = "run: python book/pregenerate_wall.py"


@pytest.fixture(scope="module")
def wall():
    sys.path.insert(0, str(BOOK))
    try:
        import pregenerate_wall
    finally:
        sys.path.remove(str(BOOK))
    return pregenerate_wall


@pytest.fixture(scope="module")
def record(wall):
    return json.loads(wall.RECORD.read_text(encoding="utf-8"))


def tokens_of(wall, model):
    return torch.from_numpy(
        sys.modules["pregenerate_sampling"].unpack(model["tokens"], model["shape"])
    )


def test_the_record_is_of_the_shipped_weights(wall, record):
    assert record["seed"] == wall.SEED, AGAIN
    assert {name: model["shape"][0] for name, model in record["models"].items()} == wall.CLIPS, (
        AGAIN
    )
    for name, model in record["models"].items():
        assert model["fingerprint"] == wall.fingerprint(name), AGAIN


@pytest.mark.parametrize("name", ["moving-mnist", "robot-push"])
@torch.no_grad()
def test_the_models_draw_these_tokens(wall, record, name):
    """Each token of the third clip follows from those before it, but for draws near an edge."""
    clip, gpt = tokens_of(wall, record["models"][name])[2:3], VideoGPT.from_pretrained(name).gpt
    rule, batch = wall.RULES[name], open_dataset(name, "test").batch([2])
    told = {"labels": batch["label"]} if gpt.config.classes else {"actions": batch["action"]}
    logits = gpt(clip, **told)
    if rule.guidance != 1:
        free = gpt(clip)
        logits = free + rule.guidance * (logits - free)
    p = rule.probabilities(logits.flatten(0, 3))
    u = torch.from_numpy(counter.uniform(wall.SEED, 2, np.arange(len(p))))
    assert (choose(p, u) == clip.flatten()).float().mean() > 0.99, AGAIN


def test_the_pictures_show_them(wall, record):
    clips = [wall.decoded(name, tokens_of(wall, model)) for name, model in record["models"].items()]
    frames = video.grid(torch.cat(clips), wall.COLUMNS).numpy().astype(int)
    with Image.open(wall.SAMPLES) as moving:
        assert moving.n_frames == len(frames)
        moving.seek(8)
        shown = np.asarray(moving.convert("RGB")).astype(int)
    assert shown.shape == frames[8].shape
    assert np.abs(shown - frames[8]).mean() < 5, AGAIN
    with Image.open(wall.CARD) as card:
        shown = np.asarray(card.convert("RGB")).astype(int)
    assert np.abs(shown[:64, :64] - frames[8, :64, :64]).mean() < 1, AGAIN
    with Image.open(wall.SHEET) as sheet:
        shown = np.asarray(sheet).astype(int)
    rows = clips[0][:10, ::2, ..., 0].int().numpy()  # (clips, frames, H, W)
    assert np.array_equal(shown[-64:, -64:], rows[9, 7]), AGAIN
