"""Handwritten digits: an embedded subset of MNIST, or all of it from a folder.

MNIST (LeCun, Cortes & Burges 1998; CC BY-SA 3.0, see MNIST-LICENSE.md) has 60,000 training and
10,000 test digits. 10,000 and 2,000 of them ship inside the package, chosen by
data_recipes/mnist_subset.py. The last tenth of the training digits is held out for validation: in
MNIST as in the subset, which takes each part from the same part. So no digit that validates or
tests was ever trained on, whichever of the two a model saw. Chapter 02 builds on it.

Shapes: images uint8 (n, 28, 28), white ink 255 on black 0; labels int64 (n,), 0 … 9.
"""

import gzip
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyvgpt.data.windows import SPLITS, check_split

__all__ = ["SPLITS", "Digits", "load", "read_idx"]

SIDE = 28  # height and width of a digit in pixels
SUBSET = Path(__file__).with_name("mnist_subset.npz")
FOLDER_VARIABLE = "TINYVGPT_MNIST"  # environment variable: a folder with all of MNIST
FILES = {  # split on disk → names of its images and labels, each as is or with .gz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IDX_UINT8 = 0x08  # the element type MNIST uses, third byte of an IDX file


class Digits(NamedTuple):
    """Digits of one split."""

    images: np.ndarray  # uint8 (n, 28, 28)
    labels: np.ndarray  # int64 (n,), 0 … 9


def load(split: str = "train", folder: str | os.PathLike | None = None) -> Digits:
    """Return the digits of a split, in the order of their files.

    Args:
        split: "train" (the first nine tenths of the training digits), "val" (the last tenth) or
            "test".
        folder: folder with MNIST's four IDX files, gzipped or not. None means the one that the
            environment variable TINYVGPT_MNIST names and, where that is unset, the embedded subset.

    Returns:
        Digits with read-only arrays, shared between calls.

    Raises:
        ValueError: unknown split, a file is missing, truncated or not what its name says.
    """
    check_split(split)
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    return _load(split, str(Path(folder).absolute()) if folder else None)


@lru_cache(maxsize=8)
def _load(split: str, folder: str | None) -> Digits:
    images, labels = _read("test" if split == "test" else "train", folder)
    kept = len(images) - len(images) // 10
    rows = {"train": slice(kept), "val": slice(kept, None), "test": slice(None)}[split]
    digits = Digits(images[rows], labels[rows].astype(np.int64))
    for array in digits:
        array.flags.writeable = False
    return digits


def _read(source: str, folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of MNIST's "train" or "test", from the folder or the embedded subset."""
    if folder is None:
        with np.load(SUBSET, allow_pickle=False) as subset:
            return subset[f"{source}_images"], subset[f"{source}_labels"]
    paths = [_find(Path(folder), name) for name in FILES[source]]
    images, labels = read_idx(paths[0], axes=3), read_idx(paths[1], axes=1)
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{paths[0]} has digits of {images.shape[1:]} pixels, not (28, 28)")
    if len(images) != len(labels):
        raise ValueError(f"{paths[0]} has {len(images)} digits, {paths[1]} {len(labels)} labels")
    if len(labels) < 10:
        raise ValueError(f"{paths[0]} has {len(labels)} digits, splitting them needs 10")
    if labels.max() > 9:
        raise ValueError(f"{paths[1]} has the label {labels.max()}, labels are 0 … 9")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    """The file `name` or `name`.gz in `folder`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    needed = ", ".join(name for pair in FILES.values() for name in pair)
    raise ValueError(f"{folder} has no {name} or {name}.gz; MNIST's four files are {needed}")


def read_idx(path: str | os.PathLike, axes: int) -> np.ndarray:
    """Read an IDX file of bytes, the format MNIST comes in.

    Two zero bytes, the element type, the number of axes, the length of each axis as a big-endian
    32-bit integer, and then the elements.

    Args:
        path: the file; a name ending in .gz is decompressed.
        axes: number of axes that the file must have.

    Returns:
        uint8 array with that many axes.

    Raises:
        ValueError: not gzip though named so, wrong magic number, truncated or too long.
    """
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    magic = bytes((0, 0, IDX_UINT8, axes))
    if content[:4] != magic:
        raise ValueError(
            f"{path} starts with bytes {content[:4].hex(' ') or 'none'}; an IDX file of bytes "
            f"with {axes} axes starts with {magic.hex(' ')}"
        )
    header = 4 + 4 * axes
    if len(content) < header:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, its header takes {header}")
    shape = tuple(int(length) for length in np.frombuffer(content[4:header], ">u4"))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "too long"
        raise ValueError(f"{path} is {fault}: {len(content)} bytes, shape {shape} takes {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
