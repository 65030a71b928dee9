"""BAIR's TFRecord files, on disk or inside the tar: which there are, and where their clips are.

The original's tar holds `softmotion30_44k/{train,test}/traj_….tfrecords`. It is not compressed, so
that a member is a range of its bytes: it is read there and never unpacked. A split is the name of
the nearest folder called `train` or `test`. Clips come in the order of file names, then of records.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from archives import tar_members
from tfrecords import read_records, scan_records

SPLITS = ("train", "test")
TFRECORD_NAME = re.compile(r".+\.tfrecords?(-\d+-of-\d+)?")


@dataclass(frozen=True)
class RecordFile:
    """A TFRecord file."""

    path: Path  # of the file itself, or of the tar that it is in
    member: tarfile.TarInfo | None  # of the tar
    split: str  # "train" or "test"
    name: str  # without its folders

    def __str__(self) -> str:
        """Return what errors call it."""
        return f"{self.path}:{self.member.name}" if self.member else str(self.path)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens it for reading; offsets count from its own first byte."""
        if not self.member:
            with self.path.open("rb") as file:
                yield file
            return
        with tarfile.open(self.path, "r:") as tar, tar.extractfile(self.member) as file:
            yield file


class Clip(NamedTuple):
    """Where a clip is."""

    file: RecordFile
    offset: int  # of its record in the file
    bytes: int  # of the record's data
    checksum: int  # of the record's data, as it stands in the file
    frames: int


def find(paths: Sequence[Path]) -> list[RecordFile]:
    """Lists the TFRecord files among files, folders and tars: train before test, by file name.

    Raises:
        ValueError: there is none, one has no split or is there twice, or a tar is damaged or
            refused for what it holds.
        OSError: a path doesn't exist or may not be read.
    """
    files = [file for path in paths for file in _files_at(path)]
    if not files:
        raise ValueError(f"no TFRecord file (*.tfrecords) in {', '.join(map(str, paths))}")
    places = set()
    for file in files:
        place = file.path.resolve(), file.member and file.member.name
        if place in places:
            raise ValueError(f"{file} is there twice")
        places.add(place)
    files.sort(key=lambda file: (SPLITS.index(file.split), file.name, str(file)))
    return files


def _files_at(path: Path) -> Iterator[RecordFile]:
    if path.is_dir():
        for folder, _, names in os.walk(path, onerror=_raise):
            for name in filter(TFRECORD_NAME.fullmatch, names):
                yield _plain_file(Path(folder, name))
    elif TFRECORD_NAME.fullmatch(path.name):
        yield _plain_file(path)
    else:
        yield from _members(path)


def _raise(error: OSError) -> None:
    raise error


def _plain_file(path: Path) -> RecordFile:
    split = _split(path.absolute().parent.parts, str(path))
    return RecordFile(path, None, split, path.name)


def _members(path: Path) -> Iterator[RecordFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar_members(tar, path):
                name = PurePosixPath(member.name)
                if member.isreg() and TFRECORD_NAME.fullmatch(name.name):
                    split = _split(name.parent.parts, f"{path}:{name}")
                    yield RecordFile(path, member, split, name.name)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no TFRecord file (*.tfrecords) and no whole, uncompressed tar: {error}"
        ) from None


def _split(folders: Sequence[str], name: str) -> str:
    for folder in reversed(folders):
        if folder in SPLITS:
            return folder
    raise ValueError(f"{name} is in no folder named train or test, which would give its split")


def clips_of(file: RecordFile, frames_of: Callable[[bytes, str], int]) -> Iterator[Clip]:
    """Yields the clips of a file, reading little of it.

    A record of BAIR's is as long as all others, since each frame takes as many bytes; so frames are
    counted once for each length of a record that occurs. Converting a record finds out if it has
    another number of frames after all.

    Args:
        file: its lengths' checksums are verified, its data's where a record is read.
        frames_of: counts a record's frames; takes its data and what errors call it.

    Raises:
        ValueError: the file is damaged, or what `frames_of` raises.
    """
    known: dict[int, int] = {}
    with file.open() as stream, file.open() as beside:
        for offset, length, checksum in scan_records(stream, str(file)):
            if length not in known:
                known[length] = frames_of(read_at(beside, file, offset), record_name(file, offset))
            yield Clip(file, offset, length, checksum, known[length])


def read_at(stream: BinaryIO, file: RecordFile, offset: int) -> bytes:
    """The data of the record at `offset`; DamagedRecord if a checksum is wrong."""
    stream.seek(offset)
    _, data = next(read_records(stream, str(file)))
    return data


def record_name(file: RecordFile, offset: int) -> str:
    """What errors call a record."""
    return f"{file}, the record at byte {offset}"
