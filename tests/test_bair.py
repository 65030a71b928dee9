"""BAIR's recipe: TFRecords → HDF5, whatever interrupts it, and inputs that are not as BAIR's."""

import http.server
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bair
import bair_files
import fetch
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as BAIR's tar unpacks to, with clips of 1 … 4 frames, and the clips by split."""
    folder = tmp_path_factory.mktemp("bair")
    generator = np.random.default_rng(5)
    clips = {"train": [make_clip(frames, generator) for frames in (3, 3, 2, 4, 3, 1, 3)]}
    clips["test"] = [make_clip(2, generator)]
    train = folder / "softmotion30_44k" / "train"
    write_clips(train / "traj_3_to_6.tfrecords", clips["train"][3:])
    write_clips(train / "traj_0_to_2.tfrecords", clips["train"][:3])
    write_clips(folder / "softmotion30_44k" / "test" / "traj_0_to_0.tfrecords", clips["test"])
    (train / "README.txt").write_text("not a TFRecord file")
    return folder, clips


@pytest.fixture
def tar(made, tmp_path):
    path = tmp_path / "made.tar"
    with tarfile.open(path, "w") as file:
        file.add(made[0] / "softmotion30_44k", "softmotion30_44k")
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


@pytest.mark.parametrize("camera", CAMERAS)
def test_folder_to_hdf5(made, tmp_path, camera, capsys):
    folder, clips = made
    out = tmp_path / "new" / "bair.h5"
    bair.convert([folder], out, camera)
    found = contents(out)
    assert_same(found, expected(clips, camera))
    assert found["train_data"].dtype == np.uint8
    assert found["train_idx"].dtype == np.int64
    assert [path.name for path in out.parent.iterdir()] == ["bair.h5"]
    with h5py.File(out, "r") as file:
        assert file["train_data"].chunks is None
        assert file.attrs["camera"] == camera
        assert file.attrs["source"] == folder.name
        assert file.attrs["version"] == bair.VERSION
    assert "7 train clips of 19 frames, 1 test clips of 2 frames, in" in capsys.readouterr().out


def test_the_originals_reader_finds_each_clip(made, tmp_path):
    """videogpt/data.py takes idx[i] … idx[i + 1] for every clip but the last."""
    folder, clips = made
    bair.convert([folder], tmp_path / "bair.h5", "image_aux1")
    with h5py.File(tmp_path / "bair.h5", "r") as file:
        images, starts = file["train_data"], file["train_idx"]
        for i in range(len(starts) - 1):
            np.testing.assert_array_equal(
                images[starts[i] : starts[i + 1]], clips["train"][i]["image_aux1"]
            )


def test_tar_files_and_folders_give_the_same_bytes(made, tar, tmp_path, monkeypatch):
    folder, _ = made
    attributes = bair.attributes  # but for the source, which they don't share
    monkeypatch.setattr(bair, "attributes", lambda files, _, camera: attributes(files, "", camera))
    one_by_one = sorted(folder.rglob("*.tfrecords"), reverse=True)
    split_folders = [folder / "softmotion30_44k" / split for split in ("test", "train")]
    outs = []
    for number, paths in enumerate(([folder], [tar], one_by_one, split_folders)):
        outs.append(tmp_path / f"{number}.h5")
        bair.convert(paths, outs[-1], "image_aux1")
    assert len({out.read_bytes() for out in outs}) == 1


def test_one_split_alone(made, tmp_path):
    folder, clips = made
    bair.convert([folder / "softmotion30_44k" / "test"], tmp_path / "bair.h5", "image_aux1")
    assert_same(contents(tmp_path / "bair.h5"), expected({"test": clips["test"]}, "image_aux1"))


def test_the_nearest_folder_gives_the_split(tmp_path):
    clips = [make_clip(1, np.random.default_rng(0))]
    write_clips(tmp_path / "test" / "train" / "deep" / "a.tfrecord-00000-of-00002", clips)
    bair.convert([tmp_path], tmp_path / "bair.h5", "image_aux1")
    assert "train_data" in contents(tmp_path / "bair.h5")


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


