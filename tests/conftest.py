"""Fixtures that several test files share."""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
for scripts in ("data_recipes", "book/notebooks"):
    sys.path.insert(0, str(ROOT / scripts))  # as Python does for a script that is started there


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


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory):
    """Where kernels compiled for the CPU are kept, by all processes of this test run."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    top = tmp_path_factory.getbasetemp()
    folder = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def user_cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def filled(tmp_path):
    """Return a function that puts films of 20 frames at places in a folder, and returns that."""
    from videos import fill

    return partial(fill, tmp_path)


@pytest.fixture
def scans(monkeypatch):
    """Names of the files that were scanned."""
    from tinyvgpt.data import index_cache

    names, scan = [], index_cache.scan

    def counted(path):
        names.append(path.name)
        return scan(path)

    monkeypatch.setattr(index_cache, "scan", counted)
    return names


@pytest.fixture
def quiet():
    """No warning may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
