"""Model folders: written whole or not at all, and read with errors that say what is wrong."""

import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from tinyvgpt import store
from tinyvgpt.store import (
    build_config,
    fill,
    load_weights,
    read_config,
    resolve,
    save_folder,
    weights_of,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save(folder, value=1.0, size=10):
    save_folder(
        folder,
        {"a": value},
        {"vqvae": {"w": torch.full((size,), value)}, "gpt": {"w": torch.full((size,), -value)}},
    )


# Writing ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    save(tmp_path / "new" / "model", 2.0)
    folder = tmp_path / "new" / "model"
    assert names(folder) == ["config.json", "gpt.safetensors", "vqvae.safetensors"]
    assert read_config(folder) == {"version": 1, "a": 2.0}
    assert torch.equal(load_file(folder / "gpt.safetensors")["w"], torch.full((10,), -2.0))
    save(folder, 3.0)
    assert read_config(folder)["a"] == 3.0
    assert len(names(folder)) == 3


def test_full_disk(tmp_path, file_limit):
    """The weights don't fit: what was there stays, to the last byte, and nothing is left over."""
    save(tmp_path)
    before = content(tmp_path)
    with file_limit(10_000), pytest.raises(OSError, match="could not be written"):
        save(tmp_path, 2.0, size=10_000)
    assert content(tmp_path) == before


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_write_error_in_the_middle(tmp_path, fails_at):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("old")
    before = content(tmp_path)

    def writer(i):
        def write(path):
            path.write_text("new, and ")
            if i == fails_at:
                raise OSError(28, "No space left on device")

        return write

    with pytest.raises(OSError, match="No space left"):
        write_atomically({path: writer(i) for i, path in enumerate(paths)})
    assert content(tmp_path) == before


@pytest.mark.parametrize("existed", [(), "a", "ab", "abc"])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("links", [True, False])
def test_renaming_fails(tmp_path, monkeypatch, existed, fails_at, links):
    """Files already renamed are put back; those that are new go."""
    for name in existed:
        (tmp_path / name).write_text("old " + name)
    before = content(tmp_path)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at + 1:
            raise OSError(5, "Input/output error")
        replace(source, target)

    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically({tmp_path / n: lambda path: path.write_text("new") for n in "abc"})
    assert content(tmp_path) == before


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def write(temporary):
        assert temporary.parent == path.parent, "on the same disk, or it can't be renamed"
        with open(temporary, "w") as file:
            file.write("new")
            file.flush()
            assert path.read_text() == "old"

    write_atomically({path: write})
    assert path.read_text() == "new"


def test_concurrent_writers_of_one_file(tmp_path):
    """Two threads in the middle of writing the same file don't get into each other's way."""
    both, failures = threading.Barrier(2), []

    def write(text):
        def writer(path):
            path.write_text(text)
            both.wait(timeout=10)
            assert path.read_text() == text

        try:
            write_atomically({tmp_path / "a": writer})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "a").read_text() in ("one", "two")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_the_umasks(tmp_path, umask):
    """safetensors makes its files readable to their owner only, which others can't share."""
    former = os.umask(umask)
    try:
        save(tmp_path)
    finally:
        os.umask(former)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_smaller_floats(tmp_path):
    """Floats shrink, counts stay, and so does what the smaller type can't hold."""
    module = nn.BatchNorm1d(4)
    module.register_buffer("count", torch.tensor([70_000.0, 1.0]))  # float16 ends at 65,504
    saved = weights_of(module, torch.float16)
    assert saved["weight"].dtype == torch.float16
    assert saved["num_batches_tracked"].dtype == torch.int64
    assert torch.equal(saved["count"].float(), module.count)
    assert weights_of(module)["weight"].dtype == torch.float32
    save_file(saved, tmp_path / "w.safetensors")
    loaded = nn.BatchNorm1d(4)
    loaded.register_buffer("count", torch.zeros(2))
    load_weights(tmp_path / "w.safetensors", loaded)
    assert loaded.weight.dtype == torch.float32
    assert torch.equal(loaded.count, module.count)


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"version": 2}', r"version 2, this tinyvgpt reads version 1"),
        ('{"version": "1"}', "version '1'"),
        ("{}", "version None"),
        ("[]", "version None"),
        ("", "not valid JSON"),
        ('{"version": 1', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\x80", "not valid JSON"),
    ],
)
def test_damaged_config(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=says) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        read_config(tmp_path)


