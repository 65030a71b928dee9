"""Draws the book's diagrams into book/_static: python book/diagrams/draw.py.

Every other module here has the diagrams of one page, as DIAGRAMS = {file's name: function}, drawn
with the shapes of `vocabulary`.
"""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent
STATIC = FOLDER.parent / "_static"


def diagrams() -> dict[str, Callable[[], str]]:
    """All diagrams by their files' names."""
    sys.path.insert(0, str(FOLDER))
    found: dict[str, Callable[[], str]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in ("draw", "vocabulary"):
            found |= runpy.run_path(str(path))["DIAGRAMS"]
    return found


if __name__ == "__main__":
    for name, draw in diagrams().items():
        (STATIC / name).write_text(draw(), encoding="utf-8")
        print(STATIC / name)