def test_dying_before_any_operation_changes_nothing_in_the_end(made, tmp_path, monkeypatch):
    """Each run dies one operation later than the one before, and goes on from what is there."""
    monkeypatch.setattr(bair, "CLIPS_A_STEP", 2)
    folder, clips = made
    whole = tmp_path / "whole.h5"
    bair.convert([folder], whole, "image_aux1")
    out = tmp_path / "out" / "whole.h5"
    runs = 0
    for operations in range(100):
        try:
            with dying_after(operations):
                bair.convert([folder], out, "image_aux1")
            break
        except Killed:
            runs += 1
    assert runs > 8
    assert out.read_bytes() == whole.read_bytes()
    for operations in range(12):  # from nothing, dying once
        other = tmp_path / f"once-{operations}.h5"
        with dying_after(operations), pytest.raises(Killed):
            bair.convert([folder], other, "image_aux1")
        bair.convert([folder], other, "image_aux1")
        assert_same(contents(other), expected(clips, "image_aux1"))


def test_a_full_disk(made, tmp_path, monkeypatch, file_limit):
    """Full in the middle of the pixels."""
    monkeypatch.setattr(bair, "CLIPS_A_STEP", 1)
    folder, clips = made
    out = tmp_path / "bair.h5"
    with dying_after(4), pytest.raises(Killed):
        bair.convert([folder], out, "image_aux1")
    words = r"bair\.h5.* make room and run this again, it goes on"
    with file_limit(140_000), pytest.raises(OSError, match=words):
        bair.convert([folder], out, "image_aux1")
    assert 0 < steps_done(tmp_path) < 8
    assert not out.exists()
    bair.convert([folder], out, "image_aux1")
    assert_same(contents(out), expected(clips, "image_aux1"))


def test_a_file_system_without_large_files(made, tmp_path, file_limit):
    with file_limit(100_000), pytest.raises(OSError, match=r"can't take bair\.h5"):
        bair.convert([made[0]], tmp_path / "bair.h5", "image_aux1")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """3,000 clips of one frame each; what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(6)
    for number in range(3):
        clips = (make_clip(1, generator) for _ in range(1_000))
        write_clips(folder / "train" / f"{number}.tfrecords", clips)
    bair.convert([folder], folder / "whole.h5", "image_main")
    return folder, folder / "whole.h5"


def start(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(folder):
    for path in folder.glob(".*.steps"):
        return int(path.read_bytes() or 0)
    return 0


def test_killing_it_ten_times(many, tmp_path):
    folder, whole = many
    arguments = "--files", folder, "--out", tmp_path / "whole.h5", "--camera", "image_main"
    generator = random.Random(7)
    killed = midway = 0
    for target in sorted(generator.randrange(2_800) for _ in range(10)):
        process = start(*arguments)
        while process.poll() is None and steps_done(tmp_path) < target:
            time.sleep(0.0005)
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        midway += 0 < steps_done(tmp_path) < 3_000
    assert killed >= 5
    assert midway >= 3
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert (tmp_path / "whole.h5").read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["whole.h5"]


def test_ctrl_c(many, tmp_path):
    folder, whole = many
    arguments = "--files", folder, "--out", tmp_path / "whole.h5", "--camera", "image_main"
    process = start(*arguments)
    while process.poll() is None and not steps_done(tmp_path):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    output, _ = start(*arguments).communicate()
    assert re.search(r"\(\d+ clips were there\)", output)
    assert (tmp_path / "whole.h5").read_bytes() == whole.read_bytes()


PEAK = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bair
bair.main()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells the peak on Linux only")
def test_memory(tmp_path):
    """Stays far below 1 GB, and doesn't grow with the number of clips."""
    payload = tfrecords.encode_example(features_of(make_clip(30, np.random.default_rng(8))))
    peaks = []
    for count in (30, 400):
        path = tmp_path / f"{count}" / "train" / "a.tfrecords"
        path.parent.mkdir(parents=True)
        tfrecords.write_records(path, [payload] * count)
        arguments = ["--files", path, "--out", tmp_path / f"{count}.h5"]
        command = [sys.executable, "-c", PEAK, SCRIPT.parent, *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(output.split()[-1]) * 1024)
    assert peaks[1] < 0.5e9
    assert peaks[1] - peaks[0] < 20e6  # the 370 further clips have 274 MB


