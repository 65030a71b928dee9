"""Choose the digits that ship inside the package: tinyvgpt/data/mnist_subset.npz.

Takes 9,000 of MNIST's first 54,000 training digits, 1,000 of its last 6,000 and 2,000 of its
10,000 test digits, in their order in MNIST; in each part the classes keep MNIST's proportions.
The choice follows from `SEED` alone, so running it again gives the same arrays:

    python data_recipes/mnist_subset.py --mnist FOLDER

FOLDER holds MNIST's four IDX files, gzipped or not.
"""

import argparse
import hashlib
import os
from pathlib import Path

import numpy as np
from recipe import run

from tinyvgpt import counter
from tinyvgpt.data import mnist

SEED = 1998  # the year MNIST appeared
COUNTS = {"train": 9_000, "val": 1_000, "test": 2_000}  # digits taken of each split
LARGEST_FILE = 2_500_000  # bytes


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Split `total` into whole numbers proportional to `weights` (largest remainders)."""
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def choose(labels: np.ndarray, total: int, part: int) -> np.ndarray:
    """Rows of `total` digits with the class proportions of `labels`, in increasing order."""
    chosen = []
    for digit, count in enumerate(apportion(total, np.bincount(labels, minlength=10))):
        rows = np.flatnonzero(labels == digit)
        chosen.append(rows[counter.shuffled(np.arange(count), len(rows), SEED, part, digit)])
    return np.sort(np.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True, help="folder with the four IDX files")
    folder = parser.parse_args().mnist

    parts = {}
    for number, (split, total) in enumerate(COUNTS.items()):
        images, labels = mnist.load(split, folder)
        rows = choose(labels, total, number)
        parts[split] = images[rows], labels[rows].astype(np.uint8)
        print(f"{split}: {total} of {len(labels)}, by class {np.bincount(labels[rows])}")
    arrays = {
        "train_images": np.concatenate([parts["train"][0], parts["val"][0]]),
        "train_labels": np.concatenate([parts["train"][1], parts["val"][1]]),
        "test_images": parts["test"][0],
        "test_labels": parts["test"][1],
    }

    temporary = mnist.SUBSET.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    size = temporary.stat().st_size
    if size > LARGEST_FILE:
        raise SystemExit(f"{temporary} takes {size} bytes, more than {LARGEST_FILE}")
    os.replace(temporary, mnist.SUBSET)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    print(f"{mnist.SUBSET}: {size} bytes, arrays' sha256 {digest}")


if __name__ == "__main__":
    run(main)
