"""Where bars are shown; `test_log` looks at them."""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from tinyvgpt.progress import hidden


@pytest.mark.parametrize(("columns", "shown"), [(0, False), (80, True)])
def test_a_terminal_of_no_width_shows_no_bar(monkeypatch, columns, shown):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        found = hidden()
        monkeypatch.undo()
    os.close(ours)
    assert found != shown


def test_log_files_show_no_bar(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with open(tmp_path / "log", "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        found = hidden()
        monkeypatch.undo()
    assert found
