"""The command line: finds the command, fills its dataclass with the options, runs it.

A user's mistake ends with exit code 2 and one line that says what it was, Ctrl-C with 130 and one.

Shapes: none of its own.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import tyro

from tinyvgpt.commands import COMMANDS, Command
from tinyvgpt.commands.training import TrainGPT, TrainVQVAE
from tinyvgpt.presets import preset
from tinyvgpt.signals import EXIT_STOPPED, Stopped

EXIT_INTERRUPTED = 130  # by Ctrl-C, as shells have it


def with_preset(command: type, argv: Sequence[str]) -> dict[str, Any]:
    """Defaults of a training command: those of the preset that its arguments name."""
    words = [part for word in argv for part in word.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else "laptop"
    chosen = preset(name)
    shared = {"preset": name, "data": chosen.data, "out": tyro.MISSING}
    if command is TrainVQVAE:
        return {**shared, "vqvae": chosen.vqvae, "train": chosen.train_vqvae}
    return {**shared, "gpt": chosen.gpt, "train": chosen.train_gpt}


def parse(name: str, argv: Sequence[str]) -> Command:
    """The command `name` with the options `argv`; tyro's box of errors becomes one line."""
    command = COMMANDS[name]
    defaults: dict[str, Any] = {}
    if command in (TrainVQVAE, TrainGPT):
        defaults["default"] = command(**with_preset(command, argv))
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(command, prog=f"tinyvgpt {name}", args=argv, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        words = [word for word in box.getvalue().split() if word.strip("─│╭╮╰╯-")]
        raise ValueError(" ".join(words)) from None


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:12} {(c.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()]
    return "\n".join(["usage: tinyvgpt COMMAND [options]; tinyvgpt COMMAND --help", "", *lines])


def one_line(message: BaseException | str, *_: Any, **__: Any) -> str:
    """An error, or a warning without the place in our code that gave it."""
    rank = os.environ.get("RANK", "0")  # torchrun's number of this process
    who = "tinyvgpt" if rank == "0" else f"tinyvgpt, process {rank}"
    return f"{who}: {' '.join(str(message).split())}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    formatted, warnings.formatwarning = warnings.formatwarning, one_line
    try:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(COMMANDS)}"
            raise ValueError(f"no command {name!r}; {hint}")
        parse(name, rest).run()
    except Stopped as stopped:
        sys.stderr.write(one_line(stopped))
        return EXIT_STOPPED
    except KeyboardInterrupt:
        sys.stderr.write(one_line("interrupted"))
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(one_line(error))
        return 2
    finally:
        warnings.formatwarning = formatted
    return 0


if __name__ == "__main__":
    sys.exit(main())
