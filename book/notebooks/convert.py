"""Makes notebooks of the chapters, which Colab, Binder and every Jupyter open.

    python book/notebooks/convert.py _build/published

writes what the branch `notebooks` holds: the notebooks under book/, an environment for Binder, and
a page that says what all of it is. Code cells are the chapters' own. What the book hides or folds
is folded; solutions are, too. Outputs are empty.
"""

import sys
from pathlib import Path

import jupytext
import yaml
from addresses import ROOT, Addresses, known, project
from directives import pieces
from first_cell import first_cell
from labels import targets, text, with_code
from nbformat import NotebookNode, validate, writes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from plain import Plain, folded

FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
ABOUT = """\
# Notebooks of tinyvgpt

Made by a workflow from the chapters of the book{link}; nothing is to be edited here. The first cell
of each installs what is missing. Open one by a launch button of the book, or with Jupyter.
"""


def fold(cell: NotebookNode) -> NotebookNode:
    """Hides a cell's code: in Jupyter, and in Colab."""
    cell.metadata["jupyter"] = {"source_hidden": True}
    cell.metadata["cellView"] = "form"
    return cell


def notebook(path: Path, where: Addresses) -> NotebookNode:
    """A chapter as a notebook.

    Args:
        path: its source.
        where: addresses for links, and the package for the first cell.

    Raises:
        ValueError: the chapter has something that no notebook shows.
    """
    plain = Plain(path.relative_to(ROOT).with_suffix("").as_posix(), where)
    cells = [new_code_cell(first_cell(where), metadata={"cellView": "form"})]
    solution = ""  # the exercise whose solution the cell belongs to
    for cell in jupytext.reads(text(path), fmt="md:myst").cells:
        if cell.cell_type == "code":
            cells += with_caption(cell, plain, solution)
            continue
        for is_solution, source in solutions(cell.source):
            if is_solution is not None:
                solution = is_solution
            if body := plain(source):
                cells.append(new_markdown_cell(folded(solution, body) if solution else body))
    for number, cell in enumerate(cells):  # the same whenever the chapter is
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    made.metadata["language_info"] = {"name": "python"}
    validate(made)
    return made


def with_caption(cell: NotebookNode, plain: Plain, solution: str) -> list[NotebookNode]:
    """A code cell, and below it what the book writes below its picture."""
    tags = set(cell.metadata.get("tags", []))
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    made = [new_code_cell(cell.source, metadata={"tags": sorted(tags)} if tags else {})]
    if solution or tags & FOLDED:
        fold(made[0])
    if "caption" in figure:
        made.append(new_markdown_cell(plain.caption(figure.get("name", ""), figure["caption"])))
    return made


def solutions(source: str) -> list[tuple[str | None, str]]:
    """Cuts a cell where a solution begins or ends.

    Returns:
        (name, text) each: whose solution begins there, "" where one has ended, None at first.
    """
    cut: list[tuple[str | None, list[str]]] = [(None, [])]
    for directive, piece in pieces(source):
        if directive and directive.name == "solution-start":
            cut.append((f"Solution to {targets()[directive.argument].name}", []))
        elif directive and directive.name == "solution-end":
            cut.append(("", []))
        else:
            cut[-1][1].append(piece)
    return [(name, "\n".join(texts)) for name, texts in cut]


def environment(where: Addresses) -> str:
    """What Binder installs. Its PyTorch is the one without CUDA, as Binder has no GPU."""
    needs = [where.package, *project()["optional-dependencies"]["chapters"]]
    packages = ["python=3.12", "pytorch-cpu>=2.10", "pip", {"pip": needs}]
    return yaml.safe_dump({"channels": ["conda-forge"], "dependencies": packages}, sort_keys=False)


def main(folder: str) -> None:
    """Writes the branch's files."""
    where, target = known(), Path(folder)
    files = {".binder/environment.yml": environment(where)}
    files["README.md"] = ABOUT.format(link=f" at {where.site}" if where.site else "")
    for path in with_code():
        name = path.relative_to(ROOT).with_suffix(".ipynb").as_posix()
        files[name] = writes(notebook(path, where)) + "\n"
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
