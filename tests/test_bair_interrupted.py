"""BAIR's recipe interrupted: killed at any point, a full disk, inputs that changed since."""

import os
import random
import re
import signal
import time

import bair
import bair_files
import filling
import numpy as np
import pytest
from bair_clips import (
    Killed,
    assert_same,
    contents,
    dying_after,
    expected,
    make_clip,
    make_folder,
    start,
    steps_done,
    write_clips,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bair")
    return folder, make_folder(folder)


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
    for _ in range(5):  # on a busy machine it may be done before the signal comes
        (tmp_path / "whole.h5").unlink(missing_ok=True)
        process = start(*arguments)
        while process.poll() is None and not steps_done(tmp_path):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        if process.returncode:
            break
    assert process.returncode == 130
    assert "Traceback" not in errors
    output, _ = start(*arguments).communicate()
    assert re.search(r"\(\d+ clips were there\)", output)
    assert (tmp_path / "whole.h5").read_bytes() == whole.read_bytes()


def test_inputs_that_changed_start_afresh(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(9)
    path, out = tmp_path / "train" / "a.tfrecords", tmp_path / "bair.h5"
    monkeypatch.setattr(bair, "CLIPS_A_STEP", 1)
    write_clips(path, [make_clip(1, generator) for _ in range(5)])
    with dying_after(16), pytest.raises(Killed):
        bair.convert([path], out, "image_aux1")
    assert steps_done(tmp_path) > 0
    written = path.stat().st_mtime_ns
    clips = [make_clip(1, generator) for _ in range(5)]
    write_clips(path, clips)
    os.utime(path, ns=(written, written))
    bair.convert([path], out, "image_aux1")
    assert_same(contents(out), expected({"train": clips}, "image_aux1"))
    assert "is left of a run with other inputs or another camera" in capsys.readouterr().err


def test_steps_without_their_file_count_for_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(bair, "CLIPS_A_STEP", 1)
    folder, clips = made
    out = tmp_path / "bair.h5"
    with dying_after(16), pytest.raises(Killed):
        bair.convert([folder], out, "image_aux1")
    assert steps_done(tmp_path) > 0
    (unfinished,) = tmp_path.glob(".*.partial")
    unfinished.unlink()
    bair.convert([folder], out, "image_aux1")
    assert_same(contents(out), expected(clips, "image_aux1"))


def test_two_processes_at_one_file(made, tmp_path):
    clips = bair.list_clips(bair_files.find([made[0]]), "image_aux1")
    about = bair.attributes(clips, made[0].name, "image_aux1")
    other = filling.Filling(tmp_path / "bair.h5", bair.key_of(about), {}, {}, {})
    with other, pytest.raises(OSError, match=r"bair\.h5 is being written by another process"):
        bair.convert([made[0]], tmp_path / "bair.h5", "image_aux1")
