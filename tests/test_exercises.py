"""An exercise's check refuses what is unsolved and what is wrong, and says why.

Each chapter's cells run in order, as in a notebook. A cell tagged raises-exception checks the stub
that the reader is given. The solutions run with the other cells, and with them their checks.
"""

import runpy
from pathlib import Path

import jupytext
import pytest

BOOK = Path(__file__).parents[1] / "book"

# A module for each chapter: for each check, a wrong answer and what the check must say to it.
WRONG = {
    path.stem: runpy.run_path(str(path))["WRONG"]
    for path in sorted((Path(__file__).parent / "wrong_answers").glob("*.py"))
}


@pytest.fixture(scope="module", params=WRONG)
def chapter(request, tmp_path_factory):
    """The chapter's name, what its cells have defined, and what its checks said to the stubs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVGPT_BUDGET", "smoke")
        patch.setenv("MPLBACKEND", "agg")
        patch.chdir(tmp_path_factory.mktemp(request.param))
        names, said = {}, {}
        for cell in jupytext.read(BOOK / f"{request.param}.md").cells:
            if cell.cell_type != "code":
                continue
            if "raises-exception" in cell.metadata.get("tags", []):
                with pytest.raises(AssertionError) as refusal:
                    exec(cell.source, names)
                said[cell.source.partition("(")[0]] = str(refusal.value)
            else:
                exec(cell.source, names)
        yield request.param, names, said


def test_an_unsolved_exercise_is_told_so(chapter):
    name, _, said = chapter
    assert said.keys() == WRONG[name].keys()
    for message in said.values():
        assert "returns nothing yet" in message


def test_a_wrong_answer_is_told_what_is_wrong(chapter):
    name, names, _ = chapter
    for check, (answer, message) in WRONG[name].items():
        with pytest.raises(AssertionError, match=message):
            names[check](eval(answer, names))
