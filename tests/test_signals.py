"""Requests to stop: what is caught, put back, passed on, and what becomes of child processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from tinyvgpt import signals
from tinyvgpt.signals import EXIT_STOPPED, Stopped, Stopping

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROOT = Path(__file__).parents[1]


def handlers():
    return [signal.getsignal(getattr(signal, name)) for name in signals.REQUESTS]


@pytest.fixture(autouse=True)
def unchanged():
    """Every test leaves the handlers as they were."""
    before = handlers()
    yield
    assert handlers() == before


@pytest.mark.parametrize("name", signals.REQUESTS)
def test_first_signal_is_remembered(name):
    with Stopping() as stopping:
        assert stopping.requested is None
        signal.raise_signal(getattr(signal, name))
        assert stopping.requested == name
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.requested == name


def test_handlers_are_back_after_an_exception():
    before = handlers()

    def fails():
        with Stopping():
            assert not set(handlers()) & set(before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_ctrl_c_again_acts_at_once(monkeypatch, first):
    monkeypatch.setattr(signals, "SAME_PRESS", 0.05)
    before = handlers()
    with Stopping() as stopping:
        signal.raise_signal(getattr(signal, first))
        signal.raise_signal(signal.SIGINT)  # the same press, passed on by another program
        assert stopping.requested == first
        time.sleep(0.06)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert handlers() == before, "from here on everything acts as by default"


def test_ignored_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            signal.raise_signal(signal.SIGINT)
            assert stopping.requested is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_within_another():
    with Stopping() as outer:
        with Stopping() as inner:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    assert (inner.requested, outer.requested) == ("SIGTERM", "SIGUSR1")


def test_not_in_the_main_thread():
    seen = []

    def other():
        with Stopping() as stopping:
            seen.extend([handlers(), stopping.requested])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [handlers(), None]


def test_stopped():
    stopped = Stopped("SIGTERM", 1200, 5000, Path("runs/a/checkpoint-0001200.pt"))
    assert str(stopped) == (
        "stopped by SIGTERM at step 1200 of 5000; "
        "the same command goes on from runs/a/checkpoint-0001200.pt"
    )
    assert str(Stopped("SIGINT", 0, 5, None)).endswith("the same command starts again")
    assert isinstance(stopped, KeyboardInterrupt)
    assert not isinstance(stopped, Exception)
    assert EXIT_STOPPED == os.EX_TEMPFAIL


# Other processes ----------------------------------------------------------------------------------


def started(tmp_path, program, **options):
    """A process, in a group of its own, that runs `program` and has printed "ready"."""
    path = tmp_path / "program.py"
    path.write_text(program)
    # On one core DataLoader warns of two workers, in the error stream that is looked at.
    quiet = {"PYTHONWARNINGS": "ignore:This DataLoader will create"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True, **options,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def finished(process, timeout=30):
    """Exit code, output and error stream; no process of its group may be left."""
    try:
        out, err = process.communicate(timeout=timeout)
        for _ in range(100):  # children that were told to end
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return process.returncode, out, err
            time.sleep(0.05)
        raise AssertionError("a child process is left")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.wait()


def told(pipe, ready=None):
    """A process that says that it has started, waits, and says so again after half a second."""
    if ready:
        ready()
    os.write(pipe, b"1")
    time.sleep(0.5)
    os.write(pipe, b"2")
    time.sleep(60)


@contextmanager
def child(ready=None):
    """A forked process that is `told`, and the end of the pipe to read from."""
    reading, writing = os.pipe()
    process = get_context("fork").Process(target=told, args=(writing, ready))
    process.start()
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        yield process, reading
    finally:
        process.kill()
        process.join()
        os.close(reading)


@forks
def test_children_can_be_terminated():
    """Also forked ones, which inherit the handler."""
    with Stopping() as stopping, child() as (process, _):
        command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]
        other = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert other.stdout.read(1)
        other.terminate()
        process.terminate()
        process.join(10)
        assert process.exitcode == other.wait(10) == -signal.SIGTERM
        assert stopping.requested is None
        other.stdout.close()


@forks
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_worker_obeys_its_parent_alone():
    with Stopping(), child(signals.leave_to_parent) as (process, reading):
        for name in signals.REQUESTS:
            subprocess.run(["sh", "-c", f"kill -{name[3:]} {process.pid}"], check=True)
        assert os.read(reading, 1) == b"2", "it lives on"
        process.terminate()
        process.join(10)
        assert process.exitcode == 0


TRAINS = """
import os, sys, time, torch
from torch.utils.data import DataLoader
from tinyvgpt.signals import EXIT_STOPPED, Stopped, Stopping, leave_to_parent

class Data(torch.utils.data.Dataset):
    def __getitem__(self, index):
        time.sleep(60 if HANGS and index > 2 else 0.02)
        return torch.tensor(index)

HANGS, INIT = {hangs}, {init}
loader = DataLoader(
    Data(), batch_size=None, sampler=range(10**6), num_workers=2, worker_init_fn=INIT
)

def loop():
    with Stopping() as stopping:
        for step, index in enumerate(loader, 1):
            assert index == step - 1
            if step == 3:
                print("ready", flush=True)
                if HANGS:
                    raise Stopped("SIGTERM", step, 10**6, None)
            if stopping.requested and not stopped:
                stopped.append(step)
            if stopped and step == stopped[0] + 20:  # as a slow save, workers at work meanwhile
                raise Stopped(stopping.requested, step, 10**6, None)

stopped = []
try:
    loop()
except Stopped as error:
    print(error, flush=True)
    sys.exit(EXIT_STOPPED)
"""


def trains(hangs=False, init="leave_to_parent"):
    return TRAINS.format(hangs=hangs, init=init)


@pytest.mark.parametrize("name", signals.REQUESTS)
def test_workers_go_on_until_the_parent_ends(tmp_path, name):
    """A terminal, Slurm and torchrun signal the whole group."""
    process = started(tmp_path, trains())
    os.killpg(process.pid, getattr(signal, name))
    code, out, err = finished(process)
    assert (code, out.split(" at ")[0], err) == (EXIT_STOPPED, f"stopped by {name}", "")


def test_workers_would_die_without(tmp_path):
    """The test above can fail: DataLoader's own workers obey, and take the run with them."""
    process = started(tmp_path, trains(init=None))
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 1
    assert "killed by signal: Terminated" in err


@pytest.mark.slow
def test_hanging_workers_end_with_the_parent(tmp_path):
    """DataLoader waits 5 seconds for each, then terminates it."""
    code, out, err = finished(started(tmp_path, trains(hangs=True)), timeout=25)
    assert (code, out[:18], err) == (EXIT_STOPPED, "stopped by SIGTERM", "")


def test_workers_of_a_killed_parent_end(tmp_path):
    process = started(tmp_path, trains())
    process.kill()
    assert finished(process)[0] == -signal.SIGKILL
