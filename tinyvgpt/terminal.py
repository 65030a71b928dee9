"""A terminal as a screen with keys: pictures as coloured half blocks, arrow keys as they come.

What it changes in a terminal is put back, whatever happens. For Linux and macOS. Chapter 17.

Shapes: H W pixels · C channels.
"""

import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from torch import Tensor

from tinyvgpt.video import resize_crop

try:
    import termios
    import tty
except ImportError:  # on Windows
    termios = tty = None  # type: ignore[assignment]

# xterm's control sequences (XTerm Control Sequences, "CSI ? Pm h"): the alternate screen, the
# cursor, and what sets all colours back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[0m\x1b[?25h\x1b[?1049l"
CLEAR, HOME, PLAIN, REST_OF_LINE = "\x1b[2J", "\x1b[H", "\x1b[0m", "\x1b[K"
NAMES = {b"A": "up", b"B": "down", b"C": "right", b"D": "left", b" ": "space"}
NAMES |= {b"q": "quit", b"\x04": "quit"}  # Ctrl-D as well
KEY = re.compile(rb"\x1b[\[O]([A-D])|\x1b[\[O][^@-~]*[@-~]|(.)", re.DOTALL)


class Terminal:
    """Standard input and output, as `opened` has set them up."""

    def __init__(self) -> None:
        self.size = (0, 0)  # columns and lines, when something was last drawn

    def show(self, frame: Tensor, line: str) -> None:
        """Draws a frame, uint8 (H, W, C), as large as fits, and a line below."""
        size = columns, lines = os.get_terminal_size(sys.stdout.fileno())
        cleared = "" if size == self.size else CLEAR
        self.size = size
        picture = "".join(row + "\n" for row in half_blocks(fitted(frame, columns, lines - 1)))
        sys.stdout.write(cleared + HOME + picture + line[: columns - 1] + REST_OF_LINE)
        sys.stdout.flush()

    def keys(self, seconds: float) -> Iterator[str]:
        """Names of the keys that are pressed within so many seconds, as they come.

        "quit" comes, too, when the terminal is gone.
        """
        end = time.monotonic() + seconds
        while True:
            left = max(end - time.monotonic(), 0)
            if not select.select([sys.stdin.fileno()], [], [], left)[0]:
                return
            data = os.read(sys.stdin.fileno(), 1024)
            yield from named(data) if data else ["quit"]


@contextmanager
def opened() -> Iterator[Terminal]:
    r"""The terminal on its alternate screen, its keys read one by one, until the block is left.

    Ctrl-C interrupts as ever, and signals that end the process leave the block first. Stopping the
    process (Ctrl-Z) and Ctrl-\ are off meanwhile: they would leave the terminal as it is.

    Raises:
        ValueError: if input or output is no terminal.
    """
    if termios is None:
        raise ValueError("this system has no terminal that can be played on (termios)")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("input and output must be a terminal, here one of them is not")
    keyboard = sys.stdin.fileno()
    former = termios.tcgetattr(keyboard)
    handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(keyboard)
        mode = termios.tcgetattr(keyboard)
        off = os.fpathconf(keyboard, "PC_VDISABLE").to_bytes(1, "little")
        for character in (termios.VSUSP, termios.VQUIT):
            mode[6][character] = off
        termios.tcsetattr(keyboard, termios.TCSADRAIN, mode)
        sys.stdout.write(ENTER)
        yield Terminal()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with suppress(OSError):  # a terminal that is gone needs nothing back
            sys.stdout.write(LEAVE)
            sys.stdout.flush()
        with suppress(termios.error):
            termios.tcsetattr(keyboard, termios.TCSAFLUSH, former)  # keys still unread are dropped


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def named(data: bytes) -> Iterator[str]:
    """Names of the keys in what a terminal sends; other keys have the name "other"."""
    for arrow, character in KEY.findall(data):
        yield NAMES.get(arrow or character.lower(), "other")


def fitted(frame: Tensor, columns: int, lines: int) -> Tensor:
    """A frame (H, W, C) as the largest square (s, s, 3), s even, that a terminal has room for.

    Pixels are repeated where there is room for it, so that edges stay sharp.
    """
    side, resolution = max(min(columns, 2 * lines), 2), len(frame)
    if side >= resolution:
        times = side // resolution
        frame = frame.repeat_interleave(times, 0).repeat_interleave(times, 1)
    side = min(side, len(frame)) // 2 * 2
    return resize_crop(frame, side).expand(-1, -1, 3)


def half_blocks(frame: Tensor) -> Iterator[str]:
    """A frame, uint8 (H, W, 3), as H/2 lines of upper half blocks: one colour above, one below."""
    for upper, lower in frame.cpu().numpy().astype(np.uint8).reshape(-1, 2, frame.shape[1], 3):
        blocks = (
            f"\x1b[38;2;{r};{g};{b};48;2;{R};{G};{B}m▀"
            for (r, g, b), (R, G, B) in zip(upper, lower, strict=True)
        )
        yield "".join(blocks) + PLAIN + REST_OF_LINE