def test_a_finished_file_stays(made, tmp_path, capsys):
    folder, _ = made
    out = tmp_path / "bair.h5"
    bair.convert([folder], out, "image_aux1")
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    bair.convert([folder], out, "image_aux1")
    assert capsys.readouterr().out == f"{out} is complete: nothing to do\n"
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with camera image_aux1, not"
    ):
        bair.convert([folder], out, "image_main")
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with inputs 3 TFRecord files"
    ):
        bair.convert([folder / "softmotion30_44k" / "test"], out, "image_aux1")
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with source .*, not bair_robot"
    ):
        bair.is_finished(out, {"source": bair.ARCHIVE})
    assert out.stat().st_mtime_ns == before
    out.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with version unknown, not 1"
    ):
        bair.convert([folder], out, "image_aux1")
    assert out.read_bytes() == b"something else"


def test_inputs_that_changed_start_afresh(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(9)
    path, out = tmp_path / "train" / "a.tfrecords", tmp_path / "bair.h5"
    monkeypatch.setattr(bair, "CLIPS_A_STEP", 1)
    write_clips(path, [make_clip(1, generator) for _ in range(5)])
    with dying_after(16), pytest.raises(Killed):
        bair.convert([path], out, "image_aux1")
    assert steps_done(tmp_path) > 0
    clips = [make_clip(1, generator) for _ in range(5)]
    write_clips(path, clips)
    os.utime(path, ns=(1, 1))
    bair.convert([path], out, "image_aux1")
    assert_same(contents(out), expected({"train": clips}, "image_aux1"))
    assert "is left of a run with other inputs or another camera" in capsys.readouterr().err


def test_two_processes_at_one_file(made, tmp_path):
    files = bair_files.find([made[0]])
    about = bair.attributes(files, made[0].name, "image_aux1")
    other = filling.Filling(tmp_path / "bair.h5", bair.key_of(files, about), {}, {}, {})
    with other, pytest.raises(OSError, match=r"bair\.h5 is being written by another process"):
        bair.convert([made[0]], tmp_path / "bair.h5", "image_aux1")


def without(key):
    return lambda features: features.pop(key)


def replaced(key, value):
    return lambda features: features.update({key: value})


BAD_RECORDS = {
    "no first image": (without("0/image_aux1/encoded"), "has no key '0/image_aux1/encoded'"),
    "no last image": (without("2/image_aux1/encoded"), "has no key '2/image_aux1/encoded'"),
    "no action": (without("1/action"), "has no key '1/action'"),
    "no position": (without("2/endeffector_pos"), "has no key '2/endeffector_pos'"),
    "a gap": (replaced("99999999/action", [0.0] * 4), "has no key '3/image_aux1/encoded'"),
    "image": (
        replaced("1/image_aux1/encoded", bytes(12_287)),
        "has 12287 bytes, not 12288 bytes, under the key '1/image_aux1/encoded'",
    ),
    "image of floats": (
        replaced("1/image_aux1/encoded", [0.0] * 9),
        "has 9 float32, not 12288 bytes, under the key '1/image_aux1/encoded'",
    ),
    "three actions": (
        replaced("1/action", [0.0] * 3),
        "has 3 float32, not 4 float32, under the key '1/action'",
    ),
    "action of bytes": (
        replaced("1/action", b"four"),
        "has 4 bytes, not 4 float32, under the key '1/action'",
    ),
    "nothing": (dict.clear, "has no key '0/image_aux1/encoded'"),
}


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_bad_records_are_named(fault, tmp_path):
    damage, words = BAD_RECORDS[fault]
    generator = np.random.default_rng(10)
    features = [features_of(make_clip(3, generator)) for _ in range(3)]
    damage(features[1])
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, map(tfrecords.encode_example, features))
    with path.open("rb") as file:
        offset = [offset for offset, _ in tfrecords.scan_records(file, "a")][1]
    with pytest.raises(ValueError, match=re.escape(f"{path}, the record at byte {offset} {words}")):
        bair.convert([tmp_path], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def test_no_example(tmp_path):
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, [b"\xff\xff\xff"])
    with pytest.raises(ValueError, match=r"at byte 0: 3 bytes are not a tf\.train\.Example"):
        bair.convert([path], tmp_path / "bair.h5", "image_aux1")


