"""Model folders: `config.json` beside `*.safetensors`, written whole or not at all.

Shapes: none of its own; tensors are stored under the modules' parameter names.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VERSION = 1  # of the layout of config.json
C = TypeVar("C")  # a configuration, a dataclass
SHIPPED = Path(__file__).parent / "weights"


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files under temporary names, then renames them all: failing half-way changes nothing.

    Args:
        writers: for each path a function that writes the file at the (temporary) path it is given.

    Raises:
        OSError: as a writer does, for instance with a full disk; nothing is left behind.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            write(temporary[path])
            with open(temporary[path], "rb") as file:
                os.fsync(file.fileno())
        for path in writers:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def weights_of(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's state dict on the CPU; floats as `dtype` if one is given."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    return {
        name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()
    }


def save_folder(folder: Path, config: dict, weights: Mapping[str, dict[str, Tensor]]) -> None:
    """Writes a model folder: config.json and one safetensors file for each entry of `weights`.

    Raises:
        OSError: if writing fails; a model that was in the folder stays whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, **config}, indent=2) + "\n"
    files = {
        folder / f"{name}.safetensors": lambda path, state=state: save_file(state, path)
        for name, state in weights.items()
    }
    write_atomically({**files, folder / "config.json": lambda path: path.write_text(text)})


def resolve(name: str | Path) -> Path:
    """The folder of a model: a folder as it is, a shipped model's name, or a hub id ("user/model").

    Raises:
        ValueError: if there is no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
    if str(name) in shipped:
        return SHIPPED / str(name)
    if str(name).count("/") != 1 or str(name).startswith(("/", ".")):
        raise ValueError(
            f"no model {str(name)!r}: not a folder, and shipped are {', '.join(shipped) or 'none'}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["config.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is not a folder, and could not be fetched from the hub: {reason}"
        ) from None


def read_config(folder: Path) -> dict:
    """Reads a model folder's config.json.

    Raises:
        ValueError: if there is none, it is damaged, or its version is another.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    found = config.get("version") if isinstance(config, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} has version {found!r}, this tinyvgpt reads version {VERSION}; "
            "save the model again"
        )
    return config


def build_config(cls: type[C], values: dict, where: str) -> C:
    """Makes the dataclass `cls` of a config's values; ValueError names fields it doesn't know."""
    unknown = set(values) - {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(
            f"{where} has unknown fields {sorted(unknown)}; "
            "it may be of another version of tinyvgpt"
        )
    return cls(**values)


def load_weights(path: Path, module: nn.Module) -> None:
    """Fills a module from a safetensors file, converting to the module's dtypes.

    Raises:
        ValueError: if the file is missing or damaged, or `fill` refuses its tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    fill(module, state, str(path))


def fill(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads a state dict; ValueError names tensors that are missing, extra or misshapen."""
    expected = module.state_dict()
    problems = [
        _list("missing", expected.keys() - state.keys()),
        _list("not part of the model", state.keys() - expected.keys()),
        _list(
            "of another shape",
            (
                f"{name} {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in state and state[name].shape != tensor.shape
            ),
        ),
    ]
    if any(problems):
        raise ValueError(f"{where} doesn't fit the model: " + "; ".join(filter(None, problems)))
    module.load_state_dict(state)


def _list(what: str, names: Iterable[str], most: int = 4) -> str:
    """`3 tensors missing (a, b, c)`, or nothing for no names."""
    names = sorted(names)
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"{len(names)} tensors {what} ({shown})" if names else ""
