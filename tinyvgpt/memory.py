"""Running out of memory, said in one line: with what, and what to lower.

Shapes: none of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Context in which running out of memory is a ValueError: "out of memory " and `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds = torch.OutOfMemoryError, MemoryError
        if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory {advice}") from error
