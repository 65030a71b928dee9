"""Which videos a folder holds: splits, classes, folders that hold none."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from videos import encode, fill, waves

from tinyvgpt.data import video_files
from tinyvgpt.data.folder import VideoFolder

SIDE = 16
FRAMES = 4
FILM = {"frames": FRAMES, "resolution": SIDE}
pytestmark = pytest.mark.usefixtures("user_cache")


def names(data):
    return [Path(name).as_posix() for name in data._videos.names]


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

    @pytest.mark.parametrize("kept", ["log.jsonl", "vqvae.safetensors"])
    def test_previews_of_a_run_among_the_films_are_no_films(self, filled, kept):
        root = filled("a.mp4", "b.mp4", "c.mp4", "runs/tokenizer/previews/0000500.mp4")
        with pytest.raises(ValueError, match=r"in class folders .* and others in none"):
            VideoFolder(str(root), **FILM)
        (root / "runs" / "tokenizer" / kept).touch()
        assert names(VideoFolder(str(root), **FILM)) == ["a.mp4", "b.mp4"]

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
        with pytest.raises(ValueError, match=r"has no test/, its videos are for train and val"):
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

    def test_links(self, filled, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        fill(elsewhere, "film.mp4")
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

    def test_a_file(self, filled):
        path = filled("film.mp4") / "film.mp4"
        with pytest.raises(ValueError, match=r"film\.mp4 is a file, a folder of videos is needed"):
            VideoFolder(str(path))

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
            f"{root} has no train clip of 30 frames: the longest of 1 videos has 20; "
            f"4 broken files skipped: {broken}, and 1 more"
        )
        with (
            pytest.warns(UserWarning, match="is skipped"),
            pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"),
        ):
            VideoFolder(str(root), frames=30)
        with (
            pytest.warns(UserWarning, match="4 broken files skipped"),
            pytest.raises(ValueError, match="at 2 a second: the longest of 1 videos has 2;"),
        ):
            VideoFolder(str(root), frames=30, fps=2)

    def test_without_pyav(self, filled, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match="pip install av"):
            VideoFolder(str(filled("a.mp4", "b.mp4")))

    def test_the_package_is_imported_without_pyav(self):
        code = "import sys; sys.modules['av'] = None; import tinyvgpt.data.folder"
        subprocess.run([sys.executable, "-c", code], check=True)
