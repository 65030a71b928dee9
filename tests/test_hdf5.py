"""HDF5 clips: the original's format opens as it is, and what is wrong with a file is said."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tinyvgpt.data import HDF5Clips, batches, open_dataset
from tinyvgpt.video import resize_crop

LENGTHS = {"train": [6, 4, 9, 3, 5, 4, 7, 4, 4, 8, 4, 6], "test": [4, 5]}
SIDE = 8


def write(path, *, channels=3, closing=False, labels=False, actions=True, lengths=LENGTHS):
    """A file in the original's format; returns its arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, counts in lengths.items():
        frames = sum(counts)
        shape = (frames, SIDE, SIDE, channels)
        arrays[f"{split}_data"] = rng.integers(0, 256, shape, dtype=np.uint8)
        index = np.cumsum([0, *counts])
        arrays[f"{split}_idx"] = index if closing else index[:-1]
        if actions:
            arrays[f"{split}_actions"] = rng.normal(size=(frames, 4)).astype(np.float32)
        if labels:
            arrays[f"{split}_labels"] = np.arange(len(counts)) % 3
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return arrays


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clips.h5"
    return str(path), write(path)


def expected_clips(arrays, split, rows, frames, stride):
    """Clips by brute force: (start in the data, row) of each."""
    starts = np.cumsum([0, *LENGTHS[split]])
    return [
        starts[row] + first
        for row in rows
        for first in range(0, LENGTHS[split][row] - frames + 1, stride)
    ]


@pytest.mark.parametrize(
    ("split", "rows", "stride"),
    [
        ("train", [*range(9), 10, 11], 1),  # row 9 is held out
        ("val", [9], 4),
        ("test", [0, 1], 4),
    ],
)
def test_clips_are_the_file_s_frames(file, split, rows, stride):
    path, arrays = file
    data = open_dataset(path, split, frames=4, resolution=SIDE)
    assert (data.channels, data.frames, data.resolution, data.label_names) == (3, 4, SIDE, None)
    prefix = "test" if split == "test" else "train"
    first = expected_clips(arrays, prefix, rows, 4, stride)
    assert len(data) == len(first)
    order = np.random.default_rng(1).permutation(len(first))
    batch = data.batch(order)
    assert batch.keys() == {"video", "action"}
    assert batch["action"].dtype == torch.float32
    for place, clip in enumerate(order):
        rows = slice(first[clip], first[clip] + 4)
        assert np.array_equal(batch["video"][place].numpy(), arrays[f"{prefix}_data"][rows])
        assert np.array_equal(batch["action"][place].numpy(), arrays[f"{prefix}_actions"][rows])


def test_a_closing_entry_of_the_index_is_no_video(tmp_path):
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", closing=True)
    a, b = (HDF5Clips(str(tmp_path / name), "test", 4, SIDE) for name in ("a.h5", "b.h5"))
    assert len(a) == len(b) == 2
    assert torch.equal(a.batch([1])["video"], b.batch([1])["video"])


def test_an_own_validation_split_is_used(tmp_path):
    lengths = {"train": [4] * 12, "val": [4, 4]}
    write(tmp_path / "a.h5", lengths=lengths)
    counts = [len(HDF5Clips(str(tmp_path / "a.h5"), split, 4, SIDE)) for split in ("train", "val")]
    assert counts == [12, 2]


def test_labels_grey_and_other_sizes(tmp_path):
    path = str(tmp_path / "a.h5")
    arrays = write(tmp_path / "a.h5", labels=True, channels=1, actions=False)
    data = HDF5Clips(path, "test", 4, 5)
    assert (data.channels, data.label_names) == (1, ("0", "1", "2"))
    batch = data.batch([0, 1])
    assert batch["label"].tolist() == [0, 1]
    assert torch.equal(batch["video"][0], resize_crop(arrays["test_data"][:4], 5))
    write(tmp_path / "b.h5", labels=True)
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["label_names"] = ["push", "pull", "lift"]
    assert HDF5Clips(str(tmp_path / "b.h5"), "test", 4, SIDE).label_names == (
        "push",
        "pull",
        "lift",
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same(file, workers):
    data = HDF5Clips(file[0], frames=4, resolution=SIDE)
    data.batch([0])  # the file is open in this process, too
    alone, shared = (batches(data, 8, seed=2, workers=w) for w in (0, workers))
    for _ in range(6):
        expected, found = next(alone), next(shared)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    shared.close()
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.batch([3])["video"], data.batch([3])["video"])


def broken(change):
    """A file with `change` made to its arrays."""

    def make(path):
        write(path)
        with h5py.File(path, "a") as file:
            change(file)

    return make


