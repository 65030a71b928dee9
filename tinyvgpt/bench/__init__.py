"""Timings against baselines, in one run on one machine: a module a subject.

`tinyvgpt bench` runs them. Only ratios within a run mean something.

Shapes: none of its own.
"""

import datetime
import json
import platform
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """What the device is called, as part of a file name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def record(result: dict, name: str, command: str, folder: Path) -> Path:
    """Writes a result as JSON with device, date, versions and command; returns the file."""
    path = folder / f"{name}.json"
    about = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **result}, indent=2) + "\n")
    return path
