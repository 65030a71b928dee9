"""The embedded robot clips: what they hold, how actions go with frames, and bad options."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tinyvgpt.data import robot_push, still_camera
from tinyvgpt.data.robot_push import FRAMES, RobotPush, load
from tinyvgpt.video import resize_crop

LIMIT = 6_000_000  # bytes


def test_the_file_is_what_its_licence_says():
    licence = robot_push.FILE.with_name("ROBOT-PUSH-LICENSE.md").read_text(encoding="utf-8")
    assert "CC0" in licence
    for source, count in (("train", 256), ("test", 32)):
        videos = load(source)
        assert f"- {source}: `{robot_push.digest(videos)}`" in licence
        assert videos.video.shape == (count, FRAMES, 64, 64, 3)
        assert videos.action.shape == (count, FRAMES, 4)
        assert videos.endeffector.shape == (count, FRAMES, 3)
        assert videos.tracks.shape == (count, FRAMES, 5, 2)
        assert videos.video.dtype == np.uint8
        assert all(array.dtype == np.float32 for array in videos[1:4])
        assert videos.colours.shape == (count, 5)
        assert videos.colours.dtype == np.int8
    assert robot_push.FILE.stat().st_size < LIMIT


def test_unpacking_is_quick_and_happens_once():
    robot_push._load.cache_clear()
    start = time.process_time()
    load("train"), load("test")
    assert time.process_time() - start < 3  # measured: 1.2, with nothing beside it
    assert load("train") is load("train")
    with pytest.raises(ValueError, match="read-only"):
        load("test").video[0] = 0


def test_other_clips_in_their_place(tmp_path, monkeypatch):
    """A file of four training videos and one test video, named by the environment variable."""
    with np.load(robot_push.FILE) as file:
        arrays = {name: file[name] for name in file if not name.endswith("colours")}
    few = {"train": 4, "test": 1}
    for source, count in few.items():
        videos = load(source)
        arrays |= {
            f"{source}_{name}": array
            for name, array in still_camera.pack(videos.video[:count]).items()
        }
        arrays |= {
            f"{source}_{name}": getattr(videos, name)[:count]
            for name in ("action", "endeffector", "tracks")
        }
    np.savez(tmp_path / "few.npz", **arrays)
    monkeypatch.setenv("TINYVGPT_ROBOT_PUSH", str(tmp_path / "few.npz"))
    assert [len(RobotPush(split, frames=30)) for split in ("train", "val", "test")] == [3, 1, 1]
    for source, count in few.items():
        assert np.array_equal(load(source).video, load(source, robot_push.FILE).video[:count])
    with pytest.raises(ValueError, match="the robot clips have no colours: data_recipes/robot_p"):
        RobotPush("test").colours([0])  # an older file


@pytest.mark.parametrize("content", [None, b"", b"no zip", "other arrays", "array", "damaged"])
def test_a_file_that_is_no_such_file(content, tmp_path, monkeypatch):
    path = tmp_path / "clips.npz"
    if content == "other arrays":
        np.savez(path, train_action=np.zeros(3))
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "damaged":
        damaged = bytearray(robot_push.FILE.read_bytes())
        start = damaged.index(b"test_change.npy") + 20
        damaged[start : start + 40] = bytes(40)
        path.write_bytes(damaged)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("TINYVGPT_ROBOT_PUSH", str(path))
    with pytest.raises(ValueError, match=r"clips.npz has no robot clips of 'test' that can be"):
        RobotPush("test")


def test_it_needs_no_more_than_numpy_and_torch():
    code = """
import sys
for name in ("av", "h5py", "PIL", "mujoco", "tyro", "google_crc32c"):
    sys.modules[name] = None
