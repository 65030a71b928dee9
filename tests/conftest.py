"""Fixtures that several test files share."""

from contextlib import contextmanager

import pytest


@pytest.fixture
def file_limit():
    """Within `with file_limit(size):` writing more than `size` bytes fails, as on a full disk.

    Only there: the test runner's own output may be a file that is longer already.
    """
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
