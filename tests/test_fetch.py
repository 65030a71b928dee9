"""Downloads from a local server that misbehaves in every way that servers do."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import Server

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import fetch
from fetch import Source, check_space

RECIPES = Path(fetch.__file__).parent
CONTENT = random.Random(0).randbytes(700_001)
OTHER = random.Random(1).randbytes(700_001)  # another version, as long
PAGE = b"<!DOCTYPE html><html><body>Moved</body></html>"
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def servers(monkeypatch):
    """Makes servers; nothing waits between tries, nothing goes through a proxy."""
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    made = []

    def make():
        made.append(Server(CONTENT))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(servers):
    return servers()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "file.bin"


def get(server, target, **expected):
    return fetch.fetch([Source(server.url, "never")], target, progress=False, **expected)


def get_refused(server, target, match, **expected):
    """Fetching fails with one line, and nothing has the target's name."""
    with pytest.raises(OSError, match=match) as caught:
        get(server, target, **expected)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    return str(caught.value)


def left(target):
    """What else stands in the target's folder."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def broken_off(server, target, cut=300_000):
    """An earlier run that got `cut` bytes and then lost its server."""
    server.cuts = [cut]
    server.statuses = [200] + [503] * fetch.TRIES
    get_refused(server, target, "503")
    server.statuses = []
    server.requests.clear()
    there = target.with_name(f".{target.name}.partial").stat().st_size
    assert there == cut
    return there


class TestWhole:
    def test_a_file(self, server, target):
        assert get(server, target, size=len(CONTENT), sha256=SHA256, md5=MD5) == target
        assert target.read_bytes() == CONTENT
        assert server.requests == [None]
        assert left(target) == []

    def test_a_right_file_is_kept_without_a_request(self, server, target):
        target.parent.mkdir()
        target.write_bytes(CONTENT)
        before = target.stat().st_mtime_ns
        get(server, target, size=len(CONTENT), md5=MD5.upper())
        assert server.requests == []
        assert target.stat().st_mtime_ns == before

    @pytest.mark.parametrize("expected", [{"size": len(CONTENT)}, {"md5": MD5}, {"sha256": SHA256}])
    def test_a_wrong_file_is_replaced_by_the_right_one(self, server, target, expected):
        target.parent.mkdir()
        target.write_bytes(CONTENT[:-1])
        get(server, target, **expected)
        assert target.read_bytes() == CONTENT

    def test_a_wrong_file_stays_where_no_right_one_is_found(self, server, target):
        target.parent.mkdir()
        target.write_bytes(b"mine")
        server.statuses = [404]
        with pytest.raises(OSError, match="404"):
            get(server, target, md5=MD5)
        assert target.read_bytes() == b"mine"

    def test_chunked(self, server, target):
        server.chunked = True
        get(server, target)
        assert target.read_bytes() == CONTENT

    def test_bar_on_stderr(self, server, target, capfd):
        fetch.fetch([Source(server.url, "never")], target)
        out, err = capfd.readouterr()
        assert out == ""
        assert "file.bin: 100%" in err


class TestCut:
    @pytest.mark.parametrize("seed", range(20))
    def test_anywhere_with_ranges(self, server, target, seed):
        """Cut again and again, orderly or by a reset, the file comes out right."""
        draw = random.Random(seed)
        server.reset = bool(seed % 2)
        server.chunked = seed % 3 == 2 and not server.reset
        server.cuts = [draw.randrange(0, 200_000) for _ in range(5)]
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert any(server.requests)
        assert left(target) == []

    @pytest.mark.parametrize("seed", range(5))
    def test_anywhere_where_ranges_are_ignored(self, server, target, seed):
        draw = random.Random(seed)
        server.ranges = False
        server.cuts = [draw.randrange(1, len(CONTENT)) for _ in range(3)]
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert len(server.requests) == 4

    def test_progress_resets_the_count(self, server, target):
        server.cuts = [fetch.CHUNK] * (fetch.TRIES + 3)
        get(server, target)
        assert target.read_bytes() == CONTENT

    def test_always_at_the_same_byte_ends(self, server, target):
        """Without ranges the same beginning comes again and again: that is no progress."""
        server.ranges = False
        server.cuts = [400_000] * 100
        get_refused(server, target, rf"broke off.*tried {fetch.TRIES} times")
        assert len(server.requests) == fetch.TRIES

    def test_pauses_double(self, server, target, monkeypatch):
        slept = []
        monkeypatch.setattr(fetch, "PAUSE", 1.0)
        monkeypatch.setattr(time, "sleep", slept.append)
        server.statuses = [500] * 5
        get(server, target)
        assert [pause for pause in slept if pause] == [1, 2, 4, 8, 16]

    def test_resumed_in_a_later_run(self, server, target):
        there = broken_off(server, target)
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert server.requests == [f"bytes={there}-"]

    def test_complete_but_not_renamed(self, server, target):
        """Killed between the last byte and the rename: nothing is asked again."""
        broken_off(server, target)
        target.with_name(".file.bin.partial").write_bytes(CONTENT)
        get(server, target, md5=MD5)
        assert target.read_bytes() == CONTENT
        assert server.requests == []

    @pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"url": 3, "size": "x"}', None])
    def test_bytes_of_no_known_version_are_given_up(self, server, target, record):
        broken_off(server, target)
        path = target.with_name(".file.bin.partial.json")
        path.unlink() if record is None else path.write_bytes(record)
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert server.requests == [None]

    def test_bytes_that_nothing_vouches_for_are_given_up(self, server, target):
        """No ETag, no date, no checksum: two versions might be joined unseen."""
        server.etag = None
        broken_off(server, target)
        get(server, target)
        assert server.requests == [None]
        broken_off(server, target.with_name("second.bin"))
        get(server, target.with_name("second.bin"), md5=MD5)
        assert server.requests == ["bytes=300000-"]

    @pytest.mark.parametrize("tag", [None, 'W/"weak"'])
    def test_date_where_there_is_no_strong_tag(self, server, target, tag):
        server.etag, server.modified = tag, "Wed, 21 Oct 2015 07:28:00 GMT"
        there = broken_off(server, target)
        get(server, target)
        assert server.requests == [f"bytes={there}-"]
        assert target.read_bytes() == CONTENT

    def test_larger_than_it_should_be(self, server, target):
        broken_off(server, target)
        target.with_name(".file.bin.partial").write_bytes(CONTENT + b"x")
        get(server, target)
        assert target.read_bytes() == CONTENT


class TestChanged:
    @pytest.mark.parametrize("if_range", [True, False])
    def test_between_two_runs(self, server, target, if_range):
        """Also where a server ignores If-Range and sends a part of the changed file."""
        broken_off(server, target)
        server.content, server.etag, server.if_range = OTHER, '"two"', if_range
        get(server, target)
        assert target.read_bytes() == OTHER

    def test_in_mid_download(self, server, target):
        answer = server.answer

        def changing(request):
            if server.requests:
                server.content, server.etag = OTHER, '"two"'
            answer(request)

        server.answer, server.cuts = changing, [300_000]
        get(server, target)
        assert target.read_bytes() == OTHER

    def test_only_its_size(self, server, target):
        """A size that differs tells, though the server says that the version is the same."""
        broken_off(server, target)
        server.content = OTHER + b"longer"
        get(server, target)
        assert target.read_bytes() == OTHER + b"longer"

    def test_unseen_but_for_its_checksum(self, server, target):
        """The server names no version: the checksum refuses what was joined of two."""
        server.etag = None
        broken_off(server, target)
        server.content = OTHER
        get_refused(server, target, "md5 is", md5=hashlib.md5(OTHER).hexdigest())
        assert left(target) == []
        get(server, target, md5=hashlib.md5(OTHER).hexdigest())
        assert target.read_bytes() == OTHER

    @pytest.mark.parametrize(
        "header",
        [
            "bytes 0-700000/700001",
            "bytes 299999-700000/700001",
            "bytes 300000-700001/700002",
            "bytes */700001",
            "items 300000-700000/700001",
            None,
        ],
    )
    def test_a_part_that_does_not_fit_is_not_appended(self, server, target, header):
        broken_off(server, target)
        answer = server.answer

        def misplaced(request):
            server.headers = {} if len(server.requests) else {"Content-Range": header}
            answer(request)

        server.answer = misplaced
        get(server, target)
        assert target.read_bytes() == CONTENT
        assert server.requests == ["bytes=300000-", None]

    def test_unasked_part(self, server, target):
        server.send = lambda request, content, start, partly: Server.send(
            server, request, content, 5, True
        )
        get_refused(server, target, "another part than was asked for")

    def test_range_not_satisfiable_starts_over(self, server, target):
        broken_off(server, target)
        server.statuses = [416]
        get(server, target)
        assert target.read_bytes() == CONTENT


class TestRefused:
    @pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
    @pytest.mark.parametrize("page", [PAGE, b"\xef\xbb\xbf \n<html>", b"<HTML><p>No</p>"])
    def test_html_page(self, server, target, kind, page):
        server.content, server.headers = page, {"Content-Type": kind}
        message = get_refused(server, target, "sends an HTML page instead of the file")
        assert server.url in message
        assert left(target) == []
        assert len(server.requests) == 1

    def test_html_page_in_tiny_chunks(self, server, target):
        server.chunked = True

        def dribble(request, content, start, partly):
            server.length = False
            request.send_response(200)
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            request.wfile.write(b"".join(b"1\r\n%c\r\n" % byte for byte in PAGE) + b"0\r\n\r\n")

        server.send = dribble
        get_refused(server, target, "HTML page")
        assert left(target) == []

    def test_html_page_leaves_what_had_come(self, server, target):
        there = broken_off(server, target)
        server.content, server.etag = PAGE, None
        get_refused(server, target, "HTML page")
        server.content, server.etag = CONTENT, '"one"'
        server.requests.clear()
        get(server, target)
        assert server.requests == [f"bytes={there}-"]

    def test_wrong_checksum(self, servers, target):
        wrong, right = servers(), servers()
        wrong.content = OTHER
        get_refused(wrong, target, "sha256 is .* is expected", sha256=SHA256)
        assert left(target) == []
        fetch.fetch(
            [Source(wrong.url, "never"), Source(right.url, "never")],
            target,
            md5=MD5,
            progress=False,
        )
        assert target.read_bytes() == CONTENT

    def test_wrong_size_is_not_even_fetched(self, server, target):
        get_refused(server, target, "has 700001 bytes, 5 are expected", size=5)
        assert left(target) == []

    def test_length_unknown(self, server, target):
        """Closing the connection may be the end, or a cut: nothing tells them apart."""
        server.length = False
        get_refused(server, target, "doesn't say how long")

    def test_empty(self, server, target):
        server.content = b""
        get_refused(server, target, "empty")

    def test_compressed_on_the_way(self, server, target):
        server.headers = {"Content-Encoding": "gzip"}
        get_refused(server, target, "gzip-encoded")
        get(server, target.with_name("file.gz"), md5=MD5)  # its own bytes, called encoded
        assert target.with_name("file.gz").read_bytes() == CONTENT

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_status(self, server, target, status):
        server.statuses = [status] * 9
        get_refused(server, target, f"{server.url}.*answers {status}")
        assert len(server.requests) == 1

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_status_that_passes(self, server, target, status):
        server.statuses = [status] * 3
        get(server, target)
        assert target.read_bytes() == CONTENT

    def test_every_mirror_is_named_with_its_reason(self, servers, target):
        mirrors = servers(), servers(), servers()
        mirrors[0].statuses = [404]
        mirrors[1].content = PAGE
        mirrors[2].close()
        sources = [Source(mirror.url, "2020-01-01") for mirror in mirrors]
        with pytest.raises(OSError, match="could not be fetched") as caught:
            fetch.fetch(sources, target, progress=False)
        lines = str(caught.value).removeprefix("file.bin could not be fetched: ").split("; http")
        assert len(lines) == 3
        for mirror, line, reason in zip(
            mirrors, lines, ("404", "HTML", "Connection refused"), strict=True
        ):
            assert mirror.url.removeprefix("http") in line
            assert reason in line
            assert "last verified: 2020-01-01" in line

    @pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://"])
    def test_no_url(self, target, url):
        with pytest.raises(OSError, match="could not be fetched"):
            fetch.fetch([Source(url, "never")], target, progress=False)

    def test_no_mirrors(self, target):
        with pytest.raises(ValueError, match="no mirrors"):
            fetch.fetch([], target)

    def test_second_mirror_is_resumed_first(self, servers, target):
        first, second = servers(), servers()
        there = broken_off(second, target)
        sources = [Source(first.url, "never"), Source(second.url, "never")]
        fetch.fetch(sources, target, progress=False)
        assert (first.requests, second.requests) == ([], [f"bytes={there}-"])

    def test_other_mirrors_bytes_are_not_joined(self, servers, target):
        first, second = servers(), servers()
        second.content = OTHER
        broken_off(first, target)
        get(second, target)
        assert target.read_bytes() == OTHER


class TestDisk:
    def test_no_space(self, server, target, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 700_000))
        get_refused(server, target, r"file.bin needs 0.0 GB, .*data has 0.0 GB free")
        assert len(server.requests) == 1  # which told the size
        get_refused(server, target, "needs 0.0 GB", size=len(CONTENT))
        assert len(server.requests) == 1  # nothing was asked
        assert left(target) == []

    def test_space_of_what_has_come_is_not_needed_again(self, server, target, monkeypatch):
        broken_off(server, target)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 400_001))
        get(server, target, size=len(CONTENT))
        assert target.read_bytes() == CONTENT

    def test_check_space(self, tmp_path):
        check_space(tmp_path / "not" / "yet", 1, "the file")
        with pytest.raises(OSError, match=r"^the file needs 1000000000\.0 GB, .*not.yet has \d+\."):
            check_space(tmp_path / "not" / "yet", 10**18, "the file")

    def test_disk_fills_up_then_has_room_again(self, server, target, file_limit):
        with file_limit(200_000):
            get_refused(server, target, r"could not be written after 0.00 GB: make room")
        server.requests.clear()
        get(server, target)
        assert server.requests == ["bytes=200000-"]
        assert target.read_bytes() == CONTENT

    def test_unwritable_folder(self, server, tmp_path):
        (tmp_path / "data").write_text("a file where the folder should be")
        with pytest.raises(OSError, match="data can't be written"):
            get(server, tmp_path / "data" / "file.bin")
        assert server.requests == []

    @pytest.mark.skipif(os.name != "posix" or not os.geteuid(), reason="root may write anywhere")
    def test_folder_without_permission(self, server, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="can't be written: Permission denied"):
            get(server, tmp_path / "file.bin")

    def test_folder_in_the_way(self, server, target):
        target.mkdir(parents=True)
        with pytest.raises(OSError, match="in the way"):
            get(server, target)

    def test_two_processes(self, server, target):
        pytest.importorskip("fcntl")
        with (
            fetch.Partial(target),
            pytest.raises(OSError, match="being fetched by another process"),
        ):
            get(server, target)


DOWNLOAD = """
import sys
from pathlib import Path
import fetch
fetch.fetch([fetch.Source(sys.argv[1], "never")], Path(sys.argv[2]), progress=False)
"""


def test_killed_at_ten_moments_and_run_again(server, target):
    """SIGKILL in mid-download, ten times in a row, at random moments of a slow download."""
    draw = random.Random(7)
    partial = target.with_name(".file.bin.partial")
    command = [sys.executable, "-c", DOWNLOAD, server.url, target]
    environment = os.environ | {"PYTHONPATH": str(RECIPES), "NO_PROXY": "*"}
    server.pause = 0.02
    marks = sorted(draw.randrange(1, len(CONTENT) - 100_000) for _ in range(10))
    for mark in marks:  # bytes on disk at which the process is killed
        process = subprocess.Popen(command, env=environment)
        while (partial.stat().st_size if partial.exists() else 0) < mark:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not target.exists()
    server.pause = 0.0
    subprocess.run(command, env=environment, check=True)
    assert target.read_bytes() == CONTENT
    assert left(target) == []
    assert server.requests.count(None) == 1  # every later run went on where the last had stopped


def test_record_names_the_version(server, target):
    broken_off(server, target)
    record = json.loads(target.with_name(".file.bin.partial.json").read_text())
    assert record == {"url": server.url, "etag": '"one"', "modified": None, "size": len(CONTENT)}
