"""Clips of a folder of videos: what they show, broken files, workers."""

import errno
import multiprocessing
import os
import pickle
import shutil
import warnings
from pathlib import Path

import av
import pytest
import torch
from videos import encode, fill, film, waves

from tinyvgpt import video
from tinyvgpt.data import batches
from tinyvgpt.data.folder import VideoFolder

SIDE = 16
FRAMES = 4
FILM = {"frames": FRAMES, "resolution": SIDE}
pytestmark = pytest.mark.usefixtures("user_cache")


def names(data):
    return [Path(name).as_posix() for name in data._videos.names]


class TestClips:
    def test_every_clip_of_a_mixed_folder(self, tmp_path, quiet):
        place = tmp_path / "train"
        place.mkdir()
        clip = waves(20, 20, 24)
        codecs = {"a.mp4": "libx264", "b.WebM": "libvpx-vp9", "c.avi": "mpeg4", "d.mov": "libx264"}
        for name, codec in codecs.items():
            encode(place / name, clip, codec, g="6")
        video.write(place / "e.gif", clip[:, ::2, ::2])
        data = VideoFolder(str(tmp_path), frames=7, resolution=SIDE)
        assert len(data) == 5 * (20 - 7 + 1) - 14  # of five files, the last is held out
        assert (data.channels, data.frames, data.resolution, data.label_names) == (3, 7, SIDE, None)
        batch = data.batch(range(len(data)))
        assert list(batch) == ["video"]
        assert batch["video"].dtype == torch.uint8
        whole = [video.read(place / name, resolution=SIDE) for name in codecs]
        expected = [clip[start : start + 7] for clip in whole for start in range(14)]
        assert torch.equal(batch["video"], torch.stack(expected))
        assert torch.equal(data[20]["video"], expected[20])

    @pytest.mark.parametrize("fps", [10, 29.97, 75])
    def test_frame_rates(self, filled, fps):
        folder = filled("train/a.mp4", "test/a.mp4")
        whole = video.read(folder / "test/a.mp4", fps=fps, resolution=SIDE)
        data = VideoFolder(str(folder), "test", fps=fps, **FILM)
        assert len(data) == len(whole) // FRAMES
        expected = whole[: len(data) * FRAMES].reshape(-1, FRAMES, SIDE, SIDE, 3)
        assert torch.equal(data.batch(range(len(data)))["video"], expected)

    def test_stride(self, filled):
        folder = str(filled("train/a.mp4", "train/b.mp4", "val/c.mp4", "test/d.mp4"))
        assert [len(VideoFolder(folder, split, **FILM)) for split in ("train", "val", "test")] == [
            2 * 17,
            5,
            5,
        ]
        data = VideoFolder(folder, stride=6, **FILM)
        whole = video.read(Path(folder) / "train/a.mp4", resolution=SIDE)
        assert len(data) == 2 * 3
        assert torch.equal(data[2]["video"], whole[12:16])

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"frames": 0}, "frames is 0"),
            ({"stride": 0}, "stride is 0"),
            ({"resolution": 0}, "resolution is 0"),
            ({"fps": 0}, "fps is 0"),
            ({"fps": float("nan")}, "fps is nan"),
            ({"split": "dev"}, "split is 'dev'"),
        ],
    )
    def test_fields_out_of_range(self, filled, options, named):
        with pytest.raises(ValueError, match=named):
            VideoFolder(str(filled("a.mp4", "b.mp4")), **options)

    @pytest.mark.parametrize(
        ("indices", "error", "named"),
        [([34], IndexError, "no clip 34"), ([-1], IndexError, "-1"), ([0.5], ValueError, "0.5")],
    )
    def test_indices(self, filled, indices, error, named):
        data = VideoFolder(str(filled("a.mp4", "b.mp4", "c.mp4")), **FILM)
        with pytest.raises(error, match=named):
            data.batch(indices)


class TestBrokenFiles:
    @pytest.fixture
    def broken(self, filled):
        root = filled("train/a.mp4", "train/b.mp4", "train/c.mp4")
        (root / "train/empty.mp4").touch()
        (root / "train/cut.mp4").write_bytes(film()[:-500])
        (root / "train/text.avi").write_text("not a video\n" * 400)
        encode(root / "train/short.mp4", waves(3), "libx264")
        return root

    def test_each_is_named_and_counted(self, broken):
        with pytest.warns(UserWarning, match="is skipped") as caught:
            data = VideoFolder(str(broken), **FILM)
        found = sorted(str(warning.message) for warning in caught)
        assert [text.split(" is skipped: it ")[0] for text in found] == [
            str(broken / f"train/{name}") for name in ("cut.mp4", "empty.mp4", "text.avi")
        ]
        assert "cannot be read" in found[2]
        assert data.skipped == {
            text.split(" is skipped: it ")[0]: text.split(" is skipped: it ")[1] for text in found
        }
        assert len(data) == 3 * 17  # short.mp4 is held out

    def test_known_ones_are_not_tried_again(self, broken, scans):
        with pytest.warns(UserWarning, match="is skipped"):
            first = VideoFolder(str(broken), **FILM)
        scans.clear()
        with pytest.warns(UserWarning, match="3 broken files skipped: train/cut") as caught:
            again = VideoFolder(str(broken), **FILM)
        assert (len(caught), scans) == (1, [])
        assert again.skipped == first.skipped

    def test_one_that_may_not_be_read_is_tried_again(self, filled, scans, monkeypatch):
        root, path_open = filled("a.mp4", "b.mp4", "c.mp4"), Path.open

        def refusing(path, *arguments, **options):
            if path.name == "b.mp4":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return path_open(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refusing)
            for _ in range(2):
                scans.clear()
                with pytest.warns(UserWarning, match=r"b\.mp4 .* may not be read: Permission"):
                    data = VideoFolder(str(root), **FILM)
                assert "b.mp4" in scans
            assert names(data) == ["a.mp4"]
        assert names(VideoFolder(str(root), **FILM)) == ["a.mp4", "b.mp4"]

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
    def test_permissions_as_the_system_has_them(self, filled):
        root = filled("a.mp4", "b.mp4", "c.mp4")
        (root / "b.mp4").chmod(0)
        with pytest.warns(UserWarning, match=r"b\.mp4 .* may not be read: Permission"):
            VideoFolder(str(root), **FILM)
        root.chmod(0)
        try:
            with pytest.raises(ValueError, match=f"folder {root} may not be read"):
                VideoFolder(str(root), **FILM)
        finally:
            root.chmod(0o700)


