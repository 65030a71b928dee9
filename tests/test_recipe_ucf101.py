"""The UCF101 recipe on a small archive of the same form: folders, interruptions, refusals."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from serving import Server
from standing_in import put_bsdtar, stand_in_rar, tar_bytes, tree
from writing_rar import member, write_rar

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import recipe
import ucf101

RECIPES = Path(ucf101.__file__).parent
CLASSES = ("ApplyLipstick", "HandstandPushups", "YoYo")
DRAW = random.Random(3)
VIDEOS = {  # where the archive has it → content
    f"UCF-101/{kind}/v_{kind.replace('stand', 'Stand')}_g{group:02}_c01.avi": DRAW.randbytes(20_000)
    for kind in CLASSES
    for group in range(1, 13)
}


def in_test(path, split):
    """Groups 1–4 test in split 1, 5–8 in split 2, 9–12 in split 3."""
    return (int(path.split("_g")[1][:2]) - 1) // 4 == split - 1


def expected(split):
    """What OUT holds of a split; the lists write HandstandPushups's videos as its folder."""
    tree = {}
    for path, content in VIDEOS.items():
        part = "test" if in_test(path, split) else "train"
        tree[f"{part}/{listed(path)}"] = content
    return tree


def listed(path):
    return path.removeprefix("UCF-101/").replace("v_HandStand", "v_Handstand")


def write_lists(path, change=None):
    """The zip of the splits, as it comes: lines end in CR LF, training videos have a number."""
    texts = {"classInd.txt": "".join(f"{i} {name}\r\n" for i, name in enumerate(CLASSES, 1))}
    for split in (1, 2, 3):
        lines = {"train": "", "test": ""}
        for video in VIDEOS:
            if in_test(video, split):
                lines["test"] += f"{listed(video)}\r\n"
            else:
                number = CLASSES.index(video.split("/")[1]) + 1
                lines["train"] += f"{listed(video)} {number}\r\n"
        texts |= {f"{part}list{split:02}.txt": text for part, text in lines.items()}
    texts |= change or {}
    with zipfile.ZipFile(path, "w") as file:
        for name, text in texts.items():
            if text is not None:
                file.writestr(f"ucfTrainTestlist/{name}", text)
    return path


@pytest.fixture
def files(tmp_path):
    """The archive (a tar: told by its content) and the lists, as someone has them."""
    archive = tmp_path / "UCF101.rar"
    archive.write_bytes(tar_bytes(VIDEOS.items()))
    return archive, write_lists(tmp_path / "splits.zip")


