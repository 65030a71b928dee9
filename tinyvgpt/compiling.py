"""torch.compile: what it needs, and what is kept out of its graphs; chapter 16 says why.

Shapes: none of its own.
"""

import os
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def lacking(device: torch.device) -> str | None:
    """What torch.compile would miss on this machine to make kernels for a device, if anything."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "no Triton is installed"
        if sys.platform == "win32":  # Triton brings its own there
            return None
        variable, language, names = "CC", "C", ["gcc", "clang"]
    else:
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        variable, language, names = "CXX", "C++", [usual]
    names = [os.environ[variable]] if variable in os.environ else names
    if any(shutil.which(name) for name in names):
        return None
    return f"there is no {language} compiler ({' or '.join(names)})"


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable, but without importing the compiler (a second) until it compiles."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
