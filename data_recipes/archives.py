"""Archives from strangers, .tar (.gz, .bz2, .xz), .zip and .rar: unpacked whole or not at all.

An archive is looked through before anything is written: one member that is not a plain file or
folder below the target (members.py) refuses all of it. Then it is unpacked under another name,
checked against its list, and renamed.
"""

import glob
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path
from typing import BinaryIO

import rar
from fetch import check_space
from members import Member, check_mode, check_name, check_unpacked, refuse
from tqdm import tqdm

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
UNREADABLE = (*DAMAGED, RuntimeError)  # encrypted, or compressed in a way that Python doesn't know


def extract(archive: Path, folder: Path, *, progress: bool = True) -> Path:
    """Unpack an archive into a folder of its own, which appears when it is complete.

    Args:
        archive: .tar, compressed or not, .zip or .rar; told by its content.
        folder: must not exist. What an interrupted run has left is thrown away.
        progress: shows a bar on stderr.

    Returns:
        folder.

    Raises:
        ValueError: a member is refused, the archive is damaged or of an unknown kind, the folder
            exists, or nothing is installed that unpacks .rar.
        OSError: too little space, or the folder can't be written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists, {archive.name} is unpacked into a folder of its own")
    listing, unpack = FORMATS[kind_of(archive)]
    with _named(archive):
        members = listing(archive)
    check_space(folder.parent, sum(member.size for member in members), f"unpacking {archive.name}")
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.unpacking.*"):
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: after a kill, unrar may go on for a moment in the former one.
    unpacking = folder.with_name(f".{folder.name}.unpacking.{os.getpid()}")
    unpacking.mkdir(parents=True)
    try:
        with _named(archive), _bar(archive, len(members), progress) as bar:
            unpack(archive, unpacking, bar)
        check_unpacked(unpacking, members, archive)
        os.replace(unpacking, folder)
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)
    return folder


def kind_of(archive: Path) -> str:
    """ "rar", "zip" or "tar", by the content; ValueError for anything else."""
    with archive.open("rb") as file:
        head = file.read(8)
    if head.startswith(rar.MAGIC):
        return "rar"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if tarfile.is_tarfile(archive):
        return "tar"
    raise ValueError(f"{archive} is no .tar (.gz, .bz2, .xz), .zip or .rar archive, or is damaged")


def check_tar_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Raises ValueError unless a member is a plain file or folder that stays below the target.

    For whoever streams a tar from a pipe; of a file `tar_members` yields them, checked.
    """
    check_name(member.name, archive)
    kinds = {
        tarfile.SYMTYPE: "is a symbolic link",
        tarfile.LNKTYPE: "is a hard link",
        tarfile.CHRTYPE: "is a device",
        tarfile.BLKTYPE: "is a device",
        tarfile.FIFOTYPE: "is a named pipe",
    }
    if not (member.isreg() or member.isdir()):
        refuse(archive, member.name, kinds.get(member.type, "is of an unknown kind"))


def tar_members(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar, each checked, to its true end.

    To `tarfile` a damaged header in mid-archive is the end, as if no member followed.

    Raises:
        ValueError: a member is refused.
        tarfile.ReadError: the tar is cut, or a header is damaged.
    """
    for member in tar:
        check_tar_member(member, archive)
        yield member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(
            f"at byte {tar.offset} is neither a member nor the zeros that close a tar"
        )


def _list_tar(archive: Path) -> list[Member]:
    with tarfile.open(archive) as tar:
        return [Member(m.name, m.size, m.isdir()) for m in tar_members(tar, archive)]


def _unpack_tar(archive: Path, into: Path, bar: tqdm) -> None:
    with tarfile.open(archive) as tar:
        for member in tar_members(tar, archive):  # it may have changed since it was listed
            content = None if member.isdir() else tar.extractfile(member)
            _write(content, into / member.name)
            bar.update()


def check_zip_member(member: zipfile.ZipInfo, archive: Path) -> None:
    """Raises ValueError unless a member is a plain file or folder that stays below the target."""
    check_name(member.orig_filename, archive)
    check_mode(member.external_attr >> 16, member.filename, archive)


def _list_zip(archive: Path) -> list[Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            check_zip_member(member, archive)
        return [Member(m.filename, m.file_size, m.is_dir()) for m in file.infolist()]


def _unpack_zip(archive: Path, into: Path, bar: tqdm) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            check_zip_member(member, archive)
            path = into / member.filename
            if member.is_dir():
                _write(None, path)
            else:
                with file.open(member) as content:
                    _write(content, path)
            bar.update()


def _write(content: BinaryIO | None, path: Path) -> None:
    """Writes a file with the owner's and permissions of any new file; or, of None, a folder."""
    (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
    if content is not None:
        with path.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Says of which archive it is that a module finds it damaged."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"{archive} is damaged, truncated or encrypted: {error}") from None


def _bar(archive: Path, total: int, progress: bool) -> tqdm:
    title = f"unpacking {archive.name}"
    return tqdm(
        desc=title, total=total, unit="file", mininterval=1, file=sys.stderr, disable=not progress
    )


FORMATS = {  # kind → what lists and checks its members, what unpacks them
    "tar": (_list_tar, _unpack_tar),
    "zip": (_list_zip, _unpack_zip),
    "rar": (rar.listing, rar.unpack),
}
