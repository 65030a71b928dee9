"""Notebooks of the chapters fail where an exercise's check takes what it must refuse."""

import pytest
from chapter_notebook import main, notebook

CHAPTER = """# A chapter

```{code-cell} python3
def double(x):
    ...

def check_double(f):
    assert f(2) is not None, "double returns nothing yet"
    assert f(2) == 4, f"twice 2 is 4, not {f(2)}"
```

```{code-cell} python3
:tags: [raises-exception, remove-output]

check_double(double)
```
"""
HEADER = "---\njupytext:\n  text_representation:\n    extension: .md\n    format_name: myst\n---\n"
WRONG = {"check_double": ("lambda x: x * x * x", "twice 2 is 4, not 8")}


def run(folder, text=CHAPTER, wrong=WRONG):
    """Runs the notebook's code cells in order; none may be allowed to fail."""
    path = folder / "chapter.md"
    path.write_text(HEADER + text, encoding="utf-8")
    names = {}
    for cell in notebook(path, wrong).cells:
        assert "raises-exception" not in cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            exec(cell.source, names)
    return names


def test_a_check_that_refuses_both(tmp_path):
    assert run(tmp_path)["double"](2) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("returns nothing yet", "is None"),
        ("assert f(2) is not None", "assert f(2) is None"),
        ("    ...\n", "    return 2 * x\n"),  # a stub that solves the exercise
        ("f(2) == 4", "f(2) > 3"),  # takes the wrong answer
        ("twice 2 is 4, not", "that isn't"),
        ("    assert f(2) is not None", "    f(2).sum(), 1 / 0; assert f(2)"),  # another error
    ],
)
def test_checks_that_do_not(tmp_path, before, after):
    assert before in CHAPTER
    with pytest.raises((AssertionError, pytest.fail.Exception, AttributeError)):
        run(tmp_path, CHAPTER.replace(before, after, 1))


@pytest.mark.parametrize("names", [(), ("check_double", "check_triple"), ("check_triple",)])
def test_each_check_has_a_wrong_answer(tmp_path, names):
    with pytest.raises(ValueError, match="need wrong answers"):
        run(tmp_path, wrong=dict.fromkeys(names, WRONG["check_double"]))


def test_a_chapter_without_wrong_answers_is_as_it_is(tmp_path):
    path = tmp_path / "chapter.md"
    path.write_text(HEADER + CHAPTER, encoding="utf-8")
    main(str(path), str(tmp_path / "chapter.ipynb"))
    assert '"raises-exception"' in (tmp_path / "chapter.ipynb").read_text(encoding="utf-8")
