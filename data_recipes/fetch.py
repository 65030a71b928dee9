"""Download a file that is whole and right, or say in one line why there is none.

What has come so far stands beside the target as `.NAME.partial`; `.NAME.partial.json` says of
which version of the file it is: its URL, its ETag or Last-Modified, its size. A later try, in this
process or another, asks for the rest with Range and If-Range (RFC 9110, §13.1.5 and §14), and
appends what comes only if it is the rest of the same version. The target's name is given to a file
whose size and checksum are right, and to nothing else.
"""

import errno
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import requests
import urllib3
from partial import Partial, Version
from tqdm import tqdm

TIMEOUTS = (20, 60)  # seconds to connect, and without a byte
TRIES = 6  # in a row, none of which got further than those before
PAUSE = 1.0  # seconds after the first failure, doubled after each that follows
LONGEST_PAUSE = 30.0  # seconds
CHUNK = 1 << 16  # bytes written at once, so what a broken connection may cost
FOR_NOW = (408, 425, 429, 500, 502, 503, 504)  # answers that another try may change
GB = 1e9  # bytes


@dataclass(frozen=True)
class Source:
    """One row of a recipe's table of mirrors."""

    url: str
    verified: str  # the date when somebody last fetched the file from there, or "never"


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is fetched."""

    size: int | None = None  # bytes
    sha256: str | None = None
    md5: str | None = None

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file at `path`; None if nothing is."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"has {size} bytes, {self.size} are expected"
        for name in ("sha256", "md5"):
            if right := getattr(self, name):
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, name).hexdigest()
                if found != right.lower():
                    return f"its {name} is {found}, {right} is expected"
        return None


class Refused(Exception):
    """This mirror doesn't have the file, and trying again won't change that."""


class Interrupted(Exception):
    """This try ended early; the next may get further."""


def fetch(
    sources: Sequence[Source],
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    progress: bool = True,
) -> Path:
    """Download a file from the first mirror that has it, going on where an earlier run stopped.

    Args:
        sources: mirrors, the best first.
        path: where the file ends up; kept as it is, without a request, if it is right already.
        size: in bytes, where known.
        sha256: hexadecimal, where known.
        md5: hexadecimal, where known.
        progress: shows a bar and what goes wrong on stderr.

    Returns:
        path, of a file that has this size and checksum.

    Raises:
        ValueError: no sources.
        OSError: no mirror has the right file, too little space, or the folder can't be written.
    """
    path, expected = Path(path), Expected(size, sha256, md5)
    if not sources:
        raise ValueError(f"{path.name} has no mirrors to be fetched from")
    if path.exists():
        if not path.is_file():
            raise OSError(f"{path} is in the way: it is no file")
        fault = expected.fault(path)
        if fault is None:
            return path
        _say(f"{path} {fault}: fetching it again", progress)
    failures = []
    with Partial(path) as partial:
        if size is not None:
            check_space(path.parent, size - partial.size, path.name)
        # A mirror that an earlier run had begun with goes first: only there the rest can be had.
        for source in sorted(sources, key=lambda source: source.url != partial.version.url):
            try:
                _fetch_from(source.url, partial, expected, progress)
                partial.publish()
                return path
            except Refused as error:
                failures.append(f"{source.url} (last verified: {source.verified}) {error}")
                _say(failures[-1], progress)
    raise OSError(f"{path.name} could not be fetched: " + "; ".join(failures))


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises OSError unless `needed` bytes are free where `folder` is, or will be, made."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"{what} needs {needed / GB:.1f} GB, {folder} has {free / GB:.1f} GB free: "
            "make room or choose another folder"
        )


def _fetch_from(url: str, partial: Partial, expected: Expected, progress: bool) -> None:
    """Completes and verifies the partial file from one mirror.

    Raises:
        Refused: it can't be had there.
    """
    failed, reached = 0, 0
    with _bar(partial, progress) as bar:
        while not partial.is_whole(url):
            try:
                _try_once(url, partial, expected, bar)
            except Interrupted as error:
                failed = 1 if partial.size > reached else failed + 1
                reached = max(reached, partial.size)
                if failed == TRIES:
                    raise Refused(f"{error}; tried {TRIES} times") from None
                pause = min(PAUSE * 2 ** (failed - 1), LONGEST_PAUSE)
                _say(f"{url} {error}: trying again in {pause:g} s", progress)
                time.sleep(pause)
    fault = expected.fault(partial.path) or _html_fault(partial.head(), partial.target)
    if fault:
        partial.clear()
        raise Refused(fault)


def _try_once(url: str, partial: Partial, expected: Expected, bar: tqdm) -> None:
    """Makes one request, and keeps what comes of the file."""
    offset = partial.size if _may_resume(url, partial, expected) else 0
    headers = {"Accept-Encoding": "identity"}  # the file's bytes, not a compression of them
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if partial.version.validator:
            headers["If-Range"] = partial.version.validator
    with _get(url, headers) as response:
        _check_answer(response, partial)
        total = _total(response, offset, partial, expected)
        if expected.size is not None and total not in (None, expected.size):
            raise Refused(f"has {total} bytes, {expected.size} are expected")
        check_space(partial.target.parent, (total or 0) - partial.size, partial.target.name)
        bar.total = total
        most = expected.size if total is None else total
        body = _body(response)
        first = next(body, b"")
        if response.status_code == 200:
            if fault := _html_fault(first, partial.target):
                raise Refused(fault)
            if not first:
                raise Refused("sends an empty file")
            with _writing(partial):
                partial.start(_version(url, response, total))
        for chunk in chain([first], body):
            with _writing(partial):
                partial.append(chunk)
            bar.update(partial.size - bar.n)
            if most is not None and partial.size > most:
                break  # it may never end
    _check_end(total, partial)


def _may_resume(url: str, partial: Partial, expected: Expected) -> bool:
    """Whether the partial file may be completed from this URL.

    Parts of two versions of a file must never be joined: either the server names the version, or
    a checksum will tell.
    """
    version = partial.version
    fits = expected.size is None or version.size in (None, expected.size)
    told = version.validator or expected.sha256 or expected.md5
    return bool(version.url == url and fits and told)


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    """The answer to a GET, its body not read yet."""
    try:
        return requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
    except requests.exceptions.SSLError as error:
        raise Refused(f"has no certificate that can be trusted: {_reason(error)}") from None
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Interrupted(f"can't be reached: {_reason(error)}") from None
    # The last two: a mirror redirects to what is no address.
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        raise Refused(f"can't be fetched: {_reason(error)}") from None


def _check_answer(response: requests.Response, partial: Partial) -> None:
    """Raises Refused or Interrupted unless the body is the file, or a part of it, as it is."""
    status, target = response.status_code, partial.target
    if status in FOR_NOW:
        raise Interrupted(f"answers {status} {response.reason}")
    if status == 416:
        partial.clear()
        raise Interrupted("has no more bytes than have come: starting over")
    if status not in (200, 206):
        raise Refused(f"answers {status} {response.reason}")
    kind = response.headers.get("Content-Type", "").lower()
    if kind.startswith("text/html") and not _is_html_name(target):
        raise Refused("sends an HTML page instead of the file")
    coding = response.headers.get("Content-Encoding", "identity").lower()
    # Some servers call a file that is a .gz "encoded": its bytes on the wire are the file.
    if coding not in ("", "identity") and target.suffix not in (".gz", ".tgz"):
        raise Refused(f"sends the file {coding}-encoded though asked not to")


def _total(
    response: requests.Response, offset: int, partial: Partial, expected: Expected
) -> int | None:
    """Bytes of the whole file, by the answer's headers; None if they don't say.

    Raises:
        Interrupted: the answer is no continuation of the partial file, which is given up then.
        Refused: nothing would tell a truncated body from a whole one.
    """
    headers = response.headers
    if response.status_code == 200:
        if re.fullmatch("[0-9]{1,18}", length := headers.get("Content-Length", "").strip()):
            return int(length)
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            return None
        raise Refused("doesn't say how long the file is")
    found = re.fullmatch(
        r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18})", headers.get("Content-Range", "").strip()
    )
    version = partial.version
    if not found or int(found[1]) != offset or not offset:
        what = "sends another part than was asked for"
    elif version.size not in (None, int(found[2])):
        what = f"has {found[2]} bytes, it had {version.size}"
    elif not version.same(headers.get("ETag"), headers.get("Last-Modified")):
        what = "has another version than before"
    elif not (
        expected.sha256
        or expected.md5
        or version.named_by(headers.get("ETag"), headers.get("Last-Modified"))
    ):
        what = "doesn't say of which version the rest is"
    else:
        return int(found[2])
    partial.clear()
    raise Interrupted(f"{what}: starting over")


def _body(response: requests.Response) -> Iterator[bytes]:
    """The body's bytes as they come."""
    try:
        yield from response.raw.stream(CHUNK, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise Interrupted(f"broke off: {_reason(error)}") from None


def _version(url: str, response: requests.Response, total: int | None) -> Version:
    headers = response.headers
    return Version(url, headers.get("ETag"), headers.get("Last-Modified"), total)


@contextmanager
def _writing(partial: Partial) -> Iterator[None]:
    """Says what to do about a disk that is full."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room and run this again, it goes on from there" if full else error.strerror
        raise OSError(
            f"{partial.path} could not be written after {partial.size / GB:.2f} GB: {advice}"
        ) from None


def _check_end(total: int | None, partial: Partial) -> None:
    """Raises Interrupted unless the body had all bytes that it should have had."""
    if total is not None and partial.size < total:
        raise Interrupted(f"broke off after {partial.size} of {total} bytes")
    if total is not None and partial.size > total:
        partial.clear()
        raise Interrupted(f"sends more than {total} bytes: starting over")
    with _writing(partial):
        partial.ended()


def _is_html_name(target: Path) -> bool:
    return target.suffix.lower() in (".html", ".htm")


def _html_fault(head: bytes, target: Path) -> str | None:
    """What is wrong with a file that begins so; None unless it is a page of a site's errors."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    page = start.startswith((b"<!doctype html", b"<html")) and not _is_html_name(target)
    return "sends an HTML page instead of the file" if page else None


def _reason(error: Exception) -> str:
    """What went wrong at the bottom of a chain of wrapped errors, in one line."""
    inner = getattr(error, "reason", None) or next(iter(error.args), None)
    while isinstance(inner, Exception):
        error, inner = inner, getattr(inner, "reason", None) or next(iter(inner.args), None)
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^.*?(HTTPS?Connection(Pool)?\([^)]*\)|<\S+ object at \S+>):? ", "", text)


def _bar(partial: Partial, progress: bool) -> tqdm:
    return tqdm(
        desc=partial.target.name,
        total=partial.version.size,
        initial=partial.size,
        unit="B",
        unit_scale=True,
        mininterval=1,
        file=sys.stderr,
        disable=not progress,
    )


def _say(line: str, progress: bool) -> None:
    if progress:
        tqdm.write(line, file=sys.stderr)
