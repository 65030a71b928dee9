"""CONTRIBUTING's files and commands exist, and it says how each record was made."""

import json
import re
from pathlib import Path

from tinyvgpt import cli
from tinyvgpt.bench import tune

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| `")]
STANDS_FOR = {  # an example of what a path with capitals stands for
    "book/NN_name.md": "book/11_conditioning.md",
    "book/diagrams/chNN.py": "book/diagrams/ch11.py",
    "book/results/NAME.json": "book/results/own-videos.json",
    "data_recipes/NAME.py": "data_recipes/ucf101.py",
    "tests/test_NAME.py": "tests/test_robot_push.py",
    "tests/test_chapter_NN.py": "tests/test_chapter_14.py",
    "tests/test_gpu_NAME.py": "tests/test_gpu_axial.py",
    "tests/test_kernel_NAME.py": "tests/test_kernel_axial.py",
    "tests/wrong_answers/NN_name.py": "tests/wrong_answers/11_conditioning.py",
    "tinyvgpt/kernels/NAME.cu": "tinyvgpt/kernels/axial.cu",
    "tinyvgpt/kernels/NAME.py": "tinyvgpt/kernels/axial.py",
}


def test_files_exist():
    pattern = r"(?<![\w/.])((?:book|data_recipes|tests|tinyvgpt)/[\w./-]*|\.ci/run)"
    named = {path.rstrip(".") for path in re.findall(pattern, TEXT)}
    assert len(named) > 40
    assert named >= STANDS_FOR.keys()
    assert [x for x in named if not (ROOT / STANDS_FOR.get(x, x)).exists()] == []


def test_commands_exist():
    assert set(re.findall(r"tinyvgpt ([a-z][\w-]+)", TEXT)) <= set(cli.COMMANDS)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:`|\n)make ([\w-]+)", TEXT)) <= set(targets)
    assert f"python -m {tune.__name__} NAME" in TEXT


def test_every_record_has_its_command():
    for path in (ROOT / "book" / "results").glob("*.json"):
        made, name = json.loads(path.read_text(encoding="utf-8")), path.stem
        of_any = f"{name.partition('-')[0]}-DEVICE" if "nvidia" in name else name
        (row,) = [row for row in ROWS if f"`{of_any}`" in row.split("|")[1]]
        program = made["command"].split(" --")[0]
        assert program in row or ("training runs" in row and "tinyvgpt.train." in program), name
