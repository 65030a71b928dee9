"""A folder of videos: splits and classes, the cache of its index, broken files, workers."""

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import encode, waves

from tinyvgpt import video
from tinyvgpt.data import batches, index_cache, video_files
from tinyvgpt.data.folder import VideoFolder

SIDE = 16
FRAMES = 4
FILM = {"frames": FRAMES, "resolution": SIDE}
EVERY_FIFTH = {"g": "5", "x264-params": "scenecut=0:bframes=0"}  # frame is a key frame


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of 20 frames with a key frame every 5."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return encode(path, waves(20, 16, 24), "libx264", **EVERY_FIFTH)


@pytest.fixture
def filled(tmp_path, film):
    """Return a function that puts copies of the film at places in a folder, and returns that."""

    def fill(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(film, path)
        return tmp_path

    return fill


@pytest.fixture
def scans(monkeypatch):
    """Names of the files that were scanned."""
    names, scan = [], index_cache.scan

    def counted(path):
        names.append(path.name)
        return scan(path)

    monkeypatch.setattr(index_cache, "scan", counted)
    return names


@pytest.fixture
def quiet():
    """No warning may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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
        expected = [film[start : start + 7] for film in whole for start in range(14)]
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


class TestSplitsAndClasses:
    def test_val_is_held_out_unless_there(self, filled):
        root = filled(*(f"train/{number:02d}.mp4" for number in range(20)), "test/t.mp4")
        train, val, test = (VideoFolder(str(root), split, **FILM) for split in video_files.SPLITS)
        assert names(val) == ["train/09.mp4", "train/19.mp4"]
        assert names(test) == ["test/t.mp4"]
        assert sorted(names(train) + names(val)) == [f"train/{n:02d}.mp4" for n in range(20)]
        filled("val/v.mp4")
        assert names(VideoFolder(str(root), "val", **FILM)) == ["val/v.mp4"]
        assert len(names(VideoFolder(str(root), **FILM))) == 20

    def test_a_broken_or_short_file_does_not_move_the_held_out_ones(self, filled, recwarn):
        root = filled(*(f"{number:02d}.mp4" for number in range(12)))
        long = VideoFolder(str(root), "val", frames=20, resolution=SIDE)
        encode(root / "03.mp4", waves(8), "libx264")
        assert names(VideoFolder(str(root), "val", frames=20, resolution=SIDE)) == names(long)
        assert names(long) == ["09.mp4"]

    def test_folder_of_videos_is_a_training_split(self, filled):
        root = str(filled("a.mp4", "b.MP4", ".hidden.mp4", "notes.txt", ".trash/c.mp4"))
        assert names(VideoFolder(root, **FILM)) == ["a.mp4"]
        assert names(VideoFolder(root, "val", **FILM)) == ["b.MP4"]
        with pytest.raises(ValueError, match=r"has no test/, only train/"):
            VideoFolder(root, "test", **FILM)

    def test_classes(self, filled):
        root = filled(
            "train/wave/x/a.mp4", "train/wave/b.mp4", "train/jump/c.mp4", "val/jump/d.gif"
        )
        filled("test/wave/e.mp4", "test/run/f.mp4")
        (root / "train/empty").mkdir()
        train, test = (VideoFolder(str(root), split, **FILM) for split in ("train", "test"))
        assert train.label_names == test.label_names == ("jump", "run", "wave")
        assert names(train) == ["train/jump/c.mp4", "train/wave/b.mp4", "train/wave/x/a.mp4"]
        batch = train.batch([0, 17, 50])
        assert batch["label"].dtype == torch.int64
        assert batch["label"].tolist() == [0, 2, 2]
        assert test.batch(range(10))["label"].tolist() == [1] * 5 + [2] * 5
        assert test[7]["label"].item() == 2

    def test_classes_without_splits(self, filled):
        data = VideoFolder(str(filled("wave/a.mp4", "jump/b.mp4", "wave/c.mp4")), **FILM)
        assert data.label_names == ("jump", "wave")
        assert names(data) == ["jump/b.mp4", "wave/a.mp4"]

    @pytest.mark.parametrize("other", ["train/a.mp4", "test/a.mp4"])
    def test_some_in_classes(self, filled, other):
        root = filled("train/wave/b.mp4", other)
        with pytest.raises(ValueError, match=rf"class folders \(train/wave/b.mp4\).*\({other}\)"):
            VideoFolder(str(root), **FILM)

    def test_what_is_beside_the_splits_is_left_alone(self, filled):
        data = VideoFolder(str(filled("train/a.mp4", "old/b.mp4", "c.mp4")), **FILM)
        assert (names(data), data.label_names) == (["train/a.mp4"], None)

    def test_links(self, filled, tmp_path_factory, film):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        shutil.copy(film, elsewhere)
        root = filled("train/a.mp4")
        (root / "train/more").symlink_to(elsewhere)
        (root / "train/a.mp4").rename(root / "train/more/a.mp4")
        (root / "train/more/up").symlink_to(root / "train")
        found = [names(VideoFolder(str(root), split, **FILM)) for split in ("train", "val")]
        assert found == [["train/more/a.mp4"], ["train/more/film.mp4"]]

    def test_only_a_test_split(self, filled):
        root = filled("test/a.mp4")
        with pytest.raises(ValueError, match="has no train/, only test/"):
            VideoFolder(str(root), **FILM)

    def test_one_video_cannot_be_shared(self, filled):
        root = filled("a.mp4")
        assert len(VideoFolder(str(root), **FILM)) == 17
        with pytest.raises(ValueError, match=rf"{root}: holding out a video .* needs two"):
            VideoFolder(str(root), "val", **FILM)


class TestBadFolders:
    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match=r"there is no folder .*/none$"):
            VideoFolder(str(tmp_path / "none"))

    def test_a_file(self, film):
        with pytest.raises(ValueError, match=r"film\.mp4 is a file, a folder of videos is needed"):
            VideoFolder(str(film))

    @pytest.mark.parametrize("place", [".", "train", "train/deep"])
    def test_may_not_be_read(self, filled, place, monkeypatch):
        root, scandir = filled("train/a.mp4", "train/deep/b.mp4"), os.scandir

        def refusing(path):
            if Path(path) == root / place:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(video_files.os, "scandir", refusing)
        with pytest.raises(ValueError, match=rf"folder {root / place} may not be read"):
            VideoFolder(str(root), **FILM)

    def test_no_videos(self, tmp_path):
        (tmp_path / "readme.txt").write_text("nothing")
        with pytest.raises(ValueError, match=rf"{tmp_path} holds no video \(\.avi, \.gif, .*\)"):
            VideoFolder(str(tmp_path))
        (tmp_path / "train").mkdir()
        with pytest.raises(ValueError, match=r"/train holds no video"):
            VideoFolder(str(tmp_path))

    def test_no_usable_clip(self, filled):
        root = filled("a.mp4", "b.mp4")
        for number in range(4):
            (root / f"empty{number}.mp4").touch()
        reason = "(is empty (0 bytes), a video file is needed)"
        broken = ", ".join(f"empty{number}.mp4 {reason}" for number in range(3))
        refusal = (
            f"{root} has no train clip of 30 frames: 1 videos are too short, the longest has 20; "
            f"4 files are broken and skipped: {broken}, and 1 more"
        )
        with (
            pytest.warns(UserWarning, match="is skipped"),
            pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"),
        ):
            VideoFolder(str(root), frames=30)
        with (
            pytest.warns(UserWarning, match="4 files are broken"),
            pytest.raises(ValueError, match=r"of 30 frames at 2 a second: .* the longest has 2;"),
        ):
            VideoFolder(str(root), frames=30, fps=2)

    def test_without_pyav(self, filled, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match="pip install av"):
            VideoFolder(str(filled("a.mp4", "b.mp4")))

    def test_the_package_is_imported_without_pyav(self):
        code = "import sys; sys.modules['av'] = None; import tinyvgpt.data.folder"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestBrokenFiles:
    @pytest.fixture
    def broken(self, filled, film):
        root = filled("train/a.mp4", "train/b.mp4", "train/c.mp4")
        (root / "train/empty.mp4").touch()
        (root / "train/cut.mp4").write_bytes(film.read_bytes()[:-500])
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
        with pytest.warns(UserWarning, match="3 files are broken and skipped: train/cut") as caught:
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
        with pytest.raises(ValueError, match="may not be read"):
            VideoFolder(str(root), **FILM)


class TestDamagedInside:
    @pytest.fixture
    def damaged(self, tmp_path):
        """Four videos of 30 frames; b.mp4 is rubbish from its frame 20 to 24."""
        film = encode(tmp_path / "film.mp4", waves(30, 16, 24), "libx264", **EVERY_FIFTH)
        for name in ("train/a/a", "train/b/b", "train/c/c", "train/d/d", "val/a/v"):
            path = tmp_path / f"{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(film, path)
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


class TestCache:
    def test_only_what_changed_is_scanned(self, filled, scans, quiet):
        root = filled("train/a.mp4", "train/b.mp4", "train/c.mp4", "test/t.mp4")
        data = VideoFolder(str(root), **FILM)
        assert sorted(scans) == ["a.mp4", "b.mp4", "c.mp4"]
        scans.clear()
        VideoFolder(str(root), "test", **FILM)
        assert scans == ["t.mp4"]
        scans.clear()
        again = VideoFolder(str(root), **FILM)
        assert scans == []
        assert again._videos.timelines == data._videos.timelines
        assert (root / ".tinyvgpt-index.json").is_file()

        encode(root / "train/a.mp4", waves(9, 16, 24), "libx264")  # changed
        filled("train/d.mp4")  # new
        (root / "train/b.mp4").unlink()  # vanished
        changed = VideoFolder(str(root), **FILM)
        assert sorted(scans) == ["a.mp4", "d.mp4"]
        assert [len(each) for each in changed._videos.timelines] == [9, 20]
        assert "b.mp4" not in (root / ".tinyvgpt-index.json").read_text()
        scans.clear()
        VideoFolder(str(root), "test", **FILM)
        assert scans == []

    def test_a_touched_file_is_scanned(self, filled, scans):
        root = filled("a.mp4", "b.mp4")
        VideoFolder(str(root), **FILM)
        status = (root / "a.mp4").stat()
        os.utime(root / "a.mp4", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        scans.clear()
        VideoFolder(str(root), **FILM)
        assert scans == ["a.mp4"]

    def test_vanished_files_are_forgotten(self, filled):
        root = filled("a.mp4", "b.mp4", "c.mp4")
        VideoFolder(str(root), **FILM)
        (root / "b.mp4").unlink()
        VideoFolder(str(root), **FILM)
        assert "b.mp4" not in (root / ".tinyvgpt-index.json").read_text()

    def test_a_damaged_cache_is_made_again(self, filled, scans, quiet):
        root = filled("a.mp4", "b.mp4", "c.mp4")
        VideoFolder(str(root), **FILM)
        cache = root / ".tinyvgpt-index.json"
        content = cache.read_bytes()
        random = np.random.default_rng(0)
        for place in [0, len(content) - 1, *random.integers(0, len(content), 30).tolist()]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(random.integers(8))
            cache.write_bytes(damaged)
            scans.clear()
            VideoFolder(str(root), **FILM)
            assert sorted(scans) == ["a.mp4", "b.mp4", "c.mp4"], place
            assert cache.read_bytes() == content
        for wrong in (b"", b"{}\n{}", b"[" * 100_000, content[:-9], content.replace(b"1", b"2", 1)):
            cache.write_bytes(wrong)
            scans.clear()
            VideoFolder(str(root), **FILM)
            assert len(scans) == 3
            assert cache.read_bytes() == content

    def test_another_version_is_made_again(self, filled, scans, monkeypatch):
        root = filled("a.mp4", "b.mp4")
        VideoFolder(str(root), **FILM)
        scans.clear()
        monkeypatch.setattr(index_cache, "VERSION", index_cache.VERSION + 1)
        VideoFolder(str(root), **FILM)
        assert len(scans) == 2

    def test_folder_that_may_not_be_written_to(self, filled, user_cache, scans, monkeypatch, quiet):
        root, write = filled("a.mp4", "b.mp4"), index_cache.write_atomically

        def refusing(writers):
            if root / ".tinyvgpt-index.json" in writers:
                raise OSError(errno.EROFS, "Read-only file system")
            write(writers)

        monkeypatch.setattr(index_cache, "write_atomically", refusing)
        VideoFolder(str(root), **FILM)
        assert [path.name for path in root.iterdir() if path.suffix != ".mp4"] == []
        assert len(list(user_cache.glob("tinyvgpt/index-*.json"))) == 1
        scans.clear()
        VideoFolder(str(root), **FILM)
        assert scans == []
        filled("c.mp4")
        VideoFolder(str(root), **FILM)
        VideoFolder(str(root), **FILM)
        assert scans == ["c.mp4"]

    def test_nowhere_to_write(self, filled, monkeypatch):
        def refusing(writers):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(index_cache, "write_atomically", refusing)
        with pytest.warns(UserWarning, match="could not be kept.*No space left on device"):
            data = VideoFolder(str(filled("a.mp4", "b.mp4")), **FILM)
        assert len(data) == 17

    def test_interrupted_indexing_keeps_what_it_has(self, filled, monkeypatch):
        root, scan = filled(*(f"{number}.mp4" for number in range(8))), index_cache.scan

        def interrupted(path):
            if path.name == "5.mp4":
                raise KeyboardInterrupt
            return scan(path)

        with monkeypatch.context() as patch:
            patch.setattr(index_cache, "scan", interrupted)
            with pytest.raises(KeyboardInterrupt):
                VideoFolder(str(root), **FILM)
        content = (root / ".tinyvgpt-index.json").read_text()
        assert [f'"{number}.mp4"' in content for number in range(8)] == [True] * 5 + [False] * 3

    def test_progress_shows_when_it_takes_long(self, filled, monkeypatch, capsys):
        root = filled("a.mp4", "b.mp4")
        VideoFolder(str(root), **FILM)
        assert capsys.readouterr() == ("", "")
        (root / ".tinyvgpt-index.json").unlink()
        monkeypatch.setattr(index_cache, "SHOW_AFTER", 0)
        VideoFolder(str(root), **FILM)
        out, err = capsys.readouterr()
        assert out == ""
        assert f"indexing {root}: 100%" in err

    def test_several_processes_at_once(self, filled):
        root = filled(*(f"{number:02d}.mp4" for number in range(12)))
        context = multiprocessing.get_context("fork")
        with context.Pool(3) as pool:
            assert pool.map(_length, [str(root)] * 6) == [11 * 17] * 6
        assert [path.suffix for path in root.iterdir() if path.suffix != ".mp4"] == [".json"]


def _length(root):
    return len(VideoFolder(root, **FILM))


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
