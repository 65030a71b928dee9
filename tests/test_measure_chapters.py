"""Times of chapters: what is measured, kept and left out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jupytext
from nbformat.v4 import new_code_cell, new_notebook

SCRIPT = Path(__file__).parents[1] / "book" / "measure_chapters.py"


def chapter(folder, name, *cells):
    made = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    jupytext.write(made, folder / f"{name}.md", fmt="md:myst")
    return str(folder / f"{name}.md")


def measure(folder, *chapters, budget="smoke"):
    return subprocess.run(
        [sys.executable, SCRIPT, *chapters, "--budget", budget, "--out", folder],
        capture_output=True,
        text=True,
    )


def test_each_chapter_s_time_and_memory_are_kept(tmp_path):
    code = "time.sleep(notebook.budget(smoke=1, cpu=9, gpu=9))"
    waits = chapter(tmp_path, "waits", "import time\nfrom tinyvgpt import notebook", code)
    takes = chapter(tmp_path, "takes", "x = bytearray(1 << 30)")
    breaks = chapter(tmp_path, "breaks", "x = 1", "assert x == 2, 'x is not two'")
    run = measure(tmp_path, waits, breaks)
    assert run.returncode == 1
    assert "x is not two" in run.stdout
    assert "failed: breaks" in run.stderr
    assert measure(tmp_path, takes).returncode == 0
    (path,) = tmp_path.glob("chapters-*.json")
    record = json.loads(path.read_text())
    assert record["budget"] == "smoke"
    assert record["chapters"].keys() == {"waits", "takes"}
    assert 1 < record["chapters"]["waits"]["seconds"] < 9
    assert record["chapters"]["takes"]["peak GiB"] > 1
    assert measure(tmp_path, waits, budget="gpu").returncode == 0
    assert json.loads(path.read_text())["chapters"].keys() == {"waits"}  # of another budget


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path):
    quick = chapter(tmp_path, "quick", "x = 1")
    endless = chapter(tmp_path, "endless", "import time", "time.sleep(600)")
    command = [sys.executable, SCRIPT, quick, endless, "--budget", "smoke", "--out", tmp_path]
    with subprocess.Popen(command) as run:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("chapters-*.json")) and time.monotonic() < until:
            time.sleep(0.1)
        run.kill()  # its kernel notices, and ends too
    (path,) = tmp_path.glob("chapters-*.json")
    assert json.loads(path.read_text())["chapters"].keys() == {"quick"}
