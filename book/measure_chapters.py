"""Runs chapters and keeps a record of how long each takes, and how much memory.

    python book/measure_chapters.py --budget gpu
    python book/measure_chapters.py book/12_first_kernel.md book/13_tensor_cores.md

Each chapter runs in a process of its own, as `make book` runs it. One that fails says why, has no
place in the record, and makes the exit code 1. The record is written after each chapter; a run of
some adds to that of the others, where it is of the same device, budget and versions. Needs the
extra `book`, and PyAV.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import jupytext
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

from tinyvgpt.bench import device_name, earlier, record
from tinyvgpt.notebook import BUDGETS

BOOK = Path(__file__).parent
LAST_CELL = """
import json as _json, resource as _resource, sys as _sys, torch as _torch
_unit = 1 if _sys.platform == "darwin" else 1024
print(_json.dumps({
    "peak GiB": _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss * _unit / 2**30,
    "peak GPU GiB": _torch.cuda.max_memory_allocated() / 2**30
    if _torch.cuda.is_available() else None,
}))
"""


def chapters() -> list[Path]:
    """The book's numbered chapters, and the one on videos of one's own."""
    return [*sorted(BOOK.glob("[0-9]*.md")), BOOK / "own_videos.md"]


def measured(chapter: Path) -> dict[str, float]:
    """Runs a chapter: its seconds, the start of its process included, and its peaks of memory.

    Raises:
        CellExecutionError: a cell fails.
    """
    made = jupytext.read(chapter)
    made.cells.append(new_code_cell(LAST_CELL))
    with tempfile.TemporaryDirectory() as folder:  # chapters write files where they run
        where = {"metadata": {"path": folder}}
        start = time.perf_counter()
        NotebookClient(made, timeout=None, kernel_name="python3", resources=where).execute()
        seconds = time.perf_counter() - start
    last = "".join(out["text"] for out in made.cells[-1].outputs if out.get("name") == "stdout")
    peaks = {name: round(peak, 2) for name, peak in json.loads(last).items() if peak is not None}
    return {"seconds": round(seconds, 1), **peaks}


def main() -> None:
    """Measures, prints and records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", type=Path, help="files; all, if none is given")
    parser.add_argument("--budget", choices=BUDGETS, help="by default the device's own")
    parser.add_argument("--out", type=Path, default=BOOK / "results", help="for the record")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    budget = options.budget or ("gpu" if cuda else "cpu")
    os.environ["TINYVGPT_BUDGET"] = budget
    device = device_name("cuda" if cuda else "cpu")
    name = f"chapters-{device}".lower().replace(",", "").replace(" ", "-")
    about = {"device": device, "budget": budget}
    found = earlier(options.out / f"{name}.json", about).get("chapters", {})
    command, failed = f"python book/measure_chapters.py --budget {budget}", []
    for chapter in options.chapters or chapters():
        try:
            found[chapter.stem] = measured(chapter)
            print(chapter.stem, found[chapter.stem], flush=True)
        except CellExecutionError as error:
            found.pop(chapter.stem, None)
            failed.append(chapter.stem)
            print(f"{chapter.stem} failed\n{error}", flush=True)
        in_order = {stem: found[stem] for stem in sorted(found)}
        record({**about, "chapters": in_order}, name, command, options.out)
    print(f"record in {options.out / name}.json")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
