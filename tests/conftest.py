"""Fixtures that several test files share."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "data_recipes"
sys.path.insert(0, str(RECIPES))  # as Python does for a script that is started there


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
