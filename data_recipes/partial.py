"""A file on its way: the bytes that have come, and of which version of the file they are.

Both survive the process that wrote them, at any moment: the version is on disk before the first of
its bytes, and is gone before they are.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Version:
    """What a server says of a file."""

    url: str | None = None
    etag: str | None = None
    modified: str | None = None  # Last-Modified, as it was sent
    size: int | None = None  # bytes of the whole file

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, or else the date."""
        strong = self.etag and not self.etag.startswith("W/")
        return self.etag if strong else self.modified

    def same(self, etag: str | None, modified: str | None) -> bool:
        """Whether an answer with these headers is of this version, as far as it says."""
        pairs = ((self.etag, etag), (self.modified, modified))
        return all(mine == theirs for mine, theirs in pairs if mine and theirs)

    def named_by(self, etag: str | None, modified: str | None) -> bool:
        """Whether an answer with these headers says that it is of this version."""
        return etag == self.etag is not None or modified == self.modified is not None


class Partial:
    """`.NAME.partial` and `.NAME.partial.json` beside a target, open for one process at a time."""

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(f".{target.name}.partial")
        self._record = target.with_name(f".{target.name}.partial.json")
        self.version = Version()  # nothing known

    def __enter__(self) -> "Partial":
        """Opens it, with what an earlier run has left.

        Raises:
            OSError: the folder can't be written, or another process is at it.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("ab", buffering=0)
        except OSError as error:
            raise OSError(f"{self.target.parent} can't be written: {error.strerror}") from None
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise OSError(f"{self.target.name} is being fetched by another process") from None
        self.size = self.path.stat().st_size
        self._read_record()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self.size == 0:
            self._record.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def _read_record(self) -> None:
        """Takes up the version of the bytes that are there; gives up bytes of no known version."""
        try:
            self.version = Version(**json.loads(self._record.read_text(encoding="utf-8")))
            whole = self.size if self.version.size is None else self.version.size
            if self.size > whole:
                self.clear()
        except (OSError, ValueError, TypeError):
            self.clear()

    def start(self, version: Version) -> None:
        """Forgets what there is, and begins with a version's first byte."""
        self.clear()
        self._write_record(version)

    def append(self, chunk: bytes) -> None:
        """Adds bytes; after an error those that were written count."""
        rest = memoryview(chunk)
        while rest:
            written = self._file.write(rest) or 0
            self.size += written
            rest = rest[written:]

    def ended(self) -> None:
        """Notes that the file is as long as what has come, where its size wasn't known before."""
        self._write_record(Version(**{**asdict(self.version), "size": self.size}))

    def is_whole(self, url: str) -> bool:
        """Whether all bytes of the version that `url` had have come."""
        return self.version.url == url and self.size == self.version.size

    def head(self) -> bytes:
        """The first bytes."""
        with self.path.open("rb") as file:
            return file.read(1024)

    def clear(self) -> None:
        """Forgets everything."""
        self._record.unlink(missing_ok=True)
        self._file.truncate(0)
        self.size, self.version = 0, Version()

    def publish(self) -> None:
        """Gives the file its name."""
        os.fsync(self._file.fileno())
        os.replace(self.path, self.target)
        self._record.unlink(missing_ok=True)

    def _write_record(self, version: Version) -> None:
        temporary = self._record.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(version)), encoding="utf-8")
        os.replace(temporary, self._record)
        self.version = version
