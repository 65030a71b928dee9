"""RAR archives, through `unrar` (RARLAB's) or `bsdtar` (libarchive's): Python has no reader.

Both write where the members' names say. So the members are listed first, with their types, and
judged as those of other archives are. `unrar` is taken where both are: it verifies every checksum
and reads every .rar. `bsdtar` (3.6.2) reads no solid archives of RAR 4, and doesn't notice a
changed byte in a file that RAR 5 holds uncompressed.
"""

import os
import re
import shutil
import subprocess
from collections import deque
from pathlib import Path

from members import Member, check_name, refuse
from tqdm import tqdm

MAGIC = b"Rar!\x1a\x07"
PROGRESS = ("x ", "Extracting ", "Creating ")  # how a tool's line for a member begins
LINE = r"\S+ +\d+ +\S+ +\S+ +(\d+) +\w{3} +\d+ +[\d:]+"  # bsdtar's: mode, links, owner, group, size
ENVIRONMENT = {"LC_ALL": "C.UTF-8"}  # dates in three fields, names as they are


def find_tool() -> str:
    """Return the path of the tool that unpacks .rar; ValueError if there is none."""
    unrar = shutil.which("unrar")
    if unrar and "Roshal" in _run([unrar]).stdout:  # others of this name can't list types
        return unrar
    if bsdtar := shutil.which("bsdtar"):
        return bsdtar
    raise ValueError(
        "unpacking .rar needs unrar or bsdtar, and neither is installed: try `apt install unrar` "
        "or `apt install libarchive-tools` (Debian, Ubuntu), `brew install libarchive` (macOS; "
        "add its bin to PATH) or `conda install -c conda-forge libarchive`"
    )


def listing(archive: Path) -> list[Member]:
    """Return the members; ValueError if one is no plain file or folder below the target."""
    tool = find_tool()
    list_members = _list_with_unrar if _is_unrar(tool) else _list_with_bsdtar
    members = list_members(tool, archive)
    if not members:
        raise ValueError(f"{archive} holds nothing that {tool} can list")
    return members


def unpack(archive: Path, into: Path, bar: tqdm) -> None:
    """Unpacks a listed archive into a folder; the bar counts its members."""
    tool = find_tool()
    if _is_unrar(tool):
        command = [tool, "x", "-cfg-", "-p-", "-y", "--", archive.absolute(), f"{into}{os.sep}"]
    else:
        flags = ("--no-same-owner", "--no-same-permissions", "-xvf")
        command = [tool, *flags, archive.absolute(), "-C", into]
    last: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | ENVIRONMENT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(PROGRESS):
                bar.update()
            elif line.strip():
                last.append(line.strip())
    if process.returncode != 0:
        raise _failed(archive, tool, " ".join(last))


def _list_with_unrar(tool: str, archive: Path) -> list[Member]:
    """Members by `unrar lt`: a block a member, its lines `key: value`."""
    found = _run([tool, "lt", "-cfg-", "-p-", "--", archive.absolute()])
    if found.returncode != 0:
        raise _failed(archive, tool, found.stderr)
    blocks: list[dict[str, str]] = []
    for line in found.stdout.split("\n"):
        key, colon, value = line.lstrip().partition(": ")
        if key == "Name":
            blocks.append({})
        if blocks and key:
            # unrar prints a line break in a name or a link's target as it is
            if key in blocks[-1] or not colon:
                refuse(archive, blocks[-1]["Name"], "has a line break in its name or its target")
            blocks[-1][key] = value
    members = []
    for block in blocks:
        name, kind = block["Name"], block.get("Type", "unknown")
        check_name(name, archive)
        if kind not in ("File", "Directory"):
            refuse(archive, name, f"is of type {kind!r}")
        members.append(Member(name, int(block.get("Size", 0)), kind == "Directory"))
    return members


def _list_with_bsdtar(tool: str, archive: Path) -> list[Member]:
    """Members by `bsdtar -t`, their names, and `-tv`, lines as of `ls -l`: type, …, size, date."""
    names = _run([tool, "-tf", archive.absolute()])
    lines = _run([tool, "-tvf", archive.absolute()])
    if names.returncode != 0 or lines.returncode != 0:
        raise _failed(archive, tool, names.stderr or lines.stderr)
    kinds = {"l": "is a symbolic link", "h": "is a hard link", "p": "is a named pipe"}
    kinds |= {"b": "is a device", "c": "is a device"}
    members = []
    for name, line in zip(
        names.stdout.split("\n")[:-1], lines.stdout.split("\n")[:-1], strict=True
    ):
        check_name(name, archive)
        if line[0] not in "-d":
            refuse(archive, name, kinds.get(line[0], "is of an unknown kind"))
        if f" {name} link to " in line:
            refuse(archive, name, "is a hard link")
        found = re.fullmatch(LINE, line.removesuffix(f" {name}"))
        if not found:
            raise ValueError(f"{archive} can't be listed: {tool} writes {line!r} of {name!r}")
        members.append(Member(name, int(found[1]), line[0] == "d"))
    return members


def _is_unrar(tool: str) -> bool:
    return Path(tool).stem.lower() == "unrar"


def _run(command: list) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | ENVIRONMENT,
        text=True,
        errors="replace",
        check=False,
    )


def _failed(archive: Path, tool: str, words: str) -> ValueError:
    reason = " ".join(words.split())[-300:] or "no reason given"
    advice = "" if _is_unrar(tool) else " (RARLAB's unrar knows kinds of .rar that bsdtar doesn't)"
    return ValueError(f"{archive} can't be read, {tool} says: {reason}{advice}")
