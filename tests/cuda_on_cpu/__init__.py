"""Runs CUDA kernels of the package on a CPU, thread by thread: slow, exact, and without a GPU.

What a kernel does is compiled by g++ with cuda_on_cpu.h in the place of CUDA. It shows whether
indices, fragments, barriers and asynchronous copies are right, not how fast they are. Two threads
that race for shared memory are not always caught; compute-sanitizer on a GPU is for that.
"""

import ctypes
import hashlib
import os
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tinyvgpt.kernels import build

HEADER = "cuda_on_cpu.h"
HERE = Path(__file__).parent
# Half of the time goes to compiling; with -O2 that takes longer, and kernels run no faster.
OPTIONS = (
    *("-std=c++17", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"),
    "-U_FORTIFY_SOURCE",  # it takes a jump to another fiber's stack for an attack
)


def build_whole(target: Path, *arguments: str) -> None:
    """Has g++ make a file unless it is there, for another process, too, that may want the same."""
    if target.exists():
        return
    part = target.with_name(f"{os.getpid()}-{target.name}")
    command = ["g++", *OPTIONS, *arguments, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    part.replace(target)


@lru_cache
def header(folder: Path) -> Path:
    """A copy of the header, compiled once for all kernels: g++ takes the .gch beside it."""
    copy = folder / HEADER
    part = folder / f"{os.getpid()}-{HEADER}"
    part.write_text((HERE / HEADER).read_text())
    part.replace(copy)
    build_whole(folder / f"{HEADER}.gch", "-x", "c++-header", str(copy))
    return copy


@lru_cache
def compiled(source: str, kernel: str, folder: Path) -> ctypes.CDLL:
    """A shared library in which `run` launches a kernel, named as in C++: "copy<float, 4>"."""
    source = source.replace("extern __shared__", "extern")
    text = f"""char shared[emulated::SHARED] __attribute__((aligned(1024)));
{source}
extern "C" void run(const unsigned* grid, const unsigned* block, long bytes, void** args) {{
    emulated::launch({kernel}, grid, block, bytes, shared, args);
}}
extern "C" void counts(long* out) {{
    out[0] = emulated::conflicts, out[1] = emulated::matrix_loads;
}}
"""
    name = hashlib.sha256(text.encode()).hexdigest()[:20]
    path = folder / f"{os.getpid()}-{name}.cpp"
    path.write_text(text)
    library = folder / f"{name}.so"
    build_whole(library, "-include", str(header(folder)), "-shared", str(path))
    return ctypes.CDLL(str(library))


def launch(source, kernel, folder, grid, block, shared_bytes, *args):
    """Runs a kernel on CPU tensors, numpy scalars and None (a null pointer)."""
    library = compiled(source, kernel, folder)
    values = []
    for arg in args:
        if arg is None or isinstance(arg, torch.Tensor):
            values.append(ctypes.c_void_p(None if arg is None else arg.data_ptr()))
        else:
            values.append(np.ctypeslib.as_ctypes_type(arg.dtype)(arg.item()))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
    library.run(sizes[0], sizes[1], ctypes.c_long(shared_bytes), pointers)


def in_place_of_launch(folder, *files):
    """A `build.launch` that runs kernels of these files, which need no tiles, on the CPU."""
    sources = {file: (build.HERE / file).read_text() for file in files}

    def emulate(file, name, grid, threads, shared_bytes, device, *args, overlap):
        launch(sources[file], name, folder, grid, (threads,), shared_bytes, *args)

    return emulate


def conflicts(source, kernel, folder) -> tuple[int, int]:
    """Bank conflicts of matrix loads so far, and how many 8 × 8 matrices were loaded."""
    found = (ctypes.c_long * 2)()
    compiled(source, kernel, folder).counts(found)
    return found[0], found[1]
