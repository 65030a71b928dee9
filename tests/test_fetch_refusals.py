"""Downloads that can't end well: error pages, wrong files, dead mirrors, full disks."""

import os
import shutil

import pytest

pytest.importorskip("requests", reason="recipes need the extra: pip install 'tinyvgpt[data]'")
import fetch
from fetch import Source, check_space
from fetching import CONTENT, MD5, OTHER, PAGE, SHA256, broken_off, get, get_refused, left

pytest_plugins = ("fetching_fixtures",)


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

    @pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "-5"])
    def test_length_that_is_no_number(self, servers, target, length):
        mirrors = servers(), servers()
        mirrors[0].headers = {"Content-Length": length}
        fetch.fetch([Source(m.url, "never") for m in mirrors], target, progress=False)
        assert target.read_bytes() == CONTENT

    @pytest.mark.parametrize("address", ["http://[::1", "http://.x.example/", "http://h:99999/"])
    def test_redirected_to_no_address(self, servers, target, address):
        mirrors = servers(), servers()
        mirrors[0].answer = lambda request: (
            request.send_response(302),
            request.send_header("Location", address),
            request.send_header("Content-Length", "0"),
            request.end_headers(),
        )
        get_refused(mirrors[0], target, "can't be fetched")
        fetch.fetch([Source(m.url, "never") for m in mirrors], target, progress=False)
        assert target.read_bytes() == CONTENT

    def test_chunk_of_no_length(self, server, target):
        server.content = b"-5\r\nx"
        server.headers = {"Transfer-Encoding": "chunked", "Content-Length": None}
        get_refused(server, target, "broke off")

    def test_more_than_is_expected_is_not_awaited(self, server, target, monkeypatch):
        """A chunked body names no end."""
        server.chunked = True
        arrived = []
        append = fetch.Partial.append
        monkeypatch.setattr(
            fetch.Partial, "append", lambda self, part: (arrived.append(part), append(self, part))
        )
        get_refused(server, target, "5 are expected", size=5)
        assert sum(map(len, arrived)) <= fetch.CHUNK
        assert left(target) == []

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
