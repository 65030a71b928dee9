"""Model folders: `config.json` beside `*.safetensors`, written whole or not at all.

Shapes: none of its own; tensors are stored under the modules' parameter names.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VERSION = 1  # of the layout of config.json
C = TypeVar("C")  # a configuration, a dataclass
M = TypeVar("M", bound=nn.Module)
SHIPPED = Path(__file__).parent / "weights"


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files under temporary names, then renames them all: failing half-way changes nothing.

    Args:
        writers: for each path a function that writes the file at the (temporary) path it is given.

    Raises:
        OSError: as a writer does, for instance with a full disk; nothing is left behind.
    """
    run = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = {path: path.with_name(f".{path.name}.{run}.tmp") for path in writers}
    kept = {path: path.with_name(f".{path.name}.{run}.old") for path in writers}
    try:
        for path, write in writers.items():
            temporary[path].touch(exist_ok=False)
            mode = temporary[path].stat().st_mode  # what the umask leaves of 0666
            write(temporary[path])
            temporary[path].chmod(mode)  # safetensors makes files that only the owner can read
            with open(temporary[path], "rb") as file:
                os.fsync(file.fileno())
        _replace_all(temporary, kept)
    finally:
        for path in (*temporary.values(), *kept.values()):
            path.unlink(missing_ok=True)


def _replace_all(new: Mapping[Path, Path], kept: Mapping[Path, Path]) -> None:
    """Renames new[path] to path, for all; if one fails, puts the former files back from `kept`."""
    replaced = []
    try:
        for path in new:
            if len(new) > 1 and path.exists():
                _keep(path, kept[path])
        for path in new:
            os.replace(new[path], path)
            replaced.append(path)
    except OSError:
        for path in replaced:
            if kept[path].exists():
                os.replace(kept[path], path)
            else:
                path.unlink()
        raise


def _keep(path: Path, at: Path) -> None:
    """Gives a file a second name; a copy, where the file system has no hard links."""
    try:
        os.link(path, at)
    except OSError:
        shutil.copy2(path, at)


def weights_of(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's state dict on the CPU; floats as `dtype` if one is given and can hold them."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, weights are saved as floats")
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    if dtype is None:
        return state
    smaller = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    return {name: t if t.isfinite().all() else state[name] for name, t in smaller.items()}


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(state, path)
    except SafetensorError as error:  # how it says that the disk is full
        raise OSError(f"{path} could not be written: {error}") from None


def save_folder(folder: Path, config: dict, weights: Mapping[str, dict[str, Tensor]]) -> None:
    """Writes a model folder: config.json and one safetensors file for each entry of `weights`.

    Raises:
        OSError: if writing fails; a model that was in the folder stays whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, **config}, indent=2) + "\n"
    files = {
        folder / f"{name}.safetensors": partial(_save_tensors, state)
        for name, state in weights.items()
    }
    write_atomically({**files, folder / "config.json": lambda path: path.write_text(text)})


def resolve(name: str | Path) -> Path:
    """The folder of a model: a folder as it is, a shipped model's name, or a hub id ("user/model").

    Raises:
        ValueError: if there is no such model.
    """
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
    if (Path(name) / "config.json").is_file() or (Path(name).is_dir() and str(name) not in shipped):
        return Path(name)
    if str(name) in shipped:
        return SHIPPED / str(name)
    if str(name).count("/") != 1 or str(name).startswith(("/", ".")):
        raise ValueError(
            f"no model {str(name)!r}: not a folder, and shipped are {', '.join(shipped) or 'none'}"
        )
    import huggingface_hub

    try:
        files = ["config.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # its own, the HTTP client's and the system's: no common class
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{str(name)!r} is not a folder, and could not be fetched from the hub: {reason}"
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    found = config.get("version") if isinstance(config, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} has version {found!r}, this tinyvgpt reads version {VERSION}; "
            "save the model again"
        )
    return config


def build_config(cls: type[C], values: dict, where: str) -> C:
    """Makes the dataclass `cls` of a config's values; ValueError says what is wrong with them."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged: its settings are {values!r:.40}, not a dict")
    unknown = set(values) - {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(
            f"{where} has unknown fields {sorted(unknown)}; "
            "it may be of another version of tinyvgpt"
        )
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} can't be built: {error}") from None


def built(make: Callable[[], M], where: str) -> M:
    """Makes a module of a file's settings; ValueError if there can be none of that size."""
    try:
        return make()
    except (TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"{where}: no model can be built of these settings: {reason}") from None


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
    check_fits(module.state_dict(), state, where)
    module.load_state_dict(state)


def check_fits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError unless `state` has tensors of the same names and shapes as `expected`."""
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


def _list(what: str, names: Iterable[str], most: int = 4) -> str:
    """`3 tensors missing (a, b, c)`, or nothing for no names."""
    names = sorted(names)
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"{len(names)} tensors {what} ({shown})" if names else ""
