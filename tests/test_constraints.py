"""The pinned versions can be installed with the oldest Python that the package takes."""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OLDEST = PROJECT["requires-python"].removeprefix(">=") + ".0"


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_a_pin_takes_the_oldest_python(pin):
    try:
        about = metadata(pin.name)
    except PackageNotFoundError:
        pytest.skip("of another platform or extra")
    if pin.specifier.contains(about["Version"]):
        assert SpecifierSet(about["Requires-Python"] or "").contains(OLDEST)