class TestDamagedInside:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Four videos of 30 frames; b.mp4 is rubbish from its frame 20 to 24."""
        names = (f"train/{name}/{name}.mp4" for name in "abcd")
        fill(tmp_path, *names, "val/a/v.mp4", frames=30)
        path = tmp_path / "train/b/b.mp4"
        with av.open(str(path)) as container:
            packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
        content = bytearray(path.read_bytes())
        for position, size in packets[20:25]:
            content[position : position + size] = b"\xff" * size
        path.write_bytes(content)
        return tmp_path

    def test_another_clip_takes_the_place(self, damaged):
        data = VideoFolder(str(damaged), **FILM)
        assert (len(data), data.skipped) == (4 * 27, {})
        with pytest.warns(UserWarning, match=r"b/b\.mp4 cannot be read: .*; other clips") as caught:
            batch = data.batch(range(27, 54))
        assert len(caught) == 1
        assert list(data.skipped) == [str(damaged / "train/b/b.mp4")]
        assert "damaged inside" in data.skipped[str(damaged / "train/b/b.mp4")]
        whole = video.read(damaged / "train/a/a.mp4", resolution=SIDE)
        expected = [whole[start : start + FRAMES] for start in range(27)]
        assert torch.equal(batch["video"], torch.stack(expected))  # all videos are the same …
        hit = [3 if 20 - FRAMES < start < 25 else 1 for start in range(27)]  # … but for their class
        assert batch["label"].tolist() == hit

    @pytest.mark.parametrize("workers", [0, 2])
    def test_it_depends_on_the_clip_alone(self, damaged, workers):
        reference = VideoFolder(str(damaged), **FILM)
        with pytest.warns(UserWarning, match="other clips"):
            expected = [reference.batch([index])["label"].item() for index in range(27, 54)]
        assert set(expected) == {1, 3}
        data = VideoFolder(str(damaged), **FILM)
        stream = batches(data, 27, shuffle=False, workers=workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels = [next(stream)["label"].tolist() for _ in range(4)]
        assert labels[1] == expected
        assert list(data.skipped) == [str(damaged / "train/b/b.mp4")]  # workers tell, too

    def test_a_file_that_vanishes(self, damaged):
        data = VideoFolder(str(damaged), **FILM)
        (damaged / "train/c/c.mp4").unlink()
        with pytest.warns(UserWarning, match=r"c/c\.mp4"):
            assert data[2 * 27]["label"].item() == 0

    def test_all_of_them_vanish(self, damaged):
        data = VideoFolder(str(damaged), **FILM)
        shutil.rmtree(damaged / "train")
        with (
            pytest.warns(UserWarning, match="No such file"),
            pytest.raises(ValueError, match=r"no video of .* can be decoded any more"),
        ):
            data.batch([0])


class TestWorkers:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_the_same_batches(self, filled, method, monkeypatch):
        root = filled(*(f"train/{name}/{name}.mp4" for name in "abc"), "val/a/v.mp4")
        data = VideoFolder(str(root), **FILM)
        expected = [next(stream) for stream in [batches(data, 5, seed=3)] for _ in range(3)]
        before = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method(method, force=True)
        try:
            stream = batches(data, 5, seed=3, workers=2)
            found = [next(stream) for _ in range(3)]
            del stream
        finally:
            multiprocessing.set_start_method(before, force=True)
        for mine, theirs in zip(expected, found, strict=True):
            assert torch.equal(mine["video"], theirs["video"])
            assert torch.equal(mine["label"], theirs["label"])

    def test_pickled_without_scanning_again(self, filled, scans):
        data = VideoFolder(str(filled("a.mp4", "b.mp4", "c.mp4")), **FILM)
        scans.clear()
        copy = pickle.loads(pickle.dumps(data))
        assert copy == data
        assert torch.equal(copy[20]["video"], data[20]["video"])
        assert scans == []

    def test_no_file_stays_open(self, filled):
        data = VideoFolder(str(filled("a.mp4", "b.mp4")), **FILM)
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
        data.batch(range(17))
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) == before
