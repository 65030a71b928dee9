"""Datasets: clips that obey the physics, and batches that never depend on the way."""

import hashlib
import itertools
import math
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvgpt import counter
from tinyvgpt.data import MovingMNIST, batches, mnist, open_dataset
from tinyvgpt.data.moving_mnist import bounce, directions, render

MNIST_CLASSES = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # of 60,000


@pytest.fixture(autouse=True)
def embedded_digits(monkeypatch):
    """Whatever the machine has set, tests see the embedded digits."""
    monkeypatch.delenv(mnist.FOLDER_VARIABLE, raising=False)


# --- the physics ------------------------------------------------------------------------------


def test_directions_are_unit_vectors_at_the_angle():
    turns = np.concatenate([counter.uniform(0, np.arange(20_000)), np.arange(9) / 8])
    exact = np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], axis=-1)
    np.testing.assert_allclose(directions(turns), exact, rtol=0, atol=1e-15)


def test_speed_is_constant_between_bounces():
    angle = counter.uniform(1, np.arange(500))
    start = counter.uniform(2, np.arange(500)[:, None], [0, 1])
    path = bounce(start, 0.1 * directions(angle), 60)
    free = ((path > 0) & (path < 1)).all(-1)
    flying = free[1:] & free[:-1]
    speed = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    assert flying.mean() > 0.5
    np.testing.assert_allclose(speed[flying], 0.1, rtol=1e-12)
    assert speed.max() < 0.1 + 1e-12  # and no faster at a wall
    assert (~free).sum() > 1000  # there were walls


def test_a_wall_reverses_one_component():
    path = bounce(np.array([0.85, 0.5]), np.array([0.1, 0.02]), 4)
    expected = [[0.95, 0.52], [1.0, 0.54], [0.9, 0.56], [0.8, 0.58]]
    np.testing.assert_allclose(path, expected, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 24),
    resolution=st.integers(28, 70),
    n=st.integers(1, 4),
    step=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_shapes_dtypes_and_walls(frames, resolution, n, step, seed):
    data = MovingMNIST("val", seed, frames, resolution, n, step)
    indices = [0, 9_999, 17]
    path, batch = data.trajectories(indices), data.batch(indices)
    assert path.positions.shape == (3, frames, n, 2)
    assert path.digits.shape == path.classes.shape == (3, n)
    assert path.positions.min() >= 0
    assert path.positions.max() <= resolution - 28
    moved = np.abs(np.diff(path.positions, axis=1))
    assert moved.size == 0 or moved.max() <= step * (resolution - 28) + 1
    assert batch["video"].shape == (3, frames, resolution, resolution, 1)
    assert batch["video"].dtype == torch.uint8
    assert batch["label"].shape == (3,)
    assert batch["label"].dtype == torch.int64
    assert (data.channels, data.frames, data.resolution) == (1, frames, resolution)
    assert (batch["video"].amax((2, 3, 4)) > 0).all()  # ink in every frame


def test_starts_fill_the_square_and_classes_follow_mnist():
    path = MovingMNIST(step=0.0, resolution=38).trajectories(range(20_000))
    cells = np.bincount((path.positions[:, 0] @ [10, 1]).ravel(), minlength=100)
    assert cells.min() > 300  # of 400 expected, five standard deviations
    share = np.bincount(path.classes.ravel()) / path.classes.size
    assert np.abs(share - np.array(MNIST_CLASSES) / 60_000).max() < 0.01


def plain_clip(index, seed, frames, resolution, n, step):
    """One test clip by the rules of Srivastava et al., pixel by pixel, and its digits."""
    digits = mnist.load("test")
    video = [[[0] * resolution for _ in range(resolution)] for _ in range(frames)]
    classes = []
    for digit in range(n):
        row, y, x, turn = (float(counter.uniform(seed, 2, index, digit, d)) for d in range(4))
        row = int(row * len(digits.labels))
        classes.append(int(digits.labels[row]))
        vy, vx = step * math.sin(2 * math.pi * turn), step * math.cos(2 * math.pi * turn)
        for frame in range(frames):
            y, x = y + vy, x + vx
            if y <= 0:
                y, vy = 0.0, -vy
            if y >= 1:
                y, vy = 1.0, -vy
            if x <= 0:
                x, vx = 0.0, -vx
            if x >= 1:
                x, vx = 1.0, -vx
            top, left = int((resolution - 28) * y), int((resolution - 28) * x)
            for i, j in itertools.product(range(28), range(28)):
                here = video[frame][top + i][left + j]
                video[frame][top + i][left + j] = max(here, int(digits.images[row, i, j]))
    return np.array(video, np.uint8)[..., None], "".join(map(str, sorted(classes)))


