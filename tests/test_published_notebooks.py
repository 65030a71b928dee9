"""Notebooks made of the chapters are plain, whole and self-contained; the first cell installs."""

import base64
import functools
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import convert
import jupytext
import nbformat
import pytest
from addresses import ROOT, Addresses, known, pages_of, project
from first_cell import first_cell
from labels import targets, text, with_code
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser
from packaging.requirements import Requirement
from plain import Plain

PACKAGE = "tinyvgpt>=0.1.0"
NOWHERE = Addresses("", "", PACKAGE)
SOMEWHERE = Addresses("https://github.com/o/book", "https://o.github.io/book", PACKAGE)
MYST = create_md_parser(
    MdParserConfig(enable_extensions={"amsmath", "colon_fence", "dollarmath", "tasklist"}),
    RendererHTML,
)

notebook = functools.cache(convert.notebook)
each_chapter = pytest.mark.parametrize("chapter", with_code(), ids=lambda path: path.stem)
each_address = pytest.mark.parametrize("where", [NOWHERE, SOMEWHERE], ids=["nowhere", "somewhere"])


def tokens(markdown):
    """All that MyST sees in a cell, also within paragraphs."""
    for token in MYST.parse(markdown):
        yield token
        yield from token.children or []


def test_every_chapter_is_published():
    chapters = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
    assert with_code() == [*chapters, ROOT / "book" / "own_videos.md"]


@each_address
@each_chapter
def test_no_myst_is_left(chapter, where):
    made = notebook(chapter, where)
    nbformat.validate(made)
    for cell in made.cells:
        if cell.cell_type == "markdown":
            for token in tokens(cell.source):
                assert not token.type.startswith(("myst", "colon", "math_block_label")), token
                assert not (token.type == "fence" and token.info.startswith("{")), token
            assert not re.search(r"\]\(\w+\.md", cell.source), cell.source


@each_chapter
def test_code_is_the_chapters_own(chapter):
    cells = [c for c in jupytext.read(chapter).cells if c.cell_type == "code"]
    made = [c for c in notebook(chapter, NOWHERE).cells if c.cell_type == "code"]
    assert [c.source for c in made[1:]] == [c.source for c in cells]
    for ours, theirs in zip(made[1:], cells, strict=True):
        assert ours.metadata.get("tags", []) == sorted(theirs.metadata.get("tags", []))


@each_chapter
def test_solutions_are_folded(chapter):
    """Between a solution's beginning and its end there is nothing that shows without a click."""
    made = notebook(chapter, NOWHERE)
    shown = [
        c.source for c in made.cells if c.cell_type == "markdown" and "<details>" not in c.source
    ]
    shown += [c.source for c in made.cells if c.cell_type == "code" and "jupyter" not in c.metadata]
    shown = "\n".join(shown)
    source = text(chapter)
    solutions = re.findall(r"```\{solution-start\}.*?```\{solution-end\}", source, re.DOTALL)
    assert len(solutions) == len(re.findall(r"\{exercise-start\}", source)) > 1
    for solution in solutions:
        lines = [line for line in solution.splitlines()[4:] if len(line) > 40]
        assert lines
        assert [line for line in lines if line in shown and source.count(line) == 1] == []
    folded = [c for c in made.cells if c.metadata.get("jupyter", {}).get("source_hidden")]
    assert all(c.metadata["cellView"] == "form" for c in folded)


@each_chapter
def test_images_are_in_the_notebook_or_on_the_site(chapter):
    for where in (NOWHERE, SOMEWHERE):
        whole = "\n".join(c.source for c in notebook(chapter, where).cells)
        images = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", whole)
        assert len(images) == text(chapter).count("```{figure}")
        files = re.findall(r"\{figure\} (\S+)", text(chapter))
        for (_, image), file in zip(images, files, strict=True):
            content = (chapter.parent / file).read_bytes()
            if where.site:
                assert image == f"{where.site}/{file}"  # html_static_path: [book/_static]
            else:
                kind, data = image.split(",")
                assert kind == "data:image/svg+xml;base64"
                assert base64.b64decode(data) == content


def links(chapter, where):
    """What a notebook's text links to."""
    for cell in notebook(chapter, where).cells:
        if cell.cell_type == "markdown":
            yield from (t.attrs["href"] for t in tokens(cell.source) if t.type == "link_open")


@each_chapter
def test_links_lead_to_the_site_or_out(chapter):
    for address in links(chapter, SOMEWHERE):
        if found := re.fullmatch(rf"{SOMEWHERE.site}/([\w/]+)\.html(?:#([\w-]+))?", address):
            page, anchor = found.groups()
            assert (ROOT / f"{page}.md").exists()
            assert not anchor or targets()[anchor.removeprefix("equation-")].page == page
        elif address.startswith(SOMEWHERE.repository):
            assert (ROOT / address.removeprefix(f"{SOMEWHERE.repository}/blob/main/")).exists()
        else:
            assert address.startswith("https://")
            assert SOMEWHERE.site not in address
    assert all(address.startswith("https://") for address in links(chapter, NOWHERE))
    assert not any("o.github.io" in address for address in links(chapter, NOWHERE))


