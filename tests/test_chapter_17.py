"""Chapter 17 trains on BAIR where there is such a file: its cells run on one of BAIR's schema."""

from pathlib import Path

import h5py
import jupytext
import numpy as np
import pytest
import torch

from tinyvgpt import open_dataset
from tinyvgpt.video import resize_crop

CHAPTER = Path(__file__).parents[1] / "book" / "17_robot_pushing.md"
SCALE = 3.0  # of the file's actions against the simulated ones


@pytest.fixture(scope="module")
def bair(tmp_path_factory):
    """A file as data_recipes/bair.py writes it, of 20 and 8 videos, noisy as a camera's."""
    path, rng = tmp_path_factory.mktemp("bair") / "bair.h5", np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, count in (("train", 20), ("test", 8)):
            clips = open_dataset("robot-push", split, frames=30).batch(range(count))
            noise = rng.integers(0, 9, clips["video"].shape, dtype=np.uint8)
            frames = np.minimum(clips["video"].numpy(), 240) + noise
            file[f"{split}_data"] = frames.reshape(-1, 64, 64, 3)
            file[f"{split}_idx"] = np.arange(count) * 30
            file[f"{split}_actions"] = SCALE * clips["action"].numpy().reshape(-1, 4)
            file[f"{split}_endeffector_pos"] = np.zeros((30 * count, 3), np.float32)
    return str(path)


def test_what_is_trained_is_trained_on_bair(bair, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setenv("TINYVGPT_BAIR", bair)
    monkeypatch.setenv("TINYVGPT_BUDGET", "smoke")
    names: dict = {}
    for cell in jupytext.read(CHAPTER).cells:
        if "## Longer" in cell.source:  # from here on all is the shipped model's
            break
        if cell.cell_type == "code":
            exec(cell.source, names)
    pyplot.close("all")
    assert "trained on this page is: BAIR" in capsys.readouterr().out
    with h5py.File(bair) as file:
        held = torch.from_numpy(file["test_data"][:]).unflatten(0, (8, 30))
        assert torch.equal(names["held_films"], resize_crop(held, 32))
        told = torch.from_numpy(file["train_actions"][:]).unflatten(0, (20, 30))
    assert names["told"].shape == (18, 30, 4)  # every tenth is held out
    assert (told[:, None] == names["told"]).flatten(2).all(2).any(0).all()
    assert names["same"] < 0.2  # noise
    steered = names["world"].gpt.config
    assert steered.action_std == pytest.approx(tuple(names["told"].std((0, 1)).tolist()))
    assert names["arm_reader"] is not names["reader"]
    simulated = open_dataset("robot-push", frames=30).batch(range(231))["action"]
    assert torch.allclose(names["push_std"], simulated.std((0, 1)))
