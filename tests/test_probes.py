"""Detectors of what a frame shows: their targets, what they read, and that they learn."""

import pytest
import torch

from tinyvgpt import frechet, open_dataset
from tinyvgpt.features import feature_set
from tinyvgpt.probes import CELL, Probe, ProbeConfig, ProbeFeatures, loss, targets

DIGITS = ProbeConfig("moving-mnist", tuple("0123456789"), 2, width=16, threshold=0.4)


def test_targets():
    classes = torch.tensor([[3, -1], [5, 5]])
    places = torch.tensor([[[10.0, 21.0], [40.0, 40.0]], [[2.0, 2.0], [61.9, 33.0]]])
    marks, shifts, cells, counts = targets(classes, places, 10, 16)
    assert (marks == 1).nonzero().tolist() == [[0, 3, 2, 5], [1, 5, 0, 0], [1, 5, 15, 8]]
    assert not marks[0, [i for i in range(10) if i != 3]].any()
    assert 0 < marks[0, 3, 2, 6] < 1
    assert counts.tolist() == [[True, False], [True, True]]
    back = CELL * (cells + 0.5 + shifts)
    torch.testing.assert_close(back[counts], places[counts])


def test_loss_is_least_for_what_is_there():
    wanted = targets(torch.tensor([[3]]), torch.tensor([[[10.0, 21.0]]]), 10, 16)
    right, shifts = torch.full((1, 10, 16, 16), -12.0), torch.zeros(1, 2, 16, 16)
    right[0, 3, 2, 5] = 12
    shifts[0, :, 2, 5] = wanted[1][0, 0]
    other, elsewhere, off = right.clone(), right.clone(), shifts.clone()
    other[0, 4, 2, 5], elsewhere[0, 3, 9, 9] = 12, 12
    off[0, 0, 2, 5] += 1
    best = loss(right, shifts, wanted)
    assert best < 1e-3
    for marks, moved in ((other, shifts), (elsewhere, shifts), (right, off), (-right, shifts)):
        assert loss(marks, moved, wanted) > best + 0.5


def test_reads_what_it_has_learnt(tmp_path):
    torch.manual_seed(0)
    data = open_dataset("moving-mnist")
    path = data.trajectories(range(2))
    clips = data.batch(range(2))["video"]
    classes = torch.from_numpy(path.classes)[:, None].expand(-1, 16, -1).flatten(0, 1)
    places = torch.from_numpy(path.positions).flatten(0, 1).float() + 14
    probe, frames = Probe(DIGITS), clips.flatten(0, 1).movedim(-1, 1).float() / 255
    optimizer = torch.optim.Adam(probe.parameters(), 3e-3)
    for _ in range(60):
        marks, shifts = probe(frames)
        loss(marks, shifts, targets(classes, places, 10, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    probe.eval().save(tmp_path)
    again = Probe.from_pretrained(tmp_path)
    assert again.config == DIGITS
    readings = again.read(clips, batch_size=5)
    assert readings.places.shape == (2, 16, 2, 2)
    right = readings.classes.sort(-1)[0] == classes.view(2, 16, 2).sort(-1)[0]
    assert right.all(-1).float().mean() > 0.8
    order, wanted = readings.classes.argsort(-1), classes.view(2, 16, 2).argsort(-1)
    at, middle = (
        x.gather(2, i[..., None].expand(-1, -1, -1, 2))
        for x, i in ((readings.places, order), (places.view(2, 16, 2, 2), wanted))
    )
    assert (at - middle).norm(dim=-1)[right.all(-1)].median() < 3
    features = again.features(clips)
    assert features.shape == (2, 64)
    assert again.features(clips[:, :1].expand(-1, 16, -1, -1, -1))[:, 32:].abs().max() == 0


def test_features_for_distances():
    """As the probe has them; a name for the weights; sets of different probes are refused."""
    torch.manual_seed(0)
    tiny = ProbeConfig("moving-mnist", tuple("0123456789"), 2, width=2)
    probe, other = Probe(tiny).eval(), Probe(tiny).eval()
    clips = open_dataset("moving-mnist", "test").batch(range(9))["video"]
    features, others = ProbeFeatures(probe), ProbeFeatures(other)
    assert (features.size, features.least) == (8, 9)
    assert torch.equal(features(clips), probe.features(clips))
    assert features(clips).shape == (9, 8)
    other.load_state_dict(probe.state_dict())
    assert ProbeFeatures(other).name == features.name
    with torch.no_grad():
        other.marks.bias[3] += 1e-3
    assert ProbeFeatures(other).name != features.name
    assert features.name.startswith("probe moving-mnist ")
    assert features.protocol["weights"].split()[1].startswith(features.name.split()[-1])
    sets = feature_set(features, [features(clips)]), feature_set(others, [others(clips)])
    with pytest.raises(ValueError, match="features are of different networks: probe moving-mnist"):
        frechet.compare(*sets)
    few = feature_set(features, [features(clips[:8])])
    with pytest.raises(ValueError, match=r"8 clips are too few .* at least 9 are needed"):
        frechet.compare(few, few)


def test_clips_that_have_no_features():
    features = ProbeFeatures(Probe(ProbeConfig("moving-mnist", ("a",), 1, width=2)).eval())
    clips = torch.zeros(2, 16, 64, 64, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="clips have 1 frame, a probe's features take 2 or more"):
        features(clips[:, :1])
    with pytest.raises(ValueError, match="moving-mnist reads 1 channels, the clips have 3"):
        features(clips.expand(-1, -1, -1, -1, 3))


def test_no_such_probe(tmp_path):
    with pytest.raises(ValueError, match="no probe 'no such probe': not a folder, and shipped"):
        Probe.from_pretrained("no such probe")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        Probe.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="robot-push holds no probe, but another model"):
        Probe.from_pretrained("tinyvgpt/weights/robot-push")
