"""Clips to tokens, once and for all: in memory, or as shards on disk that a GPT trains from.

The tokenizer is frozen while the GPT trains (VideoGPT, section 3.2), so a clip's tokens never
change: encoding them beforehand saves the tokenizer's work in every step. `tinyvgpt encode` is
`encode_folder`. Chapter 09 uses both.

Shapes: B batch · n clips · T H W C frames, pixels, channels · t h w latent grid · K codes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinyvgpt import video
from tinyvgpt.data import Dataset, batches
from tinyvgpt.data.tokens import (
    INDEX,
    JOB,
    VERSION,
    TokenFolder,
    Tokens,
    open_shard,
    shard_path,
)
from tinyvgpt.progress import hidden
from tinyvgpt.store import write_atomically
from tinyvgpt.videogpt import evaluating
from tinyvgpt.vqvae import VQVAE

ENCODED_AT_A_TIME = 64  # clips
SHARD_BATCHES = 64  # batches in a shard: 4,096 clips


def fingerprint(codes: Tensor) -> str:
    """Twelve hexadecimal digits that tell one codebook (K, D) from another."""
    return hashlib.sha256(codes.cpu().numpy().tobytes()).hexdigest()[:12]


def encode(vqvae: VQVAE, batch: dict[str, Tensor]) -> Tensor:
    """Tokens (B, t, h, w) of a batch's clips, in float32 whatever the precision of training."""
    with torch.autocast(batch["video"].device.type, enabled=False):
        return vqvae.encode(video.to_model(batch["video"]))


def encode_dataset(
    vqvae: VQVAE, data: Dataset, clips: int, first_frames: int, device: torch.device
) -> Tokens:
    """The first `clips` clips of a dataset as tokens, kept on `device`.

    Of `video` the `first_frames` first ones are kept, which a model may be conditioned on.
    """
    parts: dict[str, list[Tensor]] = {}
    for start in tqdm(
        range(0, min(clips, len(data)), ENCODED_AT_A_TIME), desc="encoding", disable=hidden()
    ):
        stop = min(start + ENCODED_AT_A_TIME, clips, len(data))
        batch = data.batch(range(start, stop), device)
        tokens = encode(vqvae, batch).to(torch.int32)
        first = batch["video"][:, :first_frames].clone()
        for name, value in {**batch, "video": first, "tokens": tokens}.items():
            parts.setdefault(name, []).append(value)
    return Tokens({name: torch.cat(values) for name, values in parts.items()}, **about(data))


def about(data: Dataset) -> dict[str, Any]:
    """What a dataset says of its clips."""
    return {n: getattr(data, n) for n in ("channels", "frames", "resolution", "label_names")}


def encode_folder(
    vqvae: VQVAE,
    data: Dataset,
    folder: str | Path,
    *,
    clips: int | None = None,
    first_frames: int = 1,
    workers: int = 0,
    device: str | torch.device = "cpu",
    source: str = "",
) -> int:
    """Encodes a dataset into shards in `folder`, going on where an earlier call was stopped.

    Args:
        vqvae: trained tokenizer.
        data: clips of its length, size and channels, in the order in which they are stored.
        folder: of one split, such as tokens/train; `data.TokenFolder` reads it.
        clips: the first so many clips are encoded; by default all.
        first_frames: how many frames of each clip are stored as pixels, for models conditioned on
            them.
        workers: processes that load clips; see `data.batches`.
        device: where to encode.
        source: what the clips are, for the record; another source is not mixed in.

    Returns:
        The number of clips in the folder.

    Raises:
        ValueError: the data doesn't fit the tokenizer or are tokens already, or the folder holds
            tokens of other clips or of another tokenizer (says what differs).
        OSError: writing fails; finished shards stay.
    """
    if isinstance(data, Tokens | TokenFolder):
        raise ValueError("the data are tokens already; clips are needed")
    check_data(data, vqvae)
    clips = len(data) if clips is None else min(clips, len(data))
    if clips < 1 or not 0 <= first_frames <= data.frames:
        raise ValueError(
            f"clips is {clips} and first_frames {first_frames}, at least 1 clip and 0 … "
            f"{data.frames} frames are needed"
        )
    folder = Path(folder)
    job = _job(vqvae, data, clips, first_frames, source)
    indexed = _claim(folder, job)
    done = _finished_shards(folder, indexed or ["tokens"])
    if indexed and done * job["shard_size"] >= clips:
        return clips
    start = done * SHARD_BATCHES
    stream = batches(
        data, ENCODED_AT_A_TIME, start=start, shuffle=False, workers=workers, device=device
    )
    with torch.no_grad(), evaluating(vqvae.to(device)):
        _encode_shards(vqvae, stream, folder, done, clips, first_frames)
    names = [path.name.rsplit("-", 1)[0] for path in folder.glob("*-00000.npy")]
    _write_json(folder / INDEX, {**job, "arrays": sorted(names)})
    (folder / JOB).unlink(missing_ok=True)
    return clips


