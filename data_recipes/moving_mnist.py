"""The full MNIST from its mirrors, and Moving MNIST's standard test protocol as a file.

    python data_recipes/moving_mnist.py --download mnist
    python data_recipes/moving_mnist.py --mnist mnist --protocol mnist_test_seq.npy
    export TINYVGPT_MNIST=mnist    # from here on the package takes its digits from there

The protocol is 10,000 clips of 20 frames of 64 × 64 pixels with two digits, as Srivastava, Mansimov
& Salakhutdinov 2015 published them (mnist_test_seq.npy): `.npy` has their layout, (20, 10000, 64,
64) uint8; `.h5` has VideoGPT's, which `open_dataset` reads, with labels. The clips are those of
`MovingMNIST("test", frames=20)`, whose digits are of MNIST's test set: moved by the same rules as
in the published file, but not the same clips, so figures on the two are comparable, not equal.

Shapes: B clips of a part · T = 20 frames · N = 10,000 clips · H = W = 64 pixels.
"""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fetch import Source, check_space, fetch
from recipe import replacing, run
from tqdm import tqdm

from tinyvgpt.data import MovingMNIST, mnist

MIRRORS = (  # where MNIST's files lie, and when somebody last fetched them from there
    Source("https://ossci-datasets.s3.amazonaws.com/mnist/", verified="never"),
    Source("https://storage.googleapis.com/cvdf-datasets/mnist/", verified="never"),
)
MD5 = {  # of the files as LeCun published them; torchvision has the same
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
FRAMES, CLIPS, SIDE = 20, 10_000, 64  # the protocol's
PART = 250  # clips in memory at once, 20 MB


def download(folder: Path) -> None:
    """Fetches MNIST's four files into a folder, or what is missing of them."""
    for name, md5 in MD5.items():
        sources = [Source(mirror.url + name, mirror.verified) for mirror in MIRRORS]
        fetch(sources, folder / name, md5=md5)
    sizes = [len(mnist.load(split, folder).labels) for split in mnist.SPLITS]
    print(f"{folder} has MNIST: {sum(sizes[:2])} training and {sizes[2]} test digits")


def parts(data: MovingMNIST, done: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields first clip, video uint8 (B, T, H, W, 1) and label int64 (B,) of the parts not done."""
    firsts = range(0, len(data), PART)
    for first in tqdm(firsts[done:], initial=done, total=len(firsts), unit="part"):
        clips = data.batch(range(first, min(first + PART, len(data))))
        yield first, clips["video"].numpy(), clips["label"].numpy()


def write_npy(path: Path, data: MovingMNIST) -> None:
    """Writes uint8 (T, N, H, W).

    It takes seconds, so a run that was interrupted is not continued but repeated.
    """
    try:
        with replacing(path) as file:
            shape = (data.frames, len(data), SIDE, SIDE)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            begin = file.tell()
            for first, video, _ in parts(data):
                for frame in range(data.frames):
                    file.seek(begin + (frame * len(data) + first) * SIDE**2)
                    file.write(video[:, frame].tobytes())
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def write_h5(path: Path, data: MovingMNIST) -> None:
    """Writes test_data uint8 (N·T, H, W, 1), test_idx and test_labels int64 (N,), label_names."""
    from filling import Filling

    count = len(data)
    digits = mnist.load("test", data.digits).images
    key = hashlib.sha256(digits.tobytes() + str(count).encode()).hexdigest()[:16]
    arrays = {
        "test_data": ((count * data.frames, SIDE, SIDE, 1), np.uint8),
        "test_labels": ((count,), np.int64),
    }
    known = {
        "test_idx": np.arange(count, dtype=np.int64) * data.frames,
        "label_names": np.array(data.label_names, dtype=np.bytes_),
    }
    with Filling(path, key, arrays, known, {}) as file:
        for first, video, label in parts(data, file.steps):
            file.write("test_data", first * data.frames, video)
            file.write("test_labels", first, label)
            file.commit(first // PART + 1)
        file.publish()


WRITERS: dict[str, Callable[[Path, MovingMNIST], None]] = {".npy": write_npy, ".h5": write_h5}


def write_protocol(path: Path, digits: Path | None, clips: int) -> None:
    """Writes the protocol's first clips to a file, which appears when it is complete.

    Raises:
        ValueError: the name ends otherwise than in .npy or .h5, or MNIST can't be read.
        OSError: too little space, or the file can't be written.
    """
    write = WRITERS.get(path.suffix)
    if write is None:
        raise ValueError(f"{path} should end in {' or '.join(WRITERS)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: choose another name")
    folder = None if digits is None else str(digits)
    data = MovingMNIST("test", frames=FRAMES, resolution=SIDE, digits=folder, size=clips)
    check_space(path.parent, int(1.01 * clips * FRAMES * SIDE**2), path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, data)
    print(f"{path}: {clips} clips of {FRAMES} frames, {path.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """Downloads, writes the protocol, or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="fetch MNIST into it")
    parser.add_argument("--protocol", type=Path, metavar="FILE", help="write it, .npy or .h5")
    parser.add_argument(
        "--mnist",
        type=Path,
        metavar="FOLDER",
        help="the protocol's digits; what was downloaded, else TINYVGPT_MNIST, unless told",
    )
    parser.add_argument("--clips", type=int, default=CLIPS, help="write only so many, the first")
    options = parser.parse_args()
    if not options.download and not options.protocol:
        parser.error("nothing to do: give --download, --protocol or both")
    if options.download:
        download(options.download)
    if options.protocol:
        digits = options.mnist or options.download or os.environ.get(mnist.FOLDER_VARIABLE)
        if not digits:
            print(
                "digits: the 2,000 of MNIST's test set that are embedded in the package; "
                "--download or --mnist takes all 10,000"
            )
        write_protocol(options.protocol, digits and Path(digits), options.clips)


if __name__ == "__main__":
    run(main)
