"""Checkpoint files from anyone: honest ones are read whole, and nothing in any is ever run."""

import argparse
import collections
import os
import pickle
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tinyvgpt.unpickle import Name, Placeholder, UnsafeCheckpoint, read

P2, STOP = b"\x80\x02", b"."
FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def archive(path, program, storages=(), compression=zipfile.ZIP_STORED, root="archive"):
    """A checkpoint file of a handmade pickle program."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", program)
        for key, data in dict(storages).items():
            file.writestr(f"{root}/data/{key}", data)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(size, stride, offset=0, key="0", length=4, kind=b"ctorch\nFloatStorage\n"):
    """Instructions that push a tensor over storage `key`."""
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + number(length) + b"tQ"
    return rebuild(storage, number(offset), numbers(size), numbers(stride))


def rebuild(*arguments):
    """Instructions that ask for a tensor of these four arguments."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(arguments) + b"\x89}tR"


def number(n):
    return b"\x8a\x10" + n.to_bytes(16, "little", signed=True)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def under_key(instructions):
    """A program that makes {"x": …}."""
    return P2 + b"}" + text("x") + instructions + b"s" + STOP


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Weird:
    """Of a class that the reader can't know."""

    def __init__(self):
        self.number, self.names = 7, ["a"]


class Stateful(Weird):
    def __getstate__(self):
        return {"kept": 1}, {"slot": 2}

    def __setstate__(self, state):
        raise AssertionError("was run")


class Settings(dict):
    """A kind of dict, as Lightning's AttributeDict."""


# Honest files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_what_torch_saves(tmp_path, protocol):
    base = torch.arange(12.0).view(3, 4)
    dtypes = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    content = {
        "state_dict": collections.OrderedDict(view=base[1:, ::2], transposed=base.T),
        **{name: torch.tensor([0, 1, 1], dtype=getattr(torch, name)) for name in dtypes},
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [None, True, -1, 2**70, 1.5, "ü", b"bytes", (1,), (1, 2, 3, 4), {5: {}}, []],
    }
    torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
    if protocol == 2:  # in which bytes are pickled as a call
        with pytest.raises(UnsafeCheckpoint, match=r"_codecs\.encode"):
            read(tmp_path / "a.ckpt")
        content["plain"].remove(b"bytes")
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
    found = read(tmp_path / "a.ckpt")
    assert list(found) == list(content)
    assert found["plain"] == content["plain"]
    assert list(found["state_dict"]) == ["view", "transposed"]
    for name, value in {**content, **content["state_dict"]}.items():
        if isinstance(value, torch.Tensor):
            read_back = {**found, **found["state_dict"]}[name]
            assert read_back.dtype == value.dtype, name
            assert torch.equal(read_back, value), name
    view, transposed = found["state_dict"].values()
    assert view.data_ptr() == transposed[0, 1:].data_ptr(), "their storage is shared"


