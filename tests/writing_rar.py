"""Writes RAR 5 archives, uncompressed, with whatever names and links a test wants in them.

Format: RARLAB's technote.txt for RAR 5.0. A header is its CRC-32, its size, its type and flags,
then fields; numbers are of 7 bits a byte, the lowest first, the high bit says that more follow.
"""

import zlib
from pathlib import Path

SIGNATURE = b"Rar!\x1a\x07\x01\x00"
MAIN, FILE, END = 1, 2, 5
EXTRA, DATA = 1, 2  # flags of a header: such an area follows
FOLDER, CRC = 1, 4  # flags of a file
UNIX, STORED, REDIRECTION = 1, 0, 5
SYMLINK, HARD_LINK = 1, 4  # kinds of redirection


def number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def header(kind, flags, fields, data=b""):
    body = number(kind) + number(flags) + fields
    body = number(len(body)) + body
    return zlib.crc32(body).to_bytes(4, "little") + body + data


def member(name, content=b"", mode=0o100644, link=None):
    """One file, folder (by its mode) or link (a kind and a target)."""
    name, extra = name.encode(), b""
    if link:
        kind, target = link[0], link[1].encode()
        record = number(REDIRECTION) + number(kind) + number(0) + number(len(target)) + target
        extra = number(len(record)) + record
    folder = mode & 0o170000 == 0o040000
    flags = DATA | (EXTRA if extra else 0)
    fields = (number(len(extra)) if extra else b"") + number(len(content))
    fields += number(FOLDER if folder else CRC) + number(len(content)) + number(mode)
    if not folder:
        fields += zlib.crc32(content).to_bytes(4, "little")
    fields += number(STORED) + number(UNIX) + number(len(name)) + name
    return header(FILE, flags, fields + extra, content)


def write_rar(path, members):
    """Writes an archive of what `member` has made."""
    parts = [SIGNATURE, header(MAIN, 0, number(0)), *members, header(END, 0, number(0))]
    Path(path).write_bytes(b"".join(parts))
    return Path(path)
