"""The cache of a video folder's index: what is scanned again, and where it is kept."""

import errno
import multiprocessing
import os

import av
import numpy as np
import pytest
from videos import encode, waves

from tinyvgpt.data import index_cache
from tinyvgpt.data.folder import VideoFolder

SIDE = 16
FRAMES = 4
FILM = {"frames": FRAMES, "resolution": SIDE}
pytestmark = pytest.mark.usefixtures("user_cache")


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

    @pytest.mark.parametrize(
        ("module", "name", "value"), [(index_cache, "VERSION", 99), (av, "__version__", "99.0")]
    )
    def test_another_version_is_made_again(self, filled, scans, monkeypatch, module, name, value):
        root = filled("a.mp4", "b.mp4")
        VideoFolder(str(root), **FILM)
        scans.clear()
        monkeypatch.setattr(module, name, value)
        VideoFolder(str(root), **FILM)
        assert len(scans) == 2

    def test_folder_that_may_not_be_written_to(self, filled, user_cache, scans, monkeypatch, quiet):
        root, write = filled("train/a.mp4", "val/b.mp4"), index_cache.write_atomically

        def refusing(writers):
            if root / ".tinyvgpt-index.json" in writers:
                raise OSError(errno.EROFS, "Read-only file system")
            write(writers)

        monkeypatch.setattr(index_cache, "write_atomically", refusing)
        VideoFolder(str(root), **FILM)
        VideoFolder(str(root), "val", **FILM)
        assert sorted(path.name for path in root.iterdir()) == ["train", "val"]
        assert len(list(user_cache.glob("tinyvgpt/index-*.json"))) == 1
        scans.clear()
        VideoFolder(str(root), **FILM)
        assert scans == []
        filled("train/c.mp4")
        VideoFolder(str(root), **FILM)
        VideoFolder(str(root), **FILM)
        VideoFolder(str(root), "val", **FILM)
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

    def test_what_is_found_is_saved_now_and_then(self, filled, monkeypatch):
        root, write, counts = filled("a.mp4", "b.mp4", "c.mp4"), index_cache.write_atomically, []

        def counted(writers):
            write(writers)
            counts.append((root / ".tinyvgpt-index.json").read_text().count("timeline"))

        monkeypatch.setattr(index_cache, "write_atomically", counted)
        monkeypatch.setattr(index_cache, "SAVE_EVERY", 0)
        VideoFolder(str(root), **FILM)
        assert counts == [1, 2, 3, 3]

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
