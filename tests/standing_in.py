"""What stands in for bsdtar where none is installed, and for the .rar that it reads."""

import io
import sys
import tarfile

# Stands in for bsdtar where none is installed: the same lists, of a tar behind a RAR signature.
# It trusts the archive entirely, and does otherwise than it says for three names.
FAKE = """#!{python}
import io, os, sys, tarfile, time
flags = next(word for word in sys.argv if word.startswith("-") and word.endswith("f"))
path = sys.argv[sys.argv.index(flags) + 1]
file = io.BytesIO(open(path, "rb").read()[6:])
letters = dict(zip((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                    tarfile.CHRTYPE), "lhdpc"))
with tarfile.open(fileobj=file) as tar:
    for member in tar:
        name = member.name.replace("\\\\", "\\\\\\\\").replace("\\n", "\\\\n")
        if "x" in flags:
            into = sys.argv[sys.argv.index("-C") + 1]
            path = os.path.join(into, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if member.isdir():
                os.makedirs(path, exist_ok=True)
            elif name == "swapped":
                os.symlink("/etc/hostname", path)
            elif name == "linked":
                os.link(os.path.join(into, "top.txt"), path)
            elif name == "left out":
                pass
            else:
                open(path, "wb").write(tar.extractfile(member).read())
            print("x", name, file=sys.stderr, flush=True)
            time.sleep(float(os.environ.get("STAND_IN_PAUSE", 0)))
        elif "v" in flags:
            to = {{"l": " -> ", "h": " link to "}}.get(letters.get(member.type))
            mode = letters.get(member.type, "-") + "rw-r--r--"
            print(f"{{mode}}  0 0  0  {{member.size}} Jan  1  1970 {{name}}"
                  + (to + member.linkname if to else ""))
        else:
            print(name)
"""


def tar_bytes(members):
    """A tar of (name, content or TarInfo's fields) pairs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            fields = content if isinstance(content, dict) else {"size": len(content)}
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def stand_in_rar(path, members):
    """What the stand-in takes for a .rar: a tar behind its signature."""
    path.write_bytes(b"Rar!\x1a\x07" + tar_bytes(members))
    return path


def put_bsdtar(folder):
    """Makes the stand-in an executable in a folder, to be put on PATH."""
    tool = folder / "bsdtar"
    tool.write_text(FAKE.format(python=sys.executable))
    tool.chmod(0o755)


def tree(folder):
    """The bytes of every file in a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
