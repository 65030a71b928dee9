"""The API pages name what the package offers, each name once, and say what the source says."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml

import tinyvgpt
from tinyvgpt import data, kernels, upstream, video

BOOK = Path(__file__).parents[1] / "book"
API = BOOK / "api"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in API.glob("*.md")}
INDEX = PAGES.pop("index")
NAMES = [
    name for text in PAGES.values() for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)
]
EXTRAS = "av tyro h5py mujoco requests tensorboard torchmetrics matplotlib ipywidgets cuda"


def surface():
    """What the package says that it offers; methods stand with their classes."""
    for module in (tinyvgpt, video, data, kernels, upstream):
        for name in module.__all__:
            top = module is data and name in tinyvgpt.__all__  # the shorter name is the public one
            if not isinstance(getattr(module, name), ModuleType) and not top:
                yield f"{module.__name__}.{name}"
    yield from ("tinyvgpt.attention.use", "tinyvgpt.train.train_vqvae", "tinyvgpt.train.train_gpt")
    yield from ("tinyvgpt.settings.TrainConfig", "tinyvgpt.sampling.SamplingRule")
    yield from ("tinyvgpt.codebook.Codebook", "tinyvgpt.evaluate.evaluate")


def test_what_the_package_offers_is_on_a_page():
    assert set(surface()) - set(NAMES) == set()


def test_no_name_stands_twice():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    things = Counter(id(pkgutil.resolve_name(name)) for name in NAMES)
    assert set(things.values()) == {1}  # nor under two names


def test_names_are_public():
    assert [name for name in NAMES if re.search(r"\._", name)] == []


def test_pages_are_in_the_table_of_contents_and_the_index():
    toc = yaml.safe_load((BOOK.parent / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    (index,) = [chapter for chapter in files if chapter["file"] == "book/api/index"]
    listed = [section["file"].removeprefix("book/api/") for section in index["sections"]]
    assert sorted(listed) == sorted(PAGES)
    assert re.findall(r"\]\((\w+)\.md\)", INDEX) == listed  # in the same order


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_to_the_chapters_that_build_it(page):
    chapters = re.findall(r"\]\(\.\./(\w+\.md)\)", PAGES[page])
    assert any(re.match(r"\d\d_", chapter) for chapter in chapters)
    assert [chapter for chapter in chapters if not (BOOK / chapter).exists()] == []


def test_names_are_found_and_explained_without_what_is_optional():
    code = (
        "import pkgutil, sys; sys.modules |= dict.fromkeys(sys.argv[1].split())\n"
        "things = {name: pkgutil.resolve_name(name) for name in sys.argv[2].split()}\n"
        "print(*[name for name, thing in things.items() if not thing.__doc__])"
    )
    command = [sys.executable, "-c", code, EXTRAS, " ".join(NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# How docstrings become pages ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_words():
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("own_words", API / "own_words.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pair(NamedTuple):
    """Two numbers."""

    first: int  # the one # in front
    second: int


@dataclass
class Settings:
    """What to do.

    In detail.
    """

    name: str = "#"  # of whom
    sizes: tuple[int, ...] = (
        1,
        2,
    )  # how large


class Plain(list):
    """A list."""


def explained(own_words, cls, docstring):
    lines = [*docstring.splitlines(), ""]
    own_words.explain_class(cls, lines)
    return "\n".join(lines).strip()


def test_fields_are_explained_by_the_comments_beside_them(own_words):
    assert own_words.field_comments(Pair) == {"first": "the one # in front"}
    assert own_words.field_comments(Settings) == {"name": "of whom", "sizes": "how large"}
    text = explained(own_words, Pair, "Two numbers.")
    assert text == "Two numbers.\n\n\nArgs:\n    first: the one # in front"
    detail = "What to do.\n\nIn detail."
    expected = detail + "\n\n\nArgs:\n    name: of whom\n    sizes: how large"
    assert explained(own_words, Settings, detail) == expected


def test_what_others_wrote_for_a_class_is_left_out(own_words):
    assert explained(own_words, Pair, Pair.__new__.__doc__) == ""
    assert explained(own_words, Plain, list.__init__.__doc__) == ""
    assert explained(own_words, Plain, "A list.") == "A list."


def test_what_is_returned_keeps_its_colons(own_words):
    lines = [
        "Gives.",
        "",
        "Returns:",
        "    Figures: two,",
        "    no more.",
        "",
        "Raises:",
        "    E: x",
    ]
    own_words.keep_colons(lines)
    assert lines == [
        *("Gives.", "", ":returns:", "    - Figures: two,", "    - no more.", ""),
        *("Raises:", "    E: x"),
    ]
    lines = ["Yields:", "    uint8 (B, T): first", "    these.", ""]
    own_words.keep_colons(lines)
    assert lines == [":Yields:", "    uint8 (B, T): first", "    these.", ""]
    lines = ["Returns:", "    video: uint8.", "    action: float,", "        the last out.", ""]
    own_words.keep_colons(lines)
    assert lines[1:4] == ["    - video: uint8.", "    - action: float,", "      the last out."]
