"""The book's sources keep the rules that a build does not check; their cells run through nbval."""

import re
from pathlib import Path

import jupytext
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
PAGES = [*CHAPTERS, ROOT / "book" / "own_videos.md"]  # what keeps a chapter's rules
CELL_LINES = 15

each_chapter = pytest.mark.parametrize("chapter", PAGES, ids=lambda path: path.stem)


def test_the_table_of_contents_lists_every_chapter_once_in_order():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    numbered = [name for name in listed if re.match(r"book/\d\d_", name)]
    assert numbered == [f"book/{path.stem}" for path in CHAPTERS]
    assert {f"book/{path.stem}" for path in PAGES} <= set(listed)


@each_chapter
def test_shown_cells_are_short(chapter):
    folded = {"hide-input", "hide-cell"}
    shown = [
        cell.source
        for cell in jupytext.read(chapter).cells
        if cell.cell_type == "code" and folded.isdisjoint(cell.metadata.get("tags", []))
    ]
    assert shown, "no code is shown"
    longest = max(shown, key=lambda source: len(source.splitlines()))
    assert len(longest.splitlines()) <= CELL_LINES, longest


@each_chapter
def test_what_is_built_is_checked_against_the_package(chapter):
    _, found, rest = chapter.read_text(encoding="utf-8").partition("\n## Against the package\n")
    section = re.split(r"^## ", rest, flags=re.MULTILINE)[0]
    assert found, "the section is missing"
    assert re.search(r"\b(check\(|assert )", section), "nothing is asserted"


@each_chapter
def test_every_exercise_has_a_solution(chapter):
    text = chapter.read_text(encoding="utf-8")
    exercises = re.findall(r"^`{3,}\{exercise-start\}.*\n:label: (\S+)", text, re.MULTILINE)
    solutions = re.findall(r"^`{3,}\{solution-start\} (\S+)\n:class: dropdown", text, re.MULTILINE)
    assert exercises == solutions != []
