"""What `video_index.scan` found in each video of a folder, kept in a file beside them.

The file has two lines of JSON: a header with a checksum of the second line, and that: for each
video its size and time of change, by which a changed one is noticed, and its timeline, or why it is
broken. It is only a copy of what scanning finds: one that is damaged, or made by another version of
this module or of PyAV, is made again. Where the folder may not be written to, it is kept in
the user's cache folder (XDG_CACHE_HOME, else ~/.cache). Chapter 02 uses it.
"""

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tinyvgpt.data.video_index import Timeline, scan
from tinyvgpt.store import write_atomically
from tinyvgpt.write import import_av

NAME = ".tinyvgpt-index.json"
VERSION = 1  # of the file and of what scanning finds
SAVE_EVERY = 60.0  # seconds of scanning
SHOW_AFTER = 2.0  # seconds of scanning before its progress is shown
MOST_THREADS = 8  # scanning at once; disks over a network answer slowly

Entry = dict[str, Any]  # size, mtime_ns, and timeline or broken


class Index(NamedTuple):
    """What is known of some videos, by their names."""

    timelines: dict[str, Timeline]
    broken: dict[str, str]  # why
    scanned: set[str]  # those that were scanned just now


def index_videos(folder: Path, names: Sequence[str], listed: Iterable[str]) -> Index:
    """Find the timelines of videos, scanning only what is new or has changed.

    Args:
        folder: where they are, and the cache.
        names: the videos, as paths from the folder.
        listed: all videos of the folder; what the cache knows of others is forgotten.

    Returns:
        The timeline of each name, or why it is broken.
    """
    listed = set(listed)
    caches = [_load(place) for place in _places(folder)]
    marks = {name: _mark(folder / name) for name in names}
    entries = {
        name: cache[name]
        for cache in caches
        for name in names
        if _fresh(cache.get(name), marks[name])
    }
    stale = [name for name in names if name not in entries]
    if stale:
        _scan_all(folder, stale, marks, entries, listed)
    elif caches[0].keys() - listed:
        _save(folder, entries, listed)
    index = Index({}, {}, set(stale))
    for name in names:
        if "broken" in entries[name]:
            index.broken[name] = entries[name]["broken"]
        else:
            index.timelines[name] = Timeline.from_json(entries[name]["timeline"])
    return index


def _mark(path: Path) -> Entry:
    """What tells whether a file has changed; nothing if it can't be told."""
    try:
        status = path.stat()
    except OSError:
        return {}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _fresh(entry: Entry | None, mark: Entry) -> bool:
    return entry is not None and bool(mark) and mark.items() <= entry.items()


def _scan_all(
    folder: Path, names: list[str], marks: dict[str, Entry], entries: dict[str, Entry], listed: set
) -> None:
    """Scan videos into `entries`, saving them now and then and in the end, however that comes."""
    threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    saved = time.monotonic()
    try:
        scanned = threads.map(lambda name: _scan(folder, name, marks[name]), names)
        progress = tqdm(scanned, f"indexing {folder}", len(names), unit=" videos", delay=SHOW_AFTER)
        for name, entry in zip(names, progress, strict=True):
            entries[name] = entry
            if time.monotonic() - saved > SAVE_EVERY:
                _save(folder, entries, listed)
                saved = time.monotonic()
    finally:
        threads.shutdown(cancel_futures=True)
        _save(folder, entries, listed)


def _scan(folder: Path, name: str, mark: Entry) -> Entry:
    """The entry of a video. One that may not be read has no mark: it is tried again next time."""
    path = folder / name
    try:
        return {**mark, "timeline": scan(path).to_json()}
    except OSError as error:
        return {"broken": f"may not be read: {error.strerror or error}"}
    except ValueError as error:
        return {**mark, "broken": str(error).removeprefix(f"{path} ")}


def _places(folder: Path) -> list[Path]:
    """Where the cache may be: in the folder, or the user's cache folder under its path's hash."""
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return [folder / NAME, _user_cache() / "tinyvgpt" / f"index-{digest[:32]}.json"]


def _user_cache() -> Path:
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir())


def _load(place: Path) -> dict[str, Entry]:
    """What a cache knows; nothing if it is missing, damaged or of another version."""
    try:
        header, body = place.read_bytes().split(b"\n", 1)
        return json.loads(body) if json.loads(header) == _header(body) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _header(body: bytes) -> dict[str, Any]:
    """PyAV's version is part of it: another one may read what this one can't."""
    digest = hashlib.sha256(body).hexdigest()
    return {"tinyvgpt video index": VERSION, "av": import_av().__version__, "sha256": digest}


def _save(folder: Path, entries: dict[str, Entry], listed: set[str]) -> None:
    """Store entries beside those of other splits, at the first place where that is possible."""
    known: dict[str, Entry] = {}
    for place in reversed(_places(folder)):
        known |= _load(place)
    kept = {
        name: entry
        for name, entry in sorted((known | entries).items())
        if name in listed and "mtime_ns" in entry
    }
    body = json.dumps(kept, separators=(",", ":")).encode()
    content = json.dumps(_header(body)).encode() + b"\n" + body
    failures = []
    for place in _places(folder):
        try:
            if place.parent != folder:
                place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({place: lambda path: path.write_bytes(content)})
            return
        except OSError as error:
            failures.append(f"{place}: {error.strerror or error}")
    warnings.warn(
        f"the index of {folder} could not be kept, next time its videos are scanned again "
        f"({'; '.join(failures)})",
        stacklevel=2,
    )
