"""Measures of Moving MNIST clips, on readings that are made up."""

import numpy as np
import pytest
import torch

from tinyvgpt import open_dataset
from tinyvgpt.measures import apart, both_read, kept, majority, motion, pairs, tracks
from tinyvgpt.probes import ProbeConfig, Readings


class Perfect:
    """Reads what the dataset drew."""

    config = ProbeConfig("moving-mnist", tuple("0123456789"), 2)

    def __init__(self, classes, places, scores=None):
        scores = torch.ones(classes.shape) if scores is None else scores
        self.readings = Readings(classes, scores, places)

    def read(self, clips):
        return self.readings


@pytest.fixture
def real():
    """Clips with their digits' classes (B, T, 2) and middles (B, T, 2, 2)."""
    data = open_dataset("moving-mnist", "val")
    path = data.trajectories(range(12))
    classes = torch.from_numpy(path.classes)[:, None].expand(-1, 16, -1).clone()
    return data.batch(range(12))["video"], classes, torch.from_numpy(path.positions).float() + 14


def test_real_clips_keep_everything(real):
    clips, classes, places = real
    swapped = torch.rand(12, 16) < 0.5  # readings come in any order
    classes = torch.where(swapped[..., None], classes.flip(-1), classes)
    places = torch.where(swapped[..., None, None], places.flip(-2), places)
    found = kept(Perfect(classes, places), clips)
    assert (found.read == 1).all()
    assert (found.identities == 1).all()
    assert np.nanmax(found.speed) < 1.0  # positions are whole pixels
    assert np.nanmean(found.bounces) > 0.9  # tracks may change places where digits cross


def test_the_wanted_digits(real):
    clips, classes, places = real
    wanted = pairs(Readings(classes, torch.ones(12, 16, 2), places))[:, 0]
    scores = torch.ones(12, 16, 2)
    classes[0] = (classes[0] + 1) % 10  # others, throughout
    classes[1, :4, 0] = (classes[1, :4, 0] + 1) % 10
    scores[2, :9, 1] = 0.1
    found = kept(Perfect(classes, places, scores), clips, wanted)
    assert found.right[:4].tolist() == [0, 12 / 16, 7 / 16, 1]
    assert found.asked[:4].tolist() == [0, 1, 1, 1]
    assert found.identities[:4].tolist() == [1, 0, 0, 1]
    without = kept(Perfect(classes, places, scores), clips)
    assert np.isnan(without.right).all()
    assert np.isnan(without.asked).all()


def test_how_far_apart(real):
    _, classes, places = real
    there = Readings(classes, torch.ones(12, 16, 2), places)
    moved = places.clone()
    moved[..., 0, :] += torch.tensor([3.0, 4.0])
    assert torch.allclose(apart(there._replace(places=moved), there).float(), torch.tensor(2.5))
    swapped = there._replace(places=places.flip(-2), classes=classes.flip(-1))
    assert apart(swapped, there).abs().max() == 0


def test_a_digit_that_changes(real):
    clips, classes, places = real
    classes[3, 9, 0] = (classes[3, 9, 0] + 1) % 10
    assert kept(Perfect(classes, places), clips).identities.tolist() == [1] * 3 + [0] + [1] * 8


def test_frames_that_are_not_read(real):
    clips, classes, places = real
    scores = torch.ones(12, 16, 2)
    scores[0, :3, 1], scores[1, :5, 1] = 0.1, 0.1
    classes[0, 0] = 11  # what is not read does not count
    found = kept(Perfect(classes, places, scores), clips)
    assert found.read[:2].tolist() == [13 / 16, 11 / 16]
    assert found.identities[:3].tolist() == [1, 0, 1]  # the second is read too seldom


def test_turns_in_the_open(real):
    clips, classes, places = real
    line = torch.arange(16)
    zigzag = 32 + torch.where(line % 2 == 0, 4.0, -4.0)
    places[0, :, 0] = torch.stack([zigzag, torch.full((16,), 32.0)], -1)
    places[0, :, 1] = 20.0
    assert kept(Perfect(classes, places), clips).bounces[0] == 0


def test_speed_that_changes():
    path = np.cumsum(np.array([0, 2, 2, 6, 2, 2, 2.0]))
    places = np.zeros((7, 2, 2)) + 25
    places[:, 0, 1] += path
    speed, bounces = motion(places, torch.ones(7, dtype=torch.bool), 64)
    assert speed == pytest.approx((4 + 4) / 10)
    assert np.isnan(bounces)


def test_pairs():
    classes = torch.tensor([[[3, 1], [1, 3], [7, 7]]])
    readings = Readings(classes, torch.ones(1, 3, 2), torch.zeros(1, 3, 2, 2))
    assert pairs(readings).tolist() == [[13, 13, 77]]
    assert majority(readings, 0.5).tolist() == [13]
    assert majority(readings, 2.0).tolist() == [-1]
    assert not both_read(readings, 2.0).any()
    assert tracks(readings).shape == (1, 3, 2, 2)
