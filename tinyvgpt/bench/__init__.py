"""Timings against baselines, in one run on one machine: a module a subject.

`tinyvgpt bench` runs them. Only ratios within a run mean something.

Shapes: none of its own.
"""

import datetime
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinyvgpt.store import write_atomically


def device_name(device: str) -> str:
    """What the device is called."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def record(result: dict, name: str, command: str, folder: Path) -> Path:
    """Writes a result as JSON with device, date, versions and command; returns the file."""
    path = folder / f"{name}.json"
    about = {"date": datetime.date.today().isoformat(), "command": command, **versions()}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **result}, indent=2) + "\n"
    write_atomically({path: lambda file: file.write_text(text, encoding="utf-8")})
    return path


def versions() -> dict[str, str]:
    """What a record is made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def earlier(path: Path, about: dict[str, str]) -> dict[str, Any]:
    """What was recorded before, to be added to: {} if with other versions or other than `about`."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = versions() | about
    if any(found.get(name) != same[name] for name in same):
        return {}
    return {name: value for name, value in found.items() if name not in ("date", "command")}


@contextmanager
def exact_float32(wanted: bool) -> Iterator[None]:
    """Context in which, if wanted, float32 convolutions are not rounded to TF32."""
    former = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = former and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former
