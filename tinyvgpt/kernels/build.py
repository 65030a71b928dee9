"""From CUDA C++ to a kernel that runs: compiled by NVRTC at first use, then kept on disk.

Neither nvcc nor a host compiler is needed, only the package cuda-core and what PyTorch's CUDA
wheels bring. A compiled kernel (a cubin) is kept in a folder under a name that depends on its
source, its template arguments, architecture and NVRTC's version. Several processes may compile at
once; where the folder can't be written nothing is kept. Chapter 12 builds this file.

Shapes: none of its own.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinyvgpt.store import write_atomically

HERE = Path(__file__).parent
HEADERS = ("warp.cuh", "tile.cuh")  # put in front of every kernel
STANDARD = "c++17"


def source(file: str) -> str:
    """CUDA C++ of a kernel's file with the headers in front of it."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in (*HEADERS, file))


def architecture(device: torch.device) -> str:
    """What to compile for, such as "sm_80" or "sm_90a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def compiled(text: str, name: str, arch: str, log: io.StringIO | None = None) -> tuple[str, bytes]:
    """Compiles one kernel, which needs neither a GPU nor its driver.

    Args:
        text: CUDA C++.
        name: the kernel with its template arguments, as C++ spells it: "copy<float, 4>".
        arch: "sm_90a" and the like.
        log: gets what the assembler says of registers and spills.

    Returns:
        The kernel's mangled name and the cubin.

    Raises:
        RuntimeError: with the compiler's first error.
    """
    from cuda.core import Program, ProgramOptions

    said = log or io.StringIO()
    options = ProgramOptions(arch=arch, std=STANDARD, ptxas_options=["-v"] if log else None)
    try:
        code = Program(text, "c++", options).compile("cubin", name_expressions=(name,), logs=said)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "error" in line]
        raise RuntimeError(
            f"{name} does not compile for {arch}: {lines[0] if lines else error}"
        ) from error
    mangled = code.symbol_mapping[name]
    return mangled.decode() if isinstance(mangled, bytes) else mangled, bytes(code.code)


def cache_folder() -> Path:
    """Where cubins are kept: TINYVGPT_KERNELS, or a folder among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TINYVGPT_KERNELS") or Path(home) / "tinyvgpt" / "kernels")


def kept(text: str, name: str, arch: str) -> tuple[str, bytes]:
    """`compiled`, from disk if it was compiled before."""
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    key = hashlib.sha256(repr((text, name, arch, STANDARD, version)).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    try:
        mangled, _, cubin = path.read_bytes().partition(b"\n")
        return mangled.decode(), cubin
    except OSError:
        pass
    mangled_name, cubin = compiled(text, name, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = mangled_name.encode() + b"\n" + cubin
        write_atomically({path: lambda file: file.write_bytes(content)})
    except OSError:
        pass  # a home that can't be written: compiled again by the next process
    return mangled_name, cubin


@cache
def kernel(file: str, name: str, shared_bytes: int, cluster: int, device: int) -> Any:
    """A kernel, loaded on a GPU and allowed so much dynamic shared memory and such clusters."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    mangled, cubin = kept(source(file), name, architecture(torch.device("cuda", device)))
    with torch.cuda.device(device):
        Device(device).set_current()
        found = ObjectCode.from_cubin(cubin).get_kernel(mangled)
    kinds = driver.CUfunction_attribute
    wanted = {
        kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_bytes,
        kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: int(cluster > 8),
    }
    handle = driver.CUkernel(int(found.handle))
    for kind, value in wanted.items():
        (error,) = driver.cuKernelSetAttribute(kind, value, handle, driver.CUdevice(device))
        if value and error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"{name} can't have {shared_bytes} bytes of shared memory in clusters of {cluster} "
                f"blocks: {error}"
            )
    return found


def launch(
    file: str,
    name: str,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    device: torch.device,
    *args: Any,
    cluster: int = 1,
    overlap: bool = False,
) -> None:
    """Queues a kernel on the device's current stream.

    Args:
        file: in this folder, such as "axial.cu".
        name: as C++ spells it, with its template arguments.
        grid: blocks along x, y, z.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
        device: the tensors'.
        args: tensors, which the kernel gets as pointers; None for a null pointer; numpy scalars.
        cluster: neighbouring blocks along x that run at the same time (compute capability 9.0).
        overlap: lets it begin before the former kernel of the stream has ended, where GPUs can
            (9.0 and later); it must call `wait_for_former` then.
    """
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as start

    index = device.index or 0
    function = kernel(file, name, shared_bytes, cluster, index)
    stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
    pointers = [
        0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args
    ]
    options: dict[str, Any] = {"grid": tuple(grid), "block": threads, "shmem_size": shared_bytes}
    if cluster > 1:
        options |= {"grid": (grid[0] // cluster, *grid[1:]), "cluster": cluster}  # of clusters
    if overlap and torch.cuda.get_device_capability(device) >= (9, 0):
        options["programmatic_stream_serialization"] = True
    config = LaunchConfig(**options)
    with torch.cuda.device(device):
        start(stream, config, function, *pointers)