@pytest.fixture
def ucf(monkeypatch, capsys):
    """Runs the recipe as a shell does; returns exit code, stdout and stderr without its bars."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ucf101.py", *map(str, words)])
        code = 0
        try:
            recipe.run(ucf101.main)
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        lines = [line for line in err.split("\n") if line and "\r" not in line]
        return code, out, "\n".join(line for line in lines if "it/s" not in line)

    return run


def refused(run, files, tmp_path, match, out="ucf"):
    """Exit code 2 and one line on stderr, no OUT."""
    code, _, err = run("--out", tmp_path / out, "--archive", files[0], "--splits", files[1])
    last = err.splitlines()[-1]
    assert code == 2
    assert last.startswith("ucf101.py: ")
    assert match in last
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("split", [1, 2, 3])
def test_each_split(files, ucf, tmp_path, split):
    out = tmp_path / "data" / "ucf"
    code, text, err = ucf(
        "--out", out, "--archive", files[0], "--splits", files[1], "--split", split
    )
    assert (code, "missing" in err, "in no list" in err) == (0, False, False)
    assert tree(out) == expected(split)
    assert "24 of the 24 videos" in text
    assert "12 of the 12 videos" in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["ucf", "ucf-downloads"]


def test_the_next_split_takes_no_room(files, ucf, tmp_path):
    common = ("--archive", files[0], "--splits", files[1], "--downloads", tmp_path / "kept")
    for split in (1, 2):
        assert ucf("--out", tmp_path / f"split{split}", "--split", split, *common)[0] == 0
        assert tree(tmp_path / f"split{split}") == expected(split)
    video = "YoYo/v_YoYo_g12_c01.avi"  # trains in both
    assert os.path.samefile(
        tmp_path / "split1" / "train" / video, tmp_path / "split2" / "train" / video
    )


def test_without_hard_links(files, ucf, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert ucf("--out", tmp_path / "ucf", "--archive", files[0], "--splits", files[1])[0] == 0
    assert tree(tmp_path / "ucf") == expected(1)


def test_again_does_nothing(files, ucf, tmp_path):
    words = ("--out", tmp_path / "ucf", "--archive", files[0], "--splits", files[1])
    ucf(*words)
    shutil.rmtree(tmp_path / "ucf-downloads")
    before = (tmp_path / "ucf").stat().st_mtime_ns
    code, text, _ = ucf(*words)
    assert (code, "24 of the 24" in text) == (0, True)
    assert (tmp_path / "ucf").stat().st_mtime_ns == before
    assert not (tmp_path / "ucf-downloads").exists()  # nothing was unpacked for it


@pytest.mark.parametrize("real", [True, False])
def test_a_rar(files, ucf, tmp_path, real, monkeypatch):
    """Through whatever tool is installed, and through one that stands in for it everywhere."""
    if real:
        if not (shutil.which("bsdtar") or shutil.which("unrar")):
            pytest.skip("neither unrar nor bsdtar is installed (Debian: libarchive-tools)")
        write_rar(files[0], [member(name, content) for name, content in VIDEOS.items()])
    else:
        put_bsdtar(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        stand_in_rar(files[0], VIDEOS.items())
    assert ucf("--out", tmp_path / "ucf", "--archive", files[0], "--splits", files[1])[0] == 0
    assert tree(tmp_path / "ucf") == expected(1)


def test_missing_and_extra_videos_are_reported(files, ucf, tmp_path):
    gone, other = "UCF-101/YoYo/v_YoYo_g01_c01.avi", "UCF-101/YoYo/v_YoYo_g99_c01.avi"
    videos = {name: content for name, content in VIDEOS.items() if name != gone}
    files[0].write_bytes(tar_bytes({**videos, other: b"new"}.items()))
    code, text, err = ucf("--out", tmp_path / "ucf", "--archive", files[0], "--splits", files[1])
    assert code == 0
    assert "1 videos of the lists are missing, they are left out: YoYo/v_YoYo_g01_c01.avi" in err
    assert "1 videos are in no list, they are left out: v_YoYo_g99_c01.avi" in err
    assert "11 of the 12 videos" in text
    rest = expected(1)
    del rest["test/YoYo/v_YoYo_g01_c01.avi"]
    assert tree(tmp_path / "ucf") == rest


class TestRefused:
    def test_no_listed_video(self, files, ucf, tmp_path):
        files[0].write_bytes(tar_bytes([("other.avi", b"x")]))
        refused(ucf, files, tmp_path, "none of the 36 videos that the lists name is there")

    def test_a_video_twice(self, files, ucf, tmp_path):
        twice = [*VIDEOS.items(), ("copy/v_YoYo_g01_c01.avi", b"x")]
        files[0].write_bytes(tar_bytes(twice))
        refused(ucf, files, tmp_path, "v_YoYo_g01_c01.avi is there twice")

    def test_hostile_archive(self, files, ucf, tmp_path):
        files[0].write_bytes(tar_bytes([*VIDEOS.items(), ("../evil.avi", b"x")]))
        refused(ucf, files, tmp_path, "its member '../evil.avi' leads out of its folder")
        assert list((tmp_path / "ucf-downloads").iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"trainlist01.txt": None}, "should have one trainlist01.txt, it has 0"),
            ({"testlist01.txt": ""}, "testlist01.txt is empty"),
            ({"testlist01.txt": "YoYo/v.avi\nnonsense\n"}, "testlist01.txt, line 2 is 'nonsense'"),
            ({"testlist01.txt": "../v_evil.avi\n"}, "leads out of its folder"),
            ({"testlist01.txt": "/v_evil.avi\n"}, "line 1 is '/v_evil.avi'"),
            ({"testlist01.txt": "YoYo/v_YoYo_g05_c01.avi\n"}, "in both lists of split 1"),
        ],
    )
    def test_lists(self, files, ucf, tmp_path, change, match):
        write_lists(files[1], change)
        refused(ucf, files, tmp_path, match)

    def test_lists_are_no_zip(self, files, ucf, tmp_path):
        files[1].write_bytes(b"<html>")
        refused(ucf, files, tmp_path, "splits.zip is damaged or no zip file")

    def test_no_such_archive(self, files, ucf, tmp_path):
        refused(ucf, (tmp_path / "none.rar", files[1]), tmp_path, "there is no file")

    def test_no_such_lists(self, files, ucf, tmp_path):
        refused(ucf, (files[0], tmp_path / "none.zip"), tmp_path, "none.zip")

    @pytest.mark.parametrize("what", ["another split", "empty", "no folder"])
    def test_out_is_something_else(self, files, ucf, tmp_path, what):
        out = tmp_path / "ucf"
        words = ("--archive", files[0], "--splits", files[1])
        if what == "another split":
            ucf("--out", out, *words, "--split", 2)
        elif what == "empty":
            out.mkdir()
        else:
            out.write_text("mine")
        before = tree(tmp_path)
        code, _, err = ucf("--out", out, *words)
        assert code == 2
        assert f"{out} " in err
        assert tree(tmp_path) == before

    def test_folder_that_cannot_be_made(self, files, ucf, tmp_path):
        (tmp_path / "file").write_text("x")
        code, _, err = ucf("--out", tmp_path / "file" / "ucf", "--archive", files[0])
        assert code == 2
        assert len(err.splitlines()) == 1

    def test_split(self, ucf, tmp_path):
        code, _, err = ucf("--out", tmp_path / "ucf", "--split", 4)
        assert code == 2
        assert "--split" in err


class TestBeforeAnythingIsFetched:
    @pytest.fixture(autouse=True)
    def no_request(self, monkeypatch):
        def fetching(*_, **__):
            raise AssertionError("it fetches")

        monkeypatch.setattr(ucf101, "fetch", fetching)

    def test_no_tool(self, ucf, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        code, _, err = ucf("--out", tmp_path / "ucf")
        assert code == 2
        assert err.startswith("ucf101.py: unpacking .rar needs unrar or bsdtar")
        assert len(err.splitlines()) == 1

    def test_no_space(self, ucf, tmp_path, monkeypatch):
        put_bsdtar(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        usage = shutil._ntuple_diskusage(9, 9, ucf101.SIZE)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        code, _, err = ucf("--out", tmp_path / "ucf")
        assert code == 2
        assert "needs 14.1 GB" in err
        assert "has 6.9 GB free" in err
        assert len(err.splitlines()) == 1


DRIVER = """
import os, sys, time
import recipe, ucf101
from fetch import Source

