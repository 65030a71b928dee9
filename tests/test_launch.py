"""Launch buttons and downloads of the built site, with the repository's address and without.

The book is built as it is, but for two chapters only, which aren't executed.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOC = {
    "format": "jb-book",
    "root": "book/index",
    "parts": [
        {"numbered": True, "chapters": [{"file": "book/14_video_kernels"}]},
        {"chapters": [{"file": "book/own_videos"}, {"file": "book/glossary"}]},
    ],
}
WORKFLOW = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "Some-One/videobook",
    "GITHUB_SHA": "0123456789" * 4,
}
CHAPTER = "book/14_video_kernels"


def build(folder, environment):
    """The folder of the built pages."""
    for name in ("pyproject.toml", "_config.yml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("book", "tinyvgpt"):
        ignored = shutil.ignore_patterns("weights", "*.npz", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "_toc.yml").write_text(yaml.safe_dump(TOC), encoding="utf-8")
    config = yaml.safe_load((folder / "_config.yml").read_text(encoding="utf-8"))
    config["execute"]["execute_notebooks"] = "off"
    config["launch_buttons"]["jupyterhub_url"] = "https://hub.example.org"
    (folder / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", str(folder), "--all"]
    elsewhere = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    subprocess.run(command, check=True, capture_output=True, env=elsewhere | environment)
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"), WORKFLOW)


@pytest.fixture(scope="module")
def site_without_address(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"), {})


def links(site, page):
    """Addresses in a page, as a browser reads them."""
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    return [html.unescape(address) for address in re.findall(r'href="([^"]*)"', text)]


def outside(site, page):
    """Links to the services, and to the repository."""
    services = ("colab", "mybinder", "hub.example", "github.com/Some-One")
    return [link for link in links(site, page) if any(name in link for name in services)]


def test_buttons_open_the_published_notebook(site):
    path = f"{CHAPTER}.ipynb"
    assert sorted(outside(site, CHAPTER)) == [
        f"https://colab.research.google.com/github/Some-One/videobook/blob/notebooks/{path}",
        "https://github.com/Some-One/videobook",
        "https://hub.example.org/hub/user-redirect/git-pull?repo=https%3A//github.com/Some-One/"
        f"videobook&urlpath=lab/tree/videobook/{path}&branch=notebooks",
        f"https://mybinder.org/v2/gh/Some-One/videobook/notebooks?urlpath=lab/tree/{path}",
    ]
    assert len(outside(site, "book/own_videos")) == 4


@pytest.mark.parametrize("page", ["book/index", "book/glossary"])
def test_pages_without_a_notebook_have_no_buttons(site, page):
    assert outside(site, page) == ["https://github.com/Some-One/videobook"]
    assert not [link for link in links(site, page) if link.endswith(".ipynb")]


def test_without_an_address_there_are_no_buttons(site_without_address):
    for page in (CHAPTER, "book/own_videos", "book/index"):
        assert outside(site_without_address, page) == []
        text = (site_without_address / f"{page}.html").read_text(encoding="utf-8")
        assert "fa-rocket" not in text
        assert 'href=""' not in text


def test_a_chapter_is_offered_for_download(site, site_without_address):
    for built in (site, site_without_address):
        offered = re.compile(r"\.\./_sources/.*\.ipynb")
        (link,) = filter(offered.fullmatch, links(built, CHAPTER))
        made = json.loads((built / CHAPTER).parent.joinpath(link).read_text(encoding="utf-8"))
        assert "Install what is missing" in "".join(made["cells"][0]["source"])
        assert {path.stem for path in (built / "_sources").rglob("*.ipynb")} == {
            "14_video_kernels",
            "own_videos",
        }


def test_names_are_those_of_the_site(site):
    """Numbers of figures, exercises and equations, and authors, where the page has them."""
    page = (site / f"{CHAPTER}.html").read_text(encoding="utf-8")
    made = json.loads((site / "_sources" / f"{CHAPTER}.ipynb").read_text(encoding="utf-8"))
    source = "\n".join("".join(c["source"]) for c in made["cells"] if c["cell_type"] != "code")
    numbers = re.findall(r'caption-number">(\w+\.? [\d.]*\d)', page)
    assert len(numbers) > 6
    for number in numbers:  # the chapter is the first here
        assert re.search(rf"^(\*\*|### ){re.escape(number)}\b", source, re.MULTILINE), number
    equations = re.findall(r'eqno">\(([\d.]+)\)', page)
    assert [*re.findall(r"\\tag\{([\d.]+)\}", source)] == equations != []
    cited = re.findall(r'href="[^"]*bibliography[^>]*>(.*?)</a>', page) or re.findall(
        r'<span class="bibtex-citation"[^>]*>(.*?)</span>', page
    )
    plain = re.sub(r"\]\([^)]*\)|[\[\]()*]", "", source)
    for text in cited:
        name = html.unescape(re.sub(r"<[^>]+>|[\[\]]", "", text))
        assert name in plain, name


def test_pictures_are_on_the_site(site):
    made = json.loads((site / "_sources" / f"{CHAPTER}.ipynb").read_text(encoding="utf-8"))
    source = "\n".join("".join(c["source"]) for c in made["cells"])
    images = re.findall(r"!\[[^\]]*\]\((https://some-one.github.io/videobook/([^)]*))\)", source)
    assert len(images) == 3
    for _, path in images:
        assert (site / path).is_file()
