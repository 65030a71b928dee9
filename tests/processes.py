"""Runs a function in several processes that find what torchrun would tell them."""

import os
import pickle
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinyvgpt.distributed import joined


def run_processes(function, count, *args, join=True, timeout=60.0):
    """Return what `function(*args)` returns in each of `count` processes, by rank.

    Args:
        function: of a module's top level, as spawned processes import it.
        count: of processes; each computes in one thread.
        args: its arguments; what pickle takes.
        join: have them in one gloo group; else the function does that itself.
        timeout: seconds until those still running are ended.

    Raises:
        AssertionError: processes failed (with their tracebacks), or there was no time left.
    """
    outcomes = start_processes(function, count, *args, join=join, timeout=timeout)
    failures = [f"rank {rank}: {text}" for rank, (good, text) in outcomes.items() if not good]
    assert not failures, "\n".join(failures)
    return [outcomes[rank][1] for rank in range(count)]


def start_processes(function, count, *args, join=True, timeout=60.0):
    """As `run_processes`; returns {rank: (True, result) or (False, traceback)}, failing never."""
    # As torchrun does, the store is here and not in rank 0, at a port that is free for sure.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    pipes, children = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        settings = _settings(rank, count, store.port)
        child = context.Process(
            target=_child, args=(theirs, settings, function, args, join), daemon=True
        )
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    until = time.monotonic() + timeout
    outcomes = {rank: _outcome(pipe, until) for rank, pipe in enumerate(pipes)}
    for child in children:
        child.join(max(0.0, min(10.0, until - time.monotonic())))
        if child.is_alive():
            child.kill()
            child.join()
    return outcomes


def _settings(rank, count, port):
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _outcome(pipe, until):
    try:
        if pipe.poll(max(0.0, until - time.monotonic())):
            return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "ended without a word"
    return False, "no result in time"


def _child(pipe, settings, function, args, join):
    os.environ.update(settings)
    torch.set_num_threads(1)
    try:
        if join:
            with joined(torch.device("cpu"), timedelta(seconds=30)):
                result = function(*args)
        else:
            result = function(*args)
        # Pickled here, or tensors would be shared with a process that may have ended by then.
        outcome = pickle.dumps((True, result))
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(outcome)
    pipe.close()
