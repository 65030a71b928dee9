"""Pack the robot clips that ship inside the package: tinyvgpt/data/robot_push.npz.

    python data_recipes/robot_push.py --out robot_push --train 256 --test 32 --seed 0 --gl egl
    python data_recipes/robot_push_subset.py --clips robot_push

takes all clips of the folder, as camera aux1 sees them. Running it again on the same clips gives
the same arrays, whose sha256 it prints. With --out FILE it packs any number of clips into another
file, on which TINYVGPT_ROBOT_PUSH=FILE trains.

    python data_recipes/robot_push_subset.py --add-colours FILE --seed 0

adds the objects' colours, which files packed earlier lack, to one whose clips are of that seed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from recipe import run
from robot_push import FOLDER, FRAMES, SPLITS, Part, begun
from tfrecords import decode_example, read_records

from tinyvgpt.data import robot_push, still_camera
from tinyvgpt.store import write_atomically

LARGEST_FILE = 6_000_000  # bytes, in the package
CAMERA = "image_aux1/encoded"
NEAR = 3.0  # pixels from where an object was put to where it came to rest


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


def colours(seed: int, split: str, tracks: np.ndarray) -> np.ndarray:
    """The colours of all clips' objects, int8 (N, n), as `robot_push.COLOURS` numbers them; or -1.

    Raises:
        ValueError: the objects of that seed's clips are not where `tracks` (N, T, n, 2) begin.
    """
    found = np.full(tracks[:, 0, :, 0].shape, -1, np.int8)
    for clip, track in enumerate(tracks[:, 0]):
        _, things = begun(seed, split, clip)
        places = torch.tensor([(*thing.position, thing.height) for thing in things])
        seen, count = robot_push.in_picture(places).numpy(), len(things)
        there = np.isfinite(track[:, 0])
        if there.sum() != count or np.abs(seen - track[:count]).max() > NEAR:
            raise ValueError(f"{split} clip {clip} is not of seed {seed}: it has other objects")
        found[clip, :count] = [robot_push.COLOURS.index(thing.colour) for thing in things]
    return found


def pack_folder(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all clips of a folder."""
    arrays, seed = {}, json.loads((folder / "robot_push.json").read_text())["seed"]
    for split in SPLITS:
        clips = read_split(folder, split)
        packed = {**still_camera.pack(clips.pop("video")), **clips}
        packed["colours"] = colours(seed, split, clips["tracks"])
        arrays |= {f"{split}_{name}": array for name, array in packed.items()}
        print(f"{split}: {len(clips['action'])} clips, in {len(packed['colour'])} bytes of colour")
    return arrays


def with_colours(path: Path, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a packed file, and the colours of its objects."""
    for split in SPLITS:
        robot_push.load(split, path)  # refused, if it is no such file
    with np.load(path) as file:
        arrays = dict(file)
    named = {f"{s}_colours": colours(seed, s, arrays[f"{s}_tracks"]) for s in SPLITS}
    return arrays | named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", type=Path, help="folder that robot_push.py wrote")
    source.add_argument("--add-colours", type=Path, metavar="FILE", help="a packed file")
    parser.add_argument("--seed", type=int, default=0, help="of the clips in that file (0)")
    parser.add_argument("--out", type=Path, help="the file to write; by default the package's")
    options = parser.parse_args()
    if options.add_colours:
        out = options.out or options.add_colours
        arrays = with_colours(options.add_colours, options.seed)
    else:
        out, arrays = options.out or robot_push.FILE, pack_folder(options.clips)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)
        if out == robot_push.FILE and path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"the clips take {path.stat().st_size} bytes, over {LARGEST_FILE}")

    write_atomically({out: write})
    robot_push._load.cache_clear()
    print(f"{out}: {out.stat().st_size} bytes")
    for split in SPLITS:
        clips = robot_push.load(split, out)
        print(f"{split}: arrays' sha256 {robot_push.digest(clips)}")


if __name__ == "__main__":
    run(main)
