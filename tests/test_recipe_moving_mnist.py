"""The Moving MNIST recipe: downloads, the protocol's two layouts, interruptions, refusals."""

import gzip
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from serving import Server

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
pytest.importorskip("h5py", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import fetch
import h5py
import moving_mnist
import recipe

from tinyvgpt import counter, open_dataset
from tinyvgpt.data import MovingMNIST, mnist

CLIPS = 300  # more than a part, no multiple of it


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Tests see the embedded digits and this machine only, and wait for nothing."""
    monkeypatch.delenv(mnist.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the recipe as a shell does; returns exit code, stdout and stderr's last line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moving_mnist.py", *map(str, words)])
        code = 0
        try:
            recipe.run(moving_mnist.main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, (err.splitlines() or [""])[-1]

    return run


def mnist_files():
    """MNIST's four files as they are published, by name, with 40 and 12 digits."""
    files = {}
    for number, (source, count) in enumerate((("train", 40), ("test", 12))):
        images = (counter.uniform(number, np.arange(count * 784)) * 256).reshape(count, 28, 28)
        for name, array in zip(mnist.FILES[source], (images, np.arange(count) % 10), strict=True):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            files[f"{name}.gz"] = gzip.compress(content, mtime=0)
    return files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name, content in mnist_files().items():
        (tmp_path / "mnist" / name).write_bytes(content)
    return tmp_path / "mnist"


def clips_of(digits, size=CLIPS):
    """The protocol's clips, uint8 (N, T, H, W), and labels."""
    data = MovingMNIST("test", frames=20, digits=digits, size=size)
    batch = data.batch(range(size))
    return batch["video"][..., 0].numpy(), batch["label"].numpy()


def alone(path):
    return [other.name for other in path.parent.iterdir()] == [path.name]


class TestProtocol:
    def test_npy(self, run, tmp_path):
        path = tmp_path / "out" / "mnist_test_seq.npy"
        code, text, _ = run("--protocol", path, "--clips", CLIPS)
        assert code == 0
        assert "2,000 of MNIST's test set that are embedded" in text
        stored = np.load(path)
        assert (stored.shape, stored.dtype) == ((20, CLIPS, 64, 64), np.uint8)
        np.testing.assert_array_equal(stored.transpose(1, 0, 2, 3), clips_of(None)[0])
        assert alone(path)

    def test_h5(self, run, tmp_path):
        path = tmp_path / "out" / "protocol.h5"
        assert run("--protocol", path, "--clips", CLIPS)[0] == 0
        clips, labels = clips_of(None)
        with h5py.File(path) as file:
            data = file["test_data"]
            assert (data.shape, data.dtype) == ((CLIPS * 20, 64, 64, 1), np.uint8)
            np.testing.assert_array_equal(data[:].reshape(clips.shape), clips)
            assert file["test_idx"].dtype == file["test_labels"].dtype == np.int64
            np.testing.assert_array_equal(file["test_idx"][:], 20 * np.arange(CLIPS))
            np.testing.assert_array_equal(file["test_labels"][:], labels)
        assert alone(path)

    def test_h5_opens_as_a_dataset(self, run, tmp_path):
        run("--protocol", tmp_path / "protocol.h5", "--clips", 12)
        data = open_dataset(str(tmp_path / "protocol.h5"), "test", frames=20)
        clips, labels = clips_of(None, 12)
        batch = data.batch(range(12))
        np.testing.assert_array_equal(batch["video"][..., 0].numpy(), clips)
        names = MovingMNIST("test").label_names
        assert [data.label_names[i] for i in batch["label"]] == [names[i] for i in labels]

    def test_digits_of_a_folder(self, run, tmp_path, folder, monkeypatch):
        own, embedded = clips_of(str(folder), 5)[0], clips_of(None, 5)[0]
        assert (own != embedded).any()
        code, text, _ = run("--protocol", tmp_path / "a.npy", "--clips", 5, "--mnist", folder)
        assert (code, "embedded" in text) == (0, False)
        monkeypatch.setenv(mnist.FOLDER_VARIABLE, str(folder))
        code, text, _ = run("--protocol", tmp_path / "b.npy", "--clips", 5)
        assert (code, "embedded" in text) == (0, False)
        for name in ("a.npy", "b.npy"):
            np.testing.assert_array_equal(np.load(tmp_path / name).transpose(1, 0, 2, 3), own)

    def test_ten_thousand_clips_unless_told(self, run, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(moving_mnist, "write_protocol", lambda *words: asked.append(words))
        run("--protocol", tmp_path / "x.npy")
        assert asked == [(tmp_path / "x.npy", None, 10_000)]

    def test_full_disk_changes_nothing(self, run, tmp_path, file_limit):
        path = tmp_path / "x.npy"
        path.write_bytes(b"before")
        with file_limit(2_000_000):
            code, _, line = run("--protocol", path, "--clips", CLIPS)
        assert code == 2
        assert line.startswith(f"moving_mnist.py: {path} could not be written")
        assert path.read_bytes() == b"before"
        assert alone(path)

    def test_what_other_digits_began_is_not_continued(self, run, tmp_path, folder, monkeypatch):
        """A run with the embedded digits dies after a part; one with others ends."""
        path, batch = tmp_path / "out" / "x.h5", MovingMNIST.batch

        def die(data, indices):
            if 0 not in indices:
                raise KeyboardInterrupt
            return batch(data, indices)

        monkeypatch.setattr(MovingMNIST, "batch", die)
        assert run("--protocol", path, "--clips", CLIPS)[0] == 130
        monkeypatch.setattr(MovingMNIST, "batch", batch)
        assert run("--protocol", path, "--clips", CLIPS, "--mnist", folder)[0] == 0
        with h5py.File(path) as file:
            pixels = file["test_data"][:].reshape(CLIPS, 20, 64, 64)
        np.testing.assert_array_equal(pixels, clips_of(str(folder))[0])

    def test_no_space(self, run, tmp_path, monkeypatch):
        usage = shutil._ntuple_diskusage(9, 9, 800_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        code, _, line = run("--protocol", tmp_path / "x.npy")
        assert code == 2
        assert "x.npy needs 0.8 GB" in line
        assert list(tmp_path.iterdir()) == []

    def test_mistakes(self, run, tmp_path):
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder.h5").mkdir()
        for words, named in (
            (("--protocol", tmp_path / "folder.h5", "--clips", 1), "folder.h5 is a folder"),
            (("--protocol", tmp_path / "x.mp4"), "x.mp4 should end in .npy or .h5"),
            (("--protocol", tmp_path / "x.npy", "--clips", 0), "size is 0"),
            (("--protocol", tmp_path / "x.npy", "--mnist", tmp_path), "has no t10k-images"),
            (("--protocol", tmp_path / "file" / "x.npy", "--clips", 1), "file"),
            ((), "nothing to do"),
        ):
            code, _, line = run(*words)
            assert code == 2
            assert line.startswith("moving_mnist.py: ")
            assert named in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.h5"]


class Mirror(Server):
    """Serves MNIST's files by name; `gone` ones are not found."""

    def __init__(self):
        super().__init__(b"")
        self.files, self.gone = mnist_files(), set()
        self.etag = None
        self.root = self.url.removesuffix("file.bin")

    def answer(self, request):
        name = request.path.strip("/")
        self.requests.append(name)
        if name in self.gone or name not in self.files:
            request.send_error(404)
        else:
            self.send(request, self.files[name], 0, False)


class TestDownload:
    @pytest.fixture
    def mirrors(self, monkeypatch):
        mirrors = Mirror(), Mirror()
        sources = [fetch.Source(mirror.root, "never") for mirror in mirrors]
        monkeypatch.setattr(moving_mnist, "MIRRORS", sources)
        sums = {name: hashlib.md5(data).hexdigest() for name, data in mirrors[0].files.items()}
        monkeypatch.setattr(moving_mnist, "MD5", sums)
        yield mirrors
        for mirror in mirrors:
            mirror.close()

    def test_then_the_protocol(self, run, tmp_path, folder, mirrors):
        words = ("--download", tmp_path / "fetched", "--protocol", tmp_path / "x.npy")
        code, text, _ = run(*words, "--clips", 5)
        assert code == 0
        assert "40 training and 12 test digits" in text
        assert "embedded" not in text
        stored = {path.name: path.read_bytes() for path in (tmp_path / "fetched").iterdir()}
        assert stored == mirrors[0].files
        clips = np.load(tmp_path / "x.npy").transpose(1, 0, 2, 3)
        np.testing.assert_array_equal(clips, clips_of(str(folder), 5)[0])
        assert mirrors[1].requests == []

    def test_only_what_is_missing(self, run, tmp_path, mirrors):
        run("--download", tmp_path / "mnist")
        mirrors[0].requests.clear()
        (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
        assert run("--download", tmp_path / "mnist")[0] == 0
        assert mirrors[0].requests == ["t10k-labels-idx1-ubyte.gz"]

    def test_second_mirror(self, run, tmp_path, mirrors):
        gone, wrong, *_ = mirrors[0].files
        mirrors[0].gone = {gone}
        mirrors[0].files[wrong] = b"not what it should be"
        assert run("--download", tmp_path / "mnist")[0] == 0
        assert mirrors[1].requests == [gone, wrong]
        assert (tmp_path / "mnist" / wrong).read_bytes() == mirrors[1].files[wrong]

    def test_no_mirror(self, run, tmp_path, mirrors):
        for mirror in mirrors:
            mirror.close()
        code, _, line = run("--download", tmp_path / "mnist")
        assert code == 2
        for mirror in mirrors:
            assert mirror.root in line
        assert line.count("Connection refused") == 2

    def test_the_published_files_are_named(self):
        names = {f"{name}.gz" for pair in mnist.FILES.values() for name in pair}
        assert set(moving_mnist.MD5) == names or len(moving_mnist.MD5) == 4
        assert all(mirror.url.endswith("/mnist/") for mirror in moving_mnist.MIRRORS)


def kill_and_run_again(path, marks, clips):
    """Kills runs when they have written so many bytes; then one ends."""
    script = Path(moving_mnist.__file__)
    command = [sys.executable, script, "--protocol", path, "--clips", str(clips)]
    for mark in marks:
        if path.suffix == ".npy":  # begins anew, so what is there must be of this run
            path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            before = written(path)
            while written(path) < before + mark:
                assert run.poll() is None, "it ended before it was killed"
                time.sleep(0.001)
            run.kill()
        assert not path.exists()
    subprocess.run(command, check=True, capture_output=True)
    assert alone(path)


def written(path):
    """Bytes that an unfinished file takes on disk."""
    return sum(left.stat().st_blocks * 512 for left in path.parent.glob(".*.partial"))


@pytest.mark.parametrize("name", ["x.npy", "x.h5"])
def test_killed_and_run_again(tmp_path, name):
    kill_and_run_again(tmp_path / name, [8_000_000], 600)
    check_whole(tmp_path / name, 600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.npy", "x.h5"])
def test_killed_at_ten_moments_and_run_again(tmp_path, name):
    draw = random.Random(11)
    most = 140_000_000 if name == "x.npy" else 15_000_000  # in a run; what is left is continued
    kill_and_run_again(tmp_path / name, [draw.randrange(1, most) for _ in range(10)], 2000)
    check_whole(tmp_path / name, 2000)


def check_whole(path, clips):
    frames, labels = clips_of(None, clips)
    if path.suffix == ".npy":
        np.testing.assert_array_equal(np.load(path).transpose(1, 0, 2, 3), frames)
        return
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["test_data"][:].reshape(frames.shape), frames)
        np.testing.assert_array_equal(file["test_labels"][:], labels)
