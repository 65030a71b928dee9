"""Reads PyTorch checkpoint files without running anything that they name.

A checkpoint is a zip file: `data/…` holds the numbers of its tensors, and `data.pkl` a program for
the pickle machine, a small stack machine that builds the containers around them. Python's own
machine lets that program import and call whatever it names, and a checkpoint may come from anyone.
So here is another machine, which knows only what weights need: `pickletools` cuts the program into
instructions, `_Machine` carries them out. A name stays a name, an object of an unknown class
becomes an inert placeholder, and a call is refused.

Shapes: none of its own; tensors are as the checkpoint has them.
"""

import math
import pickletools
import reprlib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
NOTHING = {"PROTO", "FRAME"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


class UnsafeCheckpoint(ValueError):
    """A checkpoint asks for something that reading weights does not need."""


@dataclass(frozen=True)
class Name:
    """A class or function that a checkpoint names: its name, not the thing."""

    name: str


@dataclass(eq=False, repr=False)
class Placeholder:
    """Stands for an object of an unknown class: keeps its attributes, does nothing."""

    name: str  # of the class
    attributes: dict[str, Any] = field(default_factory=dict)


class _Storage(NamedTuple):
    """The numbers behind one or more tensors."""

    numbers: Tensor  # (length,)


def read(path: str | Path) -> dict:
    """Reads a PyTorch checkpoint file without running anything that it names.

    Classes and functions become `Name`, objects of unknown classes `Placeholder`; an `OrderedDict`
    becomes a dict. Tensors that shared memory when they were saved do so again.

    Raises:
        UnsafeCheckpoint: if the file asks for a function call, an external object, or more memory
            than its own size; the message names what it asks for.
        ValueError: if the file isn't a (whole) PyTorch zip file with a dict inside.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Machine(archive, path.stat().st_size).run()
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path} {error}") from None
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            truncated = file.read(2) == b"PK"
        reason = (
            "is truncated" if truncated else "is not a zip file, as PyTorch 1.6 or later writes"
        )
        raise ValueError(f"{path} {reason}") from None
    except Exception as error:  # a damaged program can go wrong in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged: {reason:.300}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict")
    return content


class _Machine:
    """Carries out a pickle program: makes containers, tensors and placeholders, nothing else."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        members = archive.infolist()
        roots = [m.filename[:-9] for m in members if m.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip file without data.pkl, not a PyTorch checkpoint")
        # PyTorch stores numbers as they are; what is packed, or lies over another, may be endless.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise UnsafeCheckpoint("has compressed members, which PyTorch never writes")
        if sum(m.file_size for m in members) > size:
            raise UnsafeCheckpoint("has members that together are larger than the file")
        self.archive, self.root = archive, roots[0]
        named = f"{self.root}/byteorder" in archive.namelist()
        if named and self._member("byteorder") != b"little":
            raise ValueError("its byteorder is not little")
        self.room = 2 * size  # items that dicts may yet get: each takes a byte of the file, or more
        self.stack: list[Any] = []  # since the last mark
        self.below: list[list[Any]] = []  # what lies below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        """What the program builds."""
        for opcode, argument, _ in pickletools.genops(self._member("data.pkl")):
            self._step(opcode.name, argument)
        return self.stack.pop()

    def _member(self, name: str) -> bytes:
        return self.archive.read(f"{self.root}/{name}")

    def _step(self, opcode: str, argument: Any) -> None:
        """Carries out one instruction (their meanings: Python's pickletools.py)."""
        stack, memo = self.stack, self.memo
        match opcode:
            case _ if opcode in LITERALS:
                stack.append(argument)
            case _ if opcode in CONSTANTS:
                stack.append(CONSTANTS[opcode])
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                stack.pop() if stack else self._since_mark()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                self._push(tuple(self._since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                self._push(self._since_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                self._push(self._set_items({}, self._since_mark()))
            case "EMPTY_SET":
                stack.append(set())
            case "FROZENSET":
                self._push(frozenset(map(_key, self._since_mark())))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._since_mark()
                _extend(self.stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._since_mark()
                self._set_items(self.stack[-1], items)
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{module}.{name}"))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._call(called, arguments))
            case "INST":
                self._push(self._call(Name(argument.replace(" ", ".", 1)), self._since_mark()))
            case "OBJ":
                called, *arguments = self._since_mark()
                self._push(self._call(called, arguments))
            case "NEWOBJ" | "NEWOBJ_EX":
                del stack[-1 if opcode == "NEWOBJ" else -2 :]  # its arguments
                stack.append(_new(stack.pop()))
            case "BUILD":
                state = stack.pop()
                self._set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "PERSID":
                raise UnsafeCheckpoint(f"asks for the external object {reprlib.repr(argument)}")
            case _ if opcode not in NOTHING and opcode != "STOP":
                raise UnsafeCheckpoint(
                    f"uses the pickle instruction {opcode}, which reading weights never needs"
                )

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _since_mark(self) -> list[Any]:
        """Takes everything since the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _call(self, called: Any, arguments: Any) -> Any:
        """What calling something that the checkpoint names stands for, if that is harmless."""
        if not isinstance(called, Name):
            raise UnsafeCheckpoint(f"asks to call a {type(called).__name__}")
        if called.name in REBUILD_TENSOR:
            return _tensor(*arguments)
        if called.name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if called.name == "collections.OrderedDict":
            return self._set_items({}, [x for pair in (arguments or [()])[0] for x in pair])
        # By convention (PEP 8) a class has a capital; it is called to make an object, which becomes
        # a placeholder. Anything else would be a function that is asked to run.
        if not called.name.rpartition(".")[2].lstrip("_")[:1].isupper():
            raise UnsafeCheckpoint(
                f"asks to call {called.name:.200}, which reading weights never needs"
            )
        return _new(called)

    def _storage(self, pid: Any) -> _Storage:
        """The storage that a persistent id names."""
        match pid:
            case ("storage", Name(kind), str(key), str(), int(length)) if kind in DTYPES:
                dtype = DTYPES[kind]
            case _:
                raise UnsafeCheckpoint(f"asks for the external object {reprlib.repr(pid)}")
        if key not in self.storages:
            data = self._member(f"data/{key}")
            if len(data) != length * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes, not {length} × {dtype}")
            empty = torch.empty(0, dtype=dtype)
            numbers = torch.frombuffer(bytearray(data), dtype=dtype) if data else empty
            self.storages[key] = _Storage(numbers)
        return self.storages[key]

    def _set_state(self, target: Any, state: Any) -> None:
        """Gives a placeholder its attributes; a dict's (an OrderedDict's metadata) are dropped."""
        if isinstance(target, Placeholder):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self._set_items(target, [x for item in part.items() for x in item])
        elif not isinstance(target, dict):
            raise UnsafeCheckpoint(f"asks to change the state of a {type(target).__name__}")

    def _set_items(self, target: Any, items: list[Any]) -> Any:
        """Puts key, value, key, value, … into a dict, or a placeholder of some kind of dict."""
        attributes = target.attributes if isinstance(target, Placeholder) else target
        if not isinstance(attributes, dict):
            raise UnsafeCheckpoint(f"asks to set items of a {type(target).__name__}")
        self.room -= len(items)
        if self.room < 0:
            raise UnsafeCheckpoint("has dicts that together are larger than the file")
        attributes.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        return target


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor over a storage; refuses one that reaches beyond it, or repeats its numbers."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int for n in numbers):
        raise UnsafeCheckpoint("has a tensor that is not made of a storage and integers")
    length = len(storage.numbers)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min(numbers) < 0 or math.prod(size) > length or (all(size) and last >= length):
        raise UnsafeCheckpoint(
            f"has a tensor of shape {reprlib.repr(size)} that reaches beyond its {length} numbers"
        )
    return torch.as_strided(storage.numbers, size, stride, offset)


def _new(cls: Any) -> Any:
    """An object of a class that the checkpoint names."""
    if not isinstance(cls, Name):
        raise UnsafeCheckpoint(f"asks for an object of a {type(cls).__name__}, not of a class")
    return {} if cls.name == "collections.OrderedDict" else Placeholder(cls.name)


def _extend(target: Any, items: Iterable[Any]) -> None:
    """Adds items to a list or set; those of a placeholder of some kind of list are dropped."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_key, items))
    elif not isinstance(target, Placeholder):
        raise UnsafeCheckpoint(f"asks to add items to a {type(target).__name__}")


def _key(key: Any) -> Any:
    """A dict's key: hashing nested tuples, which may share parts, could take for ever."""
    plain = str | bytes | int | float | Name | Placeholder | None
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, plain) for part in parts):
        raise UnsafeCheckpoint(f"has a key of nested containers, {reprlib.repr(key)}")
    return key
