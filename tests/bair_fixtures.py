"""A folder of records like BAIR's, and a tar of it: fixtures of the tests of its recipe."""

import pytest
from bair_clips import make_folder, make_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bair")
    return folder, make_folder(folder)


@pytest.fixture
def tar(made, tmp_path):
    return make_tar(made[0], tmp_path / "made.tar")
