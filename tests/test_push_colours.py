"""Colours of the robot's objects, added to a file that lacks them; the camera in formulas."""

import sys

import numpy as np
import pytest
import robot_push_subset
import torch
from test_recipe_robot_push import backend  # noqa: F401

from tinyvgpt.data import robot_push, still_camera


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["robot_push_subset.py", *map(str, words)])
    robot_push_subset.main()


@pytest.fixture
def old(tmp_path):
    """A file without colours, of the first embedded videos."""
    arrays = {}
    for split in ("train", "test"):
        videos = robot_push.load(split, robot_push.FILE)
        few = {name: getattr(videos, name)[:2] for name in ("action", "endeffector", "tracks")}
        few |= still_camera.pack(videos.video[:2])
        arrays |= {f"{split}_{name}": array for name, array in few.items()}
    np.savez(tmp_path / "old.npz", **arrays)
    return tmp_path / "old.npz"


def test_added_to_a_file(backend, old, monkeypatch):  # noqa: F811
    """The embedded clips' own, which their seed tells; all else stays; another seed is refused."""
    with np.load(old) as file:
        before = dict(file)
    assert robot_push.load("train", old).colours is None
    with pytest.raises(ValueError, match="clip 0 is not of seed 7: it has other objects"):
        run(monkeypatch, "--add-colours", old, "--seed", 7)
    run(monkeypatch, "--add-colours", old)
    with np.load(old) as file:
        assert set(file) == {*before, "train_colours", "test_colours"}
        assert all(np.array_equal(file[n], before[n], equal_nan="track" in n) for n in before)
    for split in ("train", "test"):
        expected = robot_push.load(split, robot_push.FILE).colours[:2]
        assert np.array_equal(robot_push.load(split, old).colours, expected)


def test_no_file_to_add_to(tmp_path, monkeypatch):
    (tmp_path / "clips.npz").write_text("nothing")
    with pytest.raises(ValueError, match=r"clips\.npz has no robot clips"):
        run(monkeypatch, "--add-colours", tmp_path / "clips.npz")


def test_the_camera_and_the_colours_are_the_simulator_s(backend):  # noqa: F811
    import push_world
    from push_world import Thing, World

    assert tuple(push_world.COLOURS) == robot_push.COLOURS
    things = [
        Thing("sphere", "red", (0.035,), (x, y), 0.0) for x, y in ((0.1, -0.2), (-0.15, 0.12))
    ]
    world = World(things, np.array([-0.1, 0.15, 0.1]), 0.0)
    seen = robot_push.in_picture(torch.from_numpy(world.middles())).numpy()
    np.testing.assert_allclose(seen, world.pixels("aux1"), atol=1e-4)
