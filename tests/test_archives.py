"""Archives: whole ones come out as they are, hostile and damaged ones write nothing."""

import contextlib
import gzip
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from standing_in import put_bsdtar, stand_in_rar, tar_bytes, tree
from writing_rar import HARD_LINK, SYMLINK, member, write_rar

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import archives
import rar

FILES = {"top.txt": b"top", "a/b c.txt": b"inner" * 9999, "a/ü.bin": bytes(range(256)), "a/0": b""}
HOSTILE_NAMES = [
    "../evil",
    "a/../../evil",
    "/tmp/evil",
    "//host/evil",
    "C:/evil",
    "c:evil",
    "\\evil",
    "a\\..\\..\\evil",
    "a\\b",
    "a\nb",
    "..",
]

LINKS = {  # what → a member of a tar
    "symbolic link": ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
    "hard link": ("link", {"type": tarfile.LNKTYPE, "linkname": "top.txt"}),
    "device": ("link", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    "named pipe": ("link", {"type": tarfile.FIFOTYPE}),
}


def zip_of(path, members):
    """A zip of (name, content, Unix mode) triples, written without any tidying of names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, mode in members:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.create_system, info.external_attr = 3, mode << 16
            file.writestr(info, content)
    return path


@pytest.fixture
def place(tmp_path):
    """A folder of its own to unpack into, so that what leaves it is seen."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def refused(archive, place, match):
    """Nothing is written: not in the target, not beside it, not above.

    And for a member that is refused by the archive's list unpacking doesn't even begin.
    """
    before = sorted(place.parent.rglob("*"))
    began = AssertionError("it went on to unpacking")
    guard = mock.patch.object(archives, "check_space", side_effect=began)
    listed = guard if "its member" in match else contextlib.nullcontext()
    with listed, pytest.raises(ValueError, match=match) as caught:
        archives.extract(archive, place / "out", progress=False)
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(place.parent.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


def use_tool(monkeypatch, tmp_path, name):
    """Only this tool is on PATH: the real one, or the stand-in as bsdtar."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if name == "stand-in":
        put_bsdtar(folder)
    else:
        found = shutil.which(name)
        if not found or (name == "unrar" and "Roshal" not in rar._run([found]).stdout):
            pytest.skip(f"{name} is not installed (Debian: libarchive-tools has bsdtar)")
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(params=["bsdtar", "unrar", "stand-in"])
def tool(request, monkeypatch, tmp_path):
    use_tool(monkeypatch, tmp_path, request.param)
    return request.param


def rar_of(path, tool, members):
    """A .rar of (name, content or TarInfo's fields) pairs, as the tool reads it."""
    if tool == "stand-in":
        return stand_in_rar(path, members)
    modes = {tarfile.CHRTYPE: 0o020644, tarfile.FIFOTYPE: 0o010644, tarfile.DIRTYPE: 0o040755}
    links = {tarfile.SYMTYPE: SYMLINK, tarfile.LNKTYPE: HARD_LINK}
    made = []
    for name, content in members:
        if isinstance(content, bytes):
            made.append(member(name, content))
        elif (kind := content["type"]) in links:
            mode = 0o120777 if kind == tarfile.SYMTYPE else 0o100644
            made.append(member(name, mode=mode, link=(links[kind], content["linkname"])))
        else:
            made.append(member(name, mode=modes[kind]))
    return write_rar(path, made)


class TestTar:
    @pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
    def test_comes_out_as_it_is(self, tmp_path, place, ending):
        archive = tmp_path / f"some.{ending}"
        plain = tar_bytes([("a", {"type": tarfile.DIRTYPE}), *FILES.items()])
        with (
            tarfile.open(fileobj=io.BytesIO(plain)) as source,
            tarfile.open(archive, "w:" + ending.removeprefix("tar").removeprefix(".")) as tar,
        ):
            for info in source:
                tar.addfile(info, source.extractfile(info) if info.isreg() else None)
        assert archives.extract(archive, place / "out", progress=False) == place / "out"
        assert tree(place / "out") == FILES
        assert [path.name for path in place.iterdir()] == ["out"]

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_names(self, tmp_path, place, name):
        archive = tmp_path / "some.tar"
        archive.write_bytes(tar_bytes([*FILES.items(), (name, b"evil")]))
        refused(archive, place, "is refused: its member '")

    @pytest.mark.parametrize("what", LINKS)
    def test_links_and_devices(self, tmp_path, place, what):
        archive = tmp_path / "some.tar"
        archive.write_bytes(tar_bytes([*FILES.items(), LINKS[what], ("link/passwd", b"x")]))
        refused(archive, place, f"its member 'link' is a {what}")

    def test_members_of_a_stream(self):
        """As who reads a tar from a pipe checks it: what came before the member was read."""
        content = tar_bytes([*FILES.items(), LINKS["hard link"]])
        with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as tar:
            for name in FILES:
                info = tar.next()
                assert info.name == name
                archives.check_tar_member(info, Path("some.tar"))
            with pytest.raises(ValueError, match=r"some\.tar is refused: its member 'link'"):
                archives.check_tar_member(tar.next(), Path("some.tar"))

    @pytest.mark.parametrize("kind", ["tar", "tar.gz"])
    def test_truncated(self, tmp_path, place, kind):
        archive = tmp_path / f"some.{kind}"
        archive.write_bytes(tar_bytes([("big", os.urandom(100_000))]))
        if kind == "tar.gz":
            with tarfile.open(archive, "w:gz") as tar:
                tar.addfile(tarfile.TarInfo("big"), None)
                info = tarfile.TarInfo("more")
                info.size = 100_000
                tar.addfile(info, io.BytesIO(os.urandom(100_000)))
        archive.write_bytes(archive.read_bytes()[:50_000])
        refused(archive, place, "damaged, truncated")

    @pytest.mark.parametrize("kind", ["tar", "tar.gz"])
    def test_members_that_tarfile_would_leave_out(self, tmp_path, place, kind):
        """To it a damaged header in mid-archive, or a cut before one, is the archive's end."""
        plain = tar_bytes([*FILES.items()])
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            begin = tar.getmembers()[2].offset
        pack = gzip.compress if kind == "tar.gz" else bytes
        archive = tmp_path / f"some.{kind}"
        changed = bytes([plain[begin + 3] ^ 1])
        archive.write_bytes(pack(plain[: begin + 3] + changed + plain[begin + 4 :]))
        refused(archive, place, f"damaged, truncated .* at byte {begin} is neither")
        archive.write_bytes(pack(plain[:begin]))
        refused(archive, place, f"damaged, truncated .* at byte {begin} is neither")


class TestZip:
    def test_comes_out_as_it_is(self, tmp_path, place):
        members = [(name, content, 0o100644) for name, content in FILES.items()]
        archive = zip_of(tmp_path / "some.zip", [("a/", b"", 0o040755), *members])
        archives.extract(archive, place / "out", progress=False)
        assert tree(place / "out") == FILES

    def test_without_modes(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a.txt", b"dos", 0)])
        archives.extract(archive, place / "out", progress=False)
        assert tree(place / "out") == {"a.txt": b"dos"}

    def test_set_user_id_is_not_taken_over(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("run", b"#!", 0o104755)])
        archives.extract(archive, place / "out", progress=False)
        assert not (place / "out" / "run").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)

    @pytest.mark.parametrize("name", [*HOSTILE_NAMES, "a\0b"])
    def test_names(self, tmp_path, place, name):
        archive = zip_of(tmp_path / "some.zip", [("a.txt", b"1", 0o100644), (name, b"", 0o100644)])
        refused(archive, place, "is refused: its member '")

    @pytest.mark.parametrize(
        ("mode", "what"),
        [
            (0o120777, "symbolic link"),
            (0o020666, "device"),
            (0o060666, "device"),
            (0o010666, "named pipe"),
            (0o140666, "socket"),
        ],
    )
    def test_links_and_devices(self, tmp_path, place, mode, what):
        archive = zip_of(
            tmp_path / "some.zip", [("a.txt", b"1", 0o100644), ("link", b"/etc/passwd", mode)]
        )
        refused(archive, place, f"its member 'link' is a {what}")

    def test_truncated(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", os.urandom(9999), 0o100644)])
        archive.write_bytes(archive.read_bytes()[:-30])
        refused(archive, place, "damaged, truncated")

    def test_a_changed_byte(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", os.urandom(9999), 0o100644)])
        content = bytearray(archive.read_bytes())
        content[5000] ^= 1
        archive.write_bytes(content)
        refused(archive, place, "damaged")

    def test_encrypted(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", b"1", 0o100644)])
        content = bytearray(archive.read_bytes())
        content[6] |= 1  # the flag, here …
        content[content.index(b"PK\1\2") + 8] |= 1  # … and in the directory
        archive.write_bytes(content)
        refused(archive, place, "encrypted")


class TestRar:
    def test_comes_out_as_it_is(self, tmp_path, place, tool):
        folder = ("a", {"type": tarfile.DIRTYPE})
        archive = rar_of(tmp_path / "some.rar", tool, [folder, *FILES.items()])
        archives.extract(archive, place / "out", progress=False)
        assert tree(place / "out") == FILES

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_names(self, tmp_path, place, tool, name):
        archive = rar_of(tmp_path / "some.rar", tool, [*FILES.items(), (name, b"evil")])
        refused(archive, place, "is refused: its member '")

    @pytest.mark.parametrize("what", ["symbolic link", "hard link"])
    def test_links(self, tmp_path, place, tool, what):
        archive = rar_of(tmp_path / "some.rar", tool, [*FILES.items(), LINKS[what]])
        refused(archive, place, f"(?i)its member 'link' is .*{what}")

    @pytest.mark.parametrize("what", ["device", "named pipe"])
    def test_devices(self, tmp_path, place, tool, what):
        archive = rar_of(tmp_path / "some.rar", tool, [*FILES.items(), LINKS[what]])
        if tool == "unrar":  # RAR 5 has no devices: it makes an empty file of one
            archives.extract(archive, place / "out", progress=False)
            assert (place / "out" / "link").is_file()
        else:
            refused(archive, place, f"its member 'link' is a {what}")

    @pytest.mark.parametrize(
        "name", ["a\n        Type: File", "a\n        Type: File\n\n        Name: b"]
    )
    @pytest.mark.parametrize("target", ["/etc", "/etc\n        Type: File"])
    def test_line_breaks_hide_nothing(self, tmp_path, place, tool, name, target):
        """A link whose name or target imitates a tool's list of plain files."""
        link = {"type": tarfile.SYMTYPE, "linkname": target}
        for hiding in (name, "plain"):
            refused(rar_of(tmp_path / "some.rar", tool, [(hiding, link)]), place, "is refused")

    def test_damaged(self, tmp_path, place, tool):
        archive = rar_of(tmp_path / "some.rar", tool, [("a", os.urandom(9999))])
        content = bytearray(archive.read_bytes())
        if tool == "unrar":
            content[5000] ^= 1
        else:  # bsdtar verifies no checksum of what is stored uncompressed
            del content[5000:]
        archive.write_bytes(content)
        refused(archive, place, "can't be read.* says: .*")

    def test_what_came_out_is_looked_at(self, tmp_path, place, monkeypatch):
        """A tool that lists files and writes links, or leaves one out."""
        use_tool(monkeypatch, tmp_path, "stand-in")
        for name, fault in (
            ("swapped", "'swapped' is a symbolic link"),
            ("linked", "is a hard link"),
            ("left out", "'left out' came out with no bytes, the archive lists 1"),
        ):
            archive = rar_of(tmp_path / "some.rar", "stand-in", [*FILES.items(), (name, b"x")])
            refused(archive, place, fault)

    def test_no_tool(self, tmp_path, place, monkeypatch):
        archive = write_rar(tmp_path / "some.rar", [member("a", b"1")])
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        with pytest.raises(ValueError, match=r"needs unrar or bsdtar.*apt install") as caught:
            archives.extract(archive, place / "out")
        assert "\n" not in str(caught.value)
        assert list(place.iterdir()) == []

    def test_another_unrar_is_passed_over(self, tmp_path, monkeypatch):
        """`unrar-free` goes by the same name and can't list types."""
        use_tool(monkeypatch, tmp_path, "stand-in")
        other = tmp_path / "bin" / "unrar"
        other.write_text(f"#!{sys.executable}\nprint('unrar-free 0.1.1')")
        other.chmod(0o755)
        assert rar.find_tool() == str(tmp_path / "bin" / "bsdtar")
        other.write_text(f"#!{sys.executable}\nprint('UNRAR 6.21 freeware, Alexander Roshal')")
        assert rar.find_tool() == str(other)


class TestExtract:
    def test_of_no_known_kind(self, tmp_path, place):
        (tmp_path / "some.zip").write_bytes(b"<!doctype html>" * 99)
        refused(tmp_path / "some.zip", place, "is no .tar")

    def test_told_by_content(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.rar", [("a", b"1", 0)])
        archives.extract(archive, place / "out", progress=False)
        assert tree(place / "out") == {"a": b"1"}

    def test_folder_exists(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", b"1", 0)])
        (place / "out").mkdir()
        with pytest.raises(ValueError, match="out exists"):
            archives.extract(archive, place / "out")

    def test_what_a_killed_run_left_is_thrown_away(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", b"1", 0)])
        for process in (7, os.getpid()):
            (place / f".out.unpacking.{process}").mkdir()
            (place / f".out.unpacking.{process}" / "half").write_text("x")
        archives.extract(archive, place / "out", progress=False)
        assert tree(place) == {"out/a": b"1"}

    def test_no_space(self, tmp_path, place, monkeypatch):
        archive = zip_of(tmp_path / "some.zip", [("a", b"1" * 9999, 0)])
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9998))
        with pytest.raises(OSError, match=r"unpacking some\.zip needs 0\.0 GB"):
            archives.extract(archive, place / "out")
        assert list(place.iterdir()) == []

    def test_disk_fills_up(self, tmp_path, place, file_limit):
        archive = zip_of(tmp_path / "some.zip", [("b", b"2", 0), ("a", b"1" * 99_999, 0)])
        with file_limit(50_000), pytest.raises(OSError, match=r"too large|No space"):
            archives.extract(archive, place / "out", progress=False)
        assert list(place.iterdir()) == []

    def test_file_and_folder_of_one_name(self, tmp_path, place):
        archive = zip_of(tmp_path / "some.zip", [("a", b"1", 0), ("a/b", b"2", 0)])
        with pytest.raises(OSError, match="a"):
            archives.extract(archive, place / "out", progress=False)
        assert list(place.iterdir()) == []


def test_bar_counts_members(tmp_path, place, monkeypatch):
    use_tool(monkeypatch, tmp_path, "stand-in")
    archive = rar_of(tmp_path / "some.rar", "stand-in", FILES.items())
    code = "import sys, pathlib, archives; archives.extract(*map(pathlib.Path, sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(archives.__file__).parent)}
    command = [sys.executable, "-c", code, archive, place / "out"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"unpacking some.rar: 100%|██████████| {len(FILES)}/{len(FILES)}" in found.stderr
