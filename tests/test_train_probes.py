"""The probes' training: what spoilt frames are, where the score is set, what is written."""

import json
import sys
from dataclasses import replace

import digit_frames
import numpy as np
import push_frames
import pytest
import torch
import train_probes
from digit_frames import REAL, DigitFrames, blurred
from push_frames import PushFrames

from tinyvgpt.data import MovingMNIST, robot_push
from tinyvgpt.probes import Probe, Readings
from tinyvgpt.pushing import CLASSES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pushes():
    return PushFrames("test", CPU)


@pytest.fixture(scope="module")
def digits():
    return DigitFrames("test", CPU, None, 4)


# Frames -------------------------------------------------------------------------------------------


def test_real_digits_are_the_data_s(digits):
    frames, classes, places = digits.of_kind(REAL)
    data = MovingMNIST("test")
    path = data.trajectories(range(4))
    assert torch.equal(frames.view(4, 16, 64, 64, 1), data.batch(range(4))["video"])
    assert classes.view(4, 16, 2)[:, 5].tolist() == path.classes.tolist()
    assert torch.equal(places.view(4, 16, 2, 2), torch.from_numpy(path.positions).float() + 14)


@pytest.mark.parametrize("kind", range(3))
def test_spoilt_digits_are_none(kind, digits):
    frames, classes, _ = digits.of_kind(kind)
    assert (classes == -1).all()
    real = digits.of_kind(REAL)[0].float()
    assert (frames.float() - real).abs().mean() > 3


def test_a_third_of_the_digits_is_spoilt():
    torch.manual_seed(0)
    training = DigitFrames("train", CPU, None, 4)
    shares = [(training.batch(step)[1] == -1).float().mean().item() for step in range(12)]
    assert np.mean(shares) == pytest.approx(1 / 3, abs=0.06)


def test_where_hand_and_objects_are(pushes):
    """Grey or black above the fingertips; the objects' own colours, mostly, where they are."""
    frames, classes, places = pushes.of_kind(REAL)
    data = robot_push.RobotPush("test", frames=30)
    assert torch.equal(frames, data.batch(range(32))["video"].flatten(0, 1))
    assert (classes[:, 0] == 0).all()
    colours = data.colours(range(32)).repeat_interleave(30, 0)
    assert torch.equal(classes[:, 1:], torch.where(colours < 0, -1, colours + 1))
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        row, thing = (classes == CLASSES.index(name)).nonzero().T
        seen = push_frames.at(frames[row].float(), places[row, thing][:, None])[:, 0]
        assert (seen.argmax(-1) == channel).float().mean() > 0.85


def test_frames_without_an_arm(pushes):
    """The empty tray shows where it was; all else, and what is said of it, stays."""
    real, told, places = pushes.of_kind(REAL)
    frames, classes, again = pushes.of_kind(2)
    assert torch.equal(places, again)
    assert (classes[:, 0] == -1).all()
    kept = classes[:, 1:] == told[:, 1:]
    assert kept[told[:, 1:] >= 0].float().mean() > 0.8
    row, thing = ((classes >= 1) & (told >= 1)).nonzero().T
    before, after = (push_frames.at(x[row], places[row, thing][:, None]) for x in (real, frames))
    assert torch.equal(before, after)
    above = places[:, :1] - torch.tensor([6.0, 0.0])  # the hand
    tray = push_frames.at(pushes.tray.expand(len(real), -1, -1, -1), above)
    off = [(push_frames.at(x.float(), above) - tray).abs().amax(-1) for x in (real, frames)]
    assert (off[0] > 15).float().mean() > 0.8
    assert (off[1] < 2).float().mean() > 0.8
    assert (frames != real).any(-1).float().mean() < 0.25


def test_the_tray_is_empty(pushes):
    """Hardly a pixel of it is an object's: saturated."""
    top = pushes.tray.amax(-1)
    saturated = (top - pushes.tray.amin(-1)) / top.clamp_min(1)
    assert (saturated > 0.65).float().mean() < 0.002


@pytest.mark.parametrize("kind", [0, 1])
def test_blends_and_blurs_show_nothing(kind, pushes):
    frames, classes, _ = pushes.of_kind(kind)
    assert (classes == -1).all()
    real = pushes.video.float()
    assert (frames.float() - real).abs().mean() > 3