@dataclass(frozen=True)
class Config:
    width: int = 4

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"width": 3}, "width 3 is odd"),
        ({"width": None}, "can't be built"),
        ({"depth": 3, "height": 1}, r"unknown fields \['depth', 'height'\]"),
        ([], "not a dict"),
        ("width", "not a dict"),
    ],
)
def test_settings_that_cannot_be_built(values, says):
    assert build_config(Config, {"width": 6}, "here") == Config(6)
    with pytest.raises(ValueError, match=says) as caught:
        build_config(Config, values, "here")
    assert str(caught.value).startswith("here")


def test_tensors_that_do_not_fit(tmp_path):
    module = nn.Linear(3, 2)
    fitting = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    fill(module, fitting, "w")
    assert torch.equal(module.weight, torch.ones(2, 3))
    for changed, says in [
        ({"weight": fitting["weight"]}, r"1 tensors missing \(bias\)"),
        ({**fitting, "extra": torch.ones(1)}, r"1 tensors not part of the model \(extra\)"),
        ({**fitting, "bias": torch.ones(5)}, r"bias \(5,\), the model has \(2,\)"),
        ({**fitting, "weight": torch.ones(3, 2)}, r"weight \(3, 2\), the model has \(2, 3\)"),
        ({}, r"2 tensors missing \(bias, weight\)"),
        ({str(i): torch.ones(1) for i in range(9)}, r"9 tensors not part .*\(0, 1, 2, 3, …\)"),
    ]:
        save_file(changed, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=says) as caught:
            load_weights(tmp_path / "w.safetensors", module)
        assert "w.safetensors doesn't fit the model" in str(caught.value)
    assert torch.equal(module.bias, torch.ones(2)), "a module that was refused keeps its weights"


def test_damaged_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="is missing"):
        load_weights(path, nn.Linear(3, 2))
    save_file(nn.Linear(3, 2).state_dict(), path)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:20], b"", b"x" * 100, b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_weights(path, nn.Linear(3, 2))


# Finding ------------------------------------------------------------------------------------------


def test_finds_folders_and_shipped_models(tmp_path, monkeypatch):
    (tmp_path / "shipped" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny") == tmp_path / "shipped" / "tiny"
    Path("tiny").mkdir()  # someone's data, say
    assert resolve("tiny") == tmp_path / "shipped" / "tiny"
    Path("tiny/config.json").write_text("{}")
    assert resolve("tiny") == Path("tiny"), "a model folder comes first"
    Path("mine").mkdir()
    assert resolve(Path("mine")) == Path("mine")
    for name in ("other", "/a/b", "./a", "../a/b", "a/b/c"):
        with pytest.raises(ValueError, match="not a folder, and shipped are tiny"):
            resolve(name)


@pytest.mark.parametrize(
    "error",
    [
        OSError("network is unreachable\nand more lines"),
        LocalEntryNotFoundError("cannot find it\nTry again"),
        HFValidationError("bad name\n"),
        RuntimeError("client has been closed"),
        ConnectionError(),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match="'user/model' is not a folder, and could not be"
    ) as caught:
        resolve("user/model")
    assert "\n" not in str(caught.value)
    assert (str(error).split("\n")[0] or type(error).__name__) in str(caught.value)


def test_hub_id(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("user/model") == tmp_path
    assert asked == [("user/model", ["config.json", "*.safetensors"])], "no code, no pickles"
