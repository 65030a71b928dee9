"""Servers that misbehave, and a target: fixtures of the tests of downloads."""

import fetch
import pytest
from fetching import CONTENT
from serving import Server


@pytest.fixture
def servers(monkeypatch):
    """Makes servers; nothing waits between tries, nothing goes through a proxy."""
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    made = []

    def make():
        made.append(Server(CONTENT))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(servers):
    return servers()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "file.bin"
