"""BAIR's recipe: TFRecords → HDF5, from folders, from the tar, from a mirror."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bair
import fetch
import h5py
import numpy as np
import pytest
import tfrecords
from bair_clips import (
    CAMERAS,
    SCRIPT,
    Killed,
    assert_same,
    contents,
    dying_after,
    expected,
    features_of,
    make_clip,
    write_clips,
)
from serving import Server

pytest_plugins = ("bair_fixtures",)


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
    monkeypatch.setattr(bair, "attributes", lambda clips, _, camera: attributes(clips, "", camera))
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
    with pytest.raises(ValueError, match=r"bair\.h5 is there, but made with inputs 8 clips"):
        bair.convert([folder / "softmotion30_44k" / "test"], out, "image_aux1")
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with source .*, not bair_robot"
    ):
        bair.is_finished(out, {"source": bair.ARCHIVE})
    other = tmp_path / "train" / "other.tfrecords"  # of the same sizes
    write_clips(other, [make_clip(2, np.random.default_rng(14))])
    bair.convert([other], tmp_path / "other.h5", "image_aux1")
    write_clips(other, [make_clip(2, np.random.default_rng(15))])
    with pytest.raises(
        ValueError, match=r"other\.h5 is there, but made with inputs 1 clips .*, not"
    ):
        bair.convert([other], tmp_path / "other.h5", "image_aux1")
    write_clips(other, [make_clip(2, np.random.default_rng(14))])
    (tmp_path / "train").rename(tmp_path / "test")  # the same records, but not for training
    with pytest.raises(ValueError, match=r"other\.h5 is there, but made with inputs 1 clips"):
        bair.convert([tmp_path / "test"], tmp_path / "other.h5", "image_aux1")
    assert out.stat().st_mtime_ns == before
    out.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"bair\.h5 is there, but made with version unknown, not 1"
    ):
        bair.convert([folder], out, "image_aux1")
    assert out.read_bytes() == b"something else"


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


@pytest.fixture
def mirror(tar, monkeypatch):
    server = Server(tar.read_bytes())
    monkeypatch.setattr(bair, "SOURCES", [fetch.Source(server.url, "today")])
    monkeypatch.setattr(bair, "ARCHIVE_BYTES", len(server.content))
    monkeypatch.setattr(bair, "ARCHIVE_SHA256", hashlib.sha256(server.content).hexdigest())
    monkeypatch.setattr(fetch, "PAUSE", 0)
    yield server
    server.close()


def test_download(made, mirror, tmp_path, monkeypatch, capsys):
    """A connection that breaks, a conversion that dies: nothing is fetched twice."""
    mirror.cuts = [200_000]
    out = tmp_path / "out" / "bair.h5"
    monkeypatch.setattr(sys, "argv", ["bair.py", "--out", str(out)])
    with dying_after(10), pytest.raises(Killed):
        bair.main()
    assert (out.parent / bair.ARCHIVE).read_bytes() == mirror.content
    bair.main()
    assert_same(contents(out), expected(made[1], "image_aux1"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["bair.h5", bair.ARCHIVE]
    assert f"{bair.ARCHIVE} isn't needed any more" in capsys.readouterr().out
    (out.parent / bair.ARCHIVE).unlink()
    bair.main()
    assert "is complete" in capsys.readouterr().out
    assert mirror.requests == [None, "bytes=200000-"]


def test_a_mirror_with_another_file(mirror, tmp_path):
    mirror.content = mirror.content[::-1]
    with pytest.raises(OSError, match="sha256"):
        bair.download(tmp_path / "bair.h5")
    assert not (tmp_path / bair.ARCHIVE).exists()