def test_what_stands_in_a_directives_place():
    plain, linked = Plain("book/02_datasets", NOWHERE), Plain("book/02_datasets", SOMEWHERE)
    assert plain("::::{note}\nOne {eq}`eq-feistel`.\n\nTwo.\n::::") == (
        "> **Note**\n>\n> One (2.2).\n>\n> Two."
    )
    assert plain("```{dropdown} More\ntext\n```").startswith("<details>\n<summary>More</summary>")
    fence = "```python\n{ref}`ex-motion`\n```"
    assert plain(fence) == fence
    assert plain("{ref}`The last\nexercise <ex-motion>`") == "The last\nexercise (Exercise 1.5)"
    assert linked("{ref}`ex-motion`") == (
        "[Exercise 1.5](https://o.github.io/book/book/01_clips.html#ex-motion)"
    )
    assert plain("[](own_videos.md)") == "Bring your own videos"
    assert plain("$$\nx\n$$ (eq-feistel)\n\nText") == "$$\nx\n\\tag{2.2}\n$$\n\nText"
    assert plain("{cite}`wilson1931distribution,yan2021videogpt`").count("](https://") >= 1
    for unknown in ("```{mermaid}\nx\n```", "{abbr}`x`", "{ref}`nothing`"):
        with pytest.raises(ValueError, match="book/02_datasets: "):
            plain(unknown)


def test_included_files_are_cut_as_the_site_cuts_them():
    plain = Plain("book/12_first_kernel", NOWHERE)
    path = "../tinyvgpt/kernels/ladder/tiled.cu"
    begin, end = "// A query's softmax so far", "// Copies KEYS rows"
    made = plain(
        f'```{{literalinclude}} {path}\n:language: cuda\n:start-at: "{begin}"\n'
        f':end-before: "{end}"\n```'
    )
    whole = (ROOT / "book" / path).read_text(encoding="utf-8")
    code = whole[whole.index(begin) : whole.index(end)].rstrip()
    assert made == f"```cpp\n{code}\n```"


@pytest.fixture
def asked(monkeypatch):
    """Runs the first cell where these packages are installed; what it asks pip for."""

    def run(installed, gpu=False, where=NOWHERE):
        def version(name):
            if name in installed:
                return installed[name]
            raise metadata.PackageNotFoundError(name)

        calls = []
        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi" if gpu else None)
        monkeypatch.setattr(subprocess, "check_call", calls.append)
        exec(first_cell(where), {})
        assert all(call[:5] == [sys.executable, "-m", "pip", "install", "-q"] for call in calls)
        return [requirement for call in calls for requirement in call[5:]]

    return run


def everything():
    """Names and versions with which nothing is missing."""
    needs = [Requirement(need) for need in project()["optional-dependencies"]["chapters"]]
    return {need.name: "999" for need in needs} | {"tinyvgpt": "0.1.0", "torch": "2.10.0+cu128"}


def test_the_first_cell_installs_nothing_where_nothing_is_missing(asked):
    assert asked(everything()) == []
    assert asked(everything() | {"cuda-core": "1.0"}, gpu=True) == []
    archive = replace(SOMEWHERE, package="tinyvgpt @ https://github.com/o/book/archive/0.zip")
    assert asked(everything(), where=archive) == []
    assert asked({}, where=archive)[0] == archive.package


def test_the_first_cell_installs_what_is_missing(asked):
    assert asked({})[0] == PACKAGE
    assert "torch" not in " ".join(asked({})).replace("torchmetrics", "")
    assert asked(everything(), gpu=True) == ["cuda-core", "torch==2.10.0+cu128"]
    assert asked(everything() | {"ipywidgets": "7.6.5"}) == [
        "ipywidgets>=7.7",
        "torch==2.10.0+cu128",
    ]
    assert asked(everything() | {"ipywidgets": "7.7.1"}) == []
    here = everything()
    del here["tinyvgpt"]
    assert asked(here) == [PACKAGE, "torch==2.10.0+cu128"]


def test_what_chapters_import_is_installed():
    ours = {"tinyvgpt", "tfrecords"}  # tfrecords: of data_recipes/, where these are
    needs = project()["dependencies"] + project()["optional-dependencies"]["chapters"]
    needs += project()["optional-dependencies"]["cuda"]
    names = {Requirement(need).name.replace("-", "_") for need in needs}
    names |= {"PIL", "cuda"}  # of matplotlib's Pillow, and of cuda-core
    for path in with_code():
        code = "\n".join(c.source for c in jupytext.read(path).cells if c.cell_type == "code")
        found = set(re.findall(r"^ *(?:import|from) (\w+)(?=\.| import|$| as)", code, re.MULTILINE))
        assert found - sys.stdlib_module_names - names - ours == set(), path


def test_addresses_follow_from_the_repositorys(monkeypatch):
    assert pages_of("https://github.com/Some-One/Book") == "https://some-one.github.io/Book"
    assert pages_of("https://github.com/One/one.github.io") == "https://one.github.io"
    assert pages_of("https://example.org/one/book") == ""
    for name in ("GITHUB_REPOSITORY", "GITHUB_SERVER_URL", "GITHUB_SHA"):
        monkeypatch.delenv(name, raising=False)
    assert known().package == f"tinyvgpt>={project()['version']}"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "one/book")
    monkeypatch.setenv("GITHUB_SHA", "0" * 40)
    assert known().repository.startswith("https://")
    assert known().package == f"tinyvgpt @ {known().repository}/archive/{'0' * 40}.zip"
    assert Requirement(known().package).name == "tinyvgpt"


def test_binder_gets_the_package_and_what_chapters_import():
    made = convert.environment(SOMEWHERE)
    assert f"- {PACKAGE}\n" in made
    assert "pytorch-cpu" in made
