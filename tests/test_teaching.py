"""What is said to teachers: every exercise has its place, and the two scripts do their work."""

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parents[1] / "book"
TEXT = (BOOK / "teaching.md").read_text(encoding="utf-8")
PAGES = [*sorted(BOOK.glob("[0-9][0-9]_*.md")), BOOK / "own_videos.md"]
LEVELS = ("Easy", "Medium", "Hard")
HANDOUT, GRADE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_table_has_every_exercise_at_its_level(page):
    exercise = r"\{exercise-start\} (.*)\n:label: (\S+)\n[^*]*\*+(\w+), (\d+) minutes"
    found = re.findall(exercise, page.read_text(encoding="utf-8"))
    cells = [
        " · ".join(
            f"{{ref}}`{title} <{label}>`"
            for title, label, level, _ in found
            if level.replace("Project", "Hard") == wanted
        )
        for wanted in LEVELS
    ]
    (row,) = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in TEXT.splitlines()
        if f"({page.name}) |" in line and line.count("|") == 6
    ]
    assert row == [*cells, str(sum(int(minutes) for *_, minutes in found))]


def test_the_list_of_solutions_has_every_exercise():
    lines = (BOOK / "solutions.md").read_text(encoding="utf-8").splitlines()
    exercise = r"\{exercise-start\} (.*)\n:label: (\S+)\n"
    wanted = []
    for page in PAGES:
        found = re.findall(exercise, page.read_text(encoding="utf-8"))
        wanted += [page.name, *(f"- {{ref}}`{title} <{label}>`" for title, label in found)]
    linked = [re.sub(r"^\*\*\[.*\]\((.*)\)\*\*$", r"\1", line) for line in lines]
    assert [line for line in linked if line.endswith((".md", ">`"))] == wanted


def run(script, *words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, words)])
    exec(script, {})


@pytest.fixture
def handout(tmp_path, monkeypatch):
    path = tmp_path / "handout.ipynb"
    run(HANDOUT, BOOK / "11_conditioning.md", path, monkeypatch=monkeypatch)
    return path


def test_a_handout_has_stubs_and_checks_but_no_solution(handout):
    cells = nbformat.read(handout, as_version=4).cells
    text = "\n".join(cell.source for cell in cells)
    assert "{solution" not in text
    assert "share = (position // per_frame)" not in text
    assert text.count("{exercise-end}") == len([c for c in cells if may_fail(c)]) == 4
    assert "def schedule(position, w, per_frame, frames):\n    ..." in text
    assert "## What to read" in text


def may_fail(cell):
    return "raises-exception" in cell.metadata.get("tags", [])


def handed_in(handout, change=lambda source: source):
    """As if it had been executed, and only one answer was right."""
    notebook = nbformat.read(handout, as_version=4)
    for cell in notebook.cells:
        cell.source = change(cell.source)
        if may_fail(cell) and "schedule" not in cell.source:
            cell.outputs = [nbformat.v4.new_output("error", ename="AssertionError", evalue="no")]
    path = handout.with_name("handed_in.ipynb")
    nbformat.write(notebook, path)
    return path


def test_answers_are_counted(handout, monkeypatch, capsys):
    run(GRADE, handout, handed_in(handout), monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert [line for line in lines if line[0] == "✓"] == ["✓ check_schedule(schedule)"]
    assert sum(line[0] == "✗" for line in lines) == 3


def test_a_check_that_was_changed_is_noticed(handout, monkeypatch):
    weaker = handed_in(handout, lambda source: source.replace("< 1e-6", "< 9"))
    with pytest.raises(AssertionError, match="a check was changed"):
        run(GRADE, handout, weaker, monkeypatch=monkeypatch)