def test_other_keys_are_ignored(tmp_path):
    clip = make_clip(2, np.random.default_rng(11))
    features = features_of(clip) | {"label": b"", "5/image_main/encoded": b"x", "x/action": [1.0]}
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, [tfrecords.encode_example(features)])
    bair.convert([path], tmp_path / "bair.h5", "image_aux1")
    assert_same(contents(tmp_path / "bair.h5"), expected({"train": [clip]}, "image_aux1"))


def test_records_as_long_with_fewer_frames(tmp_path):
    """Frames are counted once a length; a record that is an exception must not pass."""
    generator = np.random.default_rng(12)
    long, short = (features_of(make_clip(frames, generator)) for frames in (2, 1))
    missing = len(tfrecords.encode_example(long)) - len(
        tfrecords.encode_example(short | {"x": b""})
    )
    short["x"] = bytes(missing)
    while len(tfrecords.encode_example(short)) > len(tfrecords.encode_example(long)):
        short["x"] = short["x"][1:]
    path = tmp_path / "train" / "a.tfrecords"
    path.parent.mkdir()
    tfrecords.write_records(path, map(tfrecords.encode_example, [long, short]))
    with pytest.raises(ValueError, match=r"has 1 frames, others of \d+ bytes in that file have 2"):
        bair.convert([path], tmp_path / "bair.h5", "image_aux1")


