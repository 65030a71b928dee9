"""What may come out of an archive: plain files and folders below the target, nothing else.

An archive names the files that it holds, and nothing keeps it from naming `../../.bashrc`, or from
holding a link that a later member is written through. So every member is judged before anything is
written, and what was written is looked at once more.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Member:
    """A plain file or folder in an archive."""

    name: str  # with slashes, relative
    size: int  # bytes, unpacked
    is_folder: bool


def check_name(name: str, archive: Path) -> None:
    """Raises ValueError unless a member's name leads to a place below the target, everywhere."""
    if name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name):
        refuse(archive, name, "has an absolute path")
    if ".." in re.split(r"[/\\]", name):
        refuse(archive, name, "leads out of its folder")
    if not name or "\\" in name or not name.isprintable():
        refuse(archive, name, "has no name, or one with a backslash or an unprintable character")


def check_mode(mode: int, name: str, archive: Path) -> None:
    """Raises ValueError unless a Unix file mode is of a file or folder, or says nothing."""
    kinds = {
        stat.S_IFLNK: "is a symbolic link",
        stat.S_IFCHR: "is a device",
        stat.S_IFBLK: "is a device",
        stat.S_IFIFO: "is a named pipe",
        stat.S_IFSOCK: "is a socket",
    }
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        refuse(archive, name, kinds.get(kind, "is of an unknown kind"))


def refuse(archive: Path, name: str, fault: str) -> None:
    """Raises ValueError: which archive is refused, for which member and why."""
    raise ValueError(
        f"{archive} is refused: its member {name!r} {fault}; "
        "only plain files and folders below the target are unpacked"
    )


def check_unpacked(folder: Path, members: Iterable[Member], archive: Path) -> None:
    """Raises ValueError unless `folder` holds the members' files, whole, and nothing else."""
    expected = {PurePosixPath(m.name).as_posix(): m.size for m in members if not m.is_folder}
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            status = path.lstat()
            inside = path.relative_to(folder).as_posix()
            check_mode(status.st_mode, inside, archive)
            if stat.S_ISREG(status.st_mode):
                found[inside] = status.st_size
                if status.st_nlink > 1:
                    refuse(archive, inside, "is a hard link")
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{archive} can't be unpacked: {name!r} came out with {found.get(name, 'no')} "
                f"bytes, the archive lists {expected.get(name, 'no')}"
            )
