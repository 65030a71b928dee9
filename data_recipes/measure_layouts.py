"""How fast random clips are read from an HDF5 file, by how the file lays its frames out.

    python data_recipes/measure_layouts.py --folder FOLDER

writes 1 GB of BAIR-size videos (30 frames of 64×64×3 bytes) into FOLDER, reads 16 frames from a
random start of each, in a random order, and deletes the file; for one layout after another. "cold"
is after the file was dropped from the page cache (below a virtual machine there may be another
cache), "warm" is from the page cache. One process reads, one clip at a time, with h5py's default
settings. bair.py writes the layout that wins. The figures go to book/results/hdf5-layouts.json.
"""

import argparse
import os
import time
from pathlib import Path

import h5py
import numpy as np
import recipe
from fetch import check_space

from tinyvgpt.bench import record

FRAMES, IMAGE, CLIP = 30, (64, 64, 3), 16  # of a video, of a frame, of the clip that is read
LAYOUTS = {  # name: shape of a chunk, and its compression
    "contiguous": (None, None),
    "1 frame a chunk": ((1, *IMAGE), None),
    "10 frames a chunk": ((10, *IMAGE), None),
    "16 frames a chunk": ((16, *IMAGE), None),
    "30 frames a chunk": ((FRAMES, *IMAGE), None),
    "h5py's own chunks": (True, None),
    "30 frames, lzf": ((FRAMES, *IMAGE), "lzf"),
}


def write(path: Path, videos: int, layout: str) -> None:
    """Writes noise under smooth gradients, so that compression has something to do."""
    chunks, compression = LAYOUTS[layout]
    generator = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None]
    shape = (videos * FRAMES, *IMAGE)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", shape, "u1", chunks=chunks, compression=compression)
        for start in range(0, len(data), FRAMES):
            data[start : start + FRAMES] = ramp + generator.integers(
                8, size=(FRAMES, *IMAGE), dtype="u1"
            )
        file.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # only pages that are on disk can be dropped


def read(path: Path, passes: int) -> float:
    """Clips a second: one clip of each video, in a random order; several times over."""
    generator = np.random.default_rng(passes)
    with h5py.File(path, "r") as file:
        data = file["data"]
        videos = len(data) // FRAMES
        order = np.concatenate([generator.permutation(videos) for _ in range(passes)])
        firsts = order * FRAMES + generator.integers(FRAMES - CLIP + 1, size=len(order))
        start = time.perf_counter()
        for first in firsts:
            data[first : first + CLIP]
    return len(order) / (time.perf_counter() - start)


def drop(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_up(path: Path) -> None:
    """Reads a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where 1 GB is free")
    parser.add_argument("--out", type=Path, default=Path("book/results"), help="for the record")
    parser.add_argument("--videos", type=int, default=2_700, help="written, of 0.37 MB each")
    options = parser.parse_args()
    size = options.videos * FRAMES * int(np.prod(IMAGE))
    check_space(options.folder, size, "the file that is measured")
    print(f"{'layout':20}{'cold':>12}{'warm':>12}   clips of {CLIP} frames a second")
    rates = {}
    for layout in LAYOUTS:
        path = options.folder / "layout.h5"
        try:
            write(path, options.videos, layout)
            drop(path)
            cold = read(path, passes=1)
            warm_up(path)
            warm = read(path, passes=3)
        finally:
            path.unlink(missing_ok=True)
        print(f"{layout:20}{cold:12,.0f}{warm:12,.0f}", flush=True)
        rates[layout] = {"cold": round(cold), "warm": round(warm)}
    about = {"videos": options.videos, "frames": FRAMES, "frames_of_a_clip": CLIP}
    command = "python data_recipes/measure_layouts.py --folder FOLDER"
    record({**about, "clips_per_second": rates}, "hdf5-layouts", command, options.out)


if __name__ == "__main__":
    recipe.run(main)
