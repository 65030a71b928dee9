"""What the tests of downloads share: contents, what must be refused, an earlier run."""

import hashlib
import random

import fetch
import pytest
from fetch import Source

CONTENT = random.Random(0).randbytes(700_001)
OTHER = random.Random(1).randbytes(700_001)  # another version, as long
PAGE = b"<!DOCTYPE html><html><body>Moved</body></html>"
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


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