def test_blends_are_of_two_videos(pushes, monkeypatch):
    chosen = torch.arange(0, 960, 7)
    video, pushes.video = (
        pushes.video,
        torch.arange(960).div(30, rounding_mode="floor")[:, None, None, None].expand(-1, 8, 8, 3),
    )  # every pixel says whose it is
    try:
        frames, _, _ = pushes._frames(chosen, torch.zeros_like(chosen))
    finally:
        pushes.video = video
    assert (frames[:, 0, 0, 0] != chosen // 30).float().mean() > 0.9


def test_half_of_the_frames_are_spoilt(pushes):
    torch.manual_seed(0)
    _, classes, _ = pushes.batch(0)
    assert (classes[:, 0] == -1).float().mean() == pytest.approx(0.5, abs=0.07)
    assert ((classes == -1).all(1)).float().mean() == pytest.approx(1 / 3, abs=0.07)


def test_a_blur_keeps_what_is_flat():
    """And a point becomes a Gaussian."""
    flat = torch.full((2, 32, 32), 0.7)
    sigma = torch.tensor([2.5, 4.0])
    torch.testing.assert_close(blurred(flat, sigma), flat)
    point = torch.zeros(2, 65, 65)
    point[:, 32, 32] = 1
    spread = blurred(point, sigma)
    line = torch.arange(65) - 32
    width = ((spread.sum(1) * line**2).sum(1)).sqrt()
    assert width.tolist() == pytest.approx([2.5, 4.0], rel=0.03)


def test_a_file_without_colours(tmp_path, monkeypatch):
    with np.load(robot_push.FILE) as file:
        arrays = {name: file[name] for name in file if not name.endswith("colours")}
    np.savez(tmp_path / "old.npz", **arrays)
    monkeypatch.setenv("TINYVGPT_ROBOT_PUSH", str(tmp_path / "old.npz"))
    with pytest.raises(ValueError, match="the robot clips have no colours"):
        PushFrames("test", CPU)


# The score ----------------------------------------------------------------------------------------


class Scored:
    """Frames whose scores are given, by kind."""

    kinds = ("a", "b")
    of: dict[int, torch.Tensor]

    def of_kind(self, kind):
        return (torch.tensor(kind),)

    def score(self, readings):
        return self.of[int(readings)]


class Silent:
    def read(self, frames):
        return frames


def test_the_score_is_fair_to_real_frames_and_to_the_worst_kind():
    frames = Scored()
    line = torch.linspace(0, 1, 101)
    frames.of = {train_probes.REAL: line, 0: line / 4, 1: line / 2}
    score = train_probes.balanced_score(Silent(), frames)
    assert score == pytest.approx(0.335, abs=0.006)
    shares = [(frames.of[train_probes.REAL] >= score).float().mean()]
    shares += [(frames.of[kind] < score).float().mean() for kind in (0, 1)]
    assert min(shares) == pytest.approx(2 / 3, abs=0.02)
    frames.of = {train_probes.REAL: torch.full((9,), 0.9), 0: line / 5, 1: torch.full((50,), 0.1)}
    assert train_probes.balanced_score(Silent(), frames) == pytest.approx(0.9)


def test_what_is_told_of_digits():
    classes = torch.tensor([[3, 5], [3, 5], [2, 2], [1, 4]])
    places = torch.tensor([[10.0, 10], [40, 40]]).expand(4, 2, 2)
    read = torch.tensor([[5, 3], [3, 6], [2, 2], [1, 4]])
    seen = places.clone()
    seen[0] = places[0].flip(0) + torch.tensor([3.0, 4.0])
    scores = torch.tensor([[0.9, 0.8]] * 3 + [[0.9, 0.1]])
    told = DigitFrames.told(Readings(read, scores, seen), classes, places, 0.5)
    assert told["of these with both digits right"] == pytest.approx(2 / 3)
    assert told["middles off by, pixels"] == pytest.approx(5)


def test_what_is_told_of_pushing():
    classes = torch.tensor([[0, 1, 2, -1, -1, -1]] * 2)
    places = torch.zeros(2, 6, 2)
    places[:, 1], places[:, 2] = 20.0, 40.0
    read = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    scores = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]] * 2)
    scores[1, 2] = 0.2
    seen = torch.zeros(2, 8, 2)
    seen[:, 0, 0], seen[0, 1], seen[1, 1], seen[:, 2] = 2.0, 21.0, 30.0, 40.0
    told = PushFrames.told(Readings(read, scores, seen), classes, places, 0.5)
    assert told["fingertips off by, pixels, median"] == 2
    assert told["of objects read"] == pytest.approx(3 / 4)
    assert told["of these within 4 pixels"] == pytest.approx(2 / 3)
    assert told["of colours read that are there"] == pytest.approx(3 / 5)


# The whole ----------------------------------------------------------------------------------------


