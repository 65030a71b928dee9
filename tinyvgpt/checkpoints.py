"""The files that a training run resumes from: written whole, verified when read, the last few kept.

A checkpoint is `checkpoint-0001000.pt` in the run's folder, the state after so many steps. It is
what torch.save writes, a zip archive, and in the place for the archive's comment (PKWARE's
APPNOTE.TXT, §4.3.16) the CRC-32 of the whole file before it. The archive has a CRC-32 for each
tensor too, but torch.load doesn't look at them, and they don't cover the archive's own directory: a
flipped bit there may give other tensors without an error. A damaged checkpoint is set aside as
`….pt.damaged`, and the one before is used. Chapter 16 reads this file.

Shapes: none of its own.
"""

import errno
import os
import re
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tinyvgpt.store import write_atomically

NAME = re.compile(r"checkpoint-(\d{7,})\.pt")
SET_ASIDE = re.compile(r"checkpoint-(\d{7,})\.pt\.damaged")
LEFT_OVER = re.compile(r"\.checkpoint\S*\.pt\.\d+-[0-9a-f]+\.(tmp|old)")  # of write_atomically
COMMENT = b"crc32 %08x"
COMMENT_SIZE = len(COMMENT % 0)
NO_COMMENT = b"\0\0"  # how an archive without a comment ends: its length, 16 bits
CHUNK = 2**24  # bytes read at a time
LEAVES = {Tensor, torch.nn.Parameter, bool, int, float, str, type(None)}


class DamagedError(Exception):
    """Says what is wrong with a checkpoint."""


class Checkpoints:
    """The checkpoints of one run.

    Several processes may load at the same time. One of them saves, and only when all have loaded:
    loading removes temporary files, as it finds nobody's but those of a run that was killed.
    """

    def __init__(self, folder: str | Path, keep: int):
        """Keeps the last `keep` checkpoints in `folder`; ValueError if that is none."""
        if keep < 1:
            raise ValueError(f"{keep} checkpoints are to be kept, must be at least 1")
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Writes a checkpoint; once it is safely on disk, removes the oldest beyond `keep`.

        Damaged files that `load` has set aside go when their step is reached again.

        Args:
            step: steps done; stored under "step", beside `content`.
            content: tensors, numbers, strings, None, and dicts, lists and tuples of them.

        Returns:
            The file.

        Raises:
            TypeError: for content of other types, which could not be loaded.
            OSError: if it can't be written; nothing is left behind, older ones are untouched.
        """
        check_loadable(content)
        path = self.folder / f"checkpoint-{step:07d}.pt"
        try:
            write_atomically({path: lambda temporary: _write({**content, "step": step}, temporary)})
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch says the disk is full
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"{path} could not be written: {reason}") from None
        older = [file for file in self._files(NAME) if _step_of(file) < step]
        outdone = [file for file in self._files(SET_ASIDE) if _step_of(file) <= step]
        for file in (*older[self.keep - 1 :], *outdone):
            file.unlink(missing_ok=True)
        return path

    def load(self, needed: Iterable[str] = ()) -> tuple[Path, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole, to the CPU.

        Newer ones, which are damaged, are renamed to `….pt.damaged`, with a warning each. What a
        process left that was killed while saving is removed.

        Args:
            needed: keys without which a checkpoint counts as damaged.

        Returns:
            The file and its content, with "step"; None if there are no checkpoints.

        Raises:
            ValueError: if all are damaged; they stay, as starting again is not ours to decide.
            OSError: if the folder or a file can't be read, or a file not be renamed or removed.
        """
        for file in self._files(LEFT_OVER):
            file.unlink(missing_ok=True)
        damaged: dict[Path, str] = {}
        for path in self._files(NAME):
            try:
                content = read_verified(path, needed)
            except FileNotFoundError:  # set aside just now by another process of the run
                continue
            except DamagedError as error:
                damaged[path] = str(error)
                continue
            for file, wrong in damaged.items():
                _set_aside(file, wrong, path)
            return path, content
        if damaged:
            found = "; ".join(f"{file.name}: {wrong}" for file, wrong in damaged.items())
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged; remove them to start again: {found}"
            )
        return None

    def newest(self) -> Path | None:
        """The checkpoint of the highest step, going by its name; None if there are none."""
        return next(iter(self._files(NAME)), None)

    def _files(self, pattern: re.Pattern) -> list[Path]:
        """The folder's files of such names, those of the highest steps first."""
        try:
            files = [file for file in self.folder.iterdir() if pattern.fullmatch(file.name)]
        except FileNotFoundError:
            return []
        return sorted(files, key=_step_of, reverse=True)


def read_verified(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, after comparing all its bytes with their checksums.

    Raises:
        DamagedError: if it isn't what was saved, or has none of a key in `needed`.
        OSError: if it can't be read.
    """
    with open(path, "rb") as file:  # outside `try`: a file that may not be opened isn't damaged
        try:
            found = COMMENT % _checksum(file, path.stat().st_size - COMMENT_SIZE)
            comment = file.read(COMMENT_SIZE + 1)
        except OSError as error:
            if error.errno != errno.EIO:  # a bad place on the disk
                raise
            raise DamagedError("unreadable in places") from None
    if not comment.startswith(COMMENT[:6]):
        raise DamagedError("cut short, or another kind of file")
    if comment != found:
        raise DamagedError("its checksum is another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever content it refuses
        if "DefaultCPUAllocator" in str(error):  # too little memory
            raise
        raise DamagedError(f"not a checkpoint, {type(error).__name__}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"holds a {type(content).__name__}, not a dict")
    missing = [key for key in ("step", *needed) if key not in content]
    if missing:
        raise DamagedError(f"without {', '.join(missing)}")
    if content["step"] != _step_of(path):
        raise DamagedError(f"of step {content['step']!r:.20}")
    return content


def check_loadable(content: Any, where: str = "content") -> None:
    """Raises TypeError for what torch.load would refuse as unsafe, such as NumPy's numbers."""
    if type(content) in (dict, OrderedDict):
        for key, value in content.items():
            check_loadable(key, f"a key of {where}")
            check_loadable(value, f"{where}[{key!r}]")
    elif type(content) in (list, tuple):
        for index, value in enumerate(content):
            check_loadable(value, f"{where}[{index}]")
    elif type(content) not in LEAVES:
        raise TypeError(
            f"{where} is a {type(content).__module__}.{type(content).__name__}; a checkpoint holds "
            "tensors, numbers, strings, None, and dicts, lists and tuples of them"
        )


def _write(content: dict[str, Any], path: Path) -> None:
    """torch.save, and the file's checksum as the archive's comment."""
    torch.save(content, path)
    with open(path, "r+b") as file:
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        assert file.read() == NO_COMMENT
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(COMMENT_SIZE.to_bytes(2, "little"))
        file.seek(0)
        file.write(COMMENT % _checksum(file, path.stat().st_size))


def _checksum(file: BinaryIO, size: int) -> int:
    """CRC-32 of a file's next `size` bytes; the file is left after them."""
    crc = 0
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc


def _sync_folder(folder: Path) -> None:
    """Puts a new file's name on disk as well, before older files go."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(opened)


def _set_aside(path: Path, wrong: str, used: Path) -> None:
    """Renames a damaged checkpoint and says so."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process of the run has done it
        return
    warnings.warn(
        f"{path} is damaged ({wrong}): going on from {used.name}; it is kept as {aside.name}",
        stacklevel=3,
    )


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name; 0 where there is none."""
    digits = re.search(r"-(\d{7,})\.pt", path.name)
    return int(digits[1]) if digits else 0