def replace(name, array):
    def change(file):
        del file[name]
        file[name] = array

    return broken(change)


def group(name):
    """A file that has a group where an array should be."""

    def change(file):
        file.pop(name, None)
        file.create_group(name)

    return broken(change)


def labelled(name, array):
    """A file with right labels of its test videos, and `array`."""
    return broken(
        lambda file: file.update({"test_labels": np.array([0, 1]), name: np.array(array)})
    )


FRAMES = sum(LENGTHS["train"])


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (broken(lambda f: f.__delitem__("test_data")), "test", "has no 'test_data'.*it holds test"),
        (broken(lambda f: f.__delitem__("train_idx")), "val", "has no 'train_idx'"),
        (replace("train_data", np.zeros((FRAMES, 8, 8, 3))), "train", "train_data is float64"),
        (replace("train_data", np.zeros((FRAMES, 8, 8), "u1")), "train", "uint8 .*is needed"),
        (replace("train_data", np.zeros((9, 8, 8, 3), "u1")), "train", "starts at frame .* has 9"),
        (replace("train_idx", np.zeros(12)), "train", "train_idx is float64 .*is needed"),
        (replace("train_idx", [0, 4, 4]), "train", "must increase"),
        (replace("train_idx", np.zeros(0, "i8")), "train", "train_idx is empty"),
        (replace("train_actions", np.zeros((3, 4))), "train", "train_actions is float64 .3, 4"),
        (broken(lambda f: f.create_dataset("test_labels", data=[0])), "test", "test_labels is"),
        (group("train_data"), "train", "train_data is a group, uint8 .*is needed"),
        (group("train_idx"), "train", "train_idx is a group, int64"),
        (group("train_actions"), "train", "train_actions is a group, float"),
        (group("train_labels"), "train", "train_labels is a group, int64"),
        (replace("train_actions", np.full((FRAMES, 4), b"x")), "train", "train_actions is .S1"),
        (replace("train_data", np.zeros((FRAMES, 0, 8, 3), "u1")), "train", "frames of a pixel"),
        (labelled("label_names", [1, 2, 3]), "test", "label_names is int64 .*strings"),
        (labelled("val_labels", [b"a"]), "test", "val_labels is .S1"),
        (labelled("label_names", [b"caf\xe9"] * 3), "test", "bad.h5: label_names are not UTF-8"),
        (
            broken(
                lambda file: (
                    file.update({"test_labels": np.array([0, 1])})
                    or file.create_dataset("label_names", (3,), h5py.vlen_dtype("i4"))
                )
            ),
            "test",
            "label_names is object .*strings",
        ),
        (lambda path: path.write_bytes(b"no HDF5 at all"), "train", "is not an HDF5 file"),
        (lambda path: path.write_bytes(b""), "train", "is not an HDF5 file"),
        (write, "training", "split is 'training'"),
    ],
)
def test_bad_files_are_named(tmp_path, make, split, message):
    path = tmp_path / "bad.h5"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        HDF5Clips(str(path), split, 4, SIDE)
    assert "\n" not in str(caught.value)


def test_names_in_utf_8_bytes(tmp_path):
    path = tmp_path / "names.h5"
    labelled("label_names", ["café".encode(), b"b"])(path)
    assert HDF5Clips(str(path), "test", 4, SIDE).label_names == ("café", "b")


@pytest.mark.parametrize("dtype", [">f4", "f8", "i2", np.longdouble])
def test_actions_of_any_number(tmp_path, dtype):
    path, actions = tmp_path / "actions.h5", np.arange(FRAMES * 4).reshape(FRAMES, 4)
    replace("train_actions", actions.astype(dtype))(path)
    got = HDF5Clips(str(path), "train", 4, SIDE).batch([0])["action"]
    assert got.dtype == torch.float32
    assert (np.diff(got[0, 0]) == 1).all()


def test_a_truncated_file(file, tmp_path):
    content = Path(file[0]).read_bytes()
    path = tmp_path / "cut.h5"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.h5 is a damaged HDF5 file"):
        HDF5Clips(str(path), frames=4)


def test_bad_fields_and_indices(file):
    for options, message in (
        ({"frames": 10}, "no video has 10 frames, the longest has 9"),
        ({"resolution": 0}, "resolution is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"fps": 3}, "has no option 'fps'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_dataset(file[0], **options)
    data = HDF5Clips(file[0], "test", 4, SIDE)
    with pytest.raises(IndexError, match=r"no clip 2, there are 2"):
        data.batch([2])
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        HDF5Clips("gone.h5")


def test_without_h5py(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        HDF5Clips(file[0])
