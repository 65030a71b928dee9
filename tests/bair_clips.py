"""What the tests of BAIR's recipe share: made clips as BAIR's, and ways to die half-way."""

import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import bair
import filling
import h5py
import numpy as np
import pytest
import tfrecords

SCRIPT = Path(bair.__file__)
CAMERAS = bair.CAMERAS


def features_of(clip):
    """The features that hold a clip, under BAIR's keys."""
    features = {}
    for frame in range(len(clip["action"])):
        for camera in CAMERAS:
            features[f"{frame}/{camera}/encoded"] = clip[camera][frame].tobytes()
        for kind in bair.NUMBERS:
            features[f"{frame}/{kind}"] = clip[kind][frame]
    return features


def make_clip(frames, generator):
    clip = {
        camera: generator.integers(256, size=(frames, 64, 64, 3), dtype=np.uint8)
        for camera in CAMERAS
    }
    numbers = {
        kind: generator.normal(size=(frames, floats)).astype(np.float32)
        for kind, floats in bair.NUMBERS.items()
    }
    return clip | numbers


def write_clips(path, clips):
    path.parent.mkdir(parents=True, exist_ok=True)
    tfrecords.write_records(path, (tfrecords.encode_example(features_of(clip)) for clip in clips))


def make_folder(folder):
    """Makes a folder as BAIR's tar unpacks to, with clips of 1 … 4 frames; the clips by split."""
    generator = np.random.default_rng(5)
    clips = {"train": [make_clip(frames, generator) for frames in (3, 3, 2, 4, 3, 1, 3)]}
    clips["test"] = [make_clip(2, generator)]
    train = folder / "softmotion30_44k" / "train"
    write_clips(train / "traj_4_to_6.tfrecords", clips["train"][4:])
    write_clips(train / "traj_0_to_3.tfrecords", clips["train"][:4])
    write_clips(folder / "softmotion30_44k" / "test" / "traj_0_to_0.tfrecords", clips["test"])
    (train / "README.txt").write_text("not a TFRecord file")
    return clips


def make_tar(folder, path):
    with tarfile.open(path, "w") as file:
        file.add(folder / "softmotion30_44k", "softmotion30_44k")
    return path


def contents(path):
    with h5py.File(path, "r") as file:
        return {name: file[name][()] for name in file}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype
        np.testing.assert_array_equal(values, other[name])


def expected(clips, camera):
    """What the file must hold, by way of numpy alone."""
    arrays = {}
    for split, of_split in clips.items():
        lengths = [len(clip["action"]) for clip in of_split]
        arrays[f"{split}_data"] = np.concatenate([clip[camera] for clip in of_split])
        arrays[f"{split}_idx"] = np.array([sum(lengths[:i]) for i in range(len(lengths))])
        arrays[f"{split}_actions"] = np.concatenate([clip["action"] for clip in of_split])
        positions = [clip["endeffector_pos"] for clip in of_split]
        arrays[f"{split}_endeffector_pos"] = np.concatenate(positions)
    return arrays


class Killed(BaseException):
    """Stands for a process that ends here."""


@contextmanager
def dying_after(operations):
    """Lets so many operations that change files succeed, and raises Killed at the next."""
    left = operations

    def mortal(function):
        def call(*arguments, **more):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (filling.os, "fsync"),
            (filling.os, "replace"),
            (filling.Filling, "write"),
            (filling.Filling, "_make"),
            (Path, "unlink"),
        ):
            patch.setattr(place, name, mortal(getattr(place, name)))
        yield


def start(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(folder):
    for path in folder.glob(".*.steps"):
        return int(path.read_bytes() or 0)
    return 0
