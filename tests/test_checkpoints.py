"""Checkpoints: what is kept, what damage is noticed, what a kill or a full disk leaves."""

import errno
import os
import random
import re
import signal
import time
import warnings
import zipfile
from collections import OrderedDict
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from tinyvgpt import checkpoints as module
from tinyvgpt.checkpoints import Checkpoints, DamagedError, read_verified


def content(step, size=6):
    state = OrderedDict(a=torch.full((size, 3), float(step)), b=torch.tensor(step).bfloat16())
    betas = (0.9, 0.999)
    return {"module": state, "optimizer": {"groups": [{"betas": betas, "lr": 0.1}]}, "ema": None}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def whole(loaded, step):
    """Whether what `load` returned is the checkpoint of a step."""
    path, found = loaded
    return path.name == f"checkpoint-{step:07d}.pt" and same(
        found, {**content(step, len(found["module"]["a"])), "step": step}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, offset, mask=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 10, 20 and 30."""
    run = Checkpoints(tmp_path, 3)
    for step in (10, 20, 30):
        run.save(step, content(step))
    return run


# Saving and loading -------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
def test_comes_back(run):
    assert whole(run.load(("module", "optimizer", "ema")), 30)
    assert run.newest() == run.folder / "checkpoint-0000030.pt"
    assert torch.load(run.newest(), weights_only=True)["step"] == 30
    with zipfile.ZipFile(run.newest()) as archive:  # any tool for zip archives can read it
        assert archive.testzip() is None
        assert re.fullmatch(b"crc32 [0-9a-f]{8}", archive.comment)


def test_none_yet(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert Checkpoints(folder, 1).load() is None
        assert Checkpoints(folder, 1).newest() is None


def test_the_last_are_kept(tmp_path):
    run = Checkpoints(tmp_path, 2)
    for step in (8, 9, 10, 9_999_999, 10_000_000):
        assert run.save(step, content(step)) == run.newest()
        assert whole(run.load(), step)
    assert names(tmp_path) == ["checkpoint-10000000.pt", "checkpoint-9999999.pt"]
    run.save(10_000_000, content(10_000_000))  # again: replaced, not counted twice
    assert len(names(tmp_path)) == 2


def test_never_removes_what_it_just_saved(run):
    """Nor newer ones, in a folder where another run goes on."""
    Checkpoints(run.folder, 1).save(15, content(15))
    assert names(run.folder) == [f"checkpoint-00000{step}.pt" for step in (15, 20, 30)]


def test_leaves_other_files_alone(run):
    others = ["checkpoint-12.pt", "checkpoint-0000005.pt.bak", "config.json", ".log.jsonl.1-ab.tmp"]
    for name in others:
        (run.folder / name).touch()
    run.save(40, content(40))
    assert whole(run.load(), 40)
    assert set(others) < set(names(run.folder))


@pytest.mark.gpu
def test_saved_on_a_gpu(tmp_path):
    on_gpu = {"a": torch.arange(5, device="cuda")}
    Checkpoints(tmp_path, 1).save(1, on_gpu)
    assert same(Checkpoints(tmp_path, 1).load()[1], {"a": torch.arange(5), "step": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr": np.float64(1)}, r"content\['lr'\] is a numpy.float64"),
        ({"a": [1, (2, {3})]}, r"content\['a'\]\[1\]\[1\] is a builtins.set"),
        ({"a": {b"k": 1}}, r"a key of content\['a'\] is a builtins.bytes"),
    ],
)
def test_refuses_what_could_not_be_loaded(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path, 1).save(1, value)
    assert not names(tmp_path)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"^0 checkpoints are to be kept, must be at least 1$"):
        Checkpoints(tmp_path, 0)


# Damage -------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_noticed(run):
    """Also those of the archive's directory: torch.load may make other tensors of them."""
    path = run.newest()
    before = path.read_bytes()
    for offset in range(len(before)):
        flip(path, offset, random.Random(offset).randrange(1, 256))
        with pytest.raises(DamagedError):
            read_verified(path)
        path.write_bytes(before)
    assert read_verified(path)["step"] == 30


def test_torch_load_alone_does_not_notice(run):
    """What the checksum is for: as soon as torch.load verifies the file, it can go."""
    path = run.newest()
    flip(path, path.read_bytes().index(torch.full((6,), 30.0).numpy().tobytes()))
    assert not same(torch.load(path)["module"]["a"], content(30)["module"]["a"])


def test_cut_short_anywhere(run):
    path = run.newest()
    data = path.read_bytes()
    for size in [*range(0, len(data), 7), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(DamagedError, match="cut short"):
            read_verified(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DamagedError, match="cut short"):
        read_verified(path)


def replaced(what):
    """Return a function that puts something else in a checkpoint's place."""

    def other(path):
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif what == "older":
            path.write_bytes(path.with_name("checkpoint-0000020.pt").read_bytes())
        else:
            module._write(what, path)

    return other


DAMAGE = [
    (replaced(b""), "cut short, or another kind of file"),
    (replaced(b"\x00" * 5000), "cut short, or another kind of file"),
    (replaced(b"PK crc32 00000000"), "its checksum is another"),
    (replaced(b"{}crc32 " + b"%08x" % 0xA3F96A3B), "its checksum is another"),
    (replaced("older"), "of step 20"),
    (replaced([1, 2]), "holds a list, not a dict"),
    (replaced({"module": 1, "optimizer": 1}), "without step"),
    (replaced({"step": 30}), "without module, optimizer"),
    (replaced({"step": np.int64(30)}), "not a checkpoint, UnpicklingError"),
    (lambda path: torch.save({"step": 30}, path), "cut short, or another kind of file"),
    (lambda path: flip(path, 700), "its checksum is another"),
]


@pytest.mark.parametrize(("damage", "wrong"), DAMAGE)
def test_falls_back(run, damage, wrong):
    newest = run.newest()
    damage(newest)
    data = newest.read_bytes()
    message = (
        f"^{newest} is damaged \\({wrong}\\): going on from checkpoint-0000020.pt; it is kept as"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        assert whole(run.load(("module", "optimizer")), 20)
    assert len(warned) == 1
    assert run.newest().name == "checkpoint-0000020.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole(run.load(("module", "optimizer")), 20), "and stays there, without a word"
    assert newest.with_name("checkpoint-0000030.pt.damaged").read_bytes() == data


def test_damaged_ones_stay_until_their_step_is_reached(run):
    """They don't count among those that are kept."""
    for step in (20, 30):
        flip(run.folder / f"checkpoint-00000{step}.pt", -1)
    with pytest.warns(UserWarning, match="going on from checkpoint-0000010.pt") as warned:
        run.load()
    assert len(warned) == 2
    kept = {step: f"checkpoint-00000{step}.pt" for step in (10, 15, 20, 25, 30)}
    damaged = {step: f"checkpoint-00000{step}.pt.damaged" for step in (20, 30)}
    run.save(15, content(15))
    assert names(run.folder) == [kept[10], kept[15], damaged[20], damaged[30]]
    run.save(20, content(20))
    assert names(run.folder) == [kept[10], kept[15], kept[20], damaged[30]]
    run.save(25, content(25))
    run.save(30, content(30))
    assert names(run.folder) == [kept[20], kept[25], kept[30]]


def test_all_damaged(run):
    """Nothing is renamed: the next start must not take the folder for a fresh one."""
    before = names(run.folder)
    for name in before:
        flip(run.folder / name, 100)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"damaged; remove them to start again: checkpoint-0000030.pt: its checksum",
        ):
            run.load()
    assert names(run.folder) == before


def test_too_little_memory_is_not_damage(run, monkeypatch):
    def full(*_, **__):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        run.load()
    assert len(names(run.folder)) == 3


@pytest.mark.parametrize(("code", "damage"), [(errno.EIO, True), (errno.ESTALE, False)])
def test_errors_of_reading(run, monkeypatch, code, damage):
    """A bad place on the disk is damage; a server that doesn't answer is not."""
    checksum, newest = module._checksum, run.newest()

    def failing(file, size):
        if file.name == str(newest):
            raise OSError(code, os.strerror(code))
        return checksum(file, size)

    monkeypatch.setattr(module, "_checksum", failing)
    if damage:
        with pytest.warns(UserWarning, match="unreadable in places"):
            assert whole(run.load(), 20)
    else:
        with pytest.raises(OSError, match=r"[Ss]tale"):
            run.load()
        assert run.newest() == newest


def test_set_aside_by_another_process_meanwhile(run, monkeypatch):
    """Several ranks load at once: one finds the damaged file gone that it was about to read."""
    flip(run.newest(), 100)
    files = [list(run._files(pattern)) for pattern in (module.LEFT_OVER, module.NAME)]
    with pytest.warns(UserWarning, match="damaged"):
        run.load()
    monkeypatch.setattr(run, "_files", lambda pattern: files.pop(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole(run.load(), 20)


# Full disks, missing and read-only folders --------------------------------------------------------


def test_full_disk(run, file_limit):
    before = {name: (run.folder / name).read_bytes() for name in names(run.folder)}
    size = len(before["checkpoint-0000030.pt"])
    for limit in (0, size // 2, size - 1):
        message = r"^\S*checkpoint-0000040.pt could not be written: .+"
        with file_limit(limit), pytest.raises(OSError, match=message) as error:
            run.save(40, content(40))
        assert "\n" not in str(error.value)
        assert {name: (run.folder / name).read_bytes() for name in names(run.folder)} == before


def test_missing_folder(tmp_path):
    message = "checkpoint-0000001.pt could not be written: No such file or directory$"
    with pytest.raises(OSError, match=message):
        Checkpoints(tmp_path / "missing", 1).save(1, content(1))


def test_read_only_folder(run, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    before = names(run.folder)
    if os.name == "posix" and os.geteuid():
        run.folder.chmod(0o500)
    else:  # root may write anywhere
        monkeypatch.setattr("os.replace", refused)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-0000040.pt could not be written: Permission"
        ):
            run.save(40, content(40))
        assert names(run.folder) == before
        assert whole(run.load(), 30)
    finally:
        run.folder.chmod(0o700)


# Killed -------------------------------------------------------------------------------------------


def test_left_overs_are_removed(run):
    left = [
        ".checkpoint-0000040.pt.4242-0123abcd.tmp",
        ".checkpoint-0000030.pt.4242-0123abcd.old",
        ".checkpoint.pt.4242-0123abcd.tmp",
    ]
    for name in left:
        (run.folder / name).write_bytes(b"half")
    assert whole(run.load(), 30)
    assert not set(left) & set(names(run.folder))


def saves(folder, start, pipe):
    """A process that saves step after step, and says after each that it is done."""
    torch.set_num_threads(1)  # other threads don't survive a fork: waiting for them never ends
    for step in range(start + 1, 100_000):
        Checkpoints(folder, 2).save(step, content(step, 200_000))  # 2.4 MB
        os.write(pipe, step.to_bytes(4, "little"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_saving(tmp_path):
    run, last, cut = Checkpoints(tmp_path, 2), 0, 0
    chance = random.Random(7)
    for _ in range(10):
        reading, writing = os.pipe()
        child = get_context("fork").Process(target=saves, args=(tmp_path, last, writing))
        child.start()
        os.close(writing)
        with os.fdopen(reading, "rb") as told:
            told.read(4)
            time.sleep(chance.uniform(0, 0.1))
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            said = int.from_bytes(told.read()[-4:] or last.to_bytes(4, "little"), "little")
        cut += any(name.startswith(".") for name in names(tmp_path))
        path, found = run.load()
        step = found["step"]
        assert step in (max(said, last + 1), max(said, last + 1) + 1)
        assert whole((path, found), step)
        assert len(names(tmp_path)) <= 3
        last = step
    assert cut, "no kill hit a process while it was writing"
