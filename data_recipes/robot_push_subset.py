"""Pack the robot clips that ship inside the package: tinyvgpt/data/robot_push.npz.

    python data_recipes/robot_push.py --out robot_push --train 256 --test 32 --seed 0 --gl egl
    python data_recipes/robot_push_subset.py --clips robot_push

takes all clips of the folder, as camera aux1 sees them. Running it again on the same clips gives
the same arrays, whose sha256 it prints. With --out FILE it packs any number of clips into another
file, on which TINYVGPT_ROBOT_PUSH=FILE trains.
"""

import argparse
from pathlib import Path

import numpy as np
from recipe import run
from robot_push import FOLDER, FRAMES, SPLITS, Part
from tfrecords import decode_example, read_records

from tinyvgpt.data import robot_push, still_camera
from tinyvgpt.store import write_atomically

LARGEST_FILE = 6_000_000  # bytes, in the package
CAMERA = "image_aux1/encoded"


def read_clip(record: bytes) -> dict[str, np.ndarray]:
    """A clip of a TFRecord: video (T, 64, 64, 3), action (T, 4), endeffector (T, 3)."""
    example = decode_example(record, (CAMERA, "/action", "/endeffector_pos"))
    pixels = [np.frombuffer(example[f"{frame}/{CAMERA}"], np.uint8) for frame in range(FRAMES)]
    return {
        "video": np.stack(pixels).reshape(FRAMES, 64, 64, 3),
        "action": np.stack([example[f"{frame}/action"] for frame in range(FRAMES)]),
        "endeffector": np.stack([example[f"{f}/endeffector_pos"] for f in range(FRAMES)]),
    }


def read_split(folder: Path, split: str) -> dict[str, np.ndarray]:
    """All clips of a split, in order, and `tracks`, where the objects are, (N, T, n, 2).

    Raises:
        ValueError: there are none, or files are missing between them.
    """
    files = (folder / FOLDER / split).glob("traj_*_to_*.tfrecords")
    parts = sorted(Part(split, *(int(n) for n in path.stem.split("_")[1::2])) for path in files)
    if not parts or [part.first for part in parts] != [0, *(part.last + 1 for part in parts[:-1])]:
        raise ValueError(f"{folder / FOLDER / split} has no clips, or not all; run robot_push.py")
    clips, tracks = [], []
    for part in parts:
        records, objects = part.paths(folder)
        with open(records, "rb") as file:
            clips += [read_clip(record) for _, record in read_records(file, str(records))]
        tracks.append(np.load(objects))
    return {
        **{name: np.stack([clip[name] for clip in clips]) for name in clips[0]},
        "tracks": np.concatenate(tracks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, required=True, help="folder that robot_push.py wrote")
    parser.add_argument("--out", type=Path, default=robot_push.FILE, help="the file to write")
    options = parser.parse_args()
    arrays = {}
    for split in SPLITS:
        clips = read_split(options.clips, split)
        packed = {**still_camera.pack(clips.pop("video")), **clips}
        arrays |= {f"{split}_{name}": array for name, array in packed.items()}
        print(f"{split}: {len(clips['action'])} clips, in {len(packed['colour'])} bytes of colour")

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        if options.out == robot_push.FILE and path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"the clips take {path.stat().st_size} bytes, over {LARGEST_FILE}")

    write_atomically({options.out: write})
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    for split in SPLITS:
        clips = robot_push.load(split, options.out)
        print(f"{split}: arrays' sha256 {robot_push.digest(clips)}")


if __name__ == "__main__":
    run(main)
