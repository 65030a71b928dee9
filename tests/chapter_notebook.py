"""Makes a chapter a notebook for the tests, in which the checks of its exercises are tested, too.

    python tests/chapter_notebook.py book/04_codebook.md _build/notebooks/04_codebook.ipynb

An exercise's check refuses what is unsolved and what is wrong, and says why. A cell tagged
raises-exception checks the stub that the reader is given: it must be told that it returns nothing
yet. The solutions run with the other cells, and with them their checks. At the end of the notebook
each check gets the wrong answers that wrong_answers/ has for it. Outputs are left empty, so it is
the cells' assertions that are tested.
"""

import runpy
import sys
from pathlib import Path
from textwrap import indent

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

WRONG_ANSWERS = Path(__file__).parent / "wrong_answers"
UNSOLVED = "returns nothing yet"
Answer = tuple[str, str]


def refused(source: str, message: str) -> str:
    """Code that fails unless `source` fails with an assertion and a message of this pattern."""
    return (
        f"import pytest\nwith pytest.raises(AssertionError, match={message!r}):\n"
        f"{indent(source, '    ')}"
    )


def notebook(chapter: Path, wrong: dict[str, Answer | list[Answer]]) -> NotebookNode:
    """The chapter's cells, and checks of its checks.

    Args:
        chapter: its source.
        wrong: by a check's name a wrong answer, as Python, and the pattern of what it says to it;
            or several.

    Raises:
        ValueError: the stubs' checks are not those that have a wrong answer.
    """
    made, checked = jupytext.read(chapter), set()
    for cell in made.cells:
        if cell.cell_type == "code" and "raises-exception" in cell.metadata.get("tags", []):
            checked.add(cell.source.partition("(")[0])
            cell.metadata.tags.remove("raises-exception")
            cell.source = refused(cell.source, UNSOLVED)
    if checked != wrong.keys():
        raise ValueError(f"{chapter}: {sorted(checked)} need wrong answers, not {sorted(wrong)}")
    for check, answers in wrong.items():
        for answer, message in answers if isinstance(answers, list) else [answers]:
            made.cells.append(new_code_cell(refused(f"{check}(\n{answer}\n)", message)))
    return made


def main(source: str, target: str) -> None:
    """Writes the notebook of a chapter; one that has no wrong answers is left as it is."""
    chapter = Path(source)
    answers = WRONG_ANSWERS / f"{chapter.stem}.py"
    if answers.exists():
        made = notebook(chapter, runpy.run_path(str(answers))["WRONG"])
    else:
        made = jupytext.read(chapter)
    jupytext.write(made, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