def slow(*names, link=os.link):
    time.sleep(0.01)
    link(*names)

os.link = slow
address, size = sys.argv.pop(1), int(sys.argv.pop(1))
ucf101.VIDEOS = [Source(address + "UCF101.rar", "never")]
ucf101.SIZE = size
recipe.run(ucf101.main)
"""


def far(folder):
    """How far a run has come: bytes fetched, files unpacked, videos arranged."""
    partial = folder / "ucf-downloads" / ".UCF101.rar.partial"
    with contextlib.suppress(OSError):  # what is renamed meanwhile
        return {
            "fetched": partial.stat().st_size if partial.exists() else 0,
            "unpacked": len(list(folder.glob("ucf-downloads/.*.unpacking.*/*/*/*.avi"))),
            "arranged": len(list(folder.glob(".ucf.arranging/*/*/*.avi"))),
        }
    return {"fetched": 0, "unpacked": 0, "arranged": 0}


def test_killed_at_ten_moments_and_run_again(tmp_path, files):
    """SIGKILL at random moments of each step: four of fetching, three of the other two each."""
    put_bsdtar(tmp_path)
    stand_in_rar(files[0], VIDEOS.items())
    server = Server(files[0].read_bytes())
    server.pause = 0.005
    out = tmp_path / "data" / "ucf"
    command = [sys.executable, "-c", DRIVER, server.url, str(len(server.content))]
    command += ["--out", out, "--splits", files[1]]
    environment = os.environ | {"PYTHONPATH": str(RECIPES), "NO_PROXY": "*", "PATH": str(tmp_path)}
    environment["STAND_IN_PAUSE"] = "0.005"
    draw = random.Random(5)
    moments = [
        *(("fetched", mark) for mark in sorted(draw.sample(range(1, 600_000), 4))),
        *(("unpacked", draw.randrange(1, 30)) for _ in range(3)),
        *(("arranged", draw.randrange(1, 30)) for _ in range(3)),
    ]
    try:
        for step, mark in moments:
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while far(out.parent)[step] < mark or process.poll() is not None:
                assert process.poll() is None, f"it ended before {mark} were {step}"
                time.sleep(0.001)
            process.kill()
            process.wait()
            assert not out.exists()
        subprocess.run(command, env=environment, check=True)
    finally:
        server.close()
    assert tree(out) == expected(1)
    assert sorted(path.name for path in out.parent.iterdir()) == ["ucf", "ucf-downloads"]
    assert not [path for path in out.with_name("ucf-downloads").iterdir() if path.name[0] == "."]


def test_opens_as_a_dataset(tmp_path, ucf):
    """Real videos in, clips with class labels out."""
    pytest.importorskip("av")
    import torch

    from tinyvgpt import open_dataset, video

    contents = {}
    for number, name in enumerate(VIDEOS):
        clip = torch.full((20, 48, 64, 3), number * 5, dtype=torch.uint8)
        video.write(tmp_path / "one.gif", clip, fps=25)
        contents[name] = (tmp_path / "one.gif").read_bytes()  # a decoder goes by the content
    archive, lists = tmp_path / "a.tar", write_lists(tmp_path / "splits.zip")
    archive.write_bytes(tar_bytes(contents.items()))
    assert ucf("--out", tmp_path / "ucf", "--archive", archive, "--splits", lists)[0] == 0
    data = open_dataset(f"{tmp_path / 'ucf'}/", "test", frames=16, resolution=32)
    assert list(data.label_names) == list(CLASSES)
    batch = data.batch(range(len(data)))
    assert batch["video"].shape == (12, 16, 32, 32, 3)
    assert batch["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
