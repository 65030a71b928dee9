"""The robot simulator: physics, pixels, files like BAIR's, kills, and a machine without OpenGL."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import gl_backend
import numpy as np
import pytest
import robot_push
import robot_push_subset
import torch
from tfrecords import decode_example, read_records

from tinyvgpt.data import HDF5Clips, batches
from tinyvgpt.data import robot_push as embedded

SCRIPT = Path(robot_push.__file__)
CLIPS = ("--train", "9", "--test", "1", "--seed", "7")  # in three files
ENVIRONMENT = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS")


@pytest.fixture(scope="module")
def backend():
    """An OpenGL to render with, chosen before this process imports mujoco."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    try:
        yield gl_backend.choose()[0]
    except (OSError, ImportError) as error:
        pytest.skip(str(error))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def start(out, *more, **environment):
    """Starts the recipe as from a shell, whatever back end this process has chosen."""
    outside = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--out", out, *more],
        env={**outside, **environment},
        start_new_session=True,  # a process group of its own, as of a terminal's command
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(backend, tmp_path_factory):
    """A folder that the recipe wrote with two workers, and what it said."""
    out = tmp_path_factory.mktemp("made") / "clips"
    process = start(out, *CLIPS, "--workers", "2", "--gl", backend)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return out, said


@pytest.mark.parametrize("camera", ["image_aux1", "image_main"])
def test_what_is_rendered_comes_out_of_batches(made, camera, tmp_path):
    """Simulator → TFRecords → bair.py → HDF5 → batches: the same pixels and actions."""
    file = tmp_path / "push.h5"
    recipe = [sys.executable, SCRIPT.with_name("bair.py")]
    words = ["--files", made[0], "--camera", camera, "--out", file]
    subprocess.run([*recipe, *words], check=True, capture_output=True)
    train, test = (HDF5Clips(str(file), split, frames=30, stride=1) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 1)  # the last of nine is held out
    for data, split, index in ((train, "train", 0), (train, "train", 7), (test, "test", 0)):
        clip = robot_push.simulate(7, split, index)
        batch = data.batch([index])
        assert np.array_equal(batch["video"][0].numpy(), clip.images[camera.removeprefix("image_")])
        assert np.array_equal(batch["action"][0].numpy(), clip.actions)
    seen = [next(batches(train, 8, workers=workers)) for workers in (0, 2)]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_files_are_as_bairs(made):
    out, said = made
    assert sorted(contents(out)) == [
        "robot_push.json",
        "softmotion30_44k/test/traj_0_to_0.tfrecords",
        "softmotion30_44k/train/traj_0_to_7.tfrecords",
        "softmotion30_44k/train/traj_8_to_8.tfrecords",
        "tracks/test/traj_0_to_0.npy",
        "tracks/train/traj_0_to_7.npy",
        "tracks/train/traj_8_to_8.npy",
    ]
    with open(out / "softmotion30_44k/train/traj_8_to_8.tfrecords", "rb") as file:
        examples = [decode_example(record) for _, record in read_records(file, "it")]
    assert len(examples) == 1
    for example in examples:
        assert len(example) == 30 * 4
        for frame in range(30):
            for camera in ("main", "aux1"):
                assert len(example[f"{frame}/image_{camera}/encoded"]) == 64 * 64 * 3
            assert example[f"{frame}/action"].shape == (4,)
            assert example[f"{frame}/endeffector_pos"].shape == (3,)
            assert example[f"{frame}/action"].dtype == np.float32
    assert said.startswith("rendering with ")
    assert "10 clips made, 0 were there" in said


def test_a_clip_depends_on_its_seed_split_and_index_alone(made):
    """Here in this process, the last one first, as two workers made it with all the others."""
    written = []
    for part in (robot_push.Part("train", 8, 8), robot_push.Part("train", 0, 7)):
        with open(part.paths(made[0])[0], "rb") as file:
            written.append(next(record for _, record in read_records(file, "it")))
    assert [robot_push.make(7, ("train", index))[0] for index in (8, 0)] == written
    actions = [
        next(robot_push.play(*place))[1].tobytes()
        for place in ((7, "train", 0), (8, "train", 0), (7, "test", 0), (7, "train", 1))
    ]
    assert len(set(actions)) == 4


def kill_and_finish(made, backend, tmp_path, times):
    """Runs the recipe with one worker, killing it `times` times; then to its end."""
    out = tmp_path / "killed"
    for _ in range(times):
        process = start(out, *CLIPS, "--workers", "1", "--gl", backend)
        time.sleep(random.uniform(2, 7))
        process.kill()
        process.communicate()
    process = start(out, *CLIPS, "--workers", "1", "--gl", backend)
    assert process.communicate()[0].count(" moves by 4 pixels") == 2
    assert process.returncode == 0
    assert contents(out) == contents(made[0])


def test_killed_it_ends_with_the_same_files(made, backend, tmp_path):
    kill_and_finish(made, backend, tmp_path, 1)


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_files(made, backend, tmp_path):
    kill_and_finish(made, backend, tmp_path, 10)


def children(process, count):
    """The processes that it has started, once there are so many."""
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listing.exists():
        pytest.skip("children are found in Linux's /proc")
    deadline = time.time() + 60
    while len(found := listing.read_text().split()) < count and time.time() < deadline:
        time.sleep(0.01)
    assert len(found) == count
    return [int(pid) for pid in found]


WORKERS_AND_TRACKER = 3  # two workers, and multiprocessing's resource tracker


def test_ctrl_c_while_workers_start_says_nothing(backend, tmp_path):
    """A terminal's Ctrl-C reaches all processes, those too that are importing still."""
    process = start(tmp_path / "out", *CLIPS, "--workers", "2", "--gl", backend)
    children(process, WORKERS_AND_TRACKER)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_killed_run_leaves_no_workers(backend, tmp_path):
    process = start(tmp_path / "out", *CLIPS, "--workers", "2", "--gl", backend)
    workers = children(process, WORKERS_AND_TRACKER)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_full_disk_stops_it_and_leaves_no_half_file(backend, tmp_path, file_limit):
    with file_limit(500_000), pytest.raises(OSError, match="too large"):
        robot_push.generate(tmp_path, 7, {"train": 1}, 1)
    assert not [path for path in contents(tmp_path) if "tfrecords" in path]


def test_a_worker_that_dies_is_one_error(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(robot_push, "make", die)
    with pytest.raises(OSError, match="a worker was killed"):
        robot_push.generate(tmp_path, 7, {"train": 1}, 1)


def die(seed, place):
    """A worker's task that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_damaged_files_are_made_again(made, tmp_path):
    part = robot_push.Part("train", 0, 7)
    for place, damage in (
        (0, lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]),
        (0, lambda content: content[: len(content) // 2]),  # ends between records, or inside one
        (0, lambda content: content[:-1]),
        (0, lambda content: b""),
        (1, lambda content: content[:-1]),
        (1, lambda content: b""),
    ):
        out = tmp_path / "copy"
        shutil.copytree(made[0], out, dirs_exist_ok=True)
        assert robot_push.finished(part, out)
        path = part.paths(out)[place]
        path.write_bytes(damage(path.read_bytes()))
        assert not robot_push.finished(part, out)
        path.unlink()
        assert not robot_push.finished(part, out)


def test_another_run_is_not_mixed_in(made):
    out, _ = made
    process = start(out, "--train", "9", "--test", "1", "--seed", "8")
    errors = process.communicate()[1]
    assert process.returncode == 2
    assert errors.startswith(f"robot_push.py: {out} has clips of another run: seed was 7, now it")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "-1"), "--train is -1, it must be at least 0"),
        (("--workers", "0"), "--workers is 0, it must be at least 1"),
        (("--seed", str(2**64)), "fits in 64 bits"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["it", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(ValueError, match=message):
        robot_push.main()
    assert not (tmp_path / "out").exists()


def test_a_machine_without_opengl_is_told_what_to_install(tmp_path):
    """Stands in for one: a mujoco that finds neither library, as the real one says it."""
    (tmp_path / "mujoco.py").write_text("raise AttributeError(\"'NoneType': 'glGetError'\")")
    process = start(tmp_path / "out", *CLIPS, PYTHONPATH=str(tmp_path))
    errors = process.communicate()[1]
    assert process.returncode == 2
    assert errors == (
        "robot_push.py: there is no OpenGL to render with, neither egl nor osmesa works here; "
        "on Debian or Ubuntu: apt-get install libosmesa6, or libegl1 libopengl0 libgl1-mesa-dri\n"
    )
    assert not (tmp_path / "out").exists()


def test_the_hand_goes_where_it_is_told(backend):
    import mujoco
    from push_policy import LOWER, UPPER
    from push_world import joint_angles, world_xml

    model = mujoco.MjModel.from_xml_string(world_xml([]))
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    corners = [np.where(rng.random(3) < 0.5, LOWER, UPPER) for _ in range(20)]
    for tip in (*rng.uniform(LOWER, UPPER, (30, 3)), *corners):
        turn = rng.uniform(-1.5, 1.5)
        data.qpos[:] = joint_angles(tip, turn)
        mujoco.mj_forward(model, data)
        site = data.site("tip")
        assert np.allclose(site.xpos, tip, atol=1e-9)
        upright = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
        assert np.allclose(site.xmat.reshape(3, 3), upright, atol=1e-9)


def test_forty_clips_obey_physics_and_objects_move(backend):
    """Objects stay in the tray, the arm out of it, and no thing sinks into another."""
    from push_world import TRAY

    far, actions, moves = [], [], []
    for index in range(40):
        pixels, tips, orders = [], [], []
        for world, action in robot_push.play(0, "train", index):
            middles = world.middles()
            assert np.all(np.abs(middles[:, :2]) < TRAY)
            assert np.all(middles[:, 2] > 0.015)
            assert min((contact.dist for contact in world.data.contact), default=0) > -0.02
            assert world.tip()[2] > 0
            if len(tips) % 6 == 0:
                assert clearance(world) > 0
            pixels.append(world.pixels("aux1"))
            tips.append(world.tip())
            orders.append(action)
        far.append(np.linalg.norm(np.array(pixels) - pixels[0], axis=-1).max())
        actions.append(np.array(orders)[1:-1, :3])
        moves.append(np.diff(tips, axis=0)[1:])
    assert np.mean(np.array(far) >= robot_push.MOVED) > 0.8
    for axis in range(3):
        pair = (np.concatenate(list(rows))[:, axis] for rows in (actions, moves))
        assert np.corrcoef(*pair)[0, 1] > 0.93


def clearance(world):
    """Metres between the moving arm and the tray's floor and rim, where they are nearest."""
    import mujoco

    model = world.model
    body, seen = model.geom_bodyid, model.geom_group < 3
    tray = np.flatnonzero((body == 0) & seen & (model.geom_contype == 1))
    arm = np.flatnonzero((body > 0) & (body < min(world.objects)))
    assert (len(tray), len(arm)) == (5, 9)
    return min(
        mujoco.mj_geomDistance(model, world.data, one, other, 0.1, None)
        for one in arm
        for other in tray
    )


def test_objects_start_apart_and_in_colours_of_their_own():
    from push_policy import scatter

    for seed in range(50):
        things = scatter(np.random.default_rng(seed))
        assert 3 <= len(things) <= 5
        assert len({thing.colour for thing in things}) == len(things)
        for one, other in combinations(things, 2):
            gap = np.hypot(*np.subtract(one.position, other.position))
            assert gap > one.radius + other.radius


def test_pixels_show_objects_where_they_are_said_to_be(backend):
    from push_view import CAMERAS
    from push_world import Thing, World

    ball = Thing("sphere", "red", (0.03,), (0.11, -0.12), 0.0)
    world = World([ball], np.array([-0.1, 0.15, 0.1]), 0.0)
    robot_push.eyes().open(world)
    for camera in CAMERAS:
        seen = robot_push.eyes().see(camera)
        assert np.array_equal(seen, robot_push.eyes().see(camera))
        red = (seen[..., 0] > 2.0 * seen[..., 1]) & (seen[..., 0] > 2.0 * seen[..., 2])
        rows, columns = np.nonzero(red)
        assert 10 < len(rows) < 60
        middle = np.array([columns.mean(), rows.mean()]) + 0.5
        assert np.linalg.norm(middle - world.pixels(camera)[0]) < 1


def test_a_smaller_picture_holds_rounded_means():
    from push_view import FINE, smaller

    picture = np.zeros((FINE, FINE, 3), np.uint8)
    picture[:4, 4:8, 1] = 255
    picture[:4, 4:6, 2] = 3
    small = smaller(picture)
    assert small[0, 1].tolist() == [0, 255, 2]
    assert small.sum() == 257


def test_the_subset_is_what_the_records_hold(made, tmp_path, monkeypatch, capsys):
    file = tmp_path / "subset.npz"
    monkeypatch.setattr(sys, "argv", ["it", "--clips", str(made[0]), "--out", str(file)])
    robot_push_subset.main()
    said = capsys.readouterr().out
    for split, count in (("train", 9), ("test", 1)):
        packed = embedded.load(split, file)
        assert len(packed.video) == count
        assert f"{split}: arrays' sha256 {embedded.digest(packed)}" in said
        clip = robot_push.simulate(7, split, count - 1)
        assert np.array_equal(packed.video[-1], clip.images["aux1"])
        assert np.array_equal(packed.action[-1], clip.actions)
        assert np.array_equal(packed.endeffector[-1], clip.endeffector)
        assert np.array_equal(packed.tracks[-1], clip.tracks, equal_nan=True)
        names = [thing.colour for thing in robot_push.begun(7, split, count - 1)[1]]
        assert [embedded.COLOURS[i] for i in packed.colours[-1] if i >= 0] == names


def test_the_subset_needs_all_clips(made, tmp_path):
    with pytest.raises(ValueError, match="train has no clips, or not all"):
        robot_push_subset.read_split(tmp_path, "train")
    shutil.copytree(made[0], tmp_path / "copy")
    (tmp_path / "copy/softmotion30_44k/train/traj_0_to_7.tfrecords").unlink()
    with pytest.raises(ValueError, match="train has no clips, or not all"):
        robot_push_subset.read_split(tmp_path / "copy", "train")
