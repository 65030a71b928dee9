"""One process or many: joining torchrun's processes, agreeing, and adding up across them.

torchrun starts the same program once a device and says in environment variables which of them a
process is (https://docs.pytorch.org/docs/stable/elastic/run.html). `joined` reads these; all else
here does nothing where there is one process, so the training loop is the same for one and many.

Every function here that talks to the other processes is collective: all of them must call it, in
the same order. Chapter 16 builds this file.

Shapes: none of its own.
"""

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all
# How long a process waits for the others: longer than anything that rank 0 does alone (opening a
# large folder for the first time, validating, saving).
TIMEOUT = timedelta(minutes=30)
# Gloo's thread lets go of an operation's tensors a moment after it is done, for which it needs
# Python's lock. A thread that holds the lock and takes the group down would wait for it for ever.
SETTLING = 0.1  # seconds


class Place(NamedTuple):
    """Which of torchrun's processes this is."""

    rank: int  # among all, 0 … world_size - 1
    local_rank: int  # among those of this machine, 0 … local_world_size - 1
    world_size: int
    local_world_size: int


@contextmanager
def joined(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Context in which the processes that torchrun started are one group.

    Tensors of the CPU travel by gloo, those of GPUs by NCCL. Does nothing for a single process,
    and leaves a group alone that the caller made (which needs gloo for tensors of the CPU too).

    Should one process fail, its error leaves the context without waiting for the others, and it
    ends; torchrun then ends the others, which may be waiting for it in a collective operation.
    Without torchrun gloo's connection breaks at once and NCCL gives up after `timeout`.

    Args:
        device: where to train, as `TrainConfig.torch_device` gives it.
        timeout: how long a process waits for the others.

    Yields:
        The device of this process: the GPU that its LOCAL_RANK numbers, or `device` as it is.

    Raises:
        ValueError: torchrun's variables are incomplete or wrong, there are more processes than
            GPUs, or all processes are sent to the same one.
    """
    place = None if dist.is_initialized() else find_place(os.environ)
    if place is None or place.world_size == 1:
        yield device
        return
    if device.type == "cuda":
        check_devices(place, device, torch.cuda.device_count())
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=fresh(store, rank, size, timeout),
        rank=rank,
        world_size=size,
    )
    try:
        yield device
    except BaseException:
        _leave_at_once(device)
        raise
    if dist.is_initialized():  # not if the caller has left the group already
        time.sleep(SETTLING)
        dist.destroy_process_group()


def fresh(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` in which nothing is left of earlier processes.

    When torchrun restarts processes (--max-restarts), its store still has the addresses of those
    that have ended, and a process that reads one before it is overwritten can't connect
    (pytorch/pytorch#135712, #167288). Processes can't agree on a new name by the number of
    restarts, which each machine counts for itself. So each asks rank 0 by a random name, and only
    a living rank 0 answers that.
    """
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asks {rank}", name)
        session = store.get(f"answer to {name}").decode()
        store.add(f"heard {session}", 1)
        return dist.PrefixStore(session, store)
    answered, until = set(), time.monotonic() + timeout.total_seconds()
    while store.add(f"heard {name}", 0) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"asks {other}"]):
                asker = store.get(f"asks {other}").decode()
                if asker not in answered:  # perhaps of an ended process: that harms nobody
                    store.set(f"answer to {asker}", name)
                    answered.add(asker)
        if time.monotonic() > until:
            raise TimeoutError(f"not all of {world_size} processes have come within {timeout}")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def _leave_at_once(device: torch.device) -> None:
    """Leaves the group without what others have yet to do for it.

    Leaving in order, NCCL would wait for operations in which the others never join; so it is
    left to the end of the process, which an error is about to bring.
    """
    if device.type == "cpu" and dist.is_initialized():
        time.sleep(SETTLING)
        dist.destroy_process_group()


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Reads which process this is from torchrun's environment variables; None without them.

    Raises:
        ValueError: some of them are missing, or not numbers that go together.
    """
    missing = [name for name in NAMES if name not in environment]
    if "RANK" in missing and "LOCAL_RANK" in missing and "WORLD_SIZE" in missing:
        return None
    if missing:
        there = ", ".join(name for name in NAMES if name in environment)
        raise ValueError(
            f"of torchrun's environment variables {there} are set, {', '.join(missing)} not; "
            "start with torchrun, or unset them for a single process"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank = _number(environment, "LOCAL_RANK")
    local_world_size = local_rank + 1
    if "LOCAL_WORLD_SIZE" in environment:
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE")
    if rank >= world_size or local_rank >= local_world_size or local_world_size > world_size:
        raise ValueError(
            f"RANK is {rank} of WORLD_SIZE {world_size} and LOCAL_RANK {local_rank} of "
            f"LOCAL_WORLD_SIZE {local_world_size}; ranks must be below sizes (start with torchrun)"
        )
    return Place(rank, local_rank, world_size, local_world_size)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isascii() or not value.isdigit():
        raise ValueError(f"{name} is {value!r}, torchrun sets it to a whole number from 0 on")
    return int(value)


def check_devices(place: Place, device: torch.device, count: int) -> None:
    """Raises ValueError unless each process on this machine has one of its `count` GPUs."""
    processes = place.local_world_size
    if processes > count:
        raise ValueError(
            f"started with --nproc-per-node {processes}, but this machine has {count} CUDA "
            f"device{'s' * (count != 1)}; at most one process a device"
        )
    if device.index is not None and processes > 1:
        raise ValueError(
            f"device is {device}, one for all {processes} processes on this machine; "
            "with cuda each gets its own"
        )


def check_batch(batch_size: int, world_size: int, accumulate: int = 1) -> None:
    """Raises ValueError unless a batch divides among processes and accumulated parts."""
    parts = world_size * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        would_do = f"{below} or {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"batch_size {batch_size} doesn't divide among {world_size} processes × {accumulate} "
            f"accumulated parts = {parts}; {would_do} would"
        )


def rank() -> int:
    """Which process this is, 0 … world_size() - 1; rank 0 logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any of the processes; all get the same answer.

    On the CPU, by gloo, so that it doesn't wait for the GPU's work.
    """
    if world_size() == 1:
        return flag
    wanted = torch.tensor(float(flag))
    dist.all_reduce(wanted, dist.ReduceOp.MAX)
    return bool(wanted)


def check_same(name: str, value: int, hint: str) -> None:
    """Raises ValueError, in all processes, unless `value` is the same in all."""
    if world_size() == 1:
        return
    values = torch.zeros(world_size(), dtype=torch.int64)
    values[rank()] = value
    dist.all_reduce(values)
    if len(values.unique()) > 1:
        raise ValueError(f"processes differ in {name} ({values.tolist()}): {hint}")


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Context which the other processes enter once rank 0 has left it.

    For what is cached: rank 0 makes it, the others find it. They go on as well if rank 0 fails,
    and meet the same error.
    """
    if rank() != 0:
        any_rank(False)
    try:
        yield
    finally:
        if rank() == 0:
            any_rank(False)


@torch.no_grad()
def sum_(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of tensors of the same names and shapes over all processes, in one operation.

    Every process gets the same bits: an all-reduce adds each number up once, in some order, and
    hands that sum to all. Added in float64; dtypes stay.
    """
    if world_size() == 1 or not metrics:
        return {name: value.detach() for name, value in metrics.items()}
    flat = torch.cat([value.detach().double().flatten() for value in metrics.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in metrics.values()])
    return {
        name: part.view(value.shape).to(value.dtype)
        for (name, value), part in zip(metrics.items(), parts, strict=True)
    }


def mean(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of float tensors of the same names and shapes over all processes; see `sum_`."""
    return {name: value / world_size() for name, value in sum_(metrics).items()}