class Knowing:
    """Reads the hand and the objects of all real frames, and nothing in others."""

    config = replace(PushFrames.config, threshold=0.5)

    def __init__(self, frames):
        self.frames = frames

    def read(self, seen):
        shown = (seen == self.frames.video).flatten(1).all(1)
        classes = self.frames.classes
        scores = torch.where((classes >= 0) & shown[:, None], 0.9, 0.0)
        return Readings(classes.clamp_min(0), scores, self.frames.places)


def test_a_probe_to_be_trusted(pushes):
    found = train_probes.trusted(Knowing(pushes), pushes)
    assert found == {
        "frames": 960,
        "real frames accepted": 1,
        "fingertips off by, pixels, median": 0,
        "fingertips off by, pixels, 95 % under": 0,
        "of objects read": 1,
        "of these within 4 pixels": 1,
        "of colours read that are there": 1,
        "spoilt frames rejected": {"blend": 1, "blur": 1, "no arm": 1},
    }


def begin(name, tmp_path, monkeypatch):
    """The recipe with two steps of a tiny probe."""
    of = DigitFrames if name == "moving-mnist" else PushFrames
    monkeypatch.setattr(of, "config", replace(of.config, width=2))
    monkeypatch.setattr(digit_frames, "CLIPS", 2)
    monkeypatch.setattr(push_frames, "AT_ONCE", 128)
    words = ["--probe", name, "--steps", "2", "--clips", "4"]
    places = ["--out", str(tmp_path / "probe"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_probes.py", *words, *places])
    train_probes.main()


def test_main(tmp_path, monkeypatch):
    monkeypatch.setattr(train_probes, "balanced_score", lambda probe, frames: 1e-4)
    begin("moving-mnist", tmp_path, monkeypatch)
    probe = Probe.from_pretrained(tmp_path / "probe")
    found = json.loads((tmp_path / "moving-mnist-probe.json").read_text())
    assert probe.config.threshold == 1e-4 == found["threshold"]
    assert replace(probe.config, threshold=0.5) == DigitFrames.config
    command = "python data_recipes/train_probes.py --probe moving-mnist --steps 2 --clips 4"
    assert found["command"] == command
    assert found["spoilt frames rejected"].keys() == set(DigitFrames.kinds)
    assert found["frames"] == 64
    assert found["trained on"].endswith(" digits")
    assert 0 <= found["real frames accepted"] <= 1


def test_a_trained_probe_is_only_measured(tmp_path, monkeypatch):
    of = replace(DigitFrames.config, width=2)
    monkeypatch.setattr(DigitFrames, "config", of)
    monkeypatch.setattr(train_probes, "balanced_score", lambda probe, frames: 1e-4)
    monkeypatch.setattr(train_probes, "train", lambda *given: pytest.fail("it was trained"))
    probe = Probe(of)
    probe.save(tmp_path / "before")
    words = ["--probe", "moving-mnist", "--clips", "4", "--trained", str(tmp_path / "before")]
    places = ["--out", str(tmp_path / "probe"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_probes.py", *words, *places])
    train_probes.main()
    measured = Probe.from_pretrained(tmp_path / "probe")
    assert measured.config.threshold == 1e-4
    before = Probe.from_pretrained(tmp_path / "before").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in measured.state_dict().items())
    found = json.loads((tmp_path / "moving-mnist-probe.json").read_text())
    assert found["command"].endswith("--probe moving-mnist --trained FOLDER --clips 4")
    assert "steps" not in found


def test_a_probe_that_tells_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="can't tell real frames from spoilt ones: give more"):
        begin("robot-push", tmp_path, monkeypatch)
    assert not (tmp_path / "probe").exists()


def test_it_learns(monkeypatch):
    """From two videos again and again: the loss falls."""
    torch.manual_seed(0)
    monkeypatch.setattr(push_frames, "AT_ONCE", 8)
    monkeypatch.setattr(PushFrames, "config", replace(PushFrames.config, width=8))
    frames, values, loss = PushFrames("test", CPU), [], train_probes.loss
    frames.video, frames.classes, frames.places = (
        x[:60] for x in (frames.video, frames.classes, frames.places)
    )

    def noted(*given):
        value = loss(*given)
        values.append(value.item())
        return value

    monkeypatch.setattr(train_probes, "loss", noted)
    train_probes.train(frames, 60, CPU)
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


def test_refusals(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["it", "--probe", "robot-push", "--steps", "0"])
    with pytest.raises(ValueError, match="--steps is 0, it must be at least 1"):
        train_probes.main()
