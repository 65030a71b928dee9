"""Training commands that are stopped, and torchrun's processes that are killed or stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import lines, same

from tinyvgpt import VQVAE
from tinyvgpt.distributed import NAMES
from tinyvgpt.signals import EXIT_STOPPED

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")
COMMAND = ["tinyvgpt.cli", "train-vqvae", "--preset", "laptop"]
OPTIONS = {
    "vqvae.hidden": 8, "vqvae.codes": 16, "vqvae.code-dim": 4, "train.device": "cpu",
    "train.steps": 60, "train.batch-size": 4, "train.warmup": 2, "train.log-every": 5,
    "train.checkpoint-every": 5, "train.validate-every": 0, "train.preview-every": 0,
}  # fmt: skip
TORCHRUN = [
    *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("--local-addr", "127.0.0.1", "--max-restarts", "1", "-m"),
]


def start(out, *launcher, **options):
    """A training command, by itself or under torchrun."""
    given = {**OPTIONS, **{name.replace("_", "-"): value for name, value in options.items()}}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *COMMAND, *words, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **clean,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore:This DataLoader will create",  # of two workers on one core
        },
    )


def finished(process, timeout=90):
    """Exit code and error stream."""
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, err


def wait_for_checkpoint(out, process):
    until = time.monotonic() + 60
    while not list(out.glob("checkpoint-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody disturbs: in one process and in two."""
    top = tmp_path_factory.mktemp("whole")
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        code, err = finished(start(top / name, *launcher))
        assert code == 0, err
    return top


@pytest.mark.parametrize(("name", "workers"), [("SIGTERM", 2), ("SIGINT", 0)])
def test_a_stopped_command_goes_on(whole, tmp_path, name, workers):
    out = tmp_path / "run"
    process = start(out, **{"train.workers": workers})
    wait_for_checkpoint(out, process)
    process.send_signal(getattr(signal, name))
    code, err = finished(process)
    assert code == EXIT_STOPPED, err
    said = re.findall(r"^tinyvgpt: .*", err, re.MULTILINE)
    assert len(said) == 1, err
    step = int(re.match(rf"tinyvgpt: stopped by {name} at step (\d+) of 60; ", said[0])[1])
    assert (out / f"checkpoint-{step:07d}.pt").exists()
    assert f"the same command goes on from {out}/checkpoint-{step:07d}.pt" in err
    assert not (out / "vqvae.safetensors").exists()
    code, err = finished(start(out, **{"train.workers": workers}))
    assert code == 0, err
    assert "tinyvgpt:" not in err
    assert same(VQVAE.from_pretrained(out), VQVAE.from_pretrained(whole / "one"))
    assert [line["step"] for line in lines(out)] == list(range(5, 61, 5))


proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@proc
def test_torchrun_goes_on_after_a_process_was_killed(whole, tmp_path):
    out = tmp_path / "run"
    process = start(out, *TORCHRUN)
    wait_for_checkpoint(out, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    code, err = finished(process)
    assert code == 0, err
    assert "exitcode: -9" in err
    assert same(VQVAE.from_pretrained(out), VQVAE.from_pretrained(whole / "two"))
    assert [line["step"] for line in lines(out)] == list(range(5, 61, 5))


@proc
@pytest.mark.slow
def test_stopped_torchrun_goes_on(whole, tmp_path):
    """torchrun passes SIGTERM on; all processes end at the same step, with a checkpoint of it."""
    out = tmp_path / "run"
    process = start(out, *TORCHRUN)
    wait_for_checkpoint(out, process)
    process.send_signal(signal.SIGTERM)
    code, err = finished(process)
    assert code == 1, err
    said = re.findall(
        r"tinyvgpt(?:, process 1)?: stopped by .* at step (\d+) of 60; .* from (.*)\n", err
    )
    assert len(said) == 2, err
    assert len(set(said)) == 1, "both name the same step and checkpoint"
    assert Path(said[0][1]).exists()
    code, err = finished(start(out, *TORCHRUN))
    assert code == 0, err
    assert same(VQVAE.from_pretrained(out), VQVAE.from_pretrained(whole / "two"))