@pytest.mark.parametrize(("frames", "resolution", "n", "step"), [(16, 64, 2, 0.1), (9, 45, 3, 0.4)])
def test_clips_equal_a_plain_renderer(frames, resolution, n, step):
    data = MovingMNIST("test", 11, frames, resolution, n, step)
    for index in (0, 5_000):
        video, name = plain_clip(index, 11, frames, resolution, n, step)
        item = data[index]
        assert np.array_equal(item["video"].numpy(), video)
        assert data.label_names[item["label"]] == name


def test_labels_count_the_multisets_of_digits():
    assert MovingMNIST().label_names[:11] == (*(f"0{d}" for d in range(10)), "11")
    assert MovingMNIST().label_names[37] == "47"
    for n, count in ((1, 10), (2, 55), (3, 220)):
        data = MovingMNIST(digits_per_clip=n)
        assert len(data.label_names) == count
        labels = data.batch(range(500))["label"]
        classes = data.trajectories(range(500)).classes
        for label, row in zip(labels.tolist(), classes.tolist(), strict=True):
            assert data.label_names[label] == "".join(map(str, sorted(row)))


def test_golden_clips():
    """These bits are the same on every machine; a change here changes everyone's data."""
    digests = []
    for data, indices in (
        (MovingMNIST(), [0, 1, 999_999]),
        (MovingMNIST("val", seed=5), [0, 9_999]),
        (MovingMNIST("test", frames=32, resolution=80, digits_per_clip=3, step=0.05), [7]),
    ):
        batch = data.batch(indices)
        content = batch["video"].numpy().tobytes() + str(batch["label"].tolist()).encode()
        digests.append(hashlib.sha256(content).hexdigest()[:16])
    assert digests == ["9536c9016523bfb7", "d3976372d47b5228", "fed919c8b6d09ad7"]


def test_a_clip_does_not_depend_on_the_way_it_is_asked_for():
    data = MovingMNIST()
    indices = [5, 123_456, 5, 0]
    together = data.batch(indices)
    for place, index in enumerate(indices):
        alone = data[index]
        assert torch.equal(alone["video"], together["video"][place])
        assert alone["label"] == together["label"][place]
    for kind in (np.array, torch.tensor, tuple):
        assert torch.equal(data.batch(kind(indices))["video"], together["video"])
    many = data.batch(range(100))  # more than are drawn in one operation
    assert torch.equal(many["video"][77], data[77]["video"])
    copy = pickle.loads(pickle.dumps(data))  # as a worker gets it
    assert torch.equal(copy.batch(indices)["video"], together["video"])


def test_longer_clips_and_more_digits_extend_the_same_clip():
    short, long = MovingMNIST(frames=4)[8]["video"], MovingMNIST(frames=9)[8]["video"]
    assert torch.equal(long[:4], short)
    one, two = MovingMNIST(digits_per_clip=1)[8]["video"], MovingMNIST()[8]["video"]
    assert (two >= one).all()


def test_splits_and_seeds_have_clips_of_their_own():
    paths = [
        MovingMNIST(split, seed).trajectories(range(50)).positions.tobytes()
        for split in mnist.SPLITS
        for seed in (0, 1)
    ]
    assert len(set(paths)) == 6


@pytest.mark.gpu
def test_a_gpu_draws_the_same_pixels():
    data = MovingMNIST()
    cpu, gpu = data.batch(range(300)), data.batch(range(300), device="cuda")
    for name in cpu:
        assert gpu[name].device.type == "cuda"
        assert torch.equal(gpu[name].cpu(), cpu[name])


def test_render_keeps_the_brighter_pixel():
    images = torch.zeros(1, 2, 28, 28, dtype=torch.uint8)
    images[0, 0, :, :2], images[0, 1, :, :2] = 200, 100
    positions = torch.tensor([[[[0, 0], [0, 1]]]])
    frame = render(images, positions, 28 + 1)[0, 0, :, :, 0]
    assert frame[0, :4].tolist() == [200, 200, 100, 0]
    assert not frame[28].any()


# --- opening and bad input --------------------------------------------------------------------


