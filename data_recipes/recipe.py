"""What every recipe shares: how it ends, and how it writes a file whole or not at all.

A user's mistake is one line and exit code 2, never a traceback.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