def test_module_state_dict_with_metadata(tmp_path):
    """torch.nn hangs `_metadata` on its OrderedDict."""
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")["state_dict"]
    assert torch.equal(found["weight"], state["weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_classes_become_placeholders(tmp_path, protocol):
    content = {
        "args": argparse.Namespace(width=48, inner=argparse.Namespace(deep=1)),
        "callbacks": {Weird: {"best": 1.0}, torch.nn.Linear: 2},
        "object": Weird(),
        "stateful": Stateful(),
        "settings": Settings(a=1, b=[2]),
        "path": Path("a/b"),
        "counter": collections.Counter("aab"),
        "set": {1, 2} if protocol == 4 else None,
        "function": os.system,
    }
    torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
    found = read(tmp_path / "a.ckpt")
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].attributes["width"] == 48
    assert found["args"].attributes["inner"].attributes == {"deep": 1}
    module = "torch.nn.modules.linear.Linear"
    assert found["callbacks"] == {Name(f"{__name__}.Weird"): {"best": 1.0}, Name(module): 2}
    assert found["object"].attributes == {"number": 7, "names": ["a"]}
    assert found["stateful"].attributes == {"kept": 1, "slot": 2}
    assert found["settings"].attributes == {"a": 1, "b": [2]}
    assert isinstance(found["path"], Placeholder)
    assert isinstance(found["counter"], Placeholder)
    assert found["set"] == content["set"]
    assert found["function"] == Name("posix.system")


# Hostile files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "eval"),
        (exec, ("open({!r}, 'w')",), "exec"),
        (open, ("{}", "w"), "open"),
        (getattr, ("", "format"), "getattr"),
        (__import__, ("antigravity",), "__import__"),
        (subprocess.check_output, (["touch", "{}"],), "subprocess.check_output"),
        (os.mkdir, ("{}",), "posix.mkdir"),
        (pickle.loads, (b"N.",), "loads"),
    ],
)
def test_calls_are_refused_by_name(tmp_path, function, arguments, named, protocol):
    marker = tmp_path / "ran"
    filled = [a.format(str(marker)) if isinstance(a, str) else a for a in arguments]
    for content in (
        {"x": Runs(function, *filled)},
        {"state_dict": {"w": [Runs(function, *filled)]}},
        Runs(function, *filled),
    ):
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
        with pytest.raises(UnsafeCheckpoint, match=named if protocol == 4 else "call"):
            read(tmp_path / "a.ckpt")
    assert not marker.exists()


def test_class_with_arguments_is_not_constructed(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"x": Runs(subprocess.Popen, ["touch", str(marker)])}, tmp_path / "a.ckpt")
    assert read(tmp_path / "a.ckpt")["x"].attributes == {}
    time.sleep(0.2)
    assert not marker.exists()


