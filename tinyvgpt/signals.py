"""Asking a training run to stop: it ends its step, saves, and leaves with an exit code of its own.

Chapter 16 reads this file. Sources: signal(7); Slurm's sbatch(1), `--signal`; sysexits.h of BSD for
the exit code.

Shapes: none of its own.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that was stopped and can go on: sysexits.h's EX_TEMPFAIL, "try again later".

Not 128 + 15 or 130: by these, shells and schedulers mean that a process was killed by the signal.
0 is done, 1 failed, 2 a user's mistake.
"""
# SIGTERM: kill, containers, preempted machines, torchrun and Slurm at its limit (which kills 30 s
# later, too early for large checkpoints). SIGINT: Ctrl-C and a notebook's stop button. SIGUSR1:
# Slurm ahead of its limit, `--signal=USR1@120` with srun (`B:USR1@120` tells the script alone).
REQUESTS = ("SIGTERM", "SIGINT", "SIGUSR1")
SAME_PRESS = 0.5  # seconds; programs that pass Ctrl-C on to us make one press arrive twice


class Stopped(KeyboardInterrupt):
    """A run has saved and ended, as it was asked to.

    Like any KeyboardInterrupt it gets past `except Exception`: who stops one of many runs in a loop
    wants none of the others to start.
    """

    def __init__(self, name: str, step: int, steps: int, checkpoint: Path | None):
        """Stopped by the signal `name` after `step` of `steps` steps, saved in `checkpoint`."""
        goes_on = f"goes on from {checkpoint}" if checkpoint else "starts again"
        super().__init__(f"stopped by {name} at step {step} of {steps}; the same command {goes_on}")
        self.name, self.step, self.steps, self.checkpoint = name, step, steps, checkpoint


class Stopping:
    """Within `with Stopping() as stopping:` signals are requests: `stopping.requested` names one.

    The loop looks at it after each step, saves and raises `Stopped`. Ctrl-C once more acts at once.
    On leaving, former handlers are back; a request that nobody looked at is dropped. Signals that
    are ignored (as SIGINT is in a shell's background jobs), or handled by a program that Python is
    embedded in, stay as they are. In another thread than the main one, where Python allows no
    handlers, this does nothing. Each process of a run gets its own requests, at its own step.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the first signal's name
        self._at = 0.0
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (getattr(signal, name) for name in REQUESTS if hasattr(signal, name)):
            former = signal.getsignal(number)
            if former not in (None, signal.SIG_IGN):
                self._former[number] = former
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked from the run: not asked, so it acts as by default
            signal.signal(number, self._former[number])
            signal.raise_signal(number)
        elif self.requested is None:
            self.requested, self._at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > SAME_PRESS:
            self.__exit__()
            signal.raise_signal(number)


def leave_to_parent(_: int = 0) -> None:
    """Makes a data-loading process stop when its parent says so: DataLoader's `worker_init_fn`.

    Ctrl-C, Slurm and torchrun signal all processes of a run. A worker that obeyed would be missing
    in the step that the parent is to end, which then fails with "DataLoader worker is killed". So
    workers ignore the signals, except for a SIGTERM of the parent's own, with which it gets rid of
    workers that hang. When the parent dies, DataLoader's workers notice by themselves.
    """
    for name in set(REQUESTS) - {"SIGTERM"}:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere SIGTERM's sender can't be told
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Waits for a SIGTERM from `parent`, or from anyone once it is gone, and ends the process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(0)
