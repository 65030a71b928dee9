"""What robot clips show: ways, objects and rollouts, on readings that are made up."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, open_dataset, pushing
from tinyvgpt.data.robot_push import in_picture
from tinyvgpt.probes import ProbeConfig, Readings
from tinyvgpt.pushing import Sights, follows, inside, moved, sights
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.shown import REAL

TINY = VQVAEConfig(
    frames=16, resolution=64, downsample=(4, 16, 16), hidden=8, res_blocks=1, codes=8, code_dim=4,
    axial=False, causal_time=True,
)  # fmt: skip
PROBE = ProbeConfig("robot-push", pushing.CLASSES, pushing.READ, channels=3, threshold=0.5)


def build(vqvae=TINY, **fields):
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    config = GPTConfig.for_vqvae(vqvae, width=12, heads=2, layers=1, **fields)
    return VideoGPT(tokenizer, GPT(config, tokenizer.codebook.codes))


# Readings -----------------------------------------------------------------------------------------


def test_sights():
    """The most certain of each class, whatever else is read."""
    classes = torch.tensor([[3, 0, 3, 0, 7]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.3]])
    places = torch.arange(10.0).view(1, 5, 2)
    seen = sights(Readings(classes, scores, places))
    assert seen.hand.tolist() == [[2, 3]]
    assert seen.certain.tolist() == [pytest.approx(0.8)]
    assert seen.objects[0, 2].tolist() == [0, 1]
    assert seen.objects[0, 6].tolist() == [8, 9]
    assert seen.scores[0].tolist() == pytest.approx([0, 0, 0.9, 0, 0, 0, 0.3])
    assert seen.objects[0, [0, 1, 3, 4, 5]].isnan().all()
    assert pushing.acceptance(seen).tolist() == pytest.approx([0.3])  # the second object's
    armless = sights(Readings(classes.clamp_min(3), scores, places))
    assert armless.hand.isnan().all()
    assert pushing.acceptance(armless).tolist() == [0]


# Ways ---------------------------------------------------------------------------------------------


def test_the_course_is_where_the_simulator_went():
    """Seen by the camera, within a few pixels of the fingertips', in whose frames it begins."""
    data = open_dataset("robot-push", "test")
    tips, actions = data.endeffector(range(32)), data.batch(range(32))["action"]
    meant = pushing.course(tips[:, 3], actions[:, 3:-1])
    assert meant.shape == (32, 13, 3)
    assert torch.equal(meant[:, 0], tips[:, 3])
    seen, true = (pushing.in_frames(x, 64) for x in (meant, tips[:, 3:]))
    assert (seen - true).norm(dim=-1).median() < 1
    assert torch.allclose(true.flip(-1), in_picture(tips[:, 3:]))
    assert torch.allclose(pushing.in_frames(meant, 32), seen / 2)
    still = pushing.course(tips[:, 3], torch.zeros_like(actions[:, 3:-1]))
    assert torch.equal(still, tips[:, 3:4].expand(-1, 13, -1))


def test_inside():
    points = torch.zeros(4, 5, 3) + 0.05
    points[1, 3, 0], points[2, 0, 1], points[3, 4, 2] = 0.21, -0.27, -0.01
    points[1, 4] = 0
    assert inside(points).tolist() == [5, 3, 0, 4]


def test_follows():
    line = torch.linspace(0, 12, 13)
    commanded = torch.stack([line, 2 * line.sin()], -1).expand(5, -1, -1).clone()
    ways = commanded.clone() * 0.5 + 3
    ways[1] = -commanded[1]
    ways[2] = 7.0  # stands
    commanded[3, :, 1] *= 0.5  # less than 3 pixels are commanded
    found = follows(ways, commanded, torch.tensor([13, 13, 13, 13, 4]))
    assert found[0] == pytest.approx([1, 1])
    assert found[1] == pytest.approx([-1, -1])
    assert found[2] == pytest.approx([0, 0])
    assert found[3] == pytest.approx([1, np.nan], nan_ok=True)
    assert np.isnan(found[4]).all()  # too few frames
    steered = pushing.steering(ways, commanded, torch.tensor([13, 13, 13, 13, 4]))
    assert steered["follows"] == pytest.approx([1, -1, 0, 1, np.nan], nan_ok=True)
    assert steered["follows right"] == pytest.approx(found[:, 1], nan_ok=True)


def test_only_the_first_frames_count():
    commanded = torch.linspace(0, 12, 13)[None, :, None].expand(1, 13, 2).clone()
    ways = commanded.clone()
    ways[:, 7:] *= -1
    assert follows(ways, commanded, torch.tensor([7]))[0] == pytest.approx([1, 1])
    assert (follows(ways, commanded, torch.tensor([13]))[0] < 0).all()


def test_a_hand_that_is_not_read_has_not_moved():
    hand = torch.arange(12.0).view(1, 6, 2)
    hand[0, 4] = torch.nan
    seen = Sights(hand, torch.ones(1, 6), torch.zeros(1, 6, 7, 2), torch.ones(1, 6, 7))
    assert pushing.way(seen, 3)[0].tolist() == [[4, 5], [6, 7], [4, 5], [10, 11]]


# Objects ------------------------------------------------------------------------------------------


