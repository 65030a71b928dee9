"""What the book's chapters share: a budget, the check against the package, a look for figures.

Every chapter starts with `versions()` and ends its "Against the package" with `check`. Nothing else
in the package imports this module.
"""

import importlib.metadata
import os
import platform
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Values = Tensor | np.ndarray | float | int | list | tuple

BUDGETS = ("smoke", "cpu", "gpu")

# Okabe and Ito's colours without yellow and black: told apart by every kind of eye.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]


def budget_name() -> str:
    """Name the budget in force: "smoke" (tests), "cpu" (the built book) or "gpu".

    The environment variable TINYVGPT_BUDGET decides; without it, "gpu" where PyTorch sees a CUDA
    device and "cpu" elsewhere.

    Raises:
        ValueError: TINYVGPT_BUDGET is set to something else.
    """
    name = os.environ.get("TINYVGPT_BUDGET") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in BUDGETS:
        raise ValueError(f"TINYVGPT_BUDGET is {name!r}, it can be {', '.join(BUDGETS)}")
    return name


def budget(*, smoke: T, cpu: T, gpu: T) -> T:
    """Choose a value by the budget in force, such as a number of training steps.

    Raises:
        ValueError: TINYVGPT_BUDGET names no budget.
    """
    return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[budget_name()]


def versions() -> None:
    """Print what this chapter runs on: Python, PyTorch, tinyvgpt, the device and the budget."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    print(f"python    {platform.python_version()}")
    print(f"torch     {torch.__version__}")
    print(f"tinyvgpt  {importlib.metadata.version('tinyvgpt')}")
    print(f"device    {device}")
    print(f"budget    {budget_name()}")


def check(name: str, yours: Values, package: Values, atol: float = 0.0) -> None:
    """Assert that what a chapter built gives what the package gives, and print how close it is.

    Args:
        name: What is compared, for the line that is printed.
        yours: The chapter's result: a tensor or array of any dtype and device, or numbers.
        package: The package's result, of the same shape.
        atol: The largest absolute difference allowed; 0 asks for equal values.

    Raises:
        AssertionError: The shapes differ, there is nothing to compare, or two values differ by more
            than `atol` or are not numbers; the message shows the two that differ most.
    """
    a, b = (_float64(x) for x in (yours, package))
    if a.shape != b.shape:
        raise AssertionError(
            f"{name}: yours has shape {tuple(a.shape)}, the package's {tuple(b.shape)}"
        )
    if a.numel() == 0:
        raise AssertionError(f"{name}: nothing to compare, the shape is {tuple(a.shape)}")
    # Equal infinities (masked scores) differ by 0; a value that is not a number, by infinity.
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    worst = int(difference.argmax())
    largest = float(difference.flatten()[worst])
    if largest > atol:
        index = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        raise AssertionError(
            f"{name}: yours is {float(a[index]):.9g}, the package's {float(b[index]):.9g} at index "
            f"{index}; they differ by {largest:.3g}, more than {atol:g}"
        )
    agreement = "equal" if largest == 0 else f"largest difference {largest:.1e}"
    print(f"✓ {name}: {agreement} ({a.numel():,} values)")


def _float64(values: Values) -> torch.Tensor:
    """Values as float64; by way of numpy where they are Python's, which torch would round first."""
    values = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    return values.detach().cpu().double()


def style() -> None:
    """Give matplotlib the book's look: white cards that read the same in both of its themes."""
    from cycler import cycler
    from matplotlib import rcParams

    rcParams.update(
        {
            "figure.facecolor": "white",
            "figure.figsize": (7.0, 3.2),
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "axes.facecolor": "white",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "grid.color": "#dddddd",
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            # One pixel of a clip stays one square, black to white.
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )
