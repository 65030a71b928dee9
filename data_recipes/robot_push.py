"""A robot arm that pushes objects about: clips like BAIR's, made here by simulation.

    python data_recipes/robot_push.py --out robot_push --train 192 --test 32 --seed 0

writes TFRecord files with BAIR's names, keys and types (robot_push/softmotion30_44k/{train,test}/
traj_A_to_B.tfrecords), which bair.py reads like BAIR's own. Of each of a clip's 30 frames i:

    {i}/image_main/encoded, {i}/image_aux1/encoded    RGB bytes, 64 × 64 × 3
    {i}/action            4 floats: what is commanded between frames i and i + 1: the fingertips'
                          displacement along x (towards the camera), y (to the right) and z (up)
                          in metres, and the hand's turn about its own axis in radians
    {i}/endeffector_pos   3 floats: where the fingertips are in frame i, in metres from the middle
                          of the tray's floor

The hand does what is commanded to a millimetre or so, unless an object that can't move stops it.
The last frame's action is one that was decided on and led to no frame any more.

Clip i of a split is a pure function of seed, split and i, for one version of MuJoCo and one
renderer. So a run that was interrupted goes on where it was, and gives the same files, whatever
the number of workers. Beside the records lie robot_push/robot_push.json, which tells one run's
files from another's, and robot_push/tracks, where image_aux1 shows the objects' middles: from these
the script says at the end in how many clips an object moved by 4 pixels or more.

Shapes: T = 30 frames · n = 5 objects at most.
"""

import argparse
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gl_backend
import numpy as np
from recipe import replacing, run
from tfrecords import encode_example, read_records, write_records
from tqdm import tqdm

from tinyvgpt import counter

if TYPE_CHECKING:
    from push_view import Eyes
    from push_world import Thing, World

FRAMES = 30
CLIPS_A_FILE = 8  # an interrupted run makes as many again, at most
SPLITS = ("train", "test")
MOVED = 4.0  # pixels; an object that has been pushed
FOLDER = "softmotion30_44k"  # as in BAIR's tar


class Clip(NamedTuple):
    """What a clip's simulation gives."""

    images: dict[str, np.ndarray]  # by camera, uint8 (T, 64, 64, 3)
    actions: np.ndarray  # float32 (T, 4)
    endeffector: np.ndarray  # float32 (T, 3)
    tracks: np.ndarray  # float32 (T, n, 2), pixels right and down; NaN where there is no object


class Part(NamedTuple):
    """A file of consecutive clips of a split."""

    split: str
    first: int
    last: int  # included

    def paths(self, out: Path) -> tuple[Path, Path]:
        """Where its records and its objects' tracks lie."""
        name = f"traj_{self.first}_to_{self.last}"
        records = out / FOLDER / self.split / f"{name}.tfrecords"
        return records, out / "tracks" / self.split / f"{name}.npy"


@cache
def eyes() -> "Eyes":
    """This process's renderer. Imports mujoco, whose back end must be chosen by then."""
    from push_view import Eyes

    return Eyes()


def begun(seed: int, split: str, index: int) -> tuple[np.random.Generator, list["Thing"]]:
    """A clip's source of chance, from which its objects have been drawn, and these."""
    from push_policy import scatter

    rng = np.random.default_rng(int(counter.bits(seed, SPLITS.index(split), index)))
    return rng, scatter(rng)


def play(seed: int, split: str, index: int) -> Iterator[tuple["World", np.ndarray]]:
    """Lets a clip happen: yields its world at each frame, and the action that comes next, (4,)."""
    from push_policy import Policy
    from push_world import World

    rng, things = begun(seed, split, index)
    policy = Policy(rng, things)
    world = World(things, policy.tip, policy.turn)
    for _ in range(FRAMES):
        before = policy.tip, policy.turn
        action = policy.act(world.middles())
        yield world, action
        world.move(before, (policy.tip, policy.turn))


def simulate(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of a split, as the cameras see it."""
    from push_view import CAMERAS
    from push_world import MOST_OBJECTS, SIDE

    images = {camera: np.empty((FRAMES, SIDE, SIDE, 3), np.uint8) for camera in CAMERAS}
    actions, endeffector = np.empty((FRAMES, 4), np.float32), np.empty((FRAMES, 3), np.float32)
    tracks = np.full((FRAMES, MOST_OBJECTS, 2), np.nan, np.float32)
    for frame, (world, action) in enumerate(play(seed, split, index)):
        if frame == 0:
            eyes().open(world)
        for camera in CAMERAS:
            images[camera][frame] = eyes().see(camera)
        actions[frame], endeffector[frame] = action, world.tip()
        tracks[frame, : len(world.objects)] = world.pixels("aux1")
    return Clip(images, actions, endeffector, tracks)


def record_of(clip: Clip) -> bytes:
    """A clip as a tf.train.Example with BAIR's keys."""
    features: dict[str, bytes | np.ndarray] = {}
    for frame in range(FRAMES):
        for camera, images in clip.images.items():
            features[f"{frame}/image_{camera}/encoded"] = images[frame].tobytes()
        features[f"{frame}/action"] = clip.actions[frame]
        features[f"{frame}/endeffector_pos"] = clip.endeffector[frame]
    return encode_example(features)


def make(seed: int, place: tuple[str, int]) -> tuple[bytes, np.ndarray]:
    """A worker's task: the record and the tracks of the clip at (split, index)."""
    clip = simulate(seed, *place)
    return record_of(clip), clip.tracks


def parts(counts: dict[str, int]) -> list[Part]:
    """The files of all splits, in order."""
    return [
        Part(split, first, min(first + CLIPS_A_FILE, count) - 1)
        for split, count in counts.items()
        for first in range(0, count, CLIPS_A_FILE)
    ]


def finished(part: Part, out: Path) -> bool:
    """Whether an earlier run wrote this part whole: every checksum is verified."""
    records, tracks = part.paths(out)
    try:
        count = len(np.load(tracks, allow_pickle=False))
        with open(records, "rb") as file:
            read = sum(1 for _ in read_records(file, str(records)))
    except (FileNotFoundError, EOFError, ValueError):  # a damaged file is made again
        return False
    return read == count == part.last - part.first + 1


def write_part(part: Part, out: Path, made: Iterable[tuple[bytes, np.ndarray]]) -> None:
    """Writes the tracks' file, then the records' file: with the second the part is finished."""
    records, tracks = zip(*made, strict=True)
    for path in part.paths(out):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, np.stack(tracks))
    with replacing(part.paths(out)[1]) as file:
        file.write(content.getvalue())
    write_records(part.paths(out)[0], records)


def claim(out: Path, settings: dict) -> None:
    """Notes what this folder's clips follow from.

    Raises:
        ValueError: an earlier run into it had other settings, so its files would not fit.
    """
    path = out / "robot_push.json"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        with replacing(path) as file:
            file.write(text.encode())
        return
    try:
        before = json.loads(path.read_text())
        other = next(name for name in settings if before.get(name) != settings[name])
    except StopIteration:
        return
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is damaged; choose another folder") from None
    raise ValueError(
        f"{out} has clips of another run: {other} was {before.get(other)!r}, now it is "
        f"{settings[other]!r}; choose another folder, or delete it"
    )


def moved(out: Path, split: str, counts: dict[str, int]) -> np.ndarray:
    """How far, in pixels, each clip's farthest object gets from where it is in the first frame."""
    files = [part.paths(out)[1] for part in parts(counts) if part.split == split]
    tracks = np.concatenate([np.load(path) for path in files])  # (clips, T, n, 2)
    return np.nanmax(np.linalg.norm(tracks - tracks[:, :1], axis=-1), axis=(1, 2))


def _start_worker() -> None:
    """In a worker: where its parent is killed it ends."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile ignore it from birth: it is their parent's business."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def generate(out: Path, seed: int, counts: dict[str, int], workers: int) -> int:
    """Makes every part that isn't finished.

    Returns:
        How many clips were made.

    Raises:
        OSError: a file can't be written, or a worker was killed; what is finished stays.
    """
    missing = [part for part in parts(counts) if not finished(part, out)]
    places = [(part.split, i) for part in missing for i in range(part.first, part.last + 1)]
    if not places:
        return 0
    context = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(places)), context, _start_worker)
    try:
        with _ignoring_ctrl_c():
            clips = pool.map(partial(make, seed), places)
        made = iter(tqdm(clips, total=len(places), unit="clip"))
        for part in missing:
            write_part(part, out, islice(made, part.last - part.first + 1))
    except BrokenProcessPool:
        raise OSError("a worker was killed, by a lack of memory perhaps; run it again") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return len(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--train", type=int, default=192, help="training clips (192)")
    parser.add_argument("--test", type=int, default=32, help="test clips (32)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--gl", choices=("auto", *gl_backend.BACKENDS), default="auto")
    options = parser.parse_args()
    counts = {"train": options.train, "test": options.test}
    for name, least in (("train", 0), ("test", 0), ("workers", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}, it must be at least {least}")
    counter.bits(options.seed)

    backend, renderer = gl_backend.choose(options.gl)
    print(f"rendering with {backend}: {renderer}", flush=True)
    settings = {"seed": options.seed, **counts, "renderer": renderer, "mujoco": version("mujoco")}
    claim(options.out, settings)
    made = generate(options.out, options.seed, counts, options.workers)
    print(f"{made} clips made, {sum(counts.values()) - made} were there")
    for split, count in counts.items():
        if count:
            far = moved(options.out, split, counts)
            print(
                f"{split}: in {(far >= MOVED).mean():.1%} of {count} clips an object moves by "
                f"{MOVED:g} pixels or more (median {np.median(far):.1f})"
            )


if __name__ == "__main__":
    run(main)
