"""Processes that join, agree and add up; what a failing one does to the others; refusals."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes, start_processes

from tinyvgpt import distributed
from tinyvgpt.distributed import Place, check_batch, check_devices, find_place, joined

CPU = torch.device("cpu")
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def together(folder):
    """What a process sees of the others."""
    rank = distributed.rank()
    metrics = {
        "loss": torch.tensor(1.0 + rank),
        "usage": torch.tensor([[1, 10**9 + 1], [rank, 3]]),  # not exact in float32
        "half": torch.tensor([0.5 * rank], dtype=torch.bfloat16),
        "thirds": torch.tensor([1 / 3, 1e-8]) / (rank + 1),
    }
    for _ in range(20):
        distributed.any_rank(False)
    since = time.perf_counter()
    for _ in range(200):
        distributed.any_rank(False)
    took = (time.perf_counter() - since) / 200
    with distributed.rank_0_first():
        seen = sorted(path.name for path in folder.iterdir())
        time.sleep(0.3 * (rank == 0))
        (folder / f"rank {rank}").touch()
    return {
        "place": (rank, distributed.world_size()),
        "any": [distributed.any_rank(flag) for flag in (rank == 1, rank == 0, True, False)],
        "sum": distributed.sum_(metrics),
        "mean": distributed.mean({name: metrics[name] for name in ("loss", "thirds")}),
        "none": distributed.sum_({}),
        "seen": seen,
        "any_rank took": took,
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_processes(together, 2, tmp_path_factory.mktemp("cache"))


def test_each_knows_its_place(two):
    assert [found["place"] for found in two] == [(0, 2), (1, 2)]


def test_all_hear_of_a_wish_that_one_has(two):
    assert [found["any"] for found in two] == [[True, True, True, False]] * 2
    assert all(found["any_rank took"] < 0.05 for found in two)


def test_sums_and_means(two):
    for found in two:
        total, average = found["sum"], found["mean"]
        assert total["loss"] == 3
        assert total["usage"].tolist() == [[2, 2 * 10**9 + 2], [1, 6]]
        assert total["half"].dtype == torch.bfloat16
        assert total["half"].tolist() == [0.5]
        assert average["loss"] == 1.5
        torch.testing.assert_close(average["thirds"], torch.tensor([0.25, 0.75e-8]))
        assert found["none"] == {}
    assert all(torch.equal(two[0]["sum"][name], two[1]["sum"][name]) for name in two[0]["sum"])


def test_rank_0_goes_first(two):
    assert [found["seen"] for found in two] == [[], ["rank 0"]]


def test_alone_nothing_happens():
    with joined(CPU) as device:
        assert device == CPU
        assert not dist.is_initialized()
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert [distributed.any_rank(flag) for flag in (True, False)] == [True, False]
        metrics = {"loss": torch.tensor(2.0, requires_grad=True)}
        assert distributed.mean(metrics)["loss"] == distributed.sum_(metrics)["loss"] == 2
        with distributed.rank_0_first():
            pass


def test_a_group_that_the_caller_made_is_left_alone(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with joined(CPU) as device:
            assert device == CPU
        assert dist.group.WORLD is group
    finally:
        dist.destroy_process_group()


def one_fails():
    """Rank 1 fails; rank 0 waits for it. Returns seconds waited, and what it was told."""
    try:
        with joined(CPU, timedelta(seconds=30)):
            distributed.any_rank(False)
            since = time.perf_counter()
            if distributed.rank() == 1:
                raise ValueError("the disk is full")
            try:
                distributed.any_rank(False)
            except RuntimeError as error:
                return time.perf_counter() - since, str(error)
    finally:
        assert not dist.is_initialized()


def test_a_process_that_fails_leaves_nobody_waiting():
    outcomes = start_processes(one_fails, 2, join=False)
    good, text = outcomes[1]
    assert not good
    assert text.rstrip().endswith("ValueError: the disk is full")
    good, (waited, told) = outcomes[0]
    assert good
    assert waited < 10
    assert "peer" in told, told


PROGRAM = """
import torch
from tinyvgpt import distributed
with distributed.joined(torch.device("cpu")):
    total = distributed.sum_({"rank": torch.tensor(distributed.rank() + 1)})["rank"]
    if distributed.rank() == 0:
        print("sum", int(total), flush=True)
    distributed.any_rank(False)
    if distributed.rank() == 1:
        raise ValueError("the disk is full")
    distributed.any_rank(False)
"""


def test_torchrun_joins_processes_and_ends_all_when_one_fails(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    found = subprocess.run(
        [*command, "--local-addr", "127.0.0.1", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **{name: value for name, value in os.environ.items() if name not in TORCHRUN},
            "PYTHONPATH": str(Path(distributed.__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert found.returncode != 0
    said = [line for line in found.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said == ["sum 3"]
    assert "ValueError: the disk is full" in found.stderr


def test_torchrun_s_variables():
    assert find_place(TORCHRUN) == Place(1, 1, 4, 2)
    assert find_place({}) is None
    assert find_place({"MASTER_ADDR": "somewhere"}) is None
    assert find_place({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}).rank == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": None}, r"RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set, LOCAL_RANK"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT not; start with"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', torchrun sets it to a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ({"RANK": "4"}, "RANK is 4 of WORLD_SIZE 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 of LOCAL_WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0"}, "RANK is 1 of WORLD_SIZE 0"),
    ],
)
def test_refused_variables(monkeypatch, change, message):
    environment = {**TORCHRUN, **change}
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught, joined(CPU):
        pass
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus():
    place = Place(3, 3, 4, 4)
    message = "started with --nproc-per-node 4, but this machine has 2 CUDA devices; at most"
    with pytest.raises(ValueError, match=message):
        check_devices(place, torch.device("cuda"), 2)
    with pytest.raises(ValueError, match="has 1 CUDA device;"):
        check_devices(Place(0, 0, 4, 4), torch.device("cuda"), 1)  # rank 0 refuses as well
    check_devices(place, torch.device("cuda"), 4)


def test_several_processes_on_one_gpu():
    with pytest.raises(ValueError, match="device is cuda:1, one for all 4 processes"):
        check_devices(Place(3, 3, 4, 4), torch.device("cuda:1"), 8)
    check_devices(Place(1, 0, 2, 1), torch.device("cuda:1"), 8)  # one a machine


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((30, 4, 2), r"batch_size 30 doesn't divide among 4 processes × 2 .* = 8; 24 or 32 would"),
        ((3, 4), "; 4 would$"),
        ((7, 1, 3), "; 6 or 9 would$"),
    ],
)
def test_a_batch_that_does_not_divide(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_batch(*sizes)
    check_batch(32, 4, 2)