def test_open_dataset_passes_its_options_on():
    data = open_dataset("moving-mnist", split="val", seed=3, frames=4, size=10)
    assert data == MovingMNIST("val", 3, frames=4, size=10)
    assert len(data) == 10
    assert [len(open_dataset("moving-mnist", s)) for s in mnist.SPLITS] == [10**6, 10**4, 10**4]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "moving-minst",
            {},
            "no dataset, file or folder 'moving-minst', did you mean 'moving-mnist'",
        ),
        ("imagenet", {}, "no dataset, file or folder 'imagenet'; there is moving-mnist, "),
        ("moving-mnist", {"split": "training"}, "split is 'training', .* train, val, test"),
        ("moving-mnist", {"frame": 3}, "no option 'frame', did you mean 'frames'"),
        ("moving-mnist", {"frames": 0}, "frames is 0, it must be at least 1"),
        ("moving-mnist", {"resolution": 27}, "resolution is 27, it must be at least 28"),
        ("moving-mnist", {"digits_per_clip": 0}, "digits_per_clip is 0, it must be 1 … 9"),
        ("moving-mnist", {"step": -0.1}, "step is -0.1, it must be 0 … 1"),
        ("moving-mnist", {"step": math.nan}, "step is nan"),
        ("moving-mnist", {"size": 0}, "size is 0, it must be at least 1"),
        ("moving-mnist", {"seed": "seven"}, "seed is 'seven'"),
    ],
)
def test_bad_options_are_named(spec, options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(spec, **options)


def test_indices_outside_the_dataset():
    data = MovingMNIST("val", size=100)
    for index in (100, -1):
        with pytest.raises(IndexError, match=rf"no clip {index}, there are 100 \(0 … 99\)"):
            data[index]
    with pytest.raises(IndexError, match="no clip 100"):
        data.batch([0, 99, 100])
    assert len(list(data)) == 100  # a for loop ends there
    for indices in ([], [0.5], 3):
        with pytest.raises(ValueError, match="must be a list of integers"):
            data.batch(indices)


# --- batches ----------------------------------------------------------------------------------


class Places:
    """A dataset whose clips are their own indices."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def batch(self, indices, device="cpu"):
        return {"video": torch.as_tensor(indices, device=device)}


def places(size, batch_size, count, **options):
    stream = batches(Places(size), batch_size, **options)
    return [next(stream)["video"].tolist() for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 25])
def test_every_epoch_shows_every_clip_once(batch_size):
    order = list(itertools.chain(*places(10, batch_size, 70 // batch_size + 1)))
    epochs = [order[first : first + 10] for first in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert epochs[0] != list(range(10))


def test_batches_resume_where_they_stopped():
    whole = places(1_000, 64, 40, seed=3)
    for start in (1, 15, 39):  # in the first epoch, across the first end, in the third
        assert places(1_000, 64, 40 - start, seed=3, start=start) == whole[start:]
    assert places(1_000, 64, 40, seed=4) != whole


def test_without_shuffling_clips_come_in_order():
    assert places(5, 2, 4, shuffle=False) == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers):
    data = MovingMNIST(frames=3, size=50)
    generator_before = torch.get_rng_state()
    alone, shared = (batches(data, 8, seed=2, start=4, workers=w) for w in (0, workers))
    for _ in range(12):
        expected, found = next(alone), next(shared)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    shared.close()
    assert torch.equal(torch.get_rng_state(), generator_before)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_what_one_would_see(world_size):
    whole = places(50, 12, 9, seed=5)
    shares = [places(50, 12, 9, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {12 // world_size}
        assert sorted(itertools.chain(*parts)) == sorted(batch)
    epoch = list(itertools.chain(*(part for step in zip(*shares, strict=True) for part in step)))
    assert sorted(epoch[:48]) == sorted(set(epoch[:48]))  # four whole batches of the first epoch


def test_starting_late_in_a_large_dataset_costs_nothing():
    seconds = []
    for start in (0, 10**4, 10**6):
        before = time.perf_counter()
        next(batches(Places(10**6), 64, start=start))
        seconds.append(time.perf_counter() - before)
    assert min(seconds) < 0.03


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (9, {"batch_size": 0}, "batch_size is 0"),
        (9, {"batch_size": 1, "start": -1}, "start is -1"),
        (9, {"batch_size": 1, "workers": -1}, "workers is -1"),
        (0, {"batch_size": 1}, r"len\(dataset\) is 0"),
        (9, {"batch_size": 8, "rank": 2, "world_size": 2}, "rank is 2, of 2 processes"),
        (9, {"batch_size": 8, "rank": 0, "world_size": 3}, "batch_size is 8, 3 processes don't"),
    ],
)
def test_bad_batches_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        batches(Places(size), **options)