from tinyvgpt.data.robot_push import RobotPush
print(RobotPush("test").batch([0, 31])["video"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([2, 16, 64, 64, 3])", done.stderr


def test_batches_are_windows_on_the_videos():
    data = RobotPush("train", frames=16)
    rows = [row for row in range(256) if row % 10 != 9]
    assert len(data) == 15 * len(rows)
    assert (data.channels, data.label_names) == (3, None)
    batch = data.batch(torch.tensor([0, 16, len(data) - 1]))
    videos = load("train")
    for place, (row, start) in enumerate(((0, 0), (1, 1), (rows[-1], 14))):
        window = slice(start, start + 16)
        assert np.array_equal(batch["video"][place], videos.video[row, window])
        assert np.array_equal(batch["action"][place], videos.action[row, window])
        where = data.endeffector([[0, 16, len(data) - 1][place]])
        assert np.array_equal(where[0], videos.endeffector[row, window])
    assert batch["video"].dtype == torch.uint8
    assert batch["action"].dtype == torch.float32
    assert len(RobotPush("test")) == 32
    assert len(RobotPush("test", frames=10)) == 96
    assert len(RobotPush("test", frames=30)) == 32
    assert len(RobotPush("test", stride=7)) == 96


def test_validation_holds_out_a_tenth_of_the_training_videos():
    first = {
        split: {clip.tobytes() for clip in RobotPush(split, frames=1, stride=30).batch(
            np.arange(count))["video"].numpy()}
        for split, count in (("train", 231), ("val", 25), ("test", 32))
    }  # fmt: skip
    assert [len(clips) for clips in first.values()] == [231, 25, 32]
    assert len(first["train"] | first["val"] | first["test"]) == 288
    assert len(RobotPush("val")) == 25


def test_other_resolutions_are_resized():
    small = RobotPush("test", resolution=32).batch([3])["video"]
    assert small.shape == (1, 16, 32, 32, 3)
    assert torch.equal(small, resize_crop(RobotPush("test").batch([3])["video"], 32))


@pytest.mark.parametrize("axis", range(3))
def test_an_action_moves_its_frame_to_the_next(axis):
    videos = load("train")
    action = videos.action[:, 1:-2, axis].ravel()
    moves = np.diff(videos.endeffector[..., axis])  # (N, 29): frame t to t + 1
    for shift, least, most in ((0, 0.95, 1), (-1, -1, 0.9), (1, -1, 0.9)):
        moved = moves[:, 1 + shift : 28 + shift].ravel()
        assert least < np.corrcoef(action, moved)[0, 1] < most
    exact = np.abs(action - moves[:, 1:28].ravel())
    assert np.median(exact) < 0.002  # metres


def test_objects_move_in_most_clips():
    for source in ("train", "test"):
        tracks = load(source).tracks
        far = np.nanmax(np.linalg.norm(tracks - tracks[:, :1], axis=-1), axis=(1, 2))
        assert (far >= 4).mean() > 0.6


def test_the_picture_shows_the_objects_where_the_tracks_say():
    """A moved object's colour is found at its new place, and mostly no longer at the old one."""
    videos = load("train")
    start, end = videos.tracks[:, 0], videos.tracks[:, -1]
    clip, thing = np.nonzero(np.linalg.norm(end - start, axis=-1) > 8)
    assert len(clip) > 100
    places = {"old": start[clip, thing], "new": end[clip, thing]}
    columns, rows = {}, {}
    for name, place in places.items():
        columns[name], rows[name] = np.clip(place, 0, 63).astype(int).T
    colour = videos.video[clip, 0, rows["old"], columns["old"]].astype(int)
    off = {
        name: np.abs(videos.video[clip, -1, rows[name], columns[name]].astype(int) - colour).sum(-1)
        for name in places
    }
    assert np.median(off["new"]) < 0.4 * np.median(off["old"])


def test_objects_have_the_colours_that_are_said():
    """Where an object's middle is, its colour's direction is mostly the nearest: 92 % when made."""
    colours = {  # as data_recipes/push_world.py has them
        "red": (0.86, 0.13, 0.13), "orange": (0.98, 0.52, 0.08), "yellow": (0.98, 0.85, 0.15),
        "green": (0.15, 0.62, 0.22), "blue": (0.12, 0.32, 0.85), "purple": (0.52, 0.20, 0.68),
        "white": (0.95, 0.95, 0.93),
    }  # fmt: skip
    assert tuple(colours) == robot_push.COLOURS
    table = np.array(list(colours.values()))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    data = RobotPush("test", frames=30)
    batch, named = data.batch(range(32))["video"].numpy(), data.colours(range(32))
    tracks = data.tracks(range(32))
    there = torch.isfinite(tracks[:, 0, :, 0])
    assert torch.equal(there, named >= 0)
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in named)
    clip, thing = np.nonzero(there.numpy())
    columns, rows = np.clip(tracks[clip, :, thing].numpy(), 0, 63).astype(int).transpose(2, 0, 1)
    seen = batch[clip[:, None], np.arange(30), rows, columns].astype(float)  # (…, T, 3)
    seen /= np.linalg.norm(seen, axis=-1, keepdims=True)
    right = (seen @ table.T).argmax(-1) == named[clip, thing].numpy()[:, None]
    assert right.mean() > 0.85


def test_the_camera_sees_the_fingertips():
    """The hand, grey and black, is above them in the picture. Tracks in small ones are scaled."""
    data = RobotPush("test", frames=30)
    tips = robot_push.in_picture(data.endeffector(range(32)))
    assert tips.shape == (32, 30, 2)
    video = data.batch(range(32))["video"].numpy()
    place = tips.round().long().clamp(0, 63)
    dark = video[np.arange(32)[:, None], np.arange(30), place[..., 1] - 8, place[..., 0]].max(-1)
    assert (dark < 130).mean() > 0.9
    half = RobotPush("test", frames=30, resolution=32).tracks([0])
    assert torch.allclose(2 * half, data.tracks([0]), equal_nan=True)


BAD = {
    "split": ({"split": "trian"}, "split is 'trian'"),
    "long": ({"frames": 31}, "frames is 31, robot-push has 1 … 30"),
    "short": ({"frames": 0}, "frames is 0, robot-push has 1 … 30"),
    "resolution": ({"resolution": 0}, "resolution is 0, it must be at least 1"),
    "stride": ({"stride": 0}, "stride is 0, it must be at least 1"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_options_are_refused(fault):
    options, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        RobotPush(**options)


def test_indices_beyond_the_data():
    with pytest.raises(IndexError, match="no clip 32, there are 32"):
        RobotPush("test").batch([32])
    with pytest.raises(ValueError, match="list of integers"):
        RobotPush("test").endeffector([0.5])
