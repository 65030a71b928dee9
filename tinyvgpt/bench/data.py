"""How fast clips come out of each kind of dataset; chapter 02 shows the record.

Made for the purpose: an HDF5 file of BAIR's size of clip, and folders of h264 films with a key
frame every 30 and every 250 frames, which a decoder has to start from. All of them are in the page
cache, so this times decoding, copying and the workers, not a disk.

Shapes: B clips a batch · T frames · H W pixels.
"""

import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from tinyvgpt.data import Dataset, batches, open_dataset
from tinyvgpt.write import import_av

HDF5_CLIPS, HDF5_FRAMES = 2048, 30  # of 64 × 64 × 3: 755 MB
FILMS, SECONDS, FPS, WIDTH, HEIGHT = 24, 10, 25, 320, 240
WARM_UP = 2  # seconds in which workers start and files are opened
LEAST = 6  # seconds that are timed


def loading(spec: str | None = None, *, batch_size: int = 32, workers: int = 2) -> dict:
    """Clips a second of 16 × 64 × 64, in random order, from one dataset or from all kinds.

    Args:
        spec: what `open_dataset` opens; None for the embedded datasets and files made here.
        batch_size: B, clips of a batch.
        workers: processes that load.

    Returns:
        clips a second by dataset, and what was run.

    Raises:
        ValueError: as `open_dataset` and `batches`.
    """
    about = {"batch_size": batch_size, "workers": workers, "frames": 16, "resolution": 64}
    if spec is not None:
        data = open_dataset(spec)
        about |= {"frames": data.frames, "resolution": data.resolution}  # tokens have their own
        return {**about, "clips_per_second": {spec: rate(data, batch_size, workers)}}
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hdf5(folder / "bair-size.h5")
        write_films(folder / "gop-30", 30)
        write_films(folder / "gop-250", 250)
        for title, what in (
            ("moving-mnist", "moving-mnist"),
            ("robot-push", "robot-push"),
            ("HDF5, 30 frames of 64 x 64", folder / "bair-size.h5"),
            (f"mp4, {WIDTH} x {HEIGHT}, a key frame every 30", folder / "gop-30"),
            (f"mp4, {WIDTH} x {HEIGHT}, a key frame every 250", folder / "gop-250"),
        ):
            rates[title] = rate(open_dataset(what), batch_size, workers)
    return {**about, "clips_per_second": rates}


def rate(data: Dataset, batch_size: int, workers: int) -> float:
    """Clips a second that `batches` gives, once it runs."""
    stream = batches(data, batch_size, workers=workers)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        next(stream)
    clips, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < LEAST:
        clips += len(next(iter(next(stream).values())))
    del stream  # ends the workers
    return round(clips / elapsed, 1)


def write_hdf5(path: Path, clips: int = HDF5_CLIPS) -> None:
    """Random pixels in the layout that data_recipes/bair.py writes."""
    import h5py

    rng = np.random.default_rng(0)
    shape = (clips * HDF5_FRAMES, 64, 64, 3)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("train_data", shape, np.uint8)  # contiguous
        file["train_idx"] = np.arange(clips) * HDF5_FRAMES
        file["train_actions"] = rng.normal(size=(len(data), 4)).astype(np.float32)
        for start in range(0, len(data), HDF5_FRAMES):
            data[start : start + HDF5_FRAMES] = rng.integers(
                0, 256, (HDF5_FRAMES, *shape[1:]), dtype=np.uint8
            )


def write_films(folder: Path, gop: int, films: int = FILMS) -> None:
    """h264 films of a textured scene that pans, with a disc that moves across, and some noise."""
    (folder / "train").mkdir(parents=True)
    for number in range(films):
        _write_film(folder / "train" / f"{number:03d}.mp4", gop, number)


def _write_film(path: Path, gop: int, seed: int) -> None:
    av = import_av()
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (HEIGHT // 8 + 8, WIDTH // 8 + 40, 3), dtype=np.uint8)
    scene = coarse.repeat(8, 0).repeat(8, 1)
    noise = rng.integers(-6, 7, (8, HEIGHT, WIDTH, 1), dtype=np.int16)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
        for t, grain in islice(enumerate(cycle(noise)), SECONDS * FPS):
            frame = scene[t // 8 : t // 8 + HEIGHT, t : t + WIDTH] + grain
            disc = (x - 2 * t % WIDTH) ** 2 + (y - HEIGHT // 2) ** 2 < 40**2
            frame = np.where(disc[..., None], np.array([230, 40, 40]), frame)
            picture = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
