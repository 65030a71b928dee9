"""Downloads from a local server that cuts, changes and misplaces: the right file comes out."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import fetch
from fetch import Source
from fetching import CONTENT, MD5, OTHER, SHA256, broken_off, get, get_refused, left
from serving import Server

pytest_plugins = ("fetching_fixtures",)

RECIPES = Path(fetch.__file__).parent


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

    def test_a_server_that_would_compress_is_asked_not_to(self, server, target):
        answer = server.answer

        def compressing(request):
            if "gzip" in request.headers.get("Accept-Encoding", "gzip"):
                server.headers = {"Content-Encoding": "gzip"}
            answer(request)

        server.answer = compressing
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

    def test_a_part_of_no_named_version_is_not_joined(self, server, target):
        """A server that ignores If-Range, and doesn't say which version its part is of."""
        broken_off(server, target)
        server.content, server.if_range = OTHER, False
        answer = server.answer

        def silent(request):
            server.etag = None if not server.requests else '"two"'
            answer(request)

        server.answer = silent
        get(server, target)
        assert target.read_bytes() == OTHER
        assert server.requests == ["bytes=300000-", None]

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