def test_damage_is_named_and_never_converted(made, tmp_path):
    """One byte at random offsets of files in a folder: an error that names file and record."""
    folder, _ = made
    copy = tmp_path / "train" / "traj.tfrecords"
    shutil.copytree(folder / "softmotion30_44k" / "train", copy.parent)
    (copy.parent / "traj_3_to_6.tfrecords").rename(copy)
    content = copy.read_bytes()
    with copy.open("rb") as file:
        offsets = [offset for offset, _ in tfrecords.scan_records(file, "traj")]
    generator = np.random.default_rng(13)
    for place in generator.integers(len(content), size=20):
        damaged = bytearray(content)
        damaged[place] ^= generator.integers(1, 256)
        copy.write_bytes(damaged)
        offset = offsets[np.searchsorted(offsets, place, side="right") - 1]
        words = rf"traj\.tfrecords is damaged.* of the record at byte {offset} is wrong"
        with pytest.raises(tfrecords.DamagedRecord, match=words):
            bair.convert([tmp_path], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def member(name, **more):
    about = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(about, key, value)
    return about


BAD_MEMBERS = {
    "leads out": member("train/../../a.tfrecords"),
    "absolute": member("/train/a.tfrecords"),
    "link": member("train/a.tfrecords", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("train/a.tfrecords", type=tarfile.LNKTYPE, linkname="b"),
    "device": member("train/a.tfrecords", type=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("fault", BAD_MEMBERS)
def test_tars_that_are_refused(fault, tar, tmp_path):
    with tarfile.open(tar, "a") as file:
        file.addfile(BAD_MEMBERS[fault], io.BytesIO())
    with pytest.raises(ValueError, match=r"made\.tar is refused"):
        bair.convert([tar], tmp_path / "bair.h5", "image_aux1")
    assert not (tmp_path / "bair.h5").exists()


def test_tars_that_are_not_whole(tar, tmp_path):
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        members = file.getmembers()
    for cut in (members[-1].offset, members[-1].offset + 700, 1_000, 100):
        tar.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"made\.tar is no TFRecord file .* uncompressed tar"):
            bair.convert([tar], tmp_path / "bair.h5", "image_aux1")
    tar.write_bytes(content)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as packed:
        packed.add(tar, "train/a.tfrecords")
    with pytest.raises(ValueError, match=r"packed\.tar is no TFRecord file"):
        bair.convert([tmp_path / "packed.tar"], tmp_path / "bair.h5", "image_aux1")


def test_paths_without_clips(made, tmp_path):
    (tmp_path / "empty").mkdir()
    elsewhere = tmp_path / "elsewhere" / "a.tfrecords"
    write_clips(elsewhere, [])
    out = tmp_path / "bair.h5"
    for paths, words in (
        ([tmp_path / "empty"], r"no TFRecord file \(\*\.tfrecords\) in .*empty"),
        ([elsewhere], r"a\.tfrecords is in no folder named train or test"),
        (
            [made[0], made[0] / "softmotion30_44k" / "test"],
            r"traj_0_to_0\.tfrecords is there twice",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            bair.convert(paths, out, "image_aux1")
    with pytest.raises(FileNotFoundError):
        bair.convert([tmp_path / "nowhere"], out, "image_aux1")
    write_clips(tmp_path / "train" / "empty.tfrecords", [])
    with pytest.raises(ValueError, match=r"no clips in .*train"):
        bair.convert([tmp_path / "train"], out, "image_aux1")


def test_mistakes_are_one_line(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start("--files", made[0], "--out", tmp_path / "file" / "bair.h5")
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"bair\.py: .*file.*", errors.splitlines()[-1])
    assert "Traceback" not in errors
    process = start("--files", tmp_path / "nowhere", "--out", tmp_path / "bair.h5")
    assert "nowhere" in process.communicate()[1]
    assert process.returncode == 2


def usage(free):
    return lambda path: SimpleNamespace(free=free)


def test_no_space(made, tmp_path, monkeypatch):
    """Checked before a byte is fetched or written; what an earlier run has written counts."""
    monkeypatch.setattr(bair, "fetch", lambda *_, **__: pytest.fail("it was fetched"))
    monkeypatch.setattr(fetch.shutil, "disk_usage", usage(40_000_000_000))
    with pytest.raises(
        OSError, match=r"bair_robot_pushing_dataset_v0\.tar with bair\.h5 needs 48\.4"
    ):
        bair.download(tmp_path / "bair.h5")
    (tmp_path / f".{bair.ARCHIVE}.partial").touch()
    os.truncate(tmp_path / f".{bair.ARCHIVE}.partial", 10_000_000_000)
    with pytest.raises(pytest.fail.Exception, match="it was fetched"):
        bair.download(tmp_path / "bair.h5")
    monkeypatch.setattr(fetch.shutil, "disk_usage", usage(200_000))
    out = tmp_path / "out" / "bair.h5"
    with pytest.raises(OSError, match=r"bair\.h5 needs 0\.0 GB"):
        bair.convert([made[0]], out, "image_aux1")
    assert not list(out.parent.glob("*"))


class Server:
    """Serves a folder on 127.0.0.1 and counts the requests."""

    def __init__(self, folder):
        self.requests = 0
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                outer.requests += 1

        handler = partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def mirror(tar, monkeypatch):
    server = Server(tar.parent)
    monkeypatch.setattr(bair, "SOURCES", [fetch.Source(f"{server.url}/{tar.name}", "today")])
    monkeypatch.setattr(bair, "ARCHIVE_BYTES", tar.stat().st_size)
    monkeypatch.setattr(bair, "ARCHIVE_SHA256", fetch.hashlib.sha256(tar.read_bytes()).hexdigest())
    monkeypatch.setattr(bair, "ARCHIVE_CLIPS", 8)
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_download(made, mirror, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "bair.h5"
    monkeypatch.setattr(sys, "argv", ["bair.py", "--out", str(out)])
    with dying_after(10), pytest.raises(Killed):
        bair.main()
    bair.main()
    assert_same(contents(out), expected(made[1], "image_aux1"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["bair.h5", bair.ARCHIVE]
    assert f"{bair.ARCHIVE} isn't needed any more" in capsys.readouterr().out
    assert mirror.requests == 1
    (out.parent / bair.ARCHIVE).unlink()
    bair.main()
    assert "is complete" in capsys.readouterr().out
    assert mirror.requests == 1


def test_a_mirror_with_another_file(mirror, tar, tmp_path):
    tar.write_bytes(tar.read_bytes()[::-1])
    with pytest.raises(OSError, match="sha256"):
        bair.download(tmp_path / "bair.h5")
    assert not (tmp_path / bair.ARCHIVE).exists()
