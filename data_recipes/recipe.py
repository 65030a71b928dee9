"""What recipes share: how one ends, writes a file whole or not at all, and trains a model once.

A user's mistake is one line and exit code 2, never a traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FIGURES = "figures.json"  # of a training run: there when it is finished


def run(main: Callable[[], None]) -> None:
    """Runs a recipe's `main`; Ctrl-C ends with code 130, what can be mended by its user with 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a name beside `path` that the next run writes over; then it is renamed.

    Raises:
        OSError: if writing fails; a file that was at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finished(folder: Path, settings: dict[str, Any], work: Callable[[], dict]) -> dict[str, Any]:
    """A run's figures: from its folder where they are, else those that `work` brings.

    Raises:
        ValueError: the folder's run had other settings.
    """
    settings, path = json.loads(json.dumps(settings)), folder / FIGURES
    if path.exists():
        found = json.loads(path.read_text())
        changed = [name for name in settings if found["settings"].get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"{folder} has a run with another {', '.join(changed)}; give another --runs"
            )
        return found["figures"]
    print(folder.name, flush=True)
    figures = work()
    text = json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())
    for checkpoint in folder.glob("checkpoint-*.pt"):
        checkpoint.unlink()
    return figures