SYSTEM = b"cposix\nsystem\n"
REFUSED = {
    "INST": (b"(" + text("x") + b"iposix\nsystem\n", "posix.system"),
    "OBJ": (b"(" + SYSTEM + text("x") + b"o", "posix.system"),
    "dotted STACK_GLOBAL": (
        text("os") + text("path.os.system") + b"\x93(" + text("x") + b"tR",
        r"os\.path\.os\.system",
    ),
    "call of a tensor": (tensor([4], [1]) + b")R", "Tensor"),
    "call of a dict": (b"})R", "dict"),
    "call of a placeholder": (b"ca\nB\n)\x81)R", "Placeholder"),
    "new object of a tensor": (tensor([4], [1]) + b")\x81", "Tensor"),
    "new object of a function's result": (SYSTEM + b"(" + text("x") + b"tR)\x81", "posix.system"),
    "extension 1": (b"\x82\x01", "EXT1"),
    "extension 2": (b"\x83\x01\x00", "EXT2"),
    "extension 4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "out-of-band buffer": (b"\x97", "NEXT_BUFFER"),
    "read-only buffer": (b"N\x98", "READONLY_BUFFER"),
    "bytearray that says it has 2**60 bytes": (b"\x96" + struct.pack("<Q", 2**60), "damaged"),
    "text persistent id": (b"Phttp://example\n", "http://example"),
    "persistent id of another kind": (text("../../etc/passwd") + b"Q", "passwd"),
    "storage of an unknown kind": (tensor([4], [1], kind=SYSTEM), "posix.system|Name"),
    "storage of another length": (tensor([4], [1], length=5), "5"),
    "storage that is not there": (tensor([4], [1], key="../data.pkl"), "no item named"),
    "state of a tensor": (tensor([4], [1]) + b"}b", "Tensor"),
    "state of a function": (SYSTEM + b"}b", "Name"),
    "state of a list": (b"]}b", "list"),
    "items of a list": (b"]NNs", "list"),
    "items of a tensor": (tensor([4], [1]) + b"NNs", "Tensor"),
    "append to a dict": (b"}Na", "dict"),
    "list as a key": (b"}]Ns", "key"),
    "tuple of tuples as a key": (b"}))\x86Ns", "key"),
    "tensor reaching beyond": (tensor([5], [1]), "beyond"),
    "tensor reaching beyond by stride": (tensor([2, 2], [3, 1]), "beyond"),
    "tensor reaching beyond by offset": (tensor([2], [1], offset=3), "beyond"),
    "negative stride": (tensor([2], [-1], offset=3), "beyond"),
    "negative offset": (tensor([2], [1], offset=-1), "beyond"),
    "negative size": (tensor([-2], [1]), "beyond"),
    "one number repeated 2**62 times": (tensor([2**31, 2**31], [0, 0]), "beyond"),
    "sizes beyond 64 bits": (tensor([2**90], [2**90]), "beyond"),
    "empty tensor of endless stride": (tensor([0, 2**90], [2**90, 1]), "damaged"),
    "tensor of a tensor": (
        rebuild(tensor([4], [1]), number(0), numbers([1]), numbers([1])),
        "not made of a storage",
    ),
    "size of strings": (
        tensor([4], [1]).replace(numbers([4]), b"(" + text("4") + b"t"),
        "integers",
    ),
    "missing arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "damaged"),
    "get from nowhere": (b"h\x07", "damaged"),
    "pop of nothing": (b"0000000", "damaged"),
    "no mark": (b"t", "damaged"),
    "unknown instruction": (b"\xff", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path, name):
    program, says = REFUSED[name]
    path = archive(tmp_path / "a.ckpt", under_key(program), {"0": FLOATS})
    with pytest.raises(ValueError, match=says) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lone_tensor_is_fine(tmp_path):
    """The handmade instructions above are refused for what they say, not for their form."""
    path = archive(tmp_path / "a.ckpt", under_key(tensor([2, 2], [1, 2])), {"0": FLOATS})
    assert torch.equal(read(path)["x"], torch.tensor([[1.0, 3.0], [2.0, 4.0]]))


def test_registered_extensions_are_not_used(tmp_path):
    """Python's own unpickler returns what an extension's number was registered for, uninspected."""
    import copyreg

    copyreg.add_extension("posix", "system", 0x77)
    try:
        pickle.loads(b"\x82\x77.")  # into its cache
        with pytest.raises(UnsafeCheckpoint, match="EXT1"):
            read(archive(tmp_path / "a.ckpt", under_key(b"\x82\x77(" + text("true") + b"tR")))
    finally:
        copyreg.remove_extension("posix", "system", 0x77)


def nested(depth, opener=b"(", closer=b"t"):
    return opener * depth + closer * depth


def laughs(levels):
    """Tuples of ten references to the tuple before: exponential to look at, linear to build."""
    level = lambda i: b"0(" + (b"h" + bytes([i])) * 10 + b"tq" + bytes([i + 1])  # noqa: E731
    return b")q\x00" + b"".join(level(i) for i in range(levels))


@pytest.mark.parametrize(
    ("name", "instructions", "says"),
    [
        ("a memo place of 2**31", b"Nr" + struct.pack("<I", 2**31), None),
        ("tuples nested a million deep", nested(10**6), None),
        ("lists nested 100,000 deep", b"]" * 10**5 + b"a" * (10**5 - 1), None),
        ("laughs", laughs(60), None),
        ("laughs as a key", b"}" + laughs(60) + b"Ns", "key of nested containers"),
        ("laughs as a persistent id", laughs(60) + b"Q", "external object"),
        ("laughs as a size", tensor([4], [1]).replace(numbers([4]), laughs(60)), "integers"),
        ("a dict given to 100,000 objects", None, "larger than the file"),
    ],
)
def test_bombs_go_off_harmlessly(tmp_path, name, instructions, says):
    if instructions is None:
        items = b"".join(text(str(i)) + b"N" for i in range(20000))
        objects = b"h\x01)\x81h\x00b" * 100_000
        instructions = b"}q\x00(" + items + b"u0](ca\nB\nq\x010" + objects + b"e"
    path = archive(tmp_path / "a.ckpt", under_key(instructions), {"0": FLOATS})
    start = time.perf_counter()
    if says is None:
        read(path)
    else:
        with pytest.raises(ValueError, match=says):
            read(path)
    assert time.perf_counter() - start < 20


# Files that are no checkpoints --------------------------------------------------------------------


def test_overlapping_members(tmp_path):
    """Two entries of the zip directory that share one stretch of the file."""
    path = archive(tmp_path / "a.ckpt", under_key(b"N"), {"0": bytes(1000), "1": bytes(1000)})
    data = path.read_bytes()
    second = data.rindex(b"PK\x01\x02")  # its directory entry: offset of the member at byte 42
    data = bytearray(data)
    first_offset = data.index(b"archive/data/0") - 30
    data[second + 42 : second + 46] = struct.pack("<I", first_offset)
    start = data.index(b"archive/data/1") - 30
    directory = data.index(b"PK\x01\x02")
    shrunk = data[:start] + data[directory:]
    shrunk[-6:-2] = struct.pack("<I", start)  # where the directory begins
    path.write_bytes(shrunk)
    with pytest.raises(ValueError, match="larger than the file"):
        read(path)


@pytest.mark.parametrize("root", ["/etc", "..", "C:\\x", "a/b/c"])
def test_absolute_names_stay_inside(tmp_path, root):
    path = archive(tmp_path / "a.ckpt", under_key(tensor([4], [1])), {"0": FLOATS}, root=root)
    before = sorted(tmp_path.rglob("*"))
    assert read(path)["x"].tolist() == [1, 2, 3, 4]
    assert sorted(tmp_path.rglob("*")) == before


def test_other_files(tmp_path):
    honest = tmp_path / "honest.ckpt"
    torch.save({"a": torch.arange(1000)}, honest)
    cases = {}

    def case(name, says, content):
        (tmp_path / name).write_bytes(content)
        cases[name] = says

    torch.save({"a": 1}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    cases["legacy.ckpt"] = r"1\.6"
    case("empty.ckpt", "not a zip", b"")
    case("text.ckpt", "not a zip", b"hello")
    case("truncated.ckpt", "truncated", honest.read_bytes()[:-500])
    case("pickle.ckpt", "not a zip", pickle.dumps({"a": 1}))
    torch.save([1, 2], tmp_path / "list.ckpt")
    cases["list.ckpt"] = "holds a list"
    archive(tmp_path / "zipped.ckpt", under_key(b"N"), compression=zipfile.ZIP_DEFLATED)
    cases["zipped.ckpt"] = "compressed"
    with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as file:
        file.writestr("photo.jpg", b"123")
    cases["photos.ckpt"] = "data.pkl"
    with zipfile.ZipFile(tmp_path / "big.ckpt", "w") as file:
        file.writestr("archive/data.pkl", under_key(b"N"))
        file.writestr("archive/byteorder", b"big")
    cases["big.ckpt"] = "byteorder"
    cases["missing.ckpt"] = "no checkpoint file"
    (tmp_path / "folder.ckpt").mkdir()
    cases["folder.ckpt"] = "no checkpoint file"
    case("cut program.ckpt", "damaged", archive(tmp_path / "x", P2 + b"}").read_bytes())
    for name, says in cases.items():
        with pytest.raises(ValueError, match=says):
            read(tmp_path / name)


def test_every_flipped_byte_gives_a_value_error_or_content(tmp_path):
    """Damage anywhere ends in a ValueError, or goes unnoticed in numbers and names."""
    honest = archive(tmp_path / "honest", under_key(tensor([4], [1])), {"0": FLOATS}).read_bytes()
    path = tmp_path / "a.ckpt"
    outcomes = collections.Counter()
    for i in range(len(honest)):
        damaged = bytearray(honest)
        damaged[i] ^= 0xFF
        path.write_bytes(damaged)
        try:
            outcomes[type(read(path))] += 1
        except ValueError:
            outcomes[ValueError] += 1
    assert outcomes[ValueError] > len(honest) / 2
    assert set(outcomes) <= {ValueError, dict}
