"""Archives from strangers: looked through first, unpacked whole or not at all.

An archive names the files that it holds, and nothing keeps it from naming `../../.bashrc`, or from
holding a link that later members are written through. So every member is looked at before anything
is written, and one that is not a plain file or folder below the target refuses the whole archive.
"""

import re
import tarfile
from pathlib import Path


def check_tar_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Raises ValueError unless a member is a plain file or folder that stays below the target."""
    check_name(member.name, archive)
    if not (member.isreg() or member.isdir()):
        kinds = {
            tarfile.SYMTYPE: "a symbolic link",
            tarfile.LNKTYPE: "a hard link",
            tarfile.CHRTYPE: "a device",
            tarfile.BLKTYPE: "a device",
            tarfile.FIFOTYPE: "a named pipe",
        }
        refuse(archive, member.name, f"is {kinds.get(member.type, 'of an unknown kind')}")


def check_name(name: str, archive: Path) -> None:
    """Raises ValueError unless a member's name leads to a place below the target, everywhere."""
    if name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name):
        refuse(archive, name, "has an absolute path")
    if ".." in re.split(r"[/\\]", name):
        refuse(archive, name, "leads out of its folder")
    if "\\" in name or not name.isprintable():
        refuse(archive, name, "has a backslash or an unprintable character in its name")


def refuse(archive: Path, name: str, fault: str) -> None:
    """Raises ValueError: which archive is refused, for which member and why."""
    raise ValueError(
        f"{archive} is refused, nothing was written: its member {name!r} {fault}; "
        "only plain files and folders below the target are unpacked"
    )
