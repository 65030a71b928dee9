"""BAIR robot pushing → one HDF5 file, as the original VideoGPT's.

    python data_recipes/bair.py --out bair.h5                     # downloads 32 GB, writes 16 GB
    python data_recipes/bair.py --files PATH… --out bair.h5       # TFRecord files, folders, the tar

43,264 training and 256 test clips of a robot arm that pushes things about, 30 frames each, seen by
two cameras (Ebert et al. 2017, arXiv 1710.05268). `--camera image_aux1` is what the original
VideoGPT takes. The test clips alone are one TFRecord file, which the tutorials of TensorFlow Hub
fetch; put it into a folder called `test`:
https://storage.googleapis.com/download.tensorflow.org/data/bair_test_traj_0_to_255.tfrecords

The file has, for each split, `{split}_data` uint8 (frames, 64, 64, 3), `{split}_idx` int64 (clips,)
with the first frame of each clip, `{split}_actions` float32 (frames, 4) and
`{split}_endeffector_pos` float32 (frames, 3). Records are read where they are in the tar, both
checksums of each verified; one is in memory at a time, which takes less than 100 MB in all.
Interrupted at any moment, by Ctrl-C, a kill or a full disk, the same command goes on where it was,
and ends with the same bytes.

Frames lie one after another, without chunks. So one process reads 16 frames from a random start
50,700 times a second from the page cache, 5,500 times after they were dropped from it. With chunks
of 1, 10, 16 or 30 frames it is 1.9 to 2.6 and 1.4 to 1.9 times slower, with the chunks that h5py
chooses itself there are 192 clips a second (python data_recipes/measure_layouts.py --folder FOLDER,
two cores, 1 GB of clips; book/results/hdf5-layouts.json).
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import recipe
from bair_files import SPLITS, Clip, RecordFile, clips_of, find, read_at, record_name
from fetch import Source, check_space, fetch
from filling import Filling
from partial import Partial
from tfrecords import decode_example
from tqdm import tqdm

VERSION = 1  # of what this recipe makes of the same records
ARCHIVE = "bair_robot_pushing_dataset_v0.tar"
SOURCES = [  # url, last verified
    Source(f"http://rail.eecs.berkeley.edu/datasets/{ARCHIVE}", "never"),
    Source(f"https://rail.eecs.berkeley.edu/datasets/{ARCHIVE}", "never"),
]
# As TensorFlow Datasets states them (datasets/bair_robot_pushing_small/checksums.tsv).
ARCHIVE_BYTES = 32_274_964_480
ARCHIVE_SHA256 = "c6f8d164ab2be07174ef597e3e070d7466f3142caddc467b6af119b9458cd9cd"
ARCHIVE_CLIPS, ARCHIVE_FRAMES = 43_264 + 256, 30

CAMERAS = ("image_aux1", "image_main")
IMAGE = (64, 64, 3)  # height, width, channels
NUMBERS = {"action": 4, "endeffector_pos": 3}  # floats of each frame
FRAME_BYTES = int(np.prod(IMAGE)) + 4 * sum(NUMBERS.values())  # in the HDF5 file
CLIPS_A_STEP = 256  # what an interruption may cost; 94 MB of BAIR's


class Frames(NamedTuple):
    """What a record holds."""

    data: bytes  # (T, 64, 64, 3)
    actions: np.ndarray  # (T, 4)
    endeffector_pos: np.ndarray  # (T, 3)


def read_frames(payload: bytes, camera: str, name: str) -> Frames:
    """Takes one camera's frames out of a record.

    Args:
        payload: a tf.train.Example with `{i}/{camera}/encoded`, `{i}/action` and
            `{i}/endeffector_pos` for i in 0 … T - 1.
        camera: "image_aux1" or "image_main".
        name: what errors call the record.

    Raises:
        ValueError: a key is missing, or what it holds is of another kind or size.
    """
    image = f"{camera}/encoded"
    kinds = [image, *NUMBERS]
    try:
        features = decode_example(payload, tuple(f"/{kind}" for kind in kinds))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    key = re.compile(rf"(\d+)/(?:{'|'.join(kinds)})")
    count = 1 + max((int(match[1]) for match in map(key.fullmatch, features) if match), default=0)
    columns: dict[str, list] = {kind: [] for kind in kinds}
    for frame in range(count):
        for kind, column in columns.items():
            value = features.get(f"{frame}/{kind}")
            if fault := _fault(value, NUMBERS.get(kind)):
                raise ValueError(f"{name} {fault} '{frame}/{kind}'")
            column.append(value)
    actions, positions = (np.stack(columns[kind]) for kind in NUMBERS)
    return Frames(b"".join(columns[image]), actions, positions)


def _fault(value: bytes | np.ndarray | None, floats: int | None) -> str | None:
    """What is wrong with a value that should be so many floats, or an image if None."""
    if value is None:
        return "has no key"
    found = f"{len(value)} {'bytes' if isinstance(value, bytes) else value.dtype.name}"
    expected = f"{np.prod(IMAGE)} bytes" if floats is None else f"{floats} float32"
    return None if found == expected else f"has {found}, not {expected}, under the key"


def convert(paths: Sequence[Path], out: Path, camera: str) -> None:
    """Writes the HDF5 file of all clips in files, folders or tars, or goes on with it.

    Raises:
        ValueError: a file or record is damaged or not as BAIR's; `out` is there, and of other
            inputs.
        OSError: a file can't be read, or there is no space.
    """
    files = find(paths)
    clips = list_clips(files, camera)
    if not clips:
        raise ValueError(f"no clips in {', '.join(map(str, paths))}: the TFRecord files are empty")
    about = attributes(clips, ", ".join(path.resolve().name for path in paths), camera)
    if is_finished(out, {name: about[name] for name in ("version", "camera", "inputs")}):
        return
    lengths = {split: [c.frames for c in clips if c.file.split == split] for split in SPLITS}
    starts = {split: np.cumsum([0, *lengths[split]]) for split in SPLITS if lengths[split]}
    arrays = {
        f"{split}_{name}": ((int(rows[-1]), *shape), dtype)
        for split, rows in starts.items()
        for name, shape, dtype in (
            ("data", IMAGE, np.uint8),
            ("actions", (NUMBERS["action"],), np.float32),
            ("endeffector_pos", (NUMBERS["endeffector_pos"],), np.float32),
        )
    }
    known = {f"{split}_idx": rows[:-1].astype(np.int64) for split, rows in starts.items()}
    rows = np.concatenate([known[f"{split}_idx"] for split in starts])
    out.parent.mkdir(parents=True, exist_ok=True)
    filling = Filling(out, key_of(about), arrays, known, about)
    frames = sum(int(rows[-1]) for rows in starts.values())
    check_space(out.parent, frames * FRAME_BYTES - on_disk(filling.path), str(out))
    name_leftovers(filling)

    begun = time.perf_counter()
    with filling:
        done = filling.steps
        fill(filling, clips, rows, camera)
        filling.publish()
    seconds = time.perf_counter() - begun
    counts = ", ".join(f"{len(lengths[s])} {s} clips of {sum(lengths[s])} frames" for s in starts)
    size = sum(clip.bytes for clip in clips[done:])
    before = f" ({done} clips were there)" if done else ""
    print(f"{out}: {counts}, in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s read{before}")


def fill(filling: Filling, clips: list[Clip], rows: np.ndarray, camera: str) -> None:
    """Reads the clips that are not there yet and writes each to its rows."""
    step = filling.steps
    bar = tqdm(total=len(clips), initial=step, unit="clip", desc=filling.out.name, file=sys.stderr)
    with bar:
        for file, group in groupby(clips[step:], key=lambda clip: clip.file):
            with file.open() as stream:
                for clip in group:
                    name = record_name(file, clip.offset)
                    frames = read_frames(read_at(stream, file, clip.offset), camera, name)
                    if len(frames.actions) != clip.frames:
                        raise ValueError(
                            f"{name} has {len(frames.actions)} frames, others of "
                            f"{clip.bytes} bytes in that file have {clip.frames}"
                        )
                    for kind, values in frames._asdict().items():
                        filling.write(f"{file.split}_{kind}", int(rows[step]), values)
                    step += 1
                    bar.update()
                    if step % CLIPS_A_STEP == 0:
                        filling.commit(step)


def list_clips(files: Sequence[RecordFile], camera: str) -> list[Clip]:
    """All clips of all files, in order."""

    def frames_of(payload: bytes, name: str) -> int:
        return len(read_frames(payload, camera, name).actions)

    bar = tqdm(files, unit="file", desc="looking for clips", file=sys.stderr)
    return [clip for file in bar for clip in clips_of(file, frames_of)]


def attributes(clips: Sequence[Clip], source: str, camera: str) -> dict[str, str | int]:
    """What the HDF5 file says of itself; "inputs" are equal where all records and splits are."""
    records = json.dumps([(clip.file.split, clip.bytes, clip.checksum) for clip in clips])
    return {
        "recipe": "data_recipes/bair.py",
        "version": VERSION,
        "source": source,
        "camera": camera,
        "inputs": f"{len(clips)} clips {hashlib.sha256(records.encode()).hexdigest()}",
    }


def key_of(about: dict[str, str | int]) -> str:
    """Tells unfinished files apart that are not of the same records, or not for the same file."""
    return hashlib.sha256(json.dumps(sorted(about.items())).encode()).hexdigest()[:12]


def is_finished(out: Path, about: dict[str, str | int]) -> bool:
    """Whether `out` is there, with these attributes.

    Raises:
        ValueError: it is there, with others.
    """
    if not out.exists():
        return False
    try:
        with h5py.File(out, "r") as file:
            found = {name: file.attrs.get(name) for name in about}
    except OSError:
        found = {"version": "unknown"}
    for name, value in about.items():
        if found.get(name) != value:
            raise ValueError(
                f"{out} is there, but made with {name} {found.get(name)}, not {value}: "
                "delete it, or choose another --out"
            )
    print(f"{out} is complete: nothing to do")
    return True


def on_disk(path: Path) -> int:
    """Bytes that a file, which may have holes, takes on the disk."""
    return getattr(path.stat(), "st_blocks", 0) * 512 if path.exists() else 0


def name_leftovers(filling: Filling) -> None:
    """Prints which other unfinished files stand beside this one."""
    pattern = re.compile(rf"\.{re.escape(filling.out.name)}\.[0-9a-f]{{12}}\.partial")
    for path in filling.out.parent.iterdir():
        if pattern.fullmatch(path.name) and path != filling.path:
            print(f"{path} is left of a run with other inputs or another camera", file=sys.stderr)


def download(out: Path) -> Path:
    """Fetches the tar into the folder of `out`, if there is space for both.

    Raises:
        OSError: no mirror has it, or there is no space.
    """
    archive = out.with_name(ARCHIVE)
    if archive.exists():
        print(f"{archive}: verifying its checksum")
    else:
        unfinished = Partial(archive).path
        arrived = unfinished.stat().st_size if unfinished.exists() else 0
        needed = ARCHIVE_BYTES + ARCHIVE_CLIPS * ARCHIVE_FRAMES * FRAME_BYTES
        check_space(out.parent, needed - arrived, f"{ARCHIVE} with {out.name}")
    return fetch(SOURCES, archive, size=ARCHIVE_BYTES, sha256=ARCHIVE_SHA256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the HDF5 file to write")
    parser.add_argument(
        "--files",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="TFRecord files, folders of them or uncompressed tars, instead of a download; folders "
        "named train and test give the split",
    )
    parser.add_argument("--camera", choices=CAMERAS, default=CAMERAS[0])
    options = parser.parse_args()
    out, camera, paths = options.out, options.camera, options.files
    if not paths:
        if is_finished(out, {"version": VERSION, "camera": camera, "source": ARCHIVE}):
            return
        paths = [download(out)]
    convert(paths, out, camera)
    if not options.files:
        print(f"{paths[0]} isn't needed any more")


if __name__ == "__main__":
    recipe.run(main)
