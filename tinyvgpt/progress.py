"""What a user watches while something runs; chapter 06 shows it.

Shapes: none of its own.
"""

import os
import sys
import time

from tqdm import tqdm

from tinyvgpt import distributed
from tinyvgpt.estimate import in_words

# What progress shows of a line of log.jsonl, in this order and only what is there.
SHOWN = {
    "loss": "loss {}",
    "psnr": "PSNR {} dB",
    "bits_per_token": "{} bits/token",
    "clips_per_second": "{} clips/s",
    "tokens_per_second": "{} tokens/s",
    "skipped": "{} skipped",
}
# The bar gives way to the words where a terminal is narrow; speed is among the words.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def hidden() -> bool:
    """Whether bars are not to be shown: in log files, and by all processes but rank 0."""
    return distributed.rank() != 0 or not (on_a_terminal() or "ipykernel" in sys.modules)


def on_a_terminal() -> bool:
    """Whether messages go to a terminal; one of no width, which some containers have, is none."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # something that stands for a terminal
        return True


class Progress:
    """What a user watches: a bar on a terminal or in a notebook; a line now and then elsewhere.

    Of several processes rank 0's is shown.
    """

    def __init__(self, start: int, steps: int):
        """Shows `start` of `steps` steps done."""
        self.steps, self.since, self.counted = steps, time.perf_counter(), start
        self.silent = distributed.rank() != 0
        self.bar = tqdm(
            total=steps,
            initial=start,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=hidden(),
        )
        if start:
            self.line(start, "resumed" if start < steps else "trained already")

    def update(self) -> None:
        """One step more."""
        self.bar.update()

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Shows the means of the last steps."""
        if not self.bar.disable:
            self.bar.set_postfix_str(gist(values))
            return
        now = time.perf_counter()
        left = (now - self.since) / max(step - self.counted, 1) * (self.steps - step)
        self.since, self.counted = now, step
        self.line(step, gist(values) + (f", {in_words(left)} left" if step < self.steps else ""))

    def line(self, step: int, text: str) -> None:
        """Shows a line that stays; above the bar where there is one."""
        line = f"step {step:,}/{self.steps:,}: {text}"
        if not self.bar.disable:
            tqdm.write(line, file=sys.stderr)
        elif not self.silent:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()


def gist(values: dict[str, float]) -> str:
    """What progress shows of a line's values, to three digits."""
    return ", ".join(
        shown.format(three_digits(values[name]))
        for name, shown in SHOWN.items()
        if name in values and (name != "skipped" or values[name])
    )


def three_digits(value: float) -> str:
    """A number to three digits, without an exponent where that can be: "0.998", "897,000"."""
    return f"{float(f'{value:.3g}'):,.12g}"
