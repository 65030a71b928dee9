"""The book's sources keep the rules that a build does not check; their cells run through nbval."""

import re
from pathlib import Path
from statistics import median

import jupytext
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
PAGES = [*CHAPTERS, ROOT / "book" / "own_videos.md"]  # what keeps a chapter's rules
CELL_LINES, MEDIAN_LINES, FOLDED_LINES = 15, 10, 30
LINE = 79  # characters of code that the page shows without a scroll bar

each_chapter = pytest.mark.parametrize("chapter", PAGES, ids=lambda path: path.stem)


def test_the_table_of_contents_lists_every_chapter_once_in_order():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    numbered = [name for name in listed if re.match(r"book/\d\d_", name)]
    assert numbered == [f"book/{path.stem}" for path in CHAPTERS]
    assert {f"book/{path.stem}" for path in PAGES} <= set(listed)


def sources(chapter, *, tagged, wanted):
    """Code of the cells that have one of these tags, or of those that have none of them."""
    return [
        cell.source
        for cell in jupytext.read(chapter).cells
        if cell.cell_type == "code" and bool(tagged & set(cell.metadata.get("tags", []))) is wanted
    ]


@each_chapter
def test_shown_cells_are_short(chapter):
    unseen = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
    shown = sources(chapter, tagged=unseen, wanted=False)
    assert shown, "no code is shown"
    longest = max(shown, key=lambda source: len(source.splitlines()))
    assert len(longest.splitlines()) <= CELL_LINES, longest
    assert median(len(source.splitlines()) for source in shown) <= MEDIAN_LINES
    widest = max((line for source in shown for line in source.splitlines()), key=len)
    assert len(widest) <= LINE, widest


@each_chapter
def test_folded_figures_are_not_long(chapter):
    folded = sources(chapter, tagged={"hide-input", "hide-cell"}, wanted=True)
    longest = max(folded, key=lambda source: len(source.splitlines()))
    assert len(longest.splitlines()) <= FOLDED_LINES, longest


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


def test_labels_are_unique_in_the_whole_book():
    """Sphinx would say so, after ten minutes of executing chapters."""
    pattern = r"^ *:?(?:label|name): (\S+)$|^\$\$ \((\S+)\)$|^\((\S+)\)=$"
    labels = [
        next(filter(None, found))
        for page in (ROOT / "book").glob("*.md")
        for found in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
        if "python3" not in found  # the kernel's name
    ]
    assert len(labels) > 100
    twice = {label for label in labels if labels.count(label) > 1}
    assert not twice
