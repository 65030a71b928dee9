"""An HDF5 file that is filled step by step, and goes on after any interruption where it was.

The arrays get their final size and their place in the file before the first value is known
(contiguous layout, early allocation), and the HDF5 library closes the file. From then on values go
straight to their byte offsets, which HDF5 tells, so that no moment of dying can leave its
structures half-written. Beside the unfinished `.NAME.KEY.partial` stands `.NAME.KEY.steps` with the
number of steps that are safely on disk. KEY stands for all that decides what the file will hold:
other inputs never go on where these were.
"""

import errno
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


class Filling:
    """The unfinished file, open for one process at a time; `steps` of it are done."""

    def __init__(
        self,
        out: Path,
        key: str,
        arrays: Mapping[str, tuple[tuple[int, ...], type]],
        known: Mapping[str, np.ndarray],
        attributes: Mapping[str, str | int],
    ):
        """Says what the file will hold.

        Args:
            out: its name when it is finished.
            key: letters and digits, the same for the same contents only.
            arrays: shape and dtype of each dataset to fill, by name.
            known: datasets that are there from the start.
            attributes: of the file.
        """
        self.out, self.steps = out, 0
        self.path = out.with_name(f".{out.name}.{key}.partial")
        self._steps_path = out.with_name(f".{out.name}.{key}.steps")
        self._arrays, self._known, self._attributes = arrays, known, attributes

    def __enter__(self) -> "Filling":
        """Opens what an earlier run left, or makes the file.

        Raises:
            OSError: the folder can't be written, the disk is full, or another process is at it.
        """
        try:
            self._steps_file = os.fdopen(
                os.open(self._steps_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b"
            )
        except OSError as error:
            raise OSError(f"{self.out.parent} can't be written: {error.strerror}") from None
        try:
            if fcntl:
                fcntl.flock(self._steps_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists():
                self._make()
            self.steps = int(self._steps_file.read() or 0)
            self._places = self._find_places()
            self._file = self.path.open("r+b", buffering=0)
        except BlockingIOError:
            self._steps_file.close()
            raise OSError(f"{self.out} is being written by another process") from None
        except BaseException:
            self._steps_file.close()
            if not self.path.exists():
                self._steps_path.unlink(missing_ok=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._steps_file.close()

    def _make(self) -> None:
        """Makes the file; it has its name `.partial` only once its structures are on disk."""
        self._steps_file.truncate(0)
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_layout(h5py.h5d.CONTIGUOUS)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        temporary = self.path.with_suffix(".tmp")
        try:
            with h5py.File(temporary, "w") as file:
                file.attrs.update(self._attributes)
                for name, values in self._known.items():
                    file.create_dataset(name, data=values)
                for name, (shape, dtype) in self._arrays.items():
                    file.create_dataset(name, shape, dtype, dcpl=early)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except (OSError, RuntimeError) as error:  # h5py makes a RuntimeError of a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"{self.path.parent} can't take {self.out.name}: {error}") from None

    def _find_places(self) -> dict[str, tuple[int, int]]:
        """Of each array its first byte in the file, and the bytes of a row."""
        with h5py.File(self.path, "r") as file:
            sets = {name: file[name] for name in self._arrays}
            return {
                name: (data.id.get_offset(), math.prod(data.shape[1:]) * data.dtype.itemsize)
                for name, data in sets.items()
            }

    def write(self, name: str, row: int, values: bytes | np.ndarray) -> None:
        """Writes rows of an array, from `row` on.

        Args:
            name: of the array.
            row: the first.
            values: in the array's dtype, in C order.

        Raises:
            OSError: the disk is full, or broken.
        """
        offset, row_bytes = self._places[name]
        rest = memoryview(values).cast("B")
        with self._advising():
            self._file.seek(offset + row * row_bytes)
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self, steps: int) -> None:
        """Notes that so many steps are done, once all that they wrote is on disk."""
        with self._advising():
            os.fsync(self._file.fileno())
            self._steps_file.seek(0)
            self._steps_file.write(b"%020d" % steps)
            self._steps_file.flush()
        self.steps = steps

    def publish(self) -> None:
        """Gives the file its name."""
        with self._advising():
            os.fsync(self._file.fileno())
        os.replace(self.path, self.out)
        self._steps_path.unlink()

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Says what to do about a disk that is full."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "make room and run this again, it goes on from there" if full else error
            raise OSError(f"{self.path} could not be written to its end: {advice}") from None
