"""MNIST: the embedded digits, digits from a folder, and folders that are broken."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyvgpt import counter
from tinyvgpt.data import MovingMNIST, mnist, open_dataset

MNIST_CLASSES = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # of 60,000


@pytest.fixture(autouse=True)
def embedded_digits(monkeypatch):
    """Whatever the machine has set, tests see the embedded digits."""
    monkeypatch.delenv(mnist.FOLDER_VARIABLE, raising=False)


def write_idx(path, array):
    """Write `array` as an IDX file of bytes, gzipped if the name says so."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path):
    """A folder as MNIST comes, with 40 training and 12 test digits, half of the files gzipped."""
    for number, (source, count) in enumerate((("train", 40), ("test", 12))):
        images = (counter.uniform(number, np.arange(count * 784)) * 256).reshape(count, 28, 28)
        write_idx(tmp_path / f"{mnist.FILES[source][0]}.gz", images)
        write_idx(tmp_path / mnist.FILES[source][1], np.arange(count) % 10)
    return tmp_path


def test_subset_is_as_mnist_is():
    digits = {split: mnist.load(split) for split in mnist.SPLITS}
    assert [len(digits[split].labels) for split in mnist.SPLITS] == [9_000, 1_000, 2_000]
    for images, labels in digits.values():
        assert images.shape == (len(labels), 28, 28)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert images.max() == 255
        assert not images[:, 0].any()  # MNIST's digits have a black border
    train = np.bincount(np.concatenate([digits["train"].labels, digits["val"].labels]))
    assert np.abs(train - np.array(MNIST_CLASSES) / 6).max() <= 2
    assert mnist.SUBSET.stat().st_size <= 2_500_000
    licence = mnist.SUBSET.with_name("MNIST-LICENSE.md").read_text(encoding="utf-8")
    for words in ("LeCun", "Cortes", "Burges", "Share Alike 3.0"):
        assert words in licence


def test_no_digit_image_is_in_two_splits_nor_twice_in_one():
    images = [image.tobytes() for split in mnist.SPLITS for image in mnist.load(split).images]
    assert len(set(images)) == 12_000


def test_labels_tell_what_the_images_show():
    """Class means of the training digits recognise test digits: 81 % is what they are good for."""
    train, test = mnist.load("train"), mnist.load("test")
    means = np.stack([train.images[train.labels == digit].mean(0) for digit in range(10)])
    distance = ((test.images[:, None] - means) ** 2).sum((2, 3))
    assert (distance.argmin(1) == test.labels).mean() > 0.78


def test_digits_are_shared_and_read_only():
    assert mnist.load("val").images is mnist.load("val").images
    with pytest.raises(ValueError, match="read-only"):
        mnist.load("val").images[0] = 0


def test_a_folder_replaces_the_subset(folder, monkeypatch):
    given_folder = [mnist.load(split, folder) for split in mnist.SPLITS]
    assert [len(digits.labels) for digits in given_folder] == [36, 4, 12]
    assert given_folder[1].labels.tolist() == [6, 7, 8, 9]  # the last tenth of 0 … 39
    clips = MovingMNIST(split="test", digits=str(folder)).trajectories(range(100))
    assert clips.digits.max() < 12
    monkeypatch.setenv(mnist.FOLDER_VARIABLE, str(folder))
    assert mnist.load("val").images is given_folder[1].images
    assert torch.equal(
        MovingMNIST().batch([3])["video"],
        MovingMNIST(digits=str(folder)).batch([3])["video"],
    )


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, count):
    return lambda folder: overwrite(name, (folder / name).read_bytes()[:count])(folder)


IMAGES, LABELS = f"{mnist.FILES['train'][0]}.gz", mnist.FILES["train"][1]
BAD_FOLDERS = {
    "missing": (lambda f: (f / LABELS).unlink(), f"no {LABELS} or {LABELS}.gz"),
    "truncated gzip": (cut(IMAGES, 5_000), f"{IMAGES} is not a whole gzip file"),
    "no gzip": (overwrite(IMAGES, b"<html>"), f"{IMAGES} is not a whole gzip file"),
    "truncated": (cut(LABELS, 30), f"{LABELS} is truncated: 30 bytes, shape .40,. takes 48"),
    "header": (cut(LABELS, 6), f"{LABELS} is truncated: 6 bytes, its header takes 8"),
    "empty": (cut(LABELS, 0), f"{LABELS} starts with bytes none"),
    "magic": (overwrite(LABELS, b"\x00\x00\x0d\x01" + bytes(44)), "starts with bytes 00 00 0d 01"),
    "long": (overwrite(LABELS, b"\x00\x00\x08\x01" + bytes(5)), f"{LABELS} is too long"),
    "huge": (overwrite(LABELS, b"\x00\x00\x08\x01\xff\xff\xff\xff"), f"{LABELS} is truncated"),
    "count": (lambda f: write_idx(f / LABELS, np.arange(39) % 10), "40 digits, .* 39 labels"),
    "label": (lambda f: write_idx(f / LABELS, np.arange(40) % 11), "has the label 10"),
    "size": (lambda f: write_idx(f / IMAGES, np.zeros((40, 32, 32))), r"\(32, 32\) pixels"),
    "few": (
        lambda f: (
            write_idx(f / IMAGES, np.zeros((9, 28, 28))),
            write_idx(f / LABELS, np.arange(9)),
        ),
        "has 9 digits",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_is_refused(folder, fault):
    damage, message = BAD_FOLDERS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        MovingMNIST(digits=str(folder))


def test_no_folder_at_all():
    with pytest.raises(ValueError, match="nowhere has no train-images-idx3-ubyte"):
        open_dataset("moving-mnist", digits="nowhere")


def test_recipe_keeps_the_class_proportions():
    path = Path(__file__).parents[1] / "data_recipes" / "mnist_subset.py"
    spec = importlib.util.spec_from_file_location("mnist_subset", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert recipe.apportion(10, np.array([1, 1, 1])).tolist() == [4, 3, 3]
    assert recipe.apportion(7, np.array([50, 30, 20])).tolist() == [4, 2, 1]
    labels = np.repeat(np.arange(10), np.arange(10, 110, 10))
    rows = recipe.choose(labels, 110, 0)
    assert np.bincount(labels[rows]).tolist() == list(range(2, 22, 2))
    assert (np.diff(rows) > 0).all()
    assert not np.array_equal(rows, recipe.choose(labels, 110, 1))