def _job(vqvae: VQVAE, data: Dataset, clips: int, first_frames: int, source: str) -> dict[str, Any]:
    """What index.json says of an encoding, as JSON gives it back: lists for tuples."""
    job = {
        "version": VERSION,
        **about(data),
        "clips": clips,
        "source": source,
        "looks": looks(data, clips),
        "first_frames": first_frames,
        "shard_size": ENCODED_AT_A_TIME * SHARD_BATCHES,
        "codebook": fingerprint(vqvae.codebook.codes),
        "vqvae": asdict(vqvae.config),
    }
    return json.loads(json.dumps(job))


def looks(data: Dataset, clips: int) -> str:
    """Twelve hexadecimal digits of sixteen clips (or their tokens) spread over the first `clips`.

    They tell data that have changed under the same name.
    """
    shown = np.unique(np.linspace(0, clips - 1, 16).astype(int))
    batch = data.batch(shown)
    values = batch["tokens" if "tokens" in batch else "video"]
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:12]


def check_data(data: Dataset, vqvae: VQVAE) -> None:
    """Raises ValueError unless clips have the model's channels, length and size."""
    for name in ("channels", "frames", "resolution"):
        found, needed = getattr(data, name), getattr(vqvae.config, name)
        if found != needed:
            raise ValueError(f"the data has {name} {found}, the model needs {needed}")


def _claim(folder: Path, job: dict[str, Any]) -> list[str]:
    """Makes the folder this job's; the names of the arrays if the job was done once, else none.

    Raises:
        ValueError: the folder is another job's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*.tmp"):  # by a process killed while writing
        left_over.unlink()
    for path in (folder / INDEX, folder / JOB):
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text())
            changed = [name for name in job if found.get(name) != job[name]]
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is damaged; remove {folder} to start again") from None
        if changed:
            differences = ", ".join(f"{n} was {found.get(n)}, is {job[n]}" for n in changed)
            raise ValueError(f"{folder} holds other tokens: {differences}")
        if path.name == INDEX:
            (folder / JOB).unlink(missing_ok=True)  # of a process killed in between
            return found["arrays"]
        return []
    _write_json(folder / JOB, job)
    return []


def _finished_shards(folder: Path, names: list[str]) -> int:
    """How many shards are whole, up to the first that isn't.

    While encoding, tokens tell, which are renamed last; later on any array may have been lost.
    """
    number = 0
    while all(open_shard(shard_path(folder, name, number)) is not None for name in names):
        number += 1
    return number


def _encode_shards(
    vqvae: VQVAE,
    stream: Iterator[dict[str, Tensor]],
    folder: Path,
    done: int,
    clips: int,
    first_frames: int,
) -> None:
    """Encodes and writes shard `done` and those after it, of so many clips in all."""
    size = ENCODED_AT_A_TIME * SHARD_BATCHES
    first = done * size
    with tqdm(
        total=clips, initial=min(first, clips), unit="clip", desc="encoding", disable=hidden()
    ) as bar:
        for number, start in enumerate(range(first, clips, size), done):
            rows = min(size, clips - start)
            _write_shard(folder, number, _shard(vqvae, stream, rows, first_frames, bar))


def _shard(
    vqvae: VQVAE, stream: Iterator[dict[str, Tensor]], rows: int, first_frames: int, bar: tqdm
) -> dict[str, np.ndarray]:
    """The next `rows` clips of the stream, encoded; of the last batch no more than belong here."""
    parts: dict[str, list[np.ndarray]] = {}
    small = np.uint16 if vqvae.config.codes <= 2**16 else np.int32
    for start in range(0, rows, ENCODED_AT_A_TIME):
        batch = {name: value[: rows - start] for name, value in next(stream).items()}
        tokens = encode(vqvae, batch).cpu().numpy().astype(small)
        first = batch.pop("video")[:, :first_frames]
        shown = {"video": first} if first_frames else {}
        for name, value in {**batch, **shown}.items():
            parts.setdefault(name, []).append(value.cpu().numpy())
        parts.setdefault("tokens", []).append(tokens)
        bar.update(len(tokens))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> None:
    """Writes a shard's arrays, tokens last: a shard whose tokens are there is whole."""
    order = sorted(arrays, key=lambda name: name == "tokens")
    write_atomically(
        {shard_path(folder, name, number): partial(_save, arrays[name]) for name in order}
    )


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would add .npy to a temporary file's name
        np.save(file, array)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically({path: lambda temporary: temporary.write_text(text)})