def test_objects_that_move():
    places = torch.zeros(1, 8, 7, 2)
    places[0, 4:, 0, 1] = 5.0  # moves
    places[0, 4:, 1, 1] = 3.0  # hardly
    places[0, 6, 2] = 30.0  # is misread once
    places[0, 5:, 3, 0] = 9.0
    scores = torch.full((1, 8, 7), 0.9)
    scores[0, :, 4] = 0.1  # is never read
    scores[0, 4:, 3] = 0.2  # is lost
    real = moved(Sights(places[:, :, 0], scores[..., 0], places, scores), 4, 0.5)
    assert real[0].tolist() == pytest.approx([1, 0, 0, np.nan, np.nan, 0, 0], nan_ok=True)
    made = torch.tensor([[0, 1, 0, 1, np.nan, 0, np.nan]]).double()
    found = pushing.pushing(made, real)
    assert found["pushed"] == pytest.approx([0])
    assert found["left"] == pytest.approx([1 / 4])
    assert found["moved"] == pytest.approx([1])
    found = pushing.pushing(real, real)
    assert (found["pushed"], found["left"], found["moved"]) == ([1], [0], [1])
    assert np.isnan(pushing.pushing(made, made * np.nan)["moved"]).all()


# The whole ----------------------------------------------------------------------------------------


class Knowing:
    """Reads a hand where the clip's first pixels say it is, and three objects that rest."""

    config = PROBE

    def check(self, channels):
        assert channels == 3

    def read(self, clips):
        hand = clips[:, :, 0, 0, :2].float() / 4  # (B, T, 2)
        lost = clips[:, :, 0, 0, 2] == 255
        rest = torch.tensor([[10.0, 10], [20, 20], [30, 30]]).expand(*hand.shape[:2], 3, 2)
        places = torch.cat([hand[:, :, None], rest], 2)
        classes = torch.tensor([0, 1, 2, 3]).expand(*hand.shape[:2], 4)
        scores = torch.where(lost[..., None], 0.1, 0.9).expand_as(classes)
        return Readings(classes, scores, places)


def film(hand):
    """Clips that say where the hand is, (B, T, 2)."""
    clips = torch.zeros(*hand.shape[:2], 64, 64, 3, dtype=torch.uint8)
    clips[:, :, 0, 0, :2] = (4 * hand).round().clamp(0, 255).byte()
    return clips


def obedient(data, chosen, lost_after=64):
    """In place of a model: the hand goes exactly as it is told; late frames can't be read."""
    tips = data.endeffector(chosen)
    told = []

    def continued(model, batch, given, rule, seed, length=None):
        told.append((given, rule, length))
        way = pushing.course(tips[:, 0], batch["action"][:, :-1])
        clips = film(pushing.in_frames(way, 64).clamp(0, 63))
        clips[::2, lost_after:, 0, 0, 2] = 255
        return clips

    return continued, told


@pytest.fixture
def data():
    return open_dataset("robot-push", "test")


def test_show_pushing(data, monkeypatch):
    chosen = [i * 31 // 11 for i in range(12)]
    continued, told = obedient(data, chosen, lost_after=40)
    monkeypatch.setattr(pushing, "continued", continued)
    rule = SamplingRule(temperature=0.5)
    groups = pushing.show_pushing(build(action_dim=4), data, Knowing(), 12, rule=rule)
    assert told == [(4, rule, None)] * 4 + [(4, rule, 64)]
    shown = groups["shown"]
    follow = {name: of.figure.value for name, of in shown["follows"].items()}
    assert list(follow) == [REAL, "reconstructions", "samples", "another clip's actions",
                            "opposite actions", "no actions"]  # fmt: skip
    assert follow["samples"] > 0.99
    assert follow["opposite actions"] < -0.9
    assert abs(follow["another clip's actions"]) < 0.5
    assert abs(follow["no actions"]) < 0.2
    tips, actions = data.endeffector(chosen)[:, 3], data.batch(chosen)["action"][:, 3:-1]
    until = inside(pushing.course(tips, -actions))  # what leaves the tray can't be compared
    meant = pushing.in_frames(pushing.course(tips, actions), 64)
    far = [(x[:n].amax(0) - x[:n].amin(0)).amax() for x, n in zip(meant, until, strict=True)]
    counted = sum(n >= 5 and d >= 3 for n, d in zip(until.tolist(), far, strict=True))
    assert shown["follows"]["opposite actions"].clips == counted < 12
    assert shown["follows"]["samples"].clips == 12
    assert shown["off"]["samples"].figure.value < 3
    assert shown["accepted"]["samples"].figure.value == 1
    assert shown["left"]["samples"].figure.value == 0  # nothing moves
    assert "pushed" not in shown
    assert "no actions" not in shown["accepted"]
    figures = groups["rollout"]
    assert figures["accepted, frames 13 to 16"].value == 1
    assert figures["accepted, frames 61 to 64"].value == 0.5
    assert figures["accepted, these over those"].value == 0.5
    assert figures["follows"].value > 0.99


def test_with_a_model(data):
    """The shipped one's way of being asked: frames, actions, and more frames than a window has."""
    groups = pushing.show_pushing(build(action_dim=4), data, Knowing(), 2)
    assert groups["shown"].keys() >= {"follows", "moved", "accepted", "off"}
    assert groups["rollout"].keys() >= {"accepted, frames 13 to 16", "accepted, frames 61 to 64"}


def test_refusals(data):
    model, probe = build(action_dim=4), Knowing()
    with pytest.raises(ValueError, match="the model can't go on from frames as actions say"):
        pushing.show_pushing(build(), data, probe, 4)
    unsteady = build(replace(TINY, causal_time=False), action_dim=4)
    with pytest.raises(ValueError, match="the model can't go on from frames as actions say"):
        pushing.show_pushing(unsteady, data, probe, 4)
    with pytest.raises(ValueError, match="needs at least 2"):
        pushing.show_pushing(model, data, probe, 1)
    probe.config = replace(PROBE, name="moving-mnist")
    with pytest.raises(ValueError, match="the probe is of moving-mnist"):
        pushing.show_pushing(model, data, probe, 4)
